import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.nn.parameter import is_lazy

from netwright import checks
from netwright.catalogue.facets import method
from netwright.errors import UnknownName
from netwright.rules.rule import Rule, chain_of, check_labels
from netwright.runtime.modes import evaluating
from netwright.stages import Stages
from netwright.stages.stage import Stage

__all__ = ["BlockCoordinateDescent"]

Splitting = Literal["three", "two"]
Loss = Literal["squared", "hinge", "cross_entropy"]


@method(
    "rule",
    papers=["003-108"],
    saves=["backpropagation"],
    needs=["labels", "linear layers"],
    search={"gamma": (0.1, 10.0), "alpha": (0.5, 10.0)},
    variants={"plain": {}, "two-splitting": {"splitting": "two"},
              "kept samples": {"keep": 6}, "cross-entropy": {"output_loss": "cross_entropy"}},
    network=lambda: nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(),
                                  nn.Linear(12, 3)),
)
class BlockCoordinateDescent(Rule):
    """Train by minimising over each layer's weights, inputs and outputs in turn, in closed form.

    Every sample has variables of its own beside the weights: what stage i returns, V_i, and with
    `splitting="three"` also what its activation s_i reads, U_i. They need not agree with the
    network; disagreeing costs. With V_0 = x the objective is, summed over samples,

    three  F = L(V_n, y) + gamma/2 sum |V_i - s_i(U_i)|² + rho/2 sum |U_i - W_i V_{i-1} - b_i|²
    two    F = L(V_n, y) + gamma/2 sum |V_i - s_i(W_i V_{i-1} + b_i)|²,  V_i >= 0 after a ReLU

    and a sweep goes from the last stage to the first, V_i, then U_i, then W_i and b_i together,
    each at its minimum with all others held:

    V_n      argmin L(V, y) + gamma/2 |V - s(U_n)|² + alpha/2 |V - V_n|²
    V_i      argmin gamma/2 |V - s(U_i)|² + rho/2 |U_{i+1} - W_{i+1} V - b|²
    U_i      argmin gamma/2 |V_i - s(U)|² + rho/2 |U - W_i V_{i-1} - b|² + alpha/2 |U - U_i|²
    W_i, b_i argmin rho/2 |U_i - W V_{i-1} - b|² + alpha/2 |W - W_i|² + alpha/2 |b - b_i|²

    A residual stage, h + s(W h + b), has V_i - V_{i-1} where V_i stands beside s, in both of the
    terms that V_{i-1} is in. With a ReLU, U_i is the better of two numbers, one on each side of 0.
    No step raises F, and no gradient passes through any stage.

    With two splittings a ReLU leaves W_i and V_i no closed form. There W_i minimises the quadratic
    that lies above its term and touches it, |T - W V_{i-1} - b|² with T = V_i where the stage is
    on and what the stage says where it is off, and V_i takes one projected step of the length
    that this allows.

    A call makes `sweeps` sweeps over its batch, which start from a forward pass. Between batches
    only the weights remain, and `alpha` alone holds them to what other batches have taught. The
    method is one for full batches: `keep` is how many samples the batch has whose variables stay
    from one call to the next, for as long as it is the same samples in the same order. They are
    part of `state_dict`.

    `output_loss="squared"`, ½|V - onehot(y)|², takes floating-point y (batch, outputs) too.
    `"hinge"` is that of each class against the rest. `"cross_entropy"` has no closed form: as the
    paper has it for smooth losses, V_n minimises its linear model instead, which needs
    alpha >= ½. Labels of -100 are left out. The returned loss is the mean of the network's own
    before the call; `objective()` is F of the samples that are kept.

    Args:
        splitting: "three", with variables before and behind activations, or "two", behind alone.
        output_loss: "squared", "hinge" or "cross_entropy".
        gamma: what a disagreement of a stage with its activation costs, above 0.
        rho: what a disagreement with a layer's weights costs, above 0.
        alpha: what moving a variable costs, above 0.
        sweeps: over the batch, in each call.
        keep: samples whose variables stay from one call to the next, 0 for none.

    Shapes: x (batch, *size); V_i, U_i (batch, width_i); y (batch,), or (batch, outputs).

    Raises:
        ValueError: a stage is not one linear layer with at most a ReLU, or the last one has an
            activation; two layers share weights; a number is out of range; `splitting="two"` and
            a stage is residual.
        UnknownName: `splitting` or `output_loss` is none of those that are known.

    Paper: Zeng, Lau, Lin, Yao, 2019, Global Convergence of Block Coordinate Descent in Deep
    Learning.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> x, y = torch.randn(20, 4), torch.randint(3, (20,))
    >>> rule = BlockCoordinateDescent(network, keep=20)
    >>> losses = [float(rule(x, y)) for _ in range(10)]
    >>> losses[-1] < losses[0], len(rule.variables())
    (True, 4)
    """

    kept_x: Tensor
    kept_y: Tensor
    is_kept: Tensor
    updates_weights = True

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 splitting: Splitting = "three", output_loss: Loss = "squared", gamma: float = 1.0,
                 rho: float = 1.0, alpha: float = 1.0, sweeps: int = 1, keep: int = 0,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        _check(splitting, output_loss, gamma, rho, alpha, sweeps, keep)
        self.splitting, self.output_loss = splitting, output_loss
        self.gamma, self.rho, self.alpha, self.sweeps = gamma, rho, alpha, sweeps
        self.stages = chain_of(self, network, example, apart=False)
        self._layers = [_layer(stage, self.stages) for stage in self.stages]
        weights = [id(layer.linear.weight) for layer in self._layers]
        if len(set(weights)) < len(weights):
            raise ValueError("network must have weights of its own in each layer, since each is "
                             "solved for by itself; give it a copy where two share them")
        if self._layers[-1].relu or self._layers[-1].residual:
            raise ValueError("network must end in a linear layer, and stage "
                             f"{self.stages.names[-1]} has an activation or is residual; add one")
        if splitting == "two" and any(layer.residual for layer in self._layers):
            raise ValueError("splitting must be 'three' for residual stages, got 'two', which "
                             "needs outputs that are not negative")
        self.keep = keep
        if keep:
            self._make_room()

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Sweep over the batch and change the weights; return the mean loss before."""
        with torch.no_grad(), torch.autocast(y.device.type, enabled=False):
            h = self._input(x)
            at = self._forward_pass(h)
            target, labelled = self._target(y, at.V[-1])
            losses = _losses(self.output_loss, at.V[-1], target)[labelled]
            if self._kept(h, target):
                at = self._load(h)
            for _ in range(self.sweeps):
                for _ in self._sweep(at, target, labelled):
                    pass
            if self.keep == len(h):
                self._store(at, target)
            mean = losses.sum() / labelled.sum().clamp_min(1)
            return mean.to(self._layers[-1].linear.weight.dtype)

    @torch.no_grad()
    def objective(self) -> Tensor:
        """Return F of the samples that are kept."""
        if not self.keep or not bool(self.is_kept):
            raise ValueError(f"keep must be the number of samples of the last batch, got "
                             f"{self.keep}; F is of the samples whose variables are kept")
        target = _wide(self.kept_y)
        return self._objective(self._load(_wide(self.kept_x)), target, target.isfinite().all(1))

    def _objective(self, at: "_Variables", target: Tensor, labelled: Tensor) -> Tensor:
        value = _losses(self.output_loss, at.V[-1], target)[labelled].sum()
        for i, layer in enumerate(self._layers):
            said = layer.linear_of(at.before(i))
            inner = said if self.splitting == "two" else at.U[i]
            gap = at.V[i] - layer.skip(at.before(i)) - layer.activate(inner)
            value = value + self.gamma / 2 * gap.square().sum()
            if self.splitting == "three":
                value = value + self.rho / 2 * (inner - said).square().sum()
        return value

    def variables(self) -> dict[str, Tensor]:
        """Return the samples' variables that are kept, by name: V_1, U_1, V_2, ..."""
        return {name: value for name, value in self.named_buffers(recurse=False)
                if name[:2] in ("V_", "U_")}

    # One sweep

    def _sweep(self, at: "_Variables", target: Tensor, labelled: Tensor) -> Iterator[str]:
        """Minimise over one block after the other, and name each when it is done."""
        for i in reversed(range(len(self._layers))):
            layer, before = self._layers[i], at.before(i)
            if i + 1 == len(self._layers):
                at.V[i] = self._last(at, target, labelled)
            else:
                at.V[i] = self._three(at, i) if self.splitting == "three" else self._two(at, i)
            yield f"V_{i + 1}"
            if self.splitting == "two":
                layer.fit(before, layer.aim(before, at.V[i]), self.gamma, self.alpha)
            else:
                at.U[i] = self._inner(at, i)
                yield f"U_{i + 1}"
                layer.fit(before, at.U[i], self.rho, self.alpha)
            yield f"W_{i + 1}"

    def _last(self, at: "_Variables", target: Tensor, labelled: Tensor) -> Tensor:
        """Return the minimum over V_n, where samples without a label have no loss."""
        V, pull = at.V[-1], self.gamma + self.alpha
        said = self._layers[-1].linear_of(at.before(-1)) if self.splitting == "two" else at.U[-1]
        z = (self.gamma * said + self.alpha * V) / pull
        if self.output_loss == "squared":
            found = (target + pull * z) / (1 + pull)
        elif self.output_loss == "hinge":
            s = target * z  # the target is its own sign
            found = target * torch.where(s >= 1, s, (s + 1 / pull).clamp_max(1))
        else:
            found = z - (torch.softmax(V, 1) - target) / pull
        return torch.where(labelled[:, None], found, z)

    def _three(self, at: "_Variables", i: int) -> Tensor:
        """Return the minimum over V_i, which its own stage and the next one pull at."""
        layer, after = self._layers[i], self._layers[i + 1]
        W, b = after.weights()
        right = self.gamma * (layer.activate(at.U[i]) + layer.skip(at.before(i)))
        right = right + self.rho * (at.U[i + 1] - b) @ W
        if after.residual:
            right = right + self.gamma * (at.V[i + 1] - after.activate(at.U[i + 1]))
        return _solve(self.rho * W.T @ W, self.gamma * (1 + after.residual), right)

    def _inner(self, at: "_Variables", i: int) -> Tensor:
        """Return the minimum over U_i; the last one is not held back."""
        layer, before = self._layers[i], at.before(i)
        held = self.alpha if i + 1 < len(self._layers) else 0.0
        mean = (self.rho * layer.linear_of(before) + held * at.U[i]) / (self.rho + held)
        return layer.nearest(at.V[i] - layer.skip(before), mean, self.gamma, self.rho + held)

    def _two(self, at: "_Variables", i: int) -> Tensor:
        """Return V_i after a step, or at its minimum where it has no ReLU to be above 0 for."""
        layer, after, V = self._layers[i], self._layers[i + 1], at.V[i]
        W, b = after.weights()
        own, aim = layer.activate(layer.linear_of(at.before(i))), after.aim(V, at.V[i + 1])
        if not layer.relu:
            return _solve(W.T @ W, 1.0, own + (aim - b) @ W)
        slope = V - own + (after.linear_of(V) - aim) @ W
        return functional.relu(V - slope / (1 + torch.linalg.matrix_norm(W, 2) ** 2))

    # Batches

    def _input(self, x: Any) -> Tensor:
        """Return what the first linear layer reads, a row for each sample or token."""
        seen: list[Tensor] = []
        linear = self._layers[0].linear
        hook = linear.register_forward_hook(lambda _, given, __: seen.append(given[0]))
        try:
            self.stages[0](x, self.stages.context(x))
        finally:
            hook.remove()
        return _wide(seen[0].reshape(-1, linear.in_features))

    def _forward_pass(self, h: Tensor) -> "_Variables":
        V, U = [], []
        before = h
        for layer in self._layers:
            U.append(layer.linear_of(before))
            V.append(layer.activate(U[-1]) + layer.skip(before))
            before = V[-1]
        return _Variables(h, V, U)

    def _target(self, y: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the scores shall be, not a number where there is no label, and where."""
        if y.is_floating_point() and y.ndim > 1 and self.output_loss == "squared":
            target = _wide(y.reshape(-1, y.shape[-1]))
        else:
            check_labels(y, scores.shape[1])
            known = y.reshape(-1, 1)
            hot = torch.zeros(len(known), scores.shape[1], dtype=scores.dtype, device=y.device)
            hot.scatter_(1, known.clamp_min(0), 1.0)
            hot = 2 * hot - 1 if self.output_loss == "hinge" else hot
            target = hot.masked_fill(known < 0, math.nan)
        if target.shape != scores.shape:
            raise ValueError(f"y must have a label for each of the {len(scores)} rows of scores, "
                             f"or {tuple(scores.shape)} numbers, got {tuple(y.shape)}")
        return target, target.isfinite().all(1)

    def _make_room(self) -> None:
        like = self._layers[0].linear.weight
        widths = [layer.linear.out_features for layer in self._layers]
        shapes = {"kept_x": self._layers[0].linear.in_features, "kept_y": widths[-1]}
        for i, width in enumerate(widths, 1):
            shapes[f"V_{i}"] = width
            if self.splitting == "three":
                shapes[f"U_{i}"] = width
        for name, width in shapes.items():
            self.register_buffer(name, torch.zeros(self.keep, width, dtype=like.dtype,
                                                   device=like.device))
        self.register_buffer("is_kept", torch.zeros((), dtype=torch.bool, device=like.device))

    def _kept(self, h: Tensor, target: Tensor) -> bool:
        if self.keep != len(h) or not bool(self.is_kept):
            return False
        return (torch.equal(h.to(self.kept_x.dtype), self.kept_x) and
                bool(torch.isclose(target.to(self.kept_y.dtype), self.kept_y, rtol=0, atol=0,
                                   equal_nan=True).all()))

    def _load(self, h: Tensor) -> "_Variables":
        kept = self.variables()
        V, U = ([_wide(kept[f"{kind}_{i + 1}"]) for i in range(len(self._layers))]
                if f"{kind}_1" in kept else [] for kind in "VU")
        return _Variables(h, V, U)

    def _store(self, at: "_Variables", target: Tensor) -> None:
        self.kept_x.copy_(at.x)
        self.kept_y.copy_(target)
        self.is_kept.fill_(True)
        for name, kept in self.variables().items():
            kept.copy_((at.V if name[0] == "V" else at.U)[int(name[2:]) - 1])


class _Variables(NamedTuple):
    """What a batch has beside the weights; U is not used with two splittings."""

    x: Tensor
    V: list[Tensor]
    U: list[Tensor]

    def before(self, i: int) -> Tensor:
        """Return what stage i reads."""
        i %= len(self.V)
        return self.V[i - 1] if i else self.x


class _Layer(NamedTuple):
    """A stage: s(W h + b), or h + s(W h + b) if it is residual, s a ReLU or nothing."""

    linear: nn.Linear
    relu: bool
    residual: bool

    def weights(self) -> tuple[Tensor, Tensor | float]:
        bias = self.linear.bias
        return _wide(self.linear.weight), 0.0 if bias is None else _wide(bias)

    def linear_of(self, h: Tensor) -> Tensor:
        W, b = self.weights()
        return h @ W.T + b

    def activate(self, u: Tensor) -> Tensor:
        return functional.relu(u) if self.relu else u

    def skip(self, h: Tensor) -> Tensor | float:
        return h if self.residual else 0.0

    def aim(self, h: Tensor, V: Tensor) -> Tensor:
        """Return T, by which |T - W h - b|² lies above |V - s(W h + b)|² and touches it."""
        u = self.linear_of(h)
        return torch.where(u >= 0, V, u) if self.relu else V

    def nearest(self, v: Tensor, a: Tensor, gamma: float, pull: float) -> Tensor:
        """Return the u that minimises gamma/2 |v - s(u)|² + pull/2 |u - a|²."""
        on = (gamma * v + pull * a) / (gamma + pull)
        if not self.relu:
            return on
        on, off = on.clamp_min(0), a.clamp_max(0)
        with_on = gamma * (v - on).square() + pull * (on - a).square()
        with_off = gamma * v.square() + pull * (off - a).square()
        return torch.where(with_on <= with_off, on, off)

    def fit(self, h: Tensor, aim: Tensor, weight: float, alpha: float) -> None:
        """Set W and b, as far as they are free, to what brings W h + b near `aim`.

        They minimise weight/2 |aim - W h - b|² + alpha/2 of how far they go.
        """
        linear, free = self.linear, []
        if linear.weight.requires_grad:
            free.append(h)
        if linear.bias is not None and linear.bias.requires_grad:
            free.append(torch.ones_like(h[:, :1]))
        if not free:
            return
        inputs = torch.cat(free, 1)
        missing = aim - self.linear_of(h)
        if len(inputs) < inputs.shape[1]:  # the smaller of the two systems, with the same solution
            step = inputs.T @ _solve(inputs @ inputs.T, alpha / weight, missing.T).T
        else:
            step = _solve(inputs.T @ inputs, alpha / weight, missing.T @ inputs).T
        if linear.weight.requires_grad:
            linear.weight.add_(step[:h.shape[1]].T.to(linear.weight.dtype))
        if linear.bias is not None and linear.bias.requires_grad:
            linear.bias.add_(step[-1].to(linear.bias.dtype))


def _solve(gram: Tensor, own: float, right: Tensor) -> Tensor:
    """Return the rows v of v (gram + own I) = right."""
    gram = gram.clone()
    gram.diagonal().add_(own)
    return torch.cholesky_solve(right.T, torch.linalg.cholesky(gram)).T


def _losses(loss: Loss, scores: Tensor, target: Tensor) -> Tensor:
    """Return the loss of each sample."""
    if loss == "squared":
        return (scores - target).square().sum(1) / 2
    if loss == "hinge":
        return functional.relu(1 - target * scores).sum(1)
    return torch.logsumexp(scores, 1) - (scores * target).sum(1)


def _wide(value: Tensor) -> Tensor:
    """Return `value` in a type that linear systems are solved in."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _check(splitting: str, loss: str, gamma: float, rho: float, alpha: float, sweeps: int,
           keep: int) -> None:
    for kind, name, known in (("splitting", splitting, Splitting), ("output loss", loss, Loss)):
        if name not in get_args(known):
            raise UnknownName(kind, str(name), get_args(known))
    checks.above(0, gamma=gamma, rho=rho, alpha=alpha, advice="try the default")
    if loss == "cross_entropy":
        checks.at_least(0.5, alpha=alpha, advice="with less the objective of "
                        "output_loss='cross_entropy' may rise")
    checks.count(1, sweeps=sweeps)
    checks.count(0, keep=keep)


