from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.blocks.reversible.block import ReversibleBlock
from netwright.catalogue.facets import method
from netwright.reversing.engine import Add, Update, run
from netwright.runtime.attributes import Memo

__all__ = ["ReversibleSDESolver"]

Pair = tuple[Tensor, Tensor]
Schedule = Callable[[Tensor], tuple[Tensor, Tensor]]


def linear_schedule(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma of the variance-preserving diffusion with rates from 0.1 to 20.

    >>> alpha, sigma = linear_schedule(torch.tensor([0.0, 1.0]))
    >>> torch.allclose(alpha ** 2 + sigma ** 2, torch.ones(2))
    True
    """
    exponent = -0.1 * t - 0.5 * (20 - 0.1) * t ** 2
    return (exponent / 2).exp(), (-torch.expm1(exponent)).sqrt()


@method("generative", papers=["001-018"], place="whole network", takes=("score",),
        network=lambda: ReversibleSDESolver(lambda x, t: -x, steps=4))
class ReversibleSDESolver(ReversibleBlock):
    """Sample from a diffusion model by a stochastic equation, and undo that for given data.

    The diffusion is x_t = alpha(t) x_0 + sigma(t) noise, D(x, t) = (x + sigma^2 score) / alpha its
    guess of x_0. In the time r = alpha^2 / sigma^2 and with X = x alpha / sigma^2 the equation that
    generates is dX = D dr + dW. Each step takes h of r, and the same dW both ways, on two streams:

    X <- c X + (1 - c) Y + h D(Y, r) + dW;   Y <- Y + h D(X, r + h) + dW.

    Both are undone exactly, whatever the score is. `decode` goes from the prior to data; `encode`
    undoes it for any data and any path of noise. What `encode` returns are both streams: from
    one alone, data come back only as nearly as the solver solves. A step takes two evaluations.
    Where gradients are wanted, `decode` stores nothing between its steps.

    Args:
        score: Takes x and a time without dimensions, returns the gradient of log p_t at x.
        schedule: Takes times, returns alpha and sigma there.
        steps: The number of steps, evenly spread over log r.
        coupling: c, above 0 and at most 1. The nearer to 1, the less rounding grows on the way
            back; below 1 it pulls the streams together.
        begin: The time of the prior.
        end: The time of the data, a little above 0.

    Shapes: x (batch, *size); noise (steps, batch, *size), standard normal, from the prior's end;
    z a pair of (batch, *size).

    Raises:
        ValueError: an option, the schedule or the shape of the noise is not possible.

    Paper: Blasingame, Liu, 2025, A Reversible Solver for Diffusion SDEs.

    >>> solver = ReversibleSDESolver(lambda x, t: -x, steps=40)
    >>> x, noise = torch.randn(5, 2).double(), torch.randn(40, 5, 2).double()
    >>> z = solver.encode(x, noise)
    >>> torch.allclose(solver.decode(z, noise), x, atol=1e-6)
    True
    >>> solver.decode(torch.randn_like(x), noise).shape
    torch.Size([5, 2])
    """

    streams = None

    def __init__(self, score: Callable[[Tensor, Tensor], Tensor],
                 schedule: Schedule = linear_schedule, *, steps: int = 50, coupling: float = 0.999,
                 begin: float = 1.0, end: float = 1e-3) -> None:
        super().__init__()
        checks.count(1, steps=steps)
        checks.between(0, 1, ends=(False, True), coupling=coupling)
        self.score, self.schedule, self.number, self.coupling = score, schedule, steps, coupling
        self.times = _spread(schedule, begin, end, steps)
        self._seen = Memo()

    def updates(self, noise: Tensor) -> list[Update]:
        """Return the steps on X and Y, from the prior to the data."""
        ratio = _ratio(self.schedule, self.times)
        lengths = ratio.diff()
        times = self.times.to(noise).unbind()
        found: list[Update] = []
        for n in range(self.number):
            h, change = float(lengths[n]), noise[n] * float(lengths[n].sqrt())
            found += [_Mixed(f"X in step {n}", self, (1,), (0,), times[n], h, change),
                      _Added(f"Y in step {n}", self, (0,), (1,), times[n + 1], h, change)]
        return found

    def decode(self, z: Tensor | Pair, noise: Tensor, *, both: bool = False) -> Any:
        """Return the data that `z` and the noise lead to; with `both`, both streams of it."""
        ends = self._run(z, noise, 0, -1)
        return ends if both else ends[0]

    def encode(self, x: Tensor | Pair, noise: Tensor) -> Pair:
        """Return the pair that `decode` turns into `x` by the same noise."""
        streams = self._scaled(x, noise, -1)
        return self._unscaled(self.inverse(streams, noise), 0)

    def _run(self, z: Tensor | Pair, noise: Tensor, start: int, end: int) -> Pair:
        kind = torch.is_grad_enabled(), self.training
        streams = run(self.updates(noise), self._scaled(z, noise, start),
                      first=kind not in self._seen)
        self._seen.add(kind)
        return self._unscaled(streams, end)

    def _scaled(self, x: Tensor | Pair, noise: Tensor, at: int) -> list[Tensor]:
        first, second = (x, x) if isinstance(x, Tensor) else x
        if noise.shape != (self.number, *first.shape):
            raise ValueError(f"noise must be (steps, *x.shape), {(self.number, *first.shape)}, got "
                             f"{tuple(noise.shape)}; torch.randn makes it")
        scale = float(_scale(self.schedule, self.times[at]))
        return [first / scale, second / scale]

    def _unscaled(self, streams: Sequence[Tensor], at: int) -> Pair:
        scale = float(_scale(self.schedule, self.times[at]))
        return streams[0] * scale, streams[1] * scale

    def guess(self, stream: Tensor, t: Tensor) -> Tensor:
        """Return D, what the score at time `t` says of the data, for a stream."""
        alpha, sigma = (float(value) for value in self.schedule(t.double()))
        x = stream * (sigma ** 2 / alpha)
        score = self.score(x, t)
        if score.shape != x.shape:
            raise ValueError(f"score must return the shape of x, {tuple(x.shape)}, got "
                             f"{tuple(score.shape)}")
        return (x + sigma ** 2 * score) / alpha


class _Change(Update):
    """What both steps have: h D + dW."""

    def __init__(self, name: str, solver: ReversibleSDESolver, reads: tuple[int],
                 writes: tuple[int], t: Tensor, length: float, change: Tensor) -> None:
        Update.__init__(self, name, None, reads, writes)
        self.solver, self.t, self.length, self.noise = solver, t, length, change

    def made(self, stream: Tensor) -> Tensor:
        return self.length * self.solver.guess(stream, self.t) + self.noise

    def modules(self) -> list[nn.Module]:
        """Return the score, where it is a module."""
        return [self.solver.score] if isinstance(self.solver.score, nn.Module) else []


class _Mixed(_Change):

    def make(self, reads: Sequence[Tensor]) -> Tensor:
        """Return (1 - c) Y + h D + dW."""
        return (1 - self.solver.coupling) * reads[0] + self.made(reads[0])

    def change(self, x: Sequence[Tensor], made: Tensor) -> list[Tensor]:
        """Return c X + made."""
        return [self.solver.coupling * x[0] + made]

    def restore(self, y: Sequence[Tensor], made: Tensor) -> list[Tensor]:
        """Return (X - made) / c."""
        return [(y[0] - made) / self.solver.coupling]


class _Added(_Change, Add):

    def make(self, reads: Sequence[Tensor]) -> Tensor:
        """Return h D + dW."""
        return self.made(reads[0])


def _ratio(schedule: Schedule, t: Tensor) -> Tensor:
    alpha, sigma = schedule(t)
    return (alpha / sigma) ** 2


def _scale(schedule: Schedule, t: Tensor) -> Tensor:
    alpha, sigma = schedule(t)
    return sigma ** 2 / alpha


def _spread(schedule: Schedule, begin: float, end: float, steps: int) -> Tensor:
    """Return times from `begin` to `end` between which log r grows evenly."""
    ends = torch.tensor([begin, end], dtype=torch.float64)
    first, last = _ratio(schedule, ends).log()
    if not (begin > end >= 0 and bool((last - first).isfinite()) and last > first):
        raise ValueError("alpha / sigma must be positive and finite at begin and end, and grow "
                         f"from begin={begin} to end={end}; its logarithms are "
                         f"{float(first) / 2:.3g} and {float(last) / 2:.3g}")
    wanted = first + (last - first) * torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    low, high = torch.full_like(wanted, end), torch.full_like(wanted, begin)
    for _ in range(60):  # log r falls with t: halve the interval that holds each
        middle = (low + high) / 2
        above = _ratio(schedule, middle).log() > wanted
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    times = (low + high) / 2
    times[0], times[-1] = begin, end
    return times
