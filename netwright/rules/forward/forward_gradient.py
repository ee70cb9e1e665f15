from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import Parameter

from netwright import checks
from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.auxiliary_heads import AuxiliaryHead, needed, signals
from netwright.rules.forward._forward_mode import (
    DirectionalDerivative,
    RandomState,
    draw,
    random_state,
    run_with,
)
from netwright.rules.forward._guesses import one_by_one, owned
from netwright.rules.mixing import Mixing
from netwright.rules.readout import count_classes, first_parameter, without_padding
from netwright.rules.rule import Rule, chain_of, check_labels, output_for
from netwright.stages import Stages

__all__ = ["ForwardGradient"]


@method(
    "rule",
    papers=["001-112", "003-044"],
    saves=["backpropagation", "training memory"],
    needs=["labels"],
    search={"perturb": ["weights", "activities"], "directions": [1, 16]},
    variants={"plain": {}, "activities": {"perturb": "activities"},
              "three directions": {"directions": 3}, "guided": {"guess": "local_loss"},
              "guided activities": {"perturb": "activities", "guess": "local_loss"}},
)
class ForwardGradient(Rule):
    """Train with the loss's slope in guessed directions, found without a backward pass.

    `perturb="weights"`:  g = mean_k (dL/dw . v_k) v_k;  v_k ~ N(0, I), or -1 and 1 evenly.
    `perturb="activities"`, in hidden stages:  s_kn = e_n . sum_i (do_n/dh_i) v_ki;
    dL/dh_in := mean_k s_kn v_kin;  dL/dw_i := (dh_i/dw_i)^T dL/dh_i;  e = dL/do in the last stage.

    Both are unbiased: E[g] is the exact gradient. The variance grows with the number of numbers
    perturbed and falls with `directions`, which are averaged, `chunk` of them in one vectorised
    pass (one by one where the network does not allow that).

    `guess="local_loss"`:  l_i = loss(head_i(h_i), y);  u_i = dl_i/dw_i, or dl_i/dh_in;
    g_i = (dL/dw_i . u_i) u_i / |u_i|^2, likewise dL/dh_in, and exactly in the last stage.

    So each hidden stage has one direction, its own, towards less of the loss that a small network
    reads off its output (as in `LocalLosses`; the heads descend theirs), and the gradient is
    projected on it: g is the part of the gradient that the guess has hit, never longer than it,
    and biased. `directions` and `distribution` have no part in it.

    Weights: one forward-mode pass for each chunk; nothing is stored for backward, and the
    network need not be a chain of stages. Activities: each sample n has its own slope, so its
    estimate is free of the other samples' noise; differentiation backwards happens within the
    loss (e) and within each stage (dh_i/dw_i), never from stage to stage, and the stages'
    activations are stored. Where samples depend on each other (batch norm in training, graphs),
    which is found out at the first batch in each mode, the slope is the sum over samples, as it
    must be for the estimate to stay unbiased. Stages without trainable parameters are not
    perturbed. What is perturbed is a stage's output, behind its activation function where that is
    part of the stage.
    A guess of local losses is found by differentiating backwards within a head and its stage.

    Under autocast the forward-mode passes keep the parameters' own precision, since PyTorch's
    derivatives of norms do not follow autocast's dtypes.

    Args:
        perturb: "weights" or "activities".
        directions: that are averaged.
        distribution: "normal" or "rademacher", of the directions.
        guess: "isotropic" or "local_loss".
        width: units of the hidden layer of a guessing head.
        num_classes: of the heads; by default the width of the network's output.
        chunk: directions in one vectorised pass.

    Shapes: x as the network takes it; y as the loss takes it; h_i (batch, *size_i);
    o (batch, *, classes); v_k, u_i like what they perturb.

    Raises:
        ValueError: an option is not one of those above, nothing in the network is trainable, or
            `num_classes` or an example is needed for the heads and missing.
        TypeError: an operation of the network has no forward-mode derivative.

    Papers: Baydin, Pearlmutter, Syme, Wood, Torr, 2022, Gradients without Backpropagation
    (weights); Ren, Kornblith, Liao, Hinton, 2023, Scaling Forward Gradient With Local Losses
    (activities; its local losses are not part of this rule, and it perturbs the last stage too,
    where e is known here); Fournier, Rivaud, Belilovsky, Eickenberg, Oyallon, 2023, Can Forward
    Gradient Match Backpropagation? (local guesses of the global target; for weights it projects
    each sample's guess for each layer, here it is the batch's for each stage. With local targets
    a local guess is `LocalLosses`).

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> rule = ForwardGradient(network, directions=16)
    >>> rule(torch.randn(2, 4), torch.tensor([0, 2])).requires_grad
    False
    >>> network[0].weight.grad.shape
    torch.Size([8, 4])
    >>> [type(head).__name__ for head in ForwardGradient(network, guess="local_loss").heads]
    ['AuxiliaryHead']
    """

    @property
    def same_in_shares(self) -> bool:  # type: ignore[override]
        """Not where each sample's activities are perturbed, or the batch guesses for weights."""
        return (self.perturb == "activities") == (self.guess == "local_loss")

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 perturb: Literal["weights", "activities"] = "weights", directions: int = 1,
                 distribution: Literal["normal", "rademacher"] = "normal",
                 guess: Literal["isotropic", "local_loss"] = "isotropic",
                 width: int = 128, num_classes: int | None = None, chunk: int = 16,
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        for name, value, known in (("perturb", perturb, ("weights", "activities")),
                                   ("distribution", distribution, ("normal", "rademacher")),
                                   ("guess", guess, ("isotropic", "local_loss"))):
            if value not in known:
                raise ValueError(f"{name} must be {known[0]!r} or {known[1]!r}, got {value!r}")
        checks.count(1, directions=directions, chunk=chunk, width=width)
        self.perturb, self.directions, self.distribution = perturb, directions, distribution
        self.guess, self.chunk, self.loss = guess, chunk, loss
        chained = perturb == "activities" or guess == "local_loss"
        self.stages = chain_of(self, network, example, loss, apart=False) if chained else None
        self.heads = nn.ModuleList()
        if self.stages is not None and guess == "local_loss":
            found, last = signals(self.stages, example)
            classes = count_classes(self.stages, num_classes, last)
            self.heads.extend(
                AuxiliaryHead(needed(signal, self.stages, name), classes, width=width,
                              like=first_parameter(self.stages), generator=generator)
                for signal, name in zip(found[:-1], self.stages.names, strict=False))
        self._vectorised = True
        self._mixing = Mixing(self.network)

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add the estimated gradient to `.grad`; return the detached loss."""
        learning = [p for p in self.network.parameters() if p.requires_grad]
        if not learning:
            raise ValueError("network has no trainable parameters; set requires_grad on some")
        if self.perturb == "activities":
            assert self.stages is not None
            return self._activities(x, y, self.stages)
        if self.guess == "local_loss":
            assert self.stages is not None
            return self._guided_weights(x, y, self.stages)
        slopes = self._slopes(x, y, learning)
        loss, estimates = self._weights(slopes, learning, self._directions(learning))
        _add(zip(learning, estimates, strict=True))
        return loss

    def _slopes(self, x: Any, y: Tensor, learning: Sequence[Parameter],
                state: RandomState | None = None) -> DirectionalDerivative:
        """Return the loss as a function of the parameters `learning`."""
        def function(buffers: Sequence[Tensor], *weights: Tensor) -> Tensor:
            def run() -> Tensor:
                return self._loss(output_for(self.loss, self.network, x), y)
            return run_with(self.network, run, [*self.network.buffers(), *learning],
                            [*buffers, *weights])

        return DirectionalDerivative(self.network, function, vectorised=self._vectorised,
                                     state=state)

    def _weights(self, slopes: DirectionalDerivative, learning: Sequence[Parameter],
                 guesses: Iterable[Sequence[Tensor]]) -> tuple[Tensor, list[Tensor]]:
        """Return the loss, and the sum of the guesses times their slopes."""
        weights = [p.detach() for p in learning]
        estimates: list[Tensor] = []
        for directions in guesses:
            loss, slope = slopes(weights, directions)
            slope = slope * self._share
            with torch.autocast(slope.device.type, enabled=False):
                parts = [v[0].mul_(slope[0]) if len(v) == 1 else
                         torch.tensordot(slope.to(v.dtype), v, 1) for v in directions]
            if estimates:
                torch._foreach_add_(estimates, parts)
            else:
                estimates = parts
        self._vectorised = slopes.vectorised
        return loss, estimates

    def _guided_weights(self, x: Any, y: Tensor, chain: Stages) -> Tensor:
        """Project the gradient of each hidden stage on that of the stage's own loss."""
        groups = [group for group in owned(chain)[:-1] if group]
        learning = [p for group in groups for p in group]
        slopes = self._slopes(x, y, learning, random_state())
        context, h = chain.context(x), x
        gradients: dict[Parameter, Tensor] = {}
        for stage, head in zip(chain, [*self.heads, None], strict=True):
            output = stage(h, context)
            h = output.detach()
            if head is None or output.requires_grad:
                loss, signal = self._own_loss(head, h, x, y, gradients)
            if output.requires_grad:
                _differentiate(output, stage.parameters(), signal, gradients)
        if learning:
            guesses = one_by_one([[gradients.get(p, torch.zeros_like(p)) for p in group]
                                  for group in groups], self.chunk)
            gradients.update(zip(learning, self._weights(slopes, learning, guesses)[1],
                                 strict=True))
        _add(gradients.items())
        return loss

    def _own_loss(self, head: nn.Module | None, h: Tensor, x: Any, y: Tensor,
                  gradients: dict[Parameter, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss that `head` sees in `h` and its gradient; put down the head's own."""
        leaf = h.detach().requires_grad_()
        loss = self._loss(leaf if head is None else head(leaf, y, x), y)
        (signal,) = _differentiate(loss, [] if head is None else head.parameters(), None,
                                   gradients, leaf)
        return loss.detach(), signal

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
        h, guesses = x, []
        gradients: dict[Parameter, Tensor] = {}
        for i, stage in enumerate(chain):
            outputs.append(stage(h, context))
            h = outputs[-1].detach()
            if i < len(self.heads) and outputs[-1].requires_grad:
                guesses.append(self._own_loss(self.heads[i], h, x, y, gradients)[1])
        *hidden, logits = outputs
        loss, error = self._own_loss(None, h, x, y, gradients)
        learning = {i: h.detach() for i, h in enumerate(hidden) if h.requires_grad}
        signals = self._signals(x, slopes, list(learning.values()), error, guesses)
        for i, signal in zip(learning, signals, strict=True):
            hidden[i].backward(without_padding(x, signal))
        if logits.requires_grad:
            logits.backward(error)
        _add(gradients.items())
        return loss

    def _signals(self, x: Any, slopes: DirectionalDerivative, hidden: Sequence[Tensor],
                 error: Tensor, guesses: Sequence[Tensor]) -> list[Tensor]:
        if not hidden:
            return []
        zeros = [torch.zeros_like(h) for h in hidden]
        mixes = self._mixing.found(x, lambda: _mixes(slopes, zeros, error), rows=len(error))
        signals = [torch.zeros_like(h) for h in hidden]
        for directions in (one_by_one([[g] for g in guesses], self.chunk, rows=not mixes)
                           if guesses else self._directions(hidden)):
            _, change = slopes(zeros, directions)
            slope = (error * change).reshape(len(change), len(error), -1).sum(2) * self._share
            if mixes:
                slope = slope.sum(1, keepdim=True)
            for signal, v in zip(signals, directions, strict=True):
                shape = (*slope.shape, *[1] * (v.ndim - 2))
                signal += (slope.to(v.dtype).view(shape) * v).sum(0)
        self._vectorised = slopes.vectorised
        return signals

    @property
    def _share(self) -> float:
        """What each direction counts: random ones are averaged, a stage's only one is not."""
        return 1.0 if self.guess == "local_loss" else 1 / self.directions

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


def _differentiate(output: Tensor, parameters: Iterable[Parameter], signal: Tensor | None,
                   gradients: dict[Parameter, Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
    """Add to `gradients` what `output` says of the `parameters`; return its own of the `leaves`."""
    own = [p for p in parameters if p.requires_grad]
    first, found = len(leaves), torch.autograd.grad(output, [*leaves, *own], signal,
                                                    allow_unused=True)
    for p, gradient in zip(own, found[first:], strict=True):
        if gradient is not None:
            gradients[p] = gradients[p] + gradient if p in gradients else gradient
    return found[:first]


def _add(gradients: Iterable[tuple[Parameter, Tensor]]) -> None:
    for p, gradient in gradients:
        p.grad = gradient if p.grad is None else p.grad.add_(gradient)
