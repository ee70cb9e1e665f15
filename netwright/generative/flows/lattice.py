import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.generative.flows.flow import Flow, Transform
from netwright.reversing.engine import Regroup, Step, Update

__all__ = ["GaugeTransform", "U1Action", "autocorrelation_time", "field_loss", "flow_hmc",
           "gauge_flow", "hmc", "plaquettes", "smooth_charge", "topological_charge"]

Action = Callable[[Tensor], Tensor]


@method("companion")
class U1Action(nn.Module):
    """The action of the two-dimensional U(1) lattice gauge theory.

    S(x) = beta sum over plaquettes of (1 - cos P);
    P(a, b) = x_0(a, b) + x_1(a + 1, b) - x_0(a, b + 1) - x_1(a, b), on a torus.

    At large `beta` configurations of different topological charge are separated by barriers that
    hybrid Monte Carlo seldom crosses.

    Args:
        beta: the inverse coupling.

    Shapes: x (batch, 2, A, B), the angles of the links in the two directions; S (batch,).

    Raises:
        ValueError: x has another shape.

    >>> action = U1Action(4.0)
    >>> action(torch.zeros(3, 2, 8, 8))
    tensor([0., 0., 0.])
    """

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        """Return S(x)."""
        return self.beta * (1 - plaquettes(x).cos()).flatten(1).sum(1)


@checks.annotated
def plaquettes(x: Tensor) -> Tensor:
    """Return the angle of every plaquette of links `x` (batch, 2, A, B), (batch, A, B)."""
    if x.ndim != 4 or x.shape[1] != 2:
        raise ValueError(f"x must be (batch, 2, A, B), the angles of links in two directions, got "
                         f"{tuple(x.shape)}")
    first, second = x.unbind(1)
    return first + second.roll(-1, 1) - first.roll(-1, 2) - second


@checks.annotated
def topological_charge(x: Tensor) -> Tensor:
    """Return the integer charge of links `x`: the plaquettes' wrapped angles, over 2 pi.

    >>> topological_charge(torch.zeros(3, 2, 4, 4))
    tensor([0., 0., 0.])
    """
    wrapped = torch.remainder(plaquettes(x) + math.pi, 2 * math.pi) - math.pi
    return (wrapped.flatten(1).sum(1) / (2 * math.pi)).round()


@checks.annotated
def smooth_charge(x: Tensor) -> Tensor:
    """Return the charge of links `x` by the plaquettes' sines, which has a gradient."""
    return plaquettes(x).sin().flatten(1).sum(1) / (2 * math.pi)


class Chain(NamedTuple):
    """What a Markov chain drew: `samples` (draws, batch, *size), `accepted` (draws, batch)."""

    samples: Tensor
    accepted: Tensor


@checks.annotated
def hmc(action: Action, x: Tensor, *, draws: int, steps: int, step_size: float,
        generator: Generator | None = None) -> Chain:
    """Draw from exp(-S) by hybrid Monte Carlo, one chain for each row of `x`.

    v ~ N(0, 1);  `steps` leapfrogs of  v -= e/2 S'(x), x += e v, v -= e/2 S'(x);
    accepted with probability min(1, exp(H(x, v) - H(x', v'))), H = S(x) + v^2 / 2.

    Args:
        action: S, a function of a batch with one number for each row.
        x: Where the chains start.
        draws: How many samples are drawn by each chain.
        steps: Leapfrogs for each draw.
        step_size: e.
        generator: Where the randomness is drawn from.

    Shapes: x (batch, *size).

    Raises:
        ValueError: `draws`, `steps` or `step_size` is not positive, or S(x) is not finite.

    Paper: Duane, Kennedy, Pendleton, Roweth, 1987, Hybrid Monte Carlo.

    >>> chain = hmc(lambda x: x.square().sum(1) / 2, torch.zeros(5, 3), draws=10, steps=5,
    ...             step_size=0.3)
    >>> chain.samples.shape, chain.accepted.shape
    (torch.Size([10, 5, 3]), torch.Size([10, 5]))
    """
    return _hmc(action, x, lambda z: z, draws, steps, step_size, generator)


