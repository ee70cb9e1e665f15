"""Which weights of a matrix are zeroed, and what the others become: one function a criterion."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from netwright.masks import n_of_m
from netwright.obs import sweep

Pattern = tuple[int, int]
BLOCK = 128  # columns among which the second-order criterion chooses at a time


class Seen(NamedTuple):
    """What is known of a layer's inputs, in the order of its matrix' columns."""

    square: Tensor | None = None
    gram: Tensor | None = None


Prune = Callable[[Tensor, Seen, float, Pattern | None], Tensor]


class Criterion(NamedTuple):
    """A way to prune a matrix: what it must know, and whether of what pruned layers make."""

    prune: Prune
    statistics: tuple[str, ...] = ()
    cascade: bool = False


def magnitude(weight: Tensor, seen: Seen, share: float, pattern: Pattern | None) -> Tensor:
    """Zero the smallest weights of the whole matrix."""
    scores = weight.abs()
    if pattern is not None:
        return weight * n_of_m(scores, *pattern)
    gone = scores.flatten().topk(zeros(weight, share), largest=False).indices
    return weight.flatten().index_fill(0, gone, 0).view_as(weight)


def wanda(weight: Tensor, seen: Seen, share: float, pattern: Pattern | None) -> Tensor:
    """Zero the smallest |W_ij| ‖X_j‖ of each row."""
    assert seen.square is not None
    scores = weight.abs() * seen.square.sqrt().to(weight)
    if pattern is not None:
        return weight * n_of_m(scores, *pattern)
    return weight.masked_fill(least_of_rows(scores, zeros(weight, share)), 0)


def sparsegpt(weight: Tensor, seen: Seen, share: float, pattern: Pattern | None) -> Tensor:
    """Zero the least w²/[U]² of each block of columns, and let the columns after make up for it."""
    assert seen.gram is not None
    size = BLOCK if pattern is None else pattern[1]
    dead = (seen.gram.diagonal() == 0).to(weight.device)
    columns = weight.shape[1]
    gone = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)

    def become(block: Tensor, curvature: Tensor, i: int) -> Tensor:
        if i % size == 0:
            end = min(i + size, columns)
            scores = (block[:, :end - i] / curvature[:end - i]).square()
            scores[:, dead[i:end]] = 0
            if pattern is not None:
                gone[:, i:end] = ~n_of_m(scores, *pattern)
            else:
                before = zeros(weight[:, :i], share)
                gone[:, i:end] = _least(scores, zeros(weight[:, :end], share) - before)
        return block[:, 0].masked_fill(gone[:, i], 0)

    swept = sweep(weight, seen.gram, become, block=max(size, BLOCK // size * size))
    return swept.weight.masked_fill(gone, 0)


def zeros(weight: Tensor, share: float) -> int:
    """Return how many weights of a matrix become zero; one stays at the least.

    >>> zeros(torch.ones(2, 3), 0.5), zeros(torch.ones(1, 2), 0.99)
    (3, 1)
    """
    return max(0, min(round(share * weight.numel()), weight.numel() - 1))


def least_of_rows(scores: Tensor, count: int) -> Tensor:
    """Return a mask of the `count` least scores, as many in each row as in any other, or one more.

    >>> least_of_rows(torch.tensor([[1.0, 2.0, 3.0], [6.0, 5.0, 4.0]]), 3).int()
    tensor([[1, 1, 0],
            [0, 0, 1]], dtype=torch.int32)
    """
    each, more = divmod(count, len(scores))
    found = torch.zeros_like(scores, dtype=torch.bool)
    found.scatter_(1, scores.topk(each, largest=False).indices, True)
    if more:
        one_more = scores[:more].masked_fill(found[:more], float("inf")).argmin(1, keepdim=True)
        found[:more].scatter_(1, one_more, True)
    return found


def _least(scores: Tensor, count: int) -> Tensor:
    found = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    found[scores.flatten().topk(count, largest=False).indices] = True
    return found.view_as(scores)


CRITERIA = {
    "magnitude": Criterion(magnitude),
    "wanda": Criterion(wanda, ("square",)),
    "sparsegpt": Criterion(sparsegpt, ("gram",), cascade=True),
}
