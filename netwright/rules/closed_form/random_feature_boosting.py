import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from netwright import checks
from netwright.catalogue.facets import method
from netwright.numerics.closed_form import boosted_map, linear_readout, loss
from netwright.rules.readout import mean_of_tokens
from netwright.rules.residual_path import is_added
from netwright.rules.rule import Rule, chain_of, check_labels
from netwright.runtime.modes import evaluating
from netwright.stages import Stages, call
from netwright.stages.stage import Stage

__all__ = ["RandomFeatureBoosting"]

Loss = Literal["cross_entropy", "squared"]


@method(
    "rule",
    papers=["003-072"],
    saves=["backpropagation", "training time"],
    needs=["labels", "a residual network"],
    search={"ridge": (1e-3, 10.0), "ridge_readout": (1e-5, 0.1)},
    variants={"plain": {}, "squared loss": {"output_loss": "squared"},
              "kept samples": {"keep": 6}},
)
class RandomFeatureBoosting(Rule):
    """Train each residual stage's last layer in closed form, to lower the loss of a linear readout.

    In a residual stage, h_i = phi + Delta f + c, f is what its last linear layer (Delta, c) reads,
    and phi what the stage returns without it. From the first such stage to the last, once:

    W, b    the readout of phi: argmin L(W phi + b, y) + ridge_readout |W|², L halved if squared
    G       the steepest descent of L by phi, (y - p) W, scaled to mean square 1
    Delta   argmin |G - f Delta|²/n + ridge |Delta|², f less its mean, which c takes up
    Delta   times shrinkage and the step with the least loss of (W, b)

    so that no stage raises the loss of the readout before it. At last the network's last layer is
    fitted as the readout of what it reads. Everything else, so also each hidden stage that is not
    residual or ends in no linear layer, stays as it was drawn, and is random features. A network
    without residual stages becomes a ridge regression or a logistic regression of them.

    A stage between the first and the last is residual if its output is its input plus something;
    that, and that its last linear layer is added unchanged, is read off the graph. A layer with a
    frozen parameter stays as it is. The network runs in eval mode throughout: no dropout, and
    norms as they are. Where tokens share a label, the readout is of their mean.

    A call fits everything anew, so the batch should be the whole training set. For mini-batches
    `keep` is the number of samples in the training set: that many, the latest, stay in buffers of
    the rule, and each call fits to all of them; the last call of an epoch then to each sample
    once. With `keep=0` a call fits to its batch alone, and what remains is the last batch's.

    `output_loss="squared"`, ½|y - scores|², takes floating-point y (batch, outputs) too. Labels of
    -100 are left out. The returned loss is the mean over the batch before the call.

    The paper's blocks read the input besides phi, and end in a batch norm; here a block is what
    the network has. Its closed form for the squared loss alone is not here.

    Args:
        ridge: what the size of a stage's last layer costs, above 0.
        ridge_readout: what the size of the readout costs, above 0.
        shrinkage: the part of each stage's best step that is taken, at most 1.
        output_loss: "cross_entropy" or "squared".
        keep: samples of the training set to keep, 0 to fit each batch by itself.

    Shapes: f (n, features); phi and G (n, width); W (outputs, width), n counting samples, or
    tokens that have labels of their own; y (batch, *tokens), or (batch, *tokens, outputs).

    Raises:
        ValueError: a number is out of range; the network does not end in a linear layer; a layer
            to be fitted shares its weights; `keep` is below the batch, or needs an example.
        UnknownName: `output_loss` is none of those that are known.

    Paper: Zozoulenko, Cass, Gonon, 2025, Random Feature Representation Boosting.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> x, y = torch.randn(20, 4), torch.randint(3, (20,))
    >>> rule = RandomFeatureBoosting(network)
    >>> float(rule(x, y)) > float(rule(x, y))
    True
    """

    kept_x: Tensor
    kept_y: Tensor
    seen: Tensor
    updates_weights = True

    def __init__(self, network: nn.Module | Stages, example: Any = None, *, ridge: float = 0.1,
                 ridge_readout: float = 0.01, shrinkage: float = 1.0,
                 output_loss: Loss = "cross_entropy", keep: int = 0,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        checks.one_of(get_args(Loss), output_loss=output_loss)
        checks.above(0, ridge=ridge, ridge_readout=ridge_readout, advice="try the default")
        checks.between(0, 1, ends=(False, True), shrinkage=shrinkage,
                       advice="1 takes the whole step")
        checks.count(0, keep=keep)
        self.ridge, self.ridge_readout, self.shrinkage = ridge, ridge_readout, shrinkage
        self.output_loss, self.squared, self.keep = output_loss, output_loss == "squared", keep
        self.stages = chain_of(self, network, example, apart=False)
        if keep:
            self._make_room(_single(example))

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Fit the layers anew and change the weights; return the mean loss before."""
        x = _single(x)
        with torch.autocast(y.device.type, enabled=False), evaluating(self.network):
            layers, logits = self._plan(x)
            target = self._target(y, logits)
            known = target.isfinite().all(1)
            scores = _wide(logits.detach().reshape(len(target), -1))
            found = loss(scores[known], target[known], self.squared)
            if self.keep:
                self._check_room(x, logits)
            if not known.any():
                return torch.zeros_like(logits.detach().sum())
            if found.isfinite():  # otherwise there is nothing to fit to, and the loss says so
                with torch.no_grad():
                    self._fit(layers, *(self._store(x, target) if self.keep else (x, target)))
        return found.to(logits.dtype)

    # What is to be fitted

    def _plan(self, x: Any) -> tuple[list[nn.Linear | None], Tensor]:
        """Return each stage's layer to fit, None where all stays, and the network's output."""
        context, h = self.stages.context(x), x
        layers: list[nn.Linear | None] = []
        shapes = []
        for i, stage in enumerate(self.stages):
            start = h if i == 0 else h.detach().requires_grad_().view_as(h)
            with _watched(stage) as calls:
                end = stage(start, context)
            if i + 1 == len(self.stages):
                layers.append(self._last(stage, calls, end))
            elif i and end.shape == start.shape and is_added(start, end):
                added = [c.layer for c in calls if c.output.shape == end.shape
                         and is_added(c.output, end)]
                layers.append(self._own(i, added[-1], calls) if added else None)
            else:
                layers.append(None)
            shapes.append(end.shape)
            h = end.detach()
        for i, shape in enumerate(shapes):  # a readout needs as many rows as there are scores
            if shape[:-1] != h.shape[:-1] and (h.ndim != 2 or shape[0] != len(h)):
                layers[i] = None
        return layers, h

    def _last(self, stage: Stage, calls: Sequence["_Call"], logits: Tensor) -> nn.Linear | None:
        """Return the network's last layer."""
        fits = [c.layer for c in calls if c.output.shape == logits.shape
                and torch.equal(c.output.detach(), logits.detach())]
        if not fits and logits.isfinite().all():
            raise ValueError("network must end in a linear layer, whose output is the scores, and "
                             f"stage {stage.name} does not; add one")
        return self._own(len(self.stages) - 1, fits[-1], calls) if fits else None

    def _own(self, i: int, layer: nn.Linear, calls: Sequence["_Call"]) -> nn.Linear | None:
        """Return the layer of stage i if it is free, after a look at whether others use it."""
        own = list(layer.parameters())
        if not all(p.requires_grad for p in own):
            return None
        elsewhere = {id(p) for j in range(len(self.stages)) if j != i
                     for p in self.stages.parameters(j)}
        if any(id(p) in elsewhere for p in own) or sum(c.layer is layer for c in calls) > 1:
            raise ValueError("network must have weights of its own in each layer that is fitted, "
                             f"and the last of stage {self.stages.names[i]} is used twice; "
                             "untie them, or freeze it")
        return layer

    def _target(self, y: Tensor, logits: Tensor) -> Tensor:
        """Return what the scores shall be, a row for each label, NaN where there is none."""
        classes = logits.shape[-1]
        rows = logits.numel() // classes
        if self.squared and y.is_floating_point() and y.ndim > 1:
            target = _wide(y.reshape(-1, y.shape[-1]))
        else:
            check_labels(y, classes)
            target = _wide(functional.one_hot(y.reshape(-1).clamp_min(0), classes))
            target[y.reshape(-1) < 0] = math.nan
        if target.shape != (rows, classes):
            raise ValueError(f"y must have a label for each of the {rows} rows of scores, "
                             f"or {rows} x {classes} numbers, got {tuple(y.shape)}")
        return target

    # How it is fitted

    def _fit(self, layers: Sequence[nn.Linear | None], x: Any, target: Tensor) -> None:
        known = target.isfinite().all(1)
        y, context, h = target[known], self.stages.context(x), x
        readout: nn.Linear | None = None

        def rows(a: Tensor) -> Tensor:
            """Return a row of `a` for each label."""
            if a.ndim > 2 and math.prod(a.shape[:-1]) != len(target):
                a = mean_of_tokens(a.flatten(1, -2), x)
            return _wide(a.reshape(-1, a.shape[-1]))[known]

        def read(phi: Tensor, bias: bool) -> nn.Linear:
            """Return the best readout of phi, sought from where the last one was."""
            before = readout if readout is not None and bias == (readout.bias is not None) and (
                readout.in_features == phi.shape[1]) else None
            return linear_readout(phi, y, self.squared, self.ridge_readout, before, bias=bias)

        for i, (stage, layer) in enumerate(zip(self.stages, layers, strict=True)):
            if layer is None:
                h = stage(h, context)
                continue
            has_bias = layer.bias is not None
            if i + 1 < len(layers):
                _set(layer, torch.zeros(()), torch.zeros(()))
            with _watched(stage) as calls:
                phi = stage(h, context)
            f = rows(next(c.input for c in calls if c.layer is layer))
            if i + 1 == len(layers):
                readout = read(f, has_bias)
                _set(layer, readout.weight, readout.bias)
                return
            readout = read(rows(phi), True)
            mean = f.mean(0) if has_bias else torch.zeros_like(f[0])
            f = f - mean  # so that c is not penalised
            delta = self.shrinkage * boosted_map(f, readout(rows(phi)), readout.weight, y,
                                                 self.squared, self.ridge)
            _set(layer, delta.T, -mean @ delta)
            h = stage(h, context)

    # Samples that are kept

    def _make_room(self, example: Any) -> None:
        if not isinstance(example, Tensor):
            raise ValueError(f"keep={self.keep} needs example=, a tensor as the training will "
                             f"have, got {type(example).__name__}; with other inputs leave keep "
                             "at 0 and train on one batch")
        with evaluating(self.network), torch.no_grad():
            logits = call(self.network, example)
        if logits.ndim != 2:
            raise ValueError(f"keep={self.keep} needs one label for each sample, and the network "
                             f"returns {tuple(logits.shape)}; leave keep at 0")
        self.register_buffer("kept_x", example.new_zeros(self.keep, *example.shape[1:]))
        self.register_buffer("kept_y", logits.new_zeros(self.keep, logits.shape[1]))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64, device=logits.device))

    def _check_room(self, x: Any, logits: Tensor) -> None:
        if not isinstance(x, Tensor) or x.shape[1:] != self.kept_x.shape[1:]:
            raise ValueError(f"x must be a tensor of samples {tuple(self.kept_x.shape[1:])}, as "
                             "example= was, where keep is above 0; leave keep at 0 for others")
        if len(logits) > self.keep:
            raise ValueError(f"keep must be 0 or at least the {len(logits)} samples of the batch, "
                             f"got {self.keep}; give the number of samples in the training set")

    def _store(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the batch in place of the oldest samples; return all that are kept."""
        seen = int(self.seen)
        at = (seen + torch.arange(len(x), device=self.kept_x.device)) % self.keep
        self.kept_x[at] = x.to(self.kept_x)
        self.kept_y[at] = target.to(self.kept_y)
        self.seen.add_(len(x))
        count = min(seen + len(x), self.keep)
        return self.kept_x[:count], _wide(self.kept_y[:count])


class _Call(NamedTuple):
    """One run of a linear layer."""

    layer: nn.Linear
    input: Tensor
    output: Tensor


@contextmanager
def _watched(stage: Stage) -> Iterator[list[_Call]]:
    """Yield a list of what the linear layers of `stage` take and return while it runs."""
    calls: list[_Call] = []
    layers = {m: None for module in stage.modules for m in module.modules()
              if isinstance(m, nn.Linear)}
    hooks = [layer.register_forward_hook(lambda m, given, out: calls.append(
        _Call(m, given[0], out))) for layer in layers]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _set(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(bias)


def _single(x: Any) -> Any:
    """Return the tensor in a tuple of one."""
    return x[0] if isinstance(x, (tuple, list)) and len(x) == 1 else x


def _wide(value: Tensor) -> Tensor:
    """Return `value` in the type that everything is fitted in."""
    return value.double()