@method("companion", papers=["001-104"])
def flow_hmc(flow: Transform | Flow, action: Action, x: Tensor, *, draws: int, steps: int,
             step_size: float, generator: Generator | None = None) -> Chain:
    """Draw from exp(-S) by hybrid Monte Carlo in the space that a flow maps from.

    x = f(z);  S_z(z) = S(f(z)) - log |det df/dz|;  hybrid Monte Carlo on S_z, and x of its draws.

    A flow that makes S_z simple lets the chain cross what would be barriers in x. Whatever the
    flow is, the draws are from exp(-S): it costs acceptance and time, not truth. A good flow is
    trained with `field_loss`.

    Args:
        flow: f: z to x in its forward direction. Its steps are undone in the backward pass of
            each force, so that memory does not grow with its depth.
        action: S, a function of a batch with one number for each row.
        x: Where the chains start.
        draws: How many samples are drawn by each chain.
        steps: Leapfrogs for each draw.
        step_size: e, in the space of z.
        generator: Where the randomness is drawn from.

    Shapes: x (batch, *size).

    Raises:
        ValueError: `draws`, `steps` or `step_size` is not positive, or S(x) is not finite.

    Paper: Foreman, Izubuchi, Jin, Jin, Osborn, Tomiya, 2021, HMC with Normalizing Flows.

    >>> action = U1Action(2.0)
    >>> flow = gauge_flow((4, 4), depth=1)
    >>> chain = flow_hmc(flow, action, torch.zeros(3, 2, 4, 4), draws=2, steps=3, step_size=0.1)
    >>> chain.samples.shape
    torch.Size([2, 3, 2, 4, 4])
    """
    def pulled_back(z: Tensor) -> Tensor:
        x, log_det = flow(z)
        return action(x) - log_det

    needed = [p for p in flow.parameters() if p.requires_grad]
    for p in needed:
        p.requires_grad_(False)  # a force is the gradient of z alone
    try:
        with torch.no_grad():
            z = flow.inverse(x)
        return _hmc(pulled_back, z, lambda z: flow(z)[0], draws, steps, step_size, generator)
    finally:
        for p in needed:
            p.requires_grad_(True)


@checks.annotated
def field_loss(flow: Transform | Flow, action: Action, z: Tensor) -> Tensor:
    """Return the mean of S(f(z)) - log |det df/dz|: up to a constant KL(f(base) || exp(-S)).

    Shapes: z (batch, *size), drawn from the base that the flow maps from.
    """
    x, log_det = flow(z)
    return (action(x) - log_det).mean()


@checks.annotated
def autocorrelation_time(series: Tensor) -> float:
    """Return how many draws one independent draw is worth, from a statistic of several chains.

    tau = 1/2 + sum_{k=1}^{w} rho(k), the window w being the first with w >= 5 tau.

    rho is averaged over the chains, about the mean of all. A statistic that never changes has no
    time of its own: the answer is infinite.

    Shapes: series (draws, chains).

    >>> autocorrelation_time(torch.zeros(10, 2))
    inf
    """
    if series.ndim != 2 or len(series) < 2:
        raise ValueError("series must be (draws, chains) with at least 2 draws, got "
                         f"{tuple(series.shape)}")
    centred = series.double() - series.double().mean()
    n = len(series)
    power = torch.fft.rfft(centred, 2 * n, dim=0).abs().square()
    covariance = torch.fft.irfft(power, 2 * n, dim=0)[:n].mean(1) / torch.arange(n, 0, -1)
    if not float(covariance[0]) > 0:
        return math.inf
    times = 0.5 + (covariance / covariance[0])[1:].cumsum(0)
    window = torch.arange(1, n) >= 5 * times
    return float(times[int(window.int().argmax()) if bool(window.any()) else -1])


