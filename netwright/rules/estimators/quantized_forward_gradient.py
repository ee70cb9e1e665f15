import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from netwright import checks
from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.rule import Rule, checked, output_for, precise
from netwright.runtime.modes import evaluating, rehearsing
from netwright.signals import mapped
from netwright.stages import Stages

__all__ = ["QuantizedForwardGradient"]

# The layers that are computed in whole numbers, and where their input stands.
_LAYERS: dict[Any, int] = {functional.linear: 0, functional.conv1d: 0, functional.conv2d: 0,
                           functional.conv3d: 0, torch.addmm: 1}


@method(
    "rule",
    papers=["003-149"],
    saves=["backpropagation", "derivatives", "training memory"],
    needs=["labels"],
    search={"rate": (0.2, 5.0)},
    variants={"plain": {}, "half the weights": {"share": 0.5},
              "whole layers": {"momentum": 0.0, "kernelwise": False}},
)
class QuantizedForwardGradient(Rule):
    """Train weights of 8 bits by forward passes alone, by which way of two the loss is lower.

    w = 2^a q, q whole, |q| <= 127;  s_i = sign(L(q + d_i) - L(q - d_i)), i = 1..directions;
    d_i = round(z_i max(epsilon |q|, sqrt(n)) / |z_i|), z_i ~ N(0, I), for each kernel of n numbers;
    q := q - round(rate mean_i s_i d_i), rounded up or down at random with the right mean; all of q,
    q + d_i and q - d_i are held within the grid.

    Two forward passes for each direction, in which nothing is stored for backward. Each parameter
    has one exponent a, taken from its largest number when the rule is made. The first call puts
    the trainable weights on their grid and there they stay; frozen ones are rounded where they
    are used. What enters and leaves a linear or convolutional layer is rounded
    to `activation_bits`, with an exponent that its largest number decides. In between, sums are
    exact, as 64-bit integers would give them (float64 holds each of them). Activation functions,
    norms and the loss are computed on such numbers as the network computes them; a device has
    tables. `predict` runs in the same arithmetic.

    A shift is whole steps of the grid. A kernel (what makes one output unit, or all biases) is
    shifted in proportion to its own length, but by one step on average at least; with
    `kernelwise=False` a whole parameter is.

    `momentum` guides the sampling: z := sqrt(1 - momentum^2) n + momentum m, with n ~ N(0, I) and
    m the moving average of the past updates, at unit variance. `share` below 1 trains only that
    share of each parameter, the largest numbers when the rule is made.

    All passes of a step see the same buffers and draw the same random numbers (dropout's masks),
    and one of them is what the network and the global random state keep. The rule does the step
    itself, so an optimizer has nothing to do. The returned loss is the mean over the passes.

    Args:
        rate: the step, as a multiple of the mean shift, above 0.
        epsilon: a shift's length over its kernel's, above 0.
        directions: pairs of forward passes in a step.
        weight_bits: of each weight, 2 to 16.
        activation_bits: of what enters and leaves a layer, 2 to 16.
        kernelwise: whether each kernel is shifted in proportion to its own length.
        momentum: how much of a direction comes from past updates, at least 0 and below 1.
        share: of each parameter's numbers, the part that learns.

    Shapes: x as the network takes it; y as the loss takes it; q, d_i, z_i like w.

    Raises:
        ValueError: an option is out of its range, or nothing in the network is trainable.

    Paper: Feng, Zhuo, Zhang, Ramakrishnan, Yuan, Li, 2024, Stepping Forward on the Last Mile. It
    mostly has weights of 16 bits and activations of 8, which are options here; rounding at
    random, the least shift, and exponents that follow the numbers are choices made here.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> rule = QuantizedForwardGradient(network, directions=4)
    >>> rule(torch.randn(2, 4), torch.tensor([0, 2])).requires_grad
    False
    >>> q = network[0].weight.detach() / 2.0 ** rule.exponents[0]
    >>> torch.equal(q, q.round()), bool((q.abs() <= 127).all())
    (True, True)
    """

    updates_weights = True

    exponents: Tensor

    def __init__(self, network: nn.Module | Stages, example: Any = None, *, rate: float = 1.0,
                 epsilon: float = 0.05, directions: int = 8, weight_bits: int = 8,
                 activation_bits: int = 16, kernelwise: bool = True, momentum: float = 0.5,
                 share: float = 1.0, loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        checks.above(0, rate=rate, epsilon=epsilon, advice="try 0.1")
        checks.count(1, directions=directions, advice="try 8")
        checks.between(2, 16, weight_bits=weight_bits, activation_bits=activation_bits, whole=True,
                       advice="try 8 or 16")
        checks.between(0, 1, ends=(True, False), momentum=momentum, advice="try 0.5")
        checks.between(0, 1, ends=(False, True), share=share, advice="try 0.1")
        self.rate, self.epsilon, self.directions = rate, epsilon, directions
        self.activation_bits, self.limit = activation_bits, 2 ** (weight_bits - 1) - 1
        self.kernelwise, self.momentum, self.share, self.loss = kernelwise, momentum, share, loss
        parameters = [p.detach() for p in self.network.parameters()]
        self.register_buffer("exponents", torch.tensor(
            [int(exponent(p, weight_bits)) for p in parameters], dtype=torch.int64))
        for i, p in enumerate(parameters):
            if share < 1:
                self.register_buffer(f"chosen_{i}", _largest(p, share))
            if momentum:
                self.register_buffer(f"past_{i}", torch.zeros_like(p))

    @torch.no_grad()
    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Move the trainable weights by whole steps of their grid; return the detached loss."""
        if not any(p.requires_grad for p in self.network.parameters()):
            raise ValueError("network has no trainable parameters; set requires_grad on some")
        updates = {i: torch.zeros_like(p, dtype=torch.float64)
                   for i, p in enumerate(self.network.parameters()) if p.requires_grad}
        losses = []
        for left in range(self.directions)[::-1]:
            shifts = {i: self._shift(i) for i in updates}
            pair = [self._loss(x, y, shifts, sign, kept=not left and sign < 0) for sign in (1, -1)]
            sign = (pair[0] - pair[1]).sign()
            for i, update in updates.items():
                update += shifts[i] * (sign / self.directions).to(update)
            losses += pair
        self._step(updates)
        return torch.stack(losses).mean()

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """Return the network's scores in its own whole numbers, in eval mode, without a graph."""
        with evaluating(self), self._in_bits({}, 0):
            scores: Tensor = output_for(self.loss, self.network, x)
            return scores

    def _loss(self, x: Any, y: Tensor, shifts: Mapping[int, Tensor], sign: int, *,
              kept: bool) -> Tensor:
        """Return the loss of the shifted weights; buffers and random state change where `kept`."""
        with nullcontext() if kept else rehearsing(self.network), self._in_bits(shifts, sign):
            scores = output_for(self.loss, self.network, x)
            return checked(self.loss, mapped(scores, precise), y)

    def _step(self, updates: Mapping[int, Tensor]) -> None:
        parameters = list(self.network.parameters())
        for i, update in updates.items():
            p = parameters[i]
            dice = self._drawn(update).uniform_(generator=self.generator).to(update.device)
            q = self._whole(i, p) - (self.rate * update + dice).floor()
            p.copy_(q.clamp_(-self.limit, self.limit) * 2.0 ** self.exponents[i])
            if self.momentum:
                self.get_buffer(f"past_{i}").lerp_(update.to(p.dtype), 1 - self.momentum)
        torch.clear_autocast_cache()  # it may hold the weights as they were

    def _drawn(self, like: Tensor) -> Tensor:
        """Return an empty tensor where random numbers are to be drawn."""
        return torch.empty_like(like, device=None if self.generator is None else
                                self.generator.device)

    def _whole(self, i: int, p: Tensor) -> Tensor:
        """Return the whole numbers q that stand for parameter `i`."""
        q = p.detach().to(torch.float64) * 2.0 ** -self.exponents[i]
        return q.round().clamp_(-self.limit, self.limit)

    def _shift(self, i: int) -> Tensor:
        """Draw by how many steps to shift parameter `i`."""
        q = self._whole(i, list(self.network.parameters())[i])
        z = self._drawn(q).normal_(generator=self.generator).to(q.device)
        if self.momentum:
            past = self.get_buffer(f"past_{i}").to(q)
            spread = past.square().mean().sqrt()
            if spread > 0:
                z = (1 - self.momentum ** 2) ** 0.5 * z + self.momentum * past / spread
        chosen = torch.ones_like(q)
        if self.share < 1:
            chosen = self.get_buffer(f"chosen_{i}").to(q)
            z, q = z * chosen, q * chosen
        kernels = (len(q), -1) if self.kernelwise and q.ndim > 1 else (1, -1)
        length = torch.maximum(self.epsilon * q.view(kernels).norm(dim=1),
                               chosen.view(kernels).sum(1).sqrt())
        drawn = z.view(kernels).norm(dim=1).clamp_min(1e-300)
        return (z.view(kernels) * (length / drawn).unsqueeze(1)).round().view_as(q)

    @contextmanager
    def _in_bits(self, shifts: Mapping[int, Tensor], sign: int) -> Iterator[None]:
        """Let the network run on whole weights, shifted by `sign` times `shifts`, in the body."""
        parameters = list(self.network.parameters())
        before = [p.data for p in parameters]
        torch.clear_autocast_cache()
        try:
            for i, (p, w) in enumerate(zip(parameters, before, strict=True)):
                q = self._whole(i, w)
                if i in shifts:
                    q = (q + sign * shifts[i]).clamp_(-self.limit, self.limit)
                p.data = (q * 2.0 ** self.exponents[i]).to(w.dtype)
            with _WholeLayers(self.activation_bits):
                yield
        finally:
            for p, w in zip(parameters, before, strict=True):
                p.data = w
            torch.clear_autocast_cache()


class _WholeLayers(TorchFunctionMode):
    """Compute linear and convolutional layers as whole numbers would: rounded, then exactly."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def __torch_function__(self, function: Any, types: Any, args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if function not in _LAYERS:
            return function(*args, **kwargs)
        at = _LAYERS[function]
        given = [*args] if len(args) > at else [*args, kwargs["input"]]
        kept = {key: _wide(value) for key, value in kwargs.items() if key != "input"}
        whole = [rounded(value, self.bits) if i == at else _wide(value)
                 for i, value in enumerate(given)]
        return rounded(function(*whole, **kept), self.bits).to(given[at].dtype)


def exponent(values: Tensor, bits: int) -> Tensor:
    """Return the least a for which 2^a times the numbers of so many bits reach all `values`.

    >>> exponent(torch.tensor([0.5, -1.0]), 8)
    tensor(-6., dtype=torch.float64)
    """
    limit = 2 ** (bits - 1) - 1
    largest = values.detach().abs().amax().to(torch.float64)
    return torch.where(largest > 0, (largest / limit).log2().ceil(), float(1 - bits))


def rounded(values: Tensor, bits: int) -> Tensor:
    """Return `values` as whole numbers of so many bits times a power of two, in float64.

    >>> rounded(torch.tensor([1.0, 0.3]), 3)
    tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    step = 2.0 ** exponent(values, bits)
    return (values.to(torch.float64) / step).round() * step


def _wide(value: Any) -> Any:
    return value.to(torch.float64) if isinstance(value, Tensor) else value


def _largest(values: Tensor, share: float) -> Tensor:
    """Return which of `values` are the so many largest, at least one."""
    count = math.ceil(share * values.numel())
    chosen = torch.zeros_like(values, dtype=torch.bool).flatten()
    chosen[values.abs().flatten().topk(count).indices] = True
    return chosen.view_as(values)
