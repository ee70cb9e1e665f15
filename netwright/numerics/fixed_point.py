"""What a function leaves as it is, found by applying it again and again."""

from collections.abc import Callable

import torch
from torch import Tensor

from netwright import checks
from netwright.catalogue.facets import method

__all__ = ["fixed_point"]


@method("companion", papers=["003-015"])
@torch.no_grad()
def fixed_point(update: Callable[[Tensor], Tensor], start: Tensor, *, tolerance: float = 0.0,
                max_iterations: int) -> tuple[Tensor, int]:
    """Return what `update` leaves as it is, begun at `start`, and the iterations that it took.

    x^0 = start;  x^{k+1} = update(x^k), until no number moves more than `tolerance`, or for
    `max_iterations`.

    Where each of n parts of x depends on the parts before it alone, as when a sequence is sampled
    with given random numbers, n iterations give exactly what part after part would.

    Args:
        update: of x, returns one like it.
        start: the first x.
        tolerance: the most that a number may still move at the end.
        max_iterations: after which x is taken as it is.

    Raises:
        ValueError: `max_iterations` is below 1, or `tolerance` is negative.

    Paper: that of `parallel_forward`.

    >>> def doubled(x):  # x_i = 2 x_{i-1}, x_0 = 1
    ...     return torch.cat([torch.ones(1), 2 * x[:-1]])
    >>> fixed_point(doubled, torch.zeros(4), max_iterations=4)
    (tensor([1., 2., 4., 8.]), 4)
    """
    check_iterations(tolerance, max_iterations)
    x = start
    for k in range(max_iterations):
        before, x = x, update(x)
        if settled(x, before, tolerance):
            return x, k + 1
    return x, max_iterations


def check_iterations(tolerance: float, max_iterations: int | None) -> None:
    """Raise ValueError unless there can be an iteration and `tolerance` can be kept."""
    checks.at_least(0, tolerance=tolerance, advice="0 goes on until nothing moves")
    checks.count(1, max_iterations=max_iterations, optional=True,
                 advice="None is as many as it takes")


def settled(found: Tensor, before: Tensor, tolerance: float) -> bool:
    """Return whether no number has moved more than `tolerance`."""
    if not tolerance:
        return torch.equal(found, before)
    return bool(((found - before).abs() <= tolerance).all())
