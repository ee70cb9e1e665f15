"""Directions that stages' own losses point in, one stage at a time."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from netwright.stages import Stages


def one_by_one(groups: Sequence[Sequence[Tensor]], chunk: int, *,
               rows: bool = False) -> Iterator[list[Tensor]]:
    """Yield directions that are one group's normalised tensors each, and zero in the others.

    A group is of length 1, or, with `rows`, each row of its tensors is; what is zero stays so.
    There are `chunk` directions at a time.

    Shapes: the tensors of all groups in turn, (directions, *size) each.

    >>> [v] = one_by_one([[torch.tensor([3.0, 4.0])], [torch.tensor([2.0])]], chunk=2)
    >>> [t.shape for t in v], v[0].norm(dim=1).tolist(), v[1].flatten().tolist()
    ([torch.Size([2, 2]), torch.Size([2, 1])], [1.0, 0.0], [0.0, 1.0])
    """
    for start in range(0, len(groups), chunk):
        n = min(chunk, len(groups) - start)
        directions = [t.new_zeros(n, *t.shape) for group in groups for t in group]
        first = sum(len(group) for group in groups[:start])
        for i, group in enumerate(groups[start:start + n]):
            for j, unit in enumerate(_normalised(group, rows), first):
                directions[j][i] = unit
            first += len(group)
        yield directions


def _normalised(group: Sequence[Tensor], rows: bool) -> list[Tensor]:
    if rows:
        lengths = torch.stack([t.flatten(1).norm(dim=1) for t in group]).norm(dim=0)
        return [t / _not_zero(lengths).view(-1, *[1] * (t.ndim - 1)) for t in group]
    length = torch.stack(torch._foreach_norm(list(group))).norm()
    return [t / _not_zero(length) for t in group]


def _not_zero(length: Tensor) -> Tensor:
    return length.clamp_min(torch.finfo(length.dtype).tiny)


def owned(chain: Stages) -> list[list[Parameter]]:
    """Return the trainable parameters of which each stage is the first user."""
    seen: set[int] = set()
    found = []
    for stage in chain:
        own = [p for p in stage.parameters() if p.requires_grad and id(p) not in seen]
        seen.update(map(id, own))
        found.append(own)
    return found
