import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.blocks.reversible.block import ReversibleBlock
from netwright.blocks.reversible.sequential import ReversibleSequential
from netwright.catalogue.facets import method
from netwright.generative.flows.lattice import Action, Chain
from netwright.reversing.engine import Regroup, Step, Update
from netwright.runtime.modes import transformed

__all__ = ["LeapfrogLayer", "LeapfrogSampler"]


@method("block", papers=["002-099"], place="transform", takes=("action", "size"),
        network=lambda: LeapfrogLayer(lambda x: x.square().sum(1) / 2, 4, hidden=8),
        batch=lambda: ((torch.randn(3, 4), torch.randn(3, 4), torch.zeros(3)),))
class LeapfrogLayer(ReversibleBlock):
    """A leapfrog step that is scaled, shifted and bent by networks, and can be undone.

    v <- exp(e s / 2) v - e/2 (exp(e q) S'(x) + t);               (s, t, q) of x and S'(x)
    x_a <- exp(e s) x_a + e (exp(e q) v_a + t),  then x_b alike;  (s, t, q) of v and the other x
    v <- exp(e s / 2) v - e/2 (exp(e q) S'(x) + t).

    x_a and x_b are two halves of the entries, drawn at random. For angles (`periodic`) an entry is
    scaled on the circle, x <- 2 atan(exp(e s) tan(x / 2)), and networks see cosines and sines.
    Networks that return zeros make it the leapfrog of hybrid Monte Carlo; it starts there.

    Args:
        action: S, a function of a batch with one number for each row.
        size: The size of a sample.
        step_size: What e starts as; it is trained, kept positive.
        hidden: Units in each of the networks' two hidden layers.
        periodic: Whether entries are angles.
        generator: Where the halves are drawn from.

    Shapes: x and v (batch, *size), log_det (batch,): takes and returns the tuple of the three,
    log_det with the layer's added.

    Raises:
        ValueError: `step_size` is not positive, or a sample has less than two entries.

    Paper: Foreman, Jin, Osborn, 2021, LeapfrogLayers: A Trainable Framework for Effective
    Topological Sampling.

    >>> layer = LeapfrogLayer(lambda x: x.square().sum(1) / 2, 4)
    >>> x, v, log_det = layer((torch.randn(3, 4), torch.randn(3, 4), torch.zeros(3)))
    >>> x.shape, log_det.shape
    (torch.Size([3, 4]), torch.Size([3]))
    """

    streams = None
    first: Tensor
    second: Tensor
    back: Tensor

    def __init__(self, action: Action, size: int | Sequence[int], *, step_size: float = 0.1,
                 hidden: int = 64, periodic: bool = False,
                 generator: Generator | None = None) -> None:
        super().__init__()
        self.size = torch.Size([size] if isinstance(size, int) else size)
        entries = math.prod(self.size)
        checks.above(0, step_size=step_size)
        if entries < 2:
            raise ValueError("size must have at least 2 entries, of which one moves by the "
                             f"other, got {tuple(self.size)}")
        self.action, self.periodic = action, periodic
        self.log_step = nn.Parameter(torch.tensor(math.log(step_size)))
        order = torch.randperm(entries, generator=generator)
        half = (entries + 1) // 2
        self.register_buffer("first", order[:half])
        self.register_buffer("second", order[half:])
        self.register_buffer("back", order.argsort())
        seen = 2 if periodic else 1
        self.kick = _Net(entries * (seen + 1), hidden, entries)
        self.drift_first = _Net(len(self.second) * seen + entries, hidden, half)
        self.drift_second = _Net(half * seen + entries, hidden, entries - half)

    def steps(self, *args: Any, **options: Any) -> list[Step]:
        """Return the split of x, two kicks with two drifts between them, and the join."""
        kick = _Scaled("kick", _Kicked(self), (0, 1), (2, 3))
        kind = _ScaledAngles if self.periodic else _Scaled
        return [Regroup("the split before LeapfrogLayer", self._split, self._join), kick,
                kind("drift of the first half", _Drifted(self, first=True), (1, 2), (0, 3)),
                kind("drift of the second half", _Drifted(self, first=False), (0, 2), (1, 3)),
                kick, Regroup("the join after LeapfrogLayer", self._join, self._split)]

    def entries(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the x (batch, *size) of its two halves."""
        return torch.cat([first, second], 1)[:, self.back].view(-1, *self.size)

    def seen(self, x: Tensor) -> Tensor:
        """Return what networks see of entries `x` (batch, n)."""
        return torch.cat([x.cos(), x.sin()], 1) if self.periodic else x

    def force(self, x: Tensor) -> Tensor:
        """Return S'(x), which can be differentiated where x needs a gradient."""
        on = torch.is_grad_enabled() and x.requires_grad
        if transformed() and not on:  # a leaf would not have the tangent that x may have
            with torch.enable_grad():
                x, on = x + torch.zeros_like(x, requires_grad=True), True
        with torch.inference_mode(False), torch.enable_grad():
            given = x if on else (x.clone() if x.is_inference() else x.detach()).requires_grad_()
            (found,) = torch.autograd.grad(self.action(given).sum(), given, create_graph=on)
        return found

    def _split(self, streams: list[Tensor]) -> list[Tensor]:
        x, v, log_det = streams
        if x.shape[1:] != self.size or v.shape != x.shape:
            raise ValueError(f"x and v must be (batch, {', '.join(map(str, self.size))}), got "
                             f"{tuple(x.shape)} and {tuple(v.shape)}")
        x = x.flatten(1)
        return [x[:, self.first], x[:, self.second], v.flatten(1), log_det]

    def _join(self, streams: list[Tensor]) -> list[Tensor]:
        first, second, v, log_det = streams
        return [self.entries(first, second), v.view(-1, *self.size), log_det]


class _Net(nn.Module):
    """Makes s, t and q, bounded, all zero at the start."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden),
                                  nn.SiLU(), nn.Linear(hidden, 3 * outputs))
        nn.init.zeros_(self.body[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.body[-1].bias)  # type: ignore[arg-type]
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, *parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s, t, q = self.body(torch.cat(parts, 1)).chunk(3, 1)
        return self.scale[0] * s.tanh(), t, self.scale[1] * q.tanh()


class _Kicked(nn.Module):
    """Makes what changes v."""

    def __init__(self, layer: LeapfrogLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        layer, x = self.layer, self.layer.entries(first, second)
        force = layer.force(x).flatten(1)
        s, t, q = layer.kick(layer.seen(x.flatten(1)), force)
        step = layer.log_step.exp()
        return step / 2 * s, -step / 2 * ((step * q).exp() * force + t)


class _Scaled(Update):
    """The step  x <- exp(s) x + t."""

    def change(self, x: Sequence[Tensor], made: tuple[Tensor, Tensor]) -> list[Tensor]:
        s, t = made
        return [x[0] * s.exp() + t, x[1] + s.sum(1)]

    def restore(self, y: Sequence[Tensor], made: tuple[Tensor, Tensor]) -> list[Tensor]:
        s, t = made
        return [(y[0] - t) * (-s).exp(), y[1] - s.sum(1)]


class _Drifted(nn.Module):
    """Makes what changes one half of x."""

    def __init__(self, layer: LeapfrogLayer, *, first: bool) -> None:
        super().__init__()
        self.layer, self.first = layer, first

    def forward(self, other: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        layer = self.layer
        net = layer.drift_first if self.first else layer.drift_second
        s, t, q = net(layer.seen(other), v)
        step = layer.log_step.exp()
        own = v[:, layer.first if self.first else layer.second]
        return step * s, step * ((step * q).exp() * own + t)


class _ScaledAngles(Update):
    """The step  x <- 2 atan(exp(s) tan(x / 2)) + t."""

    def change(self, x: Sequence[Tensor], made: tuple[Tensor, Tensor]) -> list[Tensor]:
        s, t = made
        return [_scaled(x[0], s) + t, x[1] + _log_slope(x[0], s).sum(1)]

    def restore(self, y: Sequence[Tensor], made: tuple[Tensor, Tensor]) -> list[Tensor]:
        s, t = made
        x = _scaled(y[0] - t, -s)
        return [x, y[1] - _log_slope(x, s).sum(1)]


def _scaled(x: Tensor, s: Tensor) -> Tensor:
    """Return 2 atan(exp(s) tan(x / 2)), continued so that it stays within pi of x."""
    half = x / 2
    # atan2 gives the angle modulo a turn of x; adding what is missing keeps the winding of x.
    turned = torch.atan2(s.exp() * half.sin(), half.cos()) * 2
    return turned + 2 * math.pi * ((x - turned) / (2 * math.pi)).round().detach()


def _log_slope(x: Tensor, s: Tensor) -> Tensor:
    """Return the logarithm of the derivative of `_scaled` in x."""
    half = x / 2
    return s - torch.log(half.cos().square() + (2 * s).exp() * half.sin().square())


@method(
    "generative",
    papers=["002-099"],
    place="whole network",
    takes=("action", "size"),
    search={"layers": [2, 4], "step_size": (0.03, 0.3)},
    network=lambda: LeapfrogSampler(lambda x: x.square().sum(1) / 2, 4, layers=2, hidden=8),
    batch=lambda: (torch.randn(5, 4), lambda x: x.sum(1)),
)
class LeapfrogSampler(nn.Module):
    """A Markov chain whose proposals are leapfrog layers, run forward or backward by chance.

    v ~ N(0, 1), direction +-1;  (x', v', J) = layers((x, v)) or their inverse;
    accepted with probability min(1, exp(H(x, v) - H(x', v') + log |J|)), H = S(x) + v^2 / 2.

    So the draws are from exp(-S) whatever the networks are. `loss` is what trains them: minus the
    expected squared change of a statistic that is slow to change, acceptance counted in. It runs
    the layers forward; that is enough, since in equilibrium a move backward is a move forward seen
    from its end. No layer stores its activations.

    Args:
        action: S, a function of a batch with one number for each row.
        size: The size of a sample.
        layers: How many leapfrog layers make a proposal.
        step_size: What every layer's step starts as.
        hidden: Units in the hidden layers of the networks.
        periodic: Whether entries are angles.
        generator: Where each layer's halves are drawn from.

    Shapes: x (batch, *size).

    Paper: Foreman, Jin, Osborn, 2021, LeapfrogLayers: A Trainable Framework for Effective
    Topological Sampling.

    >>> sampler = LeapfrogSampler(lambda x: x.square().sum(1) / 2, 4, layers=3)
    >>> sampler.sample(torch.randn(5, 4), draws=10).samples.shape
    torch.Size([10, 5, 4])
    """

    def __init__(self, action: Action, size: int | Sequence[int], *, layers: int = 4,
                 step_size: float = 0.1, hidden: int = 64, periodic: bool = False,
                 generator: Generator | None = None) -> None:
        super().__init__()
        checks.count(1, layers=layers)
        self.action = action
        self.layers = ReversibleSequential(*[
            LeapfrogLayer(action, size, step_size=step_size, hidden=hidden, periodic=periodic,
                          generator=generator) for _ in range(layers)])

    def propose(self, x: Tensor, v: Tensor, *, backward: bool = False,
                ) -> tuple[Tensor, Tensor, Tensor]:
        """Return x', v' and the logarithm of the probability to accept them."""
        state = (x, v, x.new_zeros(len(x)))
        new, momentum, log_det = self.layers.inverse(state) if backward else self.layers(state)
        gain = self._energy(x, v) - self._energy(new, momentum) + log_det
        return new, momentum, gain.clamp(max=0)

    def loss(self, x: Tensor, statistic: Callable[[Tensor], Tensor], *,
             generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return minus the expected squared change of `statistic`, and the chain's next x."""
        v = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        new, _, log_accept = self.propose(x, v)
        moved = (statistic(new) - statistic(x)).square()
        log_accept = log_accept.nan_to_num(nan=-math.inf)
        with torch.no_grad():
            taken = self._uniform(x, generator).log() < log_accept
            after = torch.where(taken.view(-1, *[1] * (x.ndim - 1)), new, x)
        return -(log_accept.exp() * moved).mean(), after

    @torch.no_grad()
    def sample(self, x: Tensor, draws: int, *, generator: Generator | None = None) -> Chain:
        """Return `draws` draws of one chain for each row of `x`, where they start."""
        checks.count(1, draws=draws)
        samples, accepted = [], []
        for _ in range(draws):
            v = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            backward = self._uniform(x, generator) < 0.5
            there, back = self.propose(x, v), self.propose(x, v, backward=True)
            wide = backward.view(-1, *[1] * (x.ndim - 1))
            new = torch.where(wide, back[0], there[0])
            log_accept = torch.where(backward, back[2], there[2]).nan_to_num(nan=-math.inf)
            taken = self._uniform(x, generator).log() < log_accept
            x = torch.where(taken.view_as(wide), new, x)
            samples.append(x)
            accepted.append(taken)
        return Chain(torch.stack(samples), torch.stack(accepted))

    def _energy(self, x: Tensor, v: Tensor) -> Tensor:
        return self.action(x) + v.square().flatten(1).sum(1) / 2

    def _uniform(self, x: Tensor, generator: Generator | None) -> Tensor:
        return torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device)