@method("generative", place="transform", takes=("direction", "parity"),
        variants={"first direction": {"direction": 0, "parity": 1},
                  "second direction": {"direction": 1, "parity": 0}},
        batch=lambda: torch.randn(2, 2, 4, 4))
class GaugeTransform(Transform):
    """Move every other link of one direction along the force of its two plaquettes.

    x' = x - a sin U + b sin L;  log_det = sum log(1 - a cos U - b cos L);  |a| + |b| < 1.

    U and L are the plaquettes on the two sides of the link, each of which has one link that moves;
    a and b are made by `net` from the rectangles that both form, which contain none. So the
    transform commutes with gauge transformations, and a gradient step of the action (a = b) is
    one of its cases. Its inverse is found by Newton's method, safeguarded by bisection.

    Args:
        direction: Which links move, 0 or 1.
        parity: Every other row of them, 0 or 1.
        net: Makes a and b: 2 channels in, cosine and sine of the rectangles, and 2 out; two
            convolutions with circular padding by default.
        hidden: Channels between these.

    Shapes: x and x' (batch, 2, A, B), with an even number of rows across `direction`.

    Raises:
        ValueError: `direction` or `parity` is neither 0 nor 1, or the rows' number is odd.

    Paper: Jin, 2022, Neural Network Field Transformation and Its Application in HMC.

    >>> x = torch.randn(3, 2, 4, 4).double()
    >>> move = GaugeTransform(0, 1).double()
    >>> torch.allclose(move.inverse(move(x)[0]), x)
    True
    """

    def __init__(self, direction: int, parity: int, net: nn.Module | None = None, *,
                 hidden: int = 8) -> None:
        super().__init__()
        checks.between(0, 1, whole=True, direction=direction, parity=parity)
        checks.count(1, hidden=hidden)
        self.direction, self.parity = direction, parity
        if net is None:
            last = nn.Conv2d(hidden, 2, 3, padding=1, padding_mode="circular")
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]
            net = nn.Sequential(nn.Conv2d(2, hidden, 3, padding=1, padding_mode="circular"),
                                nn.SiLU(), last)
        self.net = net

    def steps(self, condition: Any = None) -> list[Step]:
        """Return the split of the links, the move and the join."""
        return [Regroup("the split before GaugeTransform", self._split, self._join),
                _Move("GaugeTransform", _Coefficients(self.net), (1, 2), (0, 3)),
                Regroup("the join after GaugeTransform", self._join, self._split)]

    def _split(self, streams: list[Tensor]) -> list[Tensor]:
        x, log_det = streams
        if x.ndim != 4 or x.shape[1] != 2 or x.shape[3 - self.direction] % 2:
            raise ValueError("x must be (batch, 2, A, B) with an even number of rows across "
                             f"direction {self.direction}, got {tuple(x.shape)}")
        if self.direction:
            x = x.flip(1).transpose(2, 3)
        x = x.roll(-self.parity, 3)
        moving, still = x[:, 0].unflatten(2, (-1, 2)).unbind(3)
        return [moving.contiguous(), still.contiguous(), x[:, 1].contiguous(), log_det]

    def _join(self, streams: list[Tensor]) -> list[Tensor]:
        moving, still, across, log_det = streams
        x = torch.stack([torch.stack([moving, still], 3).flatten(2), across], 1)
        x = x.roll(self.parity, 3)
        return [x.transpose(2, 3).flip(1) if self.direction else x, log_det]


