from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

from netwright.losses import cross_entropy
from netwright.rules.forward._forward_mode import (
    DirectionalDerivative,
    draw,
    random_state,
    run_with,
)
from netwright.rules.rule import Rule, check_labels
from netwright.stages import Stages, call, stages


class ForwardGradient(Rule):
    """Train with the loss's slope in random directions, found without a backward pass.

    `perturb="weights"`:  g = mean_k (dL/dw . v_k) v_k;  v_k ~ N(0, I), or -1 and 1 evenly.
    `perturb="activities"`, in hidden stages:  s_kn = e_n . sum_i (do_n/dh_i) v_ki;
    dL/dh_in := mean_k s_kn v_kin;  dL/dw_i := (dh_i/dw_i)^T dL/dh_i;  e = dL/do in the last stage.

    Both are unbiased: E[g] is the exact gradient. The variance grows with the number of numbers
    perturbed and falls with `directions`, which are averaged, `chunk` of them in one vectorised
    pass (one by one where the network does not allow that).

    Weights: one forward-mode pass for each chunk; nothing is stored for backward, and the
    network need not be a chain of stages. Activities: each sample n has its own slope, so its
    estimate is free of the other samples' noise; differentiation backwards happens within the
    loss (e) and within each stage (dh_i/dw_i), never from stage to stage, and the stages'
    activations are stored. Where samples depend on each other (batch norm in training, graphs),
    which is found out at the first batch, the slope is the sum over samples, as it must be for
    the estimate to stay unbiased. Stages without trainable parameters are not perturbed. What is
    perturbed is a stage's output, behind its activation function where that is part of the stage.

    Under autocast the forward-mode passes keep the parameters' own precision, since PyTorch's
    derivatives of norms do not follow autocast's dtypes.

    Shapes: x as the network takes it; y as the loss takes it; h_i (batch, *size_i);
    o (batch, *, classes); v_k like what it perturbs.

    Raises:
        ValueError: an option is not one of those above, or nothing in the network is trainable.
        TypeError: an operation of the network has no forward-mode derivative.

    Papers: Baydin, Pearlmutter, Syme, Wood, Torr, 2022, Gradients without Backpropagation
    (weights); Ren, Kornblith, Liao, Hinton, 2023, Scaling Forward Gradient With Local Losses
    (activities; its local losses are not part of this rule, and it perturbs the last stage too,
    where e is known here).

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> rule = ForwardGradient(network, directions=16)
    >>> rule(torch.randn(2, 4), torch.tensor([0, 2])).requires_grad
    False
    >>> network[0].weight.grad.shape
    torch.Size([8, 4])
    """

    search: ClassVar = {"perturb": ["weights", "activities"], "directions": [1, 16]}

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 perturb: Literal["weights", "activities"] = "weights", directions: int = 1,
                 distribution: Literal["normal", "rademacher"] = "normal", chunk: int = 16,
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        if perturb not in ("weights", "activities"):
            raise ValueError(f"perturb must be 'weights' or 'activities', got {perturb!r}")
        if distribution not in ("normal", "rademacher"):
            raise ValueError("distribution must be 'normal' or 'rademacher', "
                             f"got {distribution!r}")
        for name, value in (("directions", directions), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.perturb, self.directions, self.distribution = perturb, directions, distribution
        self.chunk, self.loss = chunk, loss
        self.stages = stages(network, example) if perturb == "activities" else None
        self._vectorised = True
        self._mixes: bool | None = None

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add the estimated gradient to `.grad`; return the detached loss."""
        if not any(p.requires_grad for p in self.network.parameters()):
            raise ValueError("network has no trainable parameters; set requires_grad on some")
        if self.stages is None:
            return self._weights(x, y)
        return self._activities(x, y, self.stages)

    def _weights(self, x: Any, y: Tensor) -> Tensor:
        learning = [p for p in self.network.parameters() if p.requires_grad]

        def function(buffers: Sequence[Tensor], *weights: Tensor) -> Tensor:
            return run_with(self.network, lambda: self._loss(call(self.network, x), y),
                            [*self.network.buffers(), *learning], [*buffers, *weights])

        weights = [p.detach() for p in learning]
        slopes = DirectionalDerivative(self.network, function, vectorised=self._vectorised)
        estimates: list[Tensor] = []
        for directions in self._directions(weights):
            loss, slope = slopes(weights, directions)
            slope = slope / self.directions
            with torch.autocast(slope.device.type, enabled=False):
                parts = [v[0].mul_(slope[0]) if len(v) == 1 else
                         torch.tensordot(slope.to(v.dtype), v, 1) for v in directions]
            if estimates:
                torch._foreach_add_(estimates, parts)
            else:
                estimates = parts
        self._vectorised = slopes.vectorised
        for p, estimate in zip(learning, estimates, strict=True):
            p.grad = estimate if p.grad is None else p.grad.add_(estimate)
        return loss

    def _activities(self, x: Any, y: Tensor, chain: Stages) -> Tensor:
        context, outputs = chain.context(x), []

        def run(perturbations: Mapping[int, Tensor]) -> Tensor:
            h = x
            for i, stage in enumerate(chain):
                h = stage(h, context)
                h = h + perturbations[i] if i in perturbations else h
            return h

        def function(buffers: Sequence[Tensor], *perturbations: Tensor) -> Tensor:
            named = dict(zip(learning, perturbations, strict=True))
            return run_with(self.network, lambda: run(named), [*self.network.buffers()], buffers)

        slopes = DirectionalDerivative(self.network, function, vectorised=self._vectorised,
                                       state=random_state())
        h = x
        for stage in chain:
            outputs.append(stage(h, context))
            h = outputs[-1].detach()
        *hidden, logits = outputs
        leaf = h.requires_grad_()
        loss = self._loss(leaf, y)
        (error,) = torch.autograd.grad(loss, leaf)
        learning = {i: h.detach() for i, h in enumerate(hidden) if h.requires_grad}
        signals = self._signals(slopes, list(learning.values()), error)
        for i, signal in zip(learning, signals, strict=True):
            hidden[i].backward(signal)
        if logits.requires_grad:
            logits.backward(error)
        return loss.detach()

    def _signals(self, slopes: DirectionalDerivative, hidden: Sequence[Tensor],
                 error: Tensor) -> list[Tensor]:
        if not hidden:
            return []
        zeros = [torch.zeros_like(h) for h in hidden]
        if self._mixes is None and len(error) > 1:
            self._mixes = _mixes(slopes, zeros, error)
        signals = [torch.zeros_like(h) for h in hidden]
        for directions in self._directions(hidden):
            _, change = slopes(zeros, directions)
            slope = (error * change).reshape(len(change), len(error), -1).sum(2)
            if self._mixes:
                slope = slope.sum(1, keepdim=True)
            for signal, v in zip(signals, directions, strict=True):
                shape = (*slope.shape, *[1] * (v.ndim - 2))
                signal += (slope.to(v.dtype).view(shape) * v).sum(0) / self.directions
        self._vectorised = slopes.vectorised
        return signals

    def _directions(self, like: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        for start in range(0, self.directions, self.chunk):
            n = min(self.chunk, self.directions - start)
            yield [draw(self.distribution, (n, *t.shape), t, self.generator) for t in like]

    def _loss(self, output: Tensor, y: Tensor) -> Tensor:
        if self.loss is cross_entropy:
            check_labels(y, output.shape[-1])
        return self.loss(output, y)


def _mixes(slopes: DirectionalDerivative, zeros: Sequence[Tensor], error: Tensor) -> bool:
    """Return whether a change in every second sample changes the others' outputs."""
    if any(len(z) != len(error) for z in zeros):
        return True
    generator = Generator().manual_seed(0)
    directions = [draw("normal", z.shape, z, generator) for z in zeros]
    for v in directions:
        v[1::2] = 0
    _, change = slopes(zeros, [v.unsqueeze(0) for v in directions])
    return bool(change[0, 1::2].any())
