"""Units left out one by one, each time the one that costs least once the others make up for it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 128  # updates of the whole inverse; within each, units go one by one out of a small pool
_POOL = 4


class Reader(NamedTuple):
    """A matrix that reads units, the second moments of what it takes, and where the units are.

    Shapes: weight (out, features), moments (features, features), places (units, each).
    """

    weight: Tensor
    moments: Tensor
    places: Tensor


def eliminated(readers: Sequence[Reader], count: int, damping: float) -> list[int]:
    """Return which `count` units go, in order.

    Leaving out the features J of a unit costs tr(W_J (H⁻¹_JJ)⁻¹ W_Jᵀ), summed over the readers,
    where those that stay are refitted; H is the damped matrix of second moments, W as it was
    refitted after the units before.

    >>> moments, weight = torch.eye(3) + 0.1, torch.tensor([[3.0, 1.0, 2.0]])
    >>> eliminated([Reader(weight, moments, torch.arange(3)[:, None])], 2, 0.0)
    [1, 2]
    """
    states = [_State(r.weight, damped(r.moments, damping).inverse(), r.places) for r in readers]
    left = torch.arange(len(readers[0].places), device=readers[0].weight.device)
    gone: list[int] = []
    step = -(-count // STEPS)
    while len(gone) < count:
        size = min(step, count - len(gone))
        pool = left[_costs(states, left).topk(min(_POOL * size, len(left)), largest=False).indices]
        chosen = pool[_one_by_one([state.alone(pool) for state in states], size)]
        for state in states:
            state.leave_out(chosen)
        gone += chosen.tolist()
        left = left[~torch.isin(left, chosen)]
    return gone


def damped(moments: Tensor, damping: float) -> Tensor:
    """Return second moments with a share of the mean diagonal on it, so that they are regular."""
    mean = moments.diagonal().mean().clamp_min(torch.finfo(moments.dtype).tiny)
    return moments + torch.eye(len(moments)).to(moments) * (damping * mean)


def refitted(reader: Reader, gone: Sequence[int], damping: float) -> Tensor:
    """Return the weight that makes least error without some units, whose columns are zero.

    W_K := W H_:K (H_KK)⁻¹ for the features K that stay.
    """
    stays = torch.ones(len(reader.moments), dtype=torch.bool, device=reader.weight.device)
    stays[reader.places[list(gone)].flatten()] = False
    h = damped(reader.moments, damping)
    fitted = torch.zeros_like(reader.weight)
    fitted[:, stays] = torch.linalg.solve(h[stays][:, stays], h[stays] @ reader.weight.T).T
    return fitted


class _State:
    """A reader on the way, its weight refitted and the inverse without what was left out."""

    def __init__(self, weight: Tensor, inverse: Tensor, places: Tensor) -> None:
        self.weight, self.inverse, self.places = weight.clone(), inverse, places

    def costs(self, units: Tensor) -> Tensor:
        j = self.places[units]
        own, columns = self.inverse[j[:, :, None], j[:, None, :]], self.weight[:, j]
        columns = columns.permute(1, 2, 0)
        if own.shape[-1] == 1:
            return (columns.square() / own).sum((1, 2))
        return (columns * torch.linalg.solve(own, columns)).sum((1, 2))

    def leave_out(self, units: Tensor) -> None:
        j = self.places[units].flatten()
        gain = torch.linalg.solve(self.inverse[j][:, j], self.inverse[j])
        self.weight -= self.weight[:, j] @ gain
        self.inverse -= self.inverse[:, j] @ gain

    def alone(self, units: Tensor) -> "_State":
        """Return what decides about `units`, which are numbered anew."""
        j = self.places[units].flatten()
        return _State(self.weight[:, j], self.inverse[j][:, j],
                      torch.arange(len(j), device=j.device).view(len(units), -1))


def _one_by_one(states: Sequence[_State], count: int) -> list[int]:
    left = list(range(len(states[0].places)))
    for _ in range(count):
        units = torch.tensor(left, device=states[0].weight.device)
        least = units[_costs(states, units).argmin()]
        for state in states:
            state.leave_out(least[None])
        left.remove(int(least))
    stays = set(left)
    return [i for i in range(len(states[0].places)) if i not in stays]


def _costs(states: Sequence[_State], units: Tensor) -> Tensor:
    costs: Tensor = sum(state.costs(units) for state in states)  # type: ignore[assignment]
    return costs
