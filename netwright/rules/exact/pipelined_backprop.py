from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import Parameter

from netwright import checks
from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.rule import Rule, chain_of, checked, output_for
from netwright.stages import Stages

__all__ = ["PipelinedBackprop"]


@method("rule", papers=["003-048"], needs=["labels", "a chain of stages"],
        variants={"plain": {}, "predicted": {"spike_compensation": False},
                  "difference": {"prediction": "difference"},
                  "stashed": {"spike_compensation": False, "prediction": None, "stash": True}})
class PipelinedBackprop(Rule):
    """Train as a pipeline does that never waits: with gradients of weights that are steps old.

    Sample t enters the pipeline at step t; of n stages, stage s (the first is 0) sees its gradient
    D = 2 (n - 1 - s) steps after it ran it forward. Forward runs on f_{t-D}, backward on w_t:
    f_t = w_t + T (what a step is expected to move them by),  T = horizon D;  that is
    (w_t - w_{t-1}) in `prediction="difference"`, -rate v_t, the momentum's velocity, in
    `"velocity"`, 0 in None.  g_t is what backward finds.  `.grad` += (a + b) g_t - momentum b
    g_{t-1};  a = momentum^D, b = (1 - momentum^D) / (1 - momentum) with `spike_compensation`,
    a = 1, b = 0 without.

    Nothing runs in parallel: each call is what the pipeline does with one batch, in the order in
    which each stage sees its forward and backward steps, so weights and gradients are those of
    the pipeline. In its first D steps a stage runs forward on its first weights.

    The paper steps the weights by w := w - rate (a v + b g), where v := momentum v + g. What is
    added to `.grad` makes `torch.optim.SGD` with that momentum do so, and the velocity is read off
    the weights' own moves, since rate v_t = (w_{t-1} - w_t + momentum b rate v_{t-1}) / (a + b).
    So any optimizer does, with its learning-rate schedule; give `momentum` as it has it (Adam:
    the first beta). Weight decay is not compensated, and velocities are off for a step where the
    rate jumps.

    `stash=True` keeps the weights that ran forward for backward. `delays` gives every stage's D;
    with all 0 the rule is backpropagation, bit for bit. A parameter of several stages has the
    delay of the first. Calls between two steps of the optimizer add up to one update; a step is
    noticed by the weights' having moved.

    Args:
        momentum: of the optimizer, at least 0 and below 1.
        spike_compensation: whether a late gradient is made up for by a larger part at once.
        prediction: "velocity", "difference" or None: how weights are expected to move meanwhile.
        horizon: the part of the delay that is predicted.
        stash: whether backward runs on the weights that ran forward.
        delays: D of each stage, in steps; by default what the pipeline gives.

    Shapes: f_t and w_t as the parameter, of which D + 1 are kept; x and y as the network and the
    loss take them.

    Raises:
        ValueError: `momentum`, `horizon` or `delays` is not as above, a weight has no shape yet or
            was frozen when the rule was made, or nothing in the network is trainable.
        UnknownName: `prediction` is none of those above.

    Paper: Kosson, Chiley, Venigalla, Hestness, Köster, 2021, Pipelined Backpropagation at Scale:
    Training Large Models without Batches.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> rule = PipelinedBackprop(network, momentum=0.99)
    >>> rule.delays
    [2, 0]
    >>> rule(torch.randn(1, 4), torch.tensor([2])).requires_grad
    False
    """

    remembers = True
    keeps_activations = True

    @property
    def same_in_shares(self) -> bool:  # type: ignore[override]
        """Not where the last gradient of the share is kept to make up for a delay."""
        return not self.spike_compensation

    def __init__(self, network: nn.Module | Stages, example: Any = None, *, momentum: float = 0.9,
                 spike_compensation: bool = True,
                 prediction: Literal["velocity", "difference"] | None = "velocity",
                 horizon: float = 1.0, stash: bool = False, delays: Sequence[int] | None = None,
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        checks.between(0, 1, ends=(True, False), momentum=momentum, advice="give the optimizer's, "
                       "which scaled_to_batch finds for small batches")
        checks.one_of(["velocity", "difference"], prediction=prediction, optional=True)
        checks.at_least(0, horizon=horizon, advice="it is in times of the delay; try 1")
        self.stages, self.loss = chain_of(self, network, example, loss, apart=False), loss
        n = len(self.stages)
        self.delays = [2 * (n - 1 - s) for s in range(n)] if delays is None else list(delays)
        if len(self.delays) != n or min(self.delays) < 0:
            raise ValueError(f"delays must be {n} whole numbers of steps, one for each stage, got "
                             f"{self.delays}; leave it out for those of a pipeline")
        self.momentum, self.prediction, self.horizon = momentum, prediction, horizon
        self.spike_compensation, self.stash = spike_compensation, stash
        self._delays = self._by_name()  # of the parameters that have one
        delayed = [self.network.get_parameter(name) for name in self._delays]
        now = _vector(delayed) if delayed else torch.zeros(0)
        self.seen: Tensor
        self.velocity: Tensor
        self.gradient: Tensor
        self.before: Tensor
        self.updates: Tensor
        self.calls: Tensor
        self.register_buffer("seen", now)
        for name in ("velocity", "gradient", "before"):
            self.register_buffer(name, torch.zeros_like(now))
        self.register_buffer("updates", torch.tensor(0))
        self.register_buffer("calls", torch.tensor(0))  # since the last update
        self._sizes = [p.numel() for p in delayed]
        # Stages' weights lie one after another; those of one delay are dealt with together.
        runs = [(delay, sum(size for _, size in run)) for delay, run in groupby(
            zip(self._delays.values(), self._sizes, strict=True), key=itemgetter(0))]
        self._runs, self._lengths = [delay for delay, _ in runs], [size for _, size in runs]
        for i, (delay, part) in enumerate(zip(self._runs, now.split(self._lengths), strict=True)):
            self.register_buffer(f"forward_weights_{i}", part.repeat(delay + 1, 1))

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add the delayed gradient to `.grad`; return the detached loss on the old weights."""
        parameters = dict(self.network.named_parameters())
        learning = {name: p for name, p in parameters.items() if p.requires_grad}
        if not learning:
            raise ValueError("network has no trainable parameters; set requires_grad on some")
        delayed = [parameters[name] for name in self._delays]
        if delayed:
            self._advance(_vector(delayed))
        with self._forward_weights(delayed):
            loss = checked(self.loss, output_for(self.loss, self.network, x), y)
        if not loss.requires_grad:
            raise ValueError("network has no trainable parameters; set requires_grad on some")
        gradients = torch.autograd.grad(loss, list(learning.values()), allow_unused=True)
        with torch.no_grad():
            found = dict(zip(learning, gradients, strict=True))
            if self.spike_compensation and delayed:
                found |= self._compensated(delayed, [found.get(name) for name in self._delays])
            for name, p in learning.items():
                g = found[name]
                if p.grad is None:
                    p.grad = g
                elif g is not None:
                    p.grad += g
            self.calls += 1
        return loss.detach()

    def _by_name(self) -> dict[str, int]:
        """Return the delay of every parameter that has one, by the parameter's name."""
        found: dict[str, int] = {}
        names = {id(p): name for name, p in self.network.named_parameters()}
        for stage, delay in zip(self.stages, self.delays, strict=True):
            for p in stage.parameters():
                if nn.parameter.is_lazy(p):
                    raise ValueError(f"{names[id(p)]} must have a shape to be remembered, got a "
                                     "lazy one; run the network on an input first")
                found.setdefault(names[id(p)], delay)
        return {name: delay for name, delay in found.items() if delay}

    def _scale(self, vector: Tensor, by: Callable[[int], float]) -> Tensor:
        """Multiply the weights' numbers in `vector` by what `by` makes of their delays."""
        torch._foreach_mul_(vector.split(self._lengths), [by(delay) for delay in self._runs])
        return vector

    def _whole(self, delay: int) -> float:
        """Return a + b."""
        return self.momentum ** delay + (1 - self.momentum ** delay) / (1 - self.momentum)

    def _past(self, delay: int) -> float:
        """Return momentum b."""
        return self.momentum * (1 - self.momentum ** delay) / (1 - self.momentum)

    @torch.no_grad()
    def _advance(self, now: Tensor) -> None:
        """Take note of the weights where a step has moved them."""
        if torch.equal(now, self.seen):
            return
        begun = bool(self.calls) or bool(self.updates)
        if begun:
            self.updates += 1
            moved = now - self.seen
            if self.spike_compensation:
                self._scale(self.velocity, self._past).add_(moved)
                self._scale(self.velocity, lambda delay: 1 / self._whole(delay))
            else:
                self.velocity.copy_(moved)
            expected = moved if self.prediction == "difference" else self.velocity
            ahead = now
            if self.prediction is not None:
                ahead = now + self._scale(expected.clone(), lambda delay: self.horizon * delay)
            for i, part in enumerate(ahead.split(self._lengths)):
                ring = self.get_buffer(f"forward_weights_{i}")
                ring[int(self.updates) % len(ring)] = part
        else:  # other weights were put in before the first call
            for i, part in enumerate(now.split(self._lengths)):
                self.get_buffer(f"forward_weights_{i}").copy_(part)
        self.seen.copy_(now)
        self.before.copy_(self.gradient)
        self.gradient.zero_()
        self.calls.zero_()

    @contextmanager
    def _forward_weights(self, parameters: Sequence[Parameter]) -> Iterator[None]:
        """Let the body run on the old weights, and what it leaves for backward hold the new."""
        cached, updates = torch.is_autocast_cache_enabled(), int(self.updates)
        new, rows = [p.data for p in parameters], []
        for i in range(len(self._runs)):
            ring = self.get_buffer(f"forward_weights_{i}")  # of D + 1 rows, the next one oldest
            rows.append(ring[(updates + 1) % len(ring)])
        parts = torch.cat(rows).split(self._sizes) if rows else []
        old = [part.view(p.shape).to(p.dtype) for p, part in zip(parameters, parts, strict=True)]
        torch.set_autocast_cache_enabled(False)  # it would keep the old weights
        try:
            for p, weights in zip(parameters, old, strict=True):
                p.data = weights
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)
            for p, weights in zip(parameters, new, strict=True):
                p.data = weights
            if old and not self.stash:
                # The graph's own views hold the new weights from now on; no version of a tensor
                # tells, since that of `p` is counted apart.
                torch._foreach_copy_(old, new)

    def _compensated(self, parameters: Sequence[Parameter],
                     found: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Return delayed weights' gradients with what spike compensation makes of them."""
        g = _vector([torch.zeros_like(p) if part is None else part
                     for p, part in zip(parameters, found, strict=True)])
        total = self._scale(g.clone(), self._whole)
        if not self.calls:
            total -= self._scale(self.before.clone(), self._past)
        self.gradient += g
        return {name: part.view(p.shape).to(p.dtype) for name, p, part in zip(
            self._delays, parameters, total.split(self._sizes), strict=True) if p.requires_grad}


def _vector(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def scaled_to_batch(rate: float, momentum: float, batch_size: int,
                    new_batch_size: int = 1) -> tuple[float, float]:
    """Return the learning rate and momentum that suit another batch size as the given ones do.

    momentum' = momentum^(new / old);  rate' = rate (1 - momentum') new / ((1 - momentum) old).

    A gradient's weight falls by as much over as many samples, and each sample's gradient moves the
    weights as far in all.

    Raises:
        ValueError: `momentum` is not at least 0 and below 1, or a batch size is below 1.

    >>> rate, momentum = scaled_to_batch(0.1, 0.9, batch_size=128)
    >>> f"{rate:.2e} {momentum:.5f}"
    '6.43e-06 0.99918'
    """
    checks.between(0, 1, ends=(True, False), momentum=momentum, advice="try 0.9")
    checks.count(1, batch_size=batch_size, new_batch_size=new_batch_size)
    share = new_batch_size / batch_size
    scaled = momentum ** share
    return rate * share * (1 - scaled) / (1 - momentum), scaled
