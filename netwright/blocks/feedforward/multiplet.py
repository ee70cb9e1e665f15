from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.runtime.modes import transformed

__all__ = ["LehmerMultiplet"]


@method(
    "block",
    papers=["003-040"],
    place="linear",
    takes=("inputs", "units"),
    search={"mean": ["lehmer", "gini"]},
    variants={"plain": {},
              "Gini means": {"mean": "gini", "exponents": ((1.0, 0.0), (2.0, 1.0))}},
)
class LehmerMultiplet(nn.Module):
    """Neurons that take means instead of sums: several means with the same weights.

    Lehmer: y_jm = sum_i w_ji x_i^p_m / sum_i w_ji x_i^(p_m - 1).
    Gini: y_jm = (sum_i w_ji x_i^r_m / sum_i w_ji x_i^s_m)^(1 / (r_m - s_m)).

    With w_j = softmax(logits_j) each output lies between the smallest and the largest input: p = 1
    is the weighted arithmetic mean, p = 0 the harmonic one, p towards infinity the maximum. Gini
    means with s = 0 are power means, with r = -s (and where r meets s at 0) geometric ones. Weights
    and exponents learn. All is computed from logarithms, so that large exponents neither overflow
    nor vanish, and one product with the weights serves each exponent.

    Args:
        inputs: the last axis of x, numbers that are not negative.
        units: how many multiplets, each with weights of its own.
        exponents: p for each output of a multiplet; for Gini means pairs (r, s).
        mean: which.
        constant: whether a 1 joins the inputs, without which outputs grow like the inputs do.
        floor: what smaller inputs count as; their gradient is 0.
        generator: draws the weights.

    Shapes: x (*, inputs); y (*, units * exponents), the outputs of a multiplet side by side;
    logits (units, inputs or inputs + 1).

    Raises:
        ValueError: a size is below 1, `floor` is not above 0, `exponents` are none or not of the
            mean's kind, or x has another last axis.
        UnknownName: `mean` is neither.

    Paper: Frick, 2020, An Informal Introduction to Multiplet Neural Networks.

    >>> smallest_and_largest = LehmerMultiplet(3, 1, exponents=(-60.0, 60.0))
    >>> smallest_and_largest(torch.tensor([2.0, 5.0, 3.0])).round().tolist()
    [2.0, 5.0]
    """

    def __init__(self, inputs: int, units: int,
                 exponents: Sequence[float] | Sequence[tuple[float, float]] = (-8.0, 0.0, 1.0, 8.0),
                 *, mean: Literal["lehmer", "gini"] = "lehmer", constant: bool = False,
                 floor: float = 1e-6, generator: Generator | None = None) -> None:
        super().__init__()
        checks.count(1, inputs=inputs, units=units)
        checks.one_of(["lehmer", "gini"], mean=mean)
        checks.above(0, floor=floor, advice="try 1e-6")
        table = torch.tensor(exponents, dtype=torch.get_default_dtype())
        if not len(exponents) or table.shape[1:] != (() if mean == "lehmer" else (2,)):
            raise ValueError(f"exponents of mean={mean!r} must be at least one "
                             f"{'number' if mean == 'lehmer' else 'pair (r, s)'}, got {exponents}")
        self.inputs, self.units, self.mean = inputs, units, mean
        self.constant, self.floor = constant, floor
        self.exponents = nn.Parameter(table)
        self.logits = nn.Parameter(torch.randn(units, inputs + constant, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, units * exponents) of (*, inputs)."""
        if not x.ndim or x.shape[-1] != self.inputs:
            raise ValueError(f"x must be (*, {self.inputs}), since inputs={self.inputs}, "
                             f"got {tuple(x.shape)}")
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logs = x.reshape(-1, self.inputs).to(wide).clamp(min=self.floor).log()
            if self.constant:
                logs = torch.cat([logs, torch.zeros_like(logs[:, :1])], 1)
            weights, exponents = self.logits.to(wide).softmax(1), self.exponents.to(wide)
            if self.mean == "lehmer":
                upper, lower = exponents, exponents - 1
            else:
                upper, lower = exponents.unbind(1)
            count = len(upper)
            both = _log_sums(logs, weights, torch.cat([upper, lower]))
            apart = (upper - lower)[:, None]
            if self.mean == "gini":
                # Where r and s meet, the quotient becomes the slope halfway between them.
                near = apart.abs() < torch.finfo(wide).eps ** (1 / 3)
                halfway = _log_slopes(logs, weights, (upper + lower) / 2)
                means = torch.where(near, halfway, (both[:, :count] - both[:, count:])
                                    / torch.where(near, 1, apart))
            else:
                means = both[:, :count] - both[:, count:]
            y = means.exp().transpose(1, 2).reshape(*x.shape[:-1], self.units * count)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """Return what a print shows."""
        return (f"{self.inputs}, {self.units}, mean={self.mean!r}, "
                f"exponents={self.exponents.tolist()}")


def _log_sums(logs: Tensor, weights: Tensor, exponents: Tensor) -> Tensor:
    """Return log sum_i w_ji exp(r_m logs_i), as (rows, exponents, units)."""
    if transformed():
        powers, largest = _powers(logs, exponents)
        return _sums(powers, weights).log() + largest
    found: Tensor = _LogSums.apply(logs, weights, exponents)
    return found


def _log_slopes(logs: Tensor, weights: Tensor, exponents: Tensor) -> Tensor:
    """Return the sums' derivatives by their exponents: means of logs, weighted by the powers."""
    powers, _ = _powers(logs, exponents)
    return (powers * logs[:, None]) @ weights.T / _sums(powers, weights)


class _LogSums(torch.autograd.Function):
    """Logarithms of weighted sums of powers, with the derivatives that the paper gives."""

    @staticmethod
    def forward(ctx: Any, logs: Tensor, weights: Tensor, exponents: Tensor) -> Tensor:
        ctx.save_for_backward(logs, weights, exponents)
        powers, largest = _powers(logs, exponents)
        return _sums(powers, weights).log() + largest

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # Plain operations, which can be differentiated again; powers are not stored.
        logs, weights, exponents = ctx.saved_tensors
        powers, _ = _powers(logs, exponents)
        above = grads[0] / _sums(powers, weights)
        to_weights = above.flatten(0, 1).T @ powers.flatten(0, 1)
        shares = (above @ weights) * powers
        return ((shares * exponents[:, None]).sum(1), to_weights,
                (shares * logs[:, None]).sum((0, 2)))


def _powers(logs: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(r logs) over its largest in each row, and the largest's logarithm."""
    scaled = logs[:, None] * exponents[:, None]
    largest = scaled.detach().amax(2, keepdim=True)
    return (scaled - largest).exp(), largest


def _sums(powers: Tensor, weights: Tensor) -> Tensor:
    # A weight may be so small that nothing is left of the largest power.
    return (powers @ weights.T).clamp(min=torch.finfo(powers.dtype).tiny)