def _layer(stage: Stage, net: Stages) -> _Layer:
    """Return what a stage is, found by its parts and by what it says of random inputs."""
    parts = {m: None for module in stage.modules for m in module.modules()}
    linears = [m for m in parts if isinstance(m, nn.Linear)]
    others = [type(m).__name__ for m in parts if not any(True for _ in m.children())
              and not isinstance(m, (nn.Linear, nn.ReLU, nn.Flatten, nn.Identity))]
    advice = ("there is no closed form for it; BlockCoordinateDescent takes s(W h + b) and "
              "h + s(W h + b) with a ReLU or nothing for s, PredictiveCoding any stage")
    if others or len(linears) != 1 or stage.loose:
        found = [*others, *(["Linear"] * len(linears)), *(["a parameter"] * len(stage.loose))]
        raise ValueError("network must have stages of one linear layer and at most a ReLU, and "
                         f"stage {stage.name} has {', '.join(found) or 'no layer'}; {advice}")
    linear = linears[0]
    if is_lazy(linear.weight):
        raise ValueError(f"network must know its widths, and stage {stage.name} is lazy; run the "
                         "network once before")
    h = torch.linspace(-2, 2, 8 * linear.in_features, device=linear.weight.device).view(
        8, -1).sin().to(linear.weight.dtype)
    with torch.no_grad(), evaluating(net.model):
        said, u = stage(h, net.context(h)), linear(h)
    for residual in (False, True)[:1 + (linear.in_features == linear.out_features)]:
        for relu in (False, True):
            layer = _Layer(linear, relu, residual)
            if said.shape == u.shape and torch.allclose(said, layer.activate(u) + layer.skip(h),
                                                        rtol=1e-2, atol=1e-4):
                return layer
    raise ValueError("network must have stages that are s(W h + b) or h + s(W h + b), and stage "
                     f"{stage.name} is something else; {advice}")
