"""The samples that Forward-Forward shows a network: normalised, joined and weighted."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TINY = 1e-6


def unit(value: Any) -> Any:
    """Return each sample divided by its rms, and what is no sample of real numbers as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 2:
        return value
    rows = value.reshape(len(value), -1)
    return (rows / rms(rows)).view_as(value)


def rms(rows: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return (norm / rows.shape[1] ** 0.5).clamp_min(TINY)


def joined(positive: Any, negative: Any) -> list[Any]:
    """Return positives and negatives as one batch where they can be one, else one by one."""
    if isinstance(positive, Tensor) and isinstance(negative, Tensor):
        return [torch.cat([positive, negative])] if _alike(positive, negative) else [
            positive, negative]
    if isinstance(positive, Mapping) and isinstance(negative, Mapping) and (
            set(positive) == set(negative)) and all(_alike(v, negative[k])
                                                    for k, v in positive.items()):
        return [{k: torch.cat([v, negative[k]]) for k, v in positive.items()}]
    return [positive, negative]


def _alike(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim > 0 and a.shape == b.shape


def weights(y: Tensor | None, rows: int, halves: int) -> Tensor:
    """Return what each of `rows` samples counts, 1 in all; labels below 0 leave samples out."""
    if y is None or y.ndim != 1 or len(y) * halves != rows:
        return torch.full((rows,), 1 / rows)
    counts = (y >= 0).repeat(halves).float()
    return counts / counts.sum().clamp_min(1)