class _Coefficients(nn.Module):
    """Makes a, b and what the plaquettes are without the moving link."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, still: Tensor, across: Tensor) -> tuple[Tensor, ...]:
        # Of the plaquettes above and below a moving link at (a, b): still (a, b + 1) and (a, b - 1)
        sides = across.roll(-1, 1) - across
        upper, lower = sides.unflatten(2, (-1, 2)).unbind(3)  # of rows b and b + 1
        above, below = upper - still, lower.roll(1, 2) + still.roll(1, 2)
        both = above + below
        raw = self.net(torch.stack([both.cos(), both.sin()], 1))
        a, b = (0.49 * raw.tanh()).unbind(1)
        return a, b, above, below


class _Move(Update):

    def change(self, x: Sequence[Tensor], made: tuple[Tensor, ...]) -> list[Tensor]:
        y, slope = self._miss(x[0], torch.zeros_like(x[0]), made)
        return [y, x[1] + slope.log().flatten(1).sum(1)]

    def restore(self, y: Sequence[Tensor], made: tuple[Tensor, ...]) -> list[Tensor]:
        with torch.no_grad():
            x = self._solution(y[0], made)
        miss, slope = self._miss(x, y[0], made)
        x = x - miss / slope.detach()  # so that the solution has its gradient
        return [x, y[1] - self._miss(x, y[0], made)[1].log().flatten(1).sum(1)]

    def _solution(self, y: Tensor, made: tuple[Tensor, ...]) -> Tensor:
        x, low, high = y, y - 1, y + 1  # a move is shorter than 1
        enough = 4 * torch.finfo(y.dtype).eps * max(1.0, float(y.abs().max()))
        for _ in range(60):
            miss, slope = self._miss(x, y, made)
            low, high = torch.where(miss < 0, x, low), torch.where(miss > 0, x, high)
            newton = x - miss / slope
            x = torch.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
            if float(miss.abs().max()) <= enough:
                break
        return x

    def _miss(self, x: Tensor, y: Tensor, made: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return how far the move of x is from y, and how fast that grows with x."""
        a, b, above, below = made
        upper, lower = x + above, below - x
        return x - a * upper.sin() + b * lower.sin() - y, 1 - a * upper.cos() - b * lower.cos()


@checks.annotated
def gauge_flow(size: tuple[int, int], depth: int = 2, *, hidden: int = 8) -> Flow:
    """Return a flow of `depth` times four `GaugeTransform`s, after which every link has moved.

    It starts as the identity. In the other direction than `Flow` is named for, it maps from the
    base, for instance links drawn evenly from the circle, to the field.

    Shapes: samples (batch, 2, *size).
    """
    return Flow([GaugeTransform(direction, parity, hidden=hidden) for _ in range(depth)
                 for direction in (0, 1) for parity in (0, 1)], (2, *size))


def _hmc(action: Action, x: Tensor, shown: Callable[[Tensor], Tensor], draws: int, steps: int,
         step_size: float, generator: Generator | None) -> Chain:
    checks.count(1, draws=draws, steps=steps)
    checks.above(0, step_size=step_size)
    x = x.detach().clone()
    energy, force = _force(action, x)
    if not bool(energy.isfinite().all()):
        raise ValueError("the action of x must be finite, got "
                         f"{int((~energy.isfinite()).sum())} rows in which it is not")
    samples, accepted = [], []
    for _ in range(draws):
        v = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        start = energy + v.square().flatten(1).sum(1) / 2
        new, pull = x, force
        for _ in range(steps):
            v = v - step_size / 2 * pull
            new = new + step_size * v
            potential, pull = _force(action, new)
            v = v - step_size / 2 * pull
        end = potential + v.square().flatten(1).sum(1) / 2
        u = torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device)
        taken = u.log() < start - end  # false where the end is not finite
        wide = taken.view(-1, *[1] * (x.ndim - 1))
        x, force = torch.where(wide, new, x), torch.where(wide, pull, force)
        energy = torch.where(taken, potential, energy)
        with torch.no_grad():
            samples.append(shown(x))
        accepted.append(taken)
    return Chain(torch.stack(samples), torch.stack(accepted))


def _force(action: Action, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        energy = action(x)
        (force,) = torch.autograd.grad(energy.sum(), x)
    return energy.detach(), force
