import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.errors import UnknownName

__all__ = ["NBeats"]

Stack = Literal["generic", "trend", "seasonality"] | tuple[Tensor, Tensor]


@method(
    "block",
    papers=["003-081"],
    place="whole network",
    takes=("lookback", "horizon"),
    needs=["series"],
    search={"blocks": [1, 3], "hidden": [64, 256]},
    variants={"small": {"hidden": 8}, "generic": {"hidden": 8, "stacks": ("generic",)}},
)
class NBeats(nn.Module):
    """Forecast a series by blocks that each explain a part of it and pass on what is left.

    r_0 = x;  per block: (c, d) = W relu(... relu(W_1 r)),  backcast = c B,  forecast = d F;
    r := r - backcast;  y = sum of the forecasts.

    The rows of B and F are the basis of the stack that a block belongs to: the powers
    1, t, ..., t^degree ("trend"), the cosines and sines of the horizon's harmonics
    ("seasonality"), the unit vectors, so that the last layer learns its own ("generic"), or a
    pair of matrices. So what the stacks of an interpretable network forecast can be read one by
    one: see `parts`. A constant is in the span of both trend and seasonality, wherefore only
    their sum fixes the level.

    What the paper leaves open: t runs from 0 to 1 over the lookback and anew over the horizon;
    the harmonics' phase runs on from the lookback into the horizon.

    The network does not scale what it is given: give windows of like size, for instance each
    divided by its last value.

    Args:
        lookback: points of a window, the paper's 2 to 7 times the horizon.
        horizon: points to forecast.
        stacks: the kind of each stack, or its bases (n, lookback) and (m, horizon).
        blocks: blocks of each stack.
        hidden: units of a block's layers; the paper's are 512 in generic, 256 in trend and 2048 in
            seasonality stacks.
        layers: hidden layers of a block.
        degree: of the trend's polynomial.
        harmonics: waves of the seasonality, half the horizon where none is given.
        period: points of the slowest wave, the horizon where none is given.
        share: whether the blocks of a stack with a given basis are one block, used again.
        residual: whether what a block has explained is taken off what the next one sees.

    Shapes: x (*, lookback), y (*, horizon).

    Raises:
        ValueError: a size is below 1 or `period` not above 0, `stacks` is empty or has bases of
            other sizes, or the windows are not `lookback` long.
        UnknownName: no kind of stack is called that.

    Paper: Oreshkin, Carpov, Chapados, Bengio, 2020, N-BEATS: Neural Basis Expansion Analysis for
    Interpretable Time Series Forecasting.

    >>> model = NBeats(24, 8, ["trend", "seasonality"], hidden=32)
    >>> model(torch.zeros(5, 24)).shape, model.parts(torch.zeros(5, 24)).shape
    (torch.Size([5, 8]), torch.Size([5, 2, 8]))
    """

    def __init__(self, lookback: int, horizon: int,
                 stacks: Sequence[Stack] = ("trend", "seasonality"), *, blocks: int = 3,
                 hidden: int = 256, layers: int = 4, degree: int = 2,
                 harmonics: int | None = None, period: float | None = None, share: bool = True,
                 residual: bool = True) -> None:
        super().__init__()
        harmonics = max(1, horizon // 2) if harmonics is None else harmonics
        checks.count(1, lookback=lookback, horizon=horizon, blocks=blocks, hidden=hidden,
                     layers=layers, harmonics=harmonics)
        checks.count(0, degree=degree)
        checks.above(0, period=period, optional=True)
        if isinstance(stacks, str) or not len(stacks):
            raise ValueError(f"stacks must be a list of at least one stack, got {stacks!r}; try "
                             '["trend", "seasonality"] or ["generic"]')
        self.lookback, self.horizon, self.blocks = lookback, horizon, blocks
        self.residual = residual
        made = []
        for stack in stacks:
            bases = _bases(stack, lookback, horizon, degree, harmonics, period or horizon)
            own = blocks if stack == "generic" or not share else 1
            made.append(nn.ModuleList(Block(lookback, hidden, layers, *bases)
                                      for _ in range(own)))
        self.stacks = nn.ModuleList(made)

    def forward(self, x: Tensor) -> Tensor:
        """Return the forecast (*, horizon) of windows (*, lookback)."""
        return self.parts(x).sum(-2)

    def parts(self, x: Tensor) -> Tensor:
        """Return what each stack adds to the forecast, (*, stacks, horizon)."""
        if x.shape[-1:] != (self.lookback,):
            raise ValueError(f"x must be (*, {self.lookback}), since lookback={self.lookback}, "
                             f"got {tuple(x.shape)}")
        rest, forecasts = x, []
        for stack in self.stacks:
            added = []
            for i in range(self.blocks):
                backcast, forecast = stack[i % len(stack)](rest)  # type: ignore[arg-type, index]
                rest = rest - backcast if self.residual else rest
                added.append(forecast)
            forecasts.append(torch.stack(added).sum(0))
        return torch.stack(forecasts, -2)


class Block(nn.Module):
    """Hidden layers, and the coefficients that they give to a backcast's and a forecast's basis."""

    backcast: Tensor | None
    forecast: Tensor | None

    def __init__(self, lookback: int, hidden: int, layers: int, backcast: Tensor | int,
                 forecast: Tensor | int) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for i in range(layers):
            parts += [nn.Linear(hidden if i else lookback, hidden), nn.ReLU()]
        self.hidden = nn.Sequential(*parts)
        self.sizes = [b if isinstance(b, int) else len(b) for b in (backcast, forecast)]
        generic = isinstance(backcast, int)
        self.coefficients = nn.Linear(hidden, sum(self.sizes), bias=generic)
        self.register_buffer("backcast", None if isinstance(backcast, int) else backcast)
        self.register_buffer("forecast", None if isinstance(forecast, int) else forecast)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the backcast (*, lookback) and the forecast (*, horizon)."""
        c, d = self.coefficients(self.hidden(x)).split(self.sizes, -1)
        return (c if self.backcast is None else c @ self.backcast.to(c.dtype),
                d if self.forecast is None else d @ self.forecast.to(d.dtype))


def _bases(stack: Stack, lookback: int, horizon: int, degree: int, harmonics: int,
           period: float) -> tuple[Tensor | int, Tensor | int]:
    """Return the two bases of a stack, or how many points a learnt one has."""
    if not isinstance(stack, str):
        pair = [torch.as_tensor(basis).detach().clone() for basis in stack]
        if ([b.ndim for b in pair] != [2, 2]
                or [b.shape[1] for b in pair] != [lookback, horizon]):
            raise ValueError(f"a stack's bases must be (n, lookback={lookback}) and (m, "
                             f"horizon={horizon}), got {[tuple(b.shape) for b in pair]}")
        return pair[0].to(torch.get_default_dtype()), pair[1].to(torch.get_default_dtype())
    if stack == "generic":
        return lookback, horizon
    if stack == "trend":
        powers = torch.arange(degree + 1)[:, None]
        return ((torch.arange(lookback) / lookback) ** powers,
                (torch.arange(horizon) / horizon) ** powers)
    if stack == "seasonality":
        times = torch.arange(-lookback, horizon) * (2 * math.pi / period)
        angles = torch.arange(harmonics)[:, None] * times
        # The sine of wave 0 is nothing.
        waves = torch.cat([angles.cos(), angles[1:].sin()])
        return waves[:, :lookback].contiguous(), waves[:, lookback:].contiguous()
    raise UnknownName("kind of stack", stack, ("generic", "trend", "seasonality"))
