"""How far a model's outputs move, position by position, a few positions at a time."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from netwright import checks

Distance = Literal["angular", "euclidean", "jensen-shannon"] | Callable[[Tensor, Tensor], Tensor]

NUMBERS = 2 ** 18  # worked on at a time, so that what is made in between stays in the cache


class Distances:
    """One of the distances, by its name, or a function of two outputs.

    >>> distances = Distances("euclidean")
    >>> old, new = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    >>> distances.between(old, distances.prepared(old, old), 2 * new)[1]
    2.0
    """

    def __init__(self, distance: Distance) -> None:
        known = {"angular": _angular, "euclidean": _euclidean, "jensen-shannon": _jensen_shannon}
        if not callable(distance):
            checks.one_of(known, distance=distance)
        self.own = distance if callable(distance) else None
        self.rows = None if callable(distance) else known[distance]

    def prepared(self, x: Any, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is kept of a model's outputs: the positions that count, and their lengths."""
        rows = output if self.rows is None else _rows(x, output)
        return rows, rows.float().norm(dim=-1) if self.rows is _angular else rows[:0]

    def between(self, x: Any, prepared: tuple[Tensor, Tensor],
                new: Tensor) -> tuple[float, float]:
        """Return the sum of the distances over the positions that count, and their number."""
        old, lengths = prepared
        if self.rows is None:
            assert self.own is not None
            moved = torch.atleast_1d(torch.as_tensor(self.own(old, new)))
            mask = _mask(x, moved.shape)
            moved = moved if mask is None else moved[mask]
            return float(moved.sum()), float(moved.numel())
        new, total = _rows(x, new), 0.0
        size = max(1, NUMBERS // max(1, new.shape[-1]))
        for i in range(0, len(new), size):
            piece = slice(i, i + size)
            moved = self.rows(_wide(old[piece]), _wide(new[piece]), lengths[piece])
            total += float(moved.sum(dtype=torch.float64))
        return total, float(len(new))


def _rows(x: Any, output: Tensor) -> Tensor:
    """Return the output vectors of the positions that count, one a row."""
    mask = _mask(x, output.shape[:-1])
    return output.reshape(-1, output.shape[-1]) if mask is None else output[mask]


def _mask(x: Any, shape: torch.Size) -> Tensor | None:
    mask = x.get("attention_mask") if isinstance(x, Mapping) else None
    return None if mask is None or mask.shape != shape or bool(mask.all()) else mask.bool()


def _wide(rows: Tensor) -> Tensor:
    return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()


def _angular(old: Tensor, new: Tensor, lengths: Tensor) -> Tensor:
    """Return the angle over pi, by its tangent, since the arc cosine loses the small angles."""
    moved = new - old
    unit = lengths.clamp_min(torch.finfo(torch.float32).tiny)
    along = torch.linalg.vecdot(moved, old) / unit
    across = moved.addcmul_(old, (-along / unit).unsqueeze(-1)).norm(dim=-1)
    ahead = lengths + along
    angle = torch.atan2(across, ahead) / torch.pi
    # A vector of zeros has no direction.
    gone = torch.hypot(across, ahead) <= 4 * torch.finfo(torch.float32).eps * lengths
    return torch.where(gone, 0.5 * (lengths > 0), angle)


def _euclidean(old: Tensor, new: Tensor, _: Tensor) -> Tensor:
    return (old - new).norm(dim=-1)


def _jensen_shannon(old: Tensor, new: Tensor, _: Tensor) -> Tensor:
    p, q = old.double().log_softmax(-1), new.double().log_softmax(-1)
    middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, dtype=torch.float64))
    return nn.functional.kl_div(middle, p, reduction="none", log_target=True).sum(-1) / 2 + (
        nn.functional.kl_div(middle, q, reduction="none", log_target=True).sum(-1) / 2)
