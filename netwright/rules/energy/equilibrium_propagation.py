import math
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from netwright import checks
from netwright.catalogue.facets import method
from netwright.rules.rule import Rule, check_labels, targets
from netwright.stages import Stages

__all__ = ["EquilibriumPropagation"]

# Complex-differentiable around the real line, which the contour needs.
HOLOMORPHIC = (nn.Sigmoid, nn.Tanh, nn.SiLU)


@method("rule", papers=["002-006"], saves=["backpropagation"], needs=["classes", "linear layers"],
        variants={"plain": {}, "asymmetric": {"symmetric": False, "homeostasis": 1.0}})
class EquilibriumPropagation(Rule):
    """Let a layered network settle freely and under complex nudges, then learn from how it moved.

    s_i := phi_i(W_i s_{i-1} + b_i + B_{i+1} s_{i+1}),  `steps` times, all layers at once;
    the last hidden layer, S, is nudged by beta dl/ds_S, where l is the cross-entropy of the
    readout R s_S + c;  p = 1/N sum_j s(beta_j) / beta_j,  beta_j = radius e^(2 pi i j / N);
    g = p_i s_{i-1}^T for W_i,  p_i s_{i+1}^T for B_{i+1},  dl/dR for the readout, at the free s;
    its mean over the targets.

    The contour of N = `points` nudges gives ds/dbeta at beta = 0 up to the order of radius^N,
    so that the nudge need not be small. Each nudged phase starts at the free state and takes
    `nudged_steps`.

    By default B_{i+1} is W_{i+1}^T, which gets both, and g is the gradient of l at equilibrium.
    With `symmetric=False` each B is a parameter of its own, drawn as W is, and g is as far from
    that gradient as the Jacobian J of the layers' inputs in s is from its transpose. `homeostasis`
    adds the gradient of homeostasis / units |J - J^T|^2 / 2, of which the paper draws a random
    estimate; between linear layers it is |W - B^T|^2 and known exactly.

    The network is read as layers that answer one another. Its own forward pass, without B, is not
    what is trained: `predict` lets it settle. The loss is the cross-entropy, which the contour
    needs as a function of complex s. All is computed in at least float32.

    Args:
        radius: of the contour of nudges, above 0.
        points: N, the nudges on it.
        steps: until the free state is settled.
        nudged_steps: from there, under each nudge.
        symmetric: whether the way back is the transpose of the way forward.
        homeostasis: the strength of what makes the way back like its transpose, where they differ.

    Shapes: x (batch, *size), flattened; s_i (batch, units_i); y (batch,).

    Raises:
        ValueError: the network is not an `nn.Sequential` of linear layers with a holomorphic
            activation after each but the last, or a setting is out of range.

    Papers: Laborieux, Zenke, 2024, Improving Equilibrium Propagation without Weight Symmetry
    through Jacobian Homeostasis. Laborieux, Zenke, 2022, Holomorphic Equilibrium Propagation
    Computes Exact Gradients Through Finite Size Oscillations.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(),
    ...                         nn.Linear(6, 3))
    >>> rule = EquilibriumPropagation(network)
    >>> rule(torch.randn(2, 4), torch.tensor([0, 2])).requires_grad
    False
    >>> [s.shape for s in rule.settle(torch.randn(2, 4))]
    [torch.Size([2, 8]), torch.Size([2, 6])]
    """

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 radius: float = 0.5, points: int = 4, steps: int = 150, nudged_steps: int = 20,
                 symmetric: bool = True, homeostasis: float = 0.0,
                 generator: Generator | None = None) -> None:
        checks.count(1, points=points, steps=steps, nudged_steps=nudged_steps,
                     advice="try the default")
        checks.above(0, radius=radius, advice="try the default, 0.5")
        checks.at_least(0, homeostasis=homeostasis, advice="try 1.0")
        if homeostasis and symmetric:
            raise ValueError(f"homeostasis={homeostasis} pulls B to W's transpose, which it is "
                             "with symmetric=True; give symmetric=False, or homeostasis=0.0")
        super().__init__(network, generator=generator)
        self._layers, self._activations = _read(self.network)
        self.radius, self.points, self.steps = radius, points, steps
        self.nudged_steps, self.homeostasis = nudged_steps, homeostasis
        self.feedback = nn.ParameterList()
        if not symmetric:
            self.feedback.extend(_drawn(layer, generator) for layer in self._layers[1:-1])

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add g to `.grad`; return the detached loss of the free state."""
        with torch.autocast(y.device.type, enabled=False):
            x = self._flat(x)
            readout = self._layers[-1]
            with torch.no_grad():
                free = self.settle(x)
            logits = _linear(readout, free[-1] if free else x)
            check_labels(y, logits.shape[-1])
            loss = functional.cross_entropy(logits, y)
            count = targets(logits, y)
            with torch.no_grad():
                pulls = self._moved(x, free, y)
            outputs, signals = [loss], [torch.ones_like(loss)]
            outputs += self._inputs(x, free)
            signals += [pull / count for pull in pulls]
            if self.homeostasis:
                outputs.append(self.homeostasis * self.asymmetry())
                signals.append(torch.ones_like(outputs[-1]))
            learnt = [k for k, output in enumerate(outputs) if output.requires_grad]
            if learnt:
                torch.autograd.backward([outputs[k] for k in learnt], [signals[k] for k in learnt])
        return loss.detach()

    def settle(self, x: Any) -> list[Tensor]:
        """Return the free states of the hidden layers after `steps` from silence.

        Where gradients are on, they can be differentiated through every step, which gives what g
        is to be compared with.
        """
        x = self._flat(x)
        states = [_apply(activation, x.new_zeros(len(x), layer.out_features))
                  for layer, activation in zip(self._layers, self._activations, strict=False)]
        for _ in range(self.steps):
            states = self._step(x, states)
        return states

    def asymmetry(self) -> Tensor:
        """Return |J - J^T|^2 / 2 over the number of hidden units: 0 where B is W^T."""
        layers = self._layers[1:-1]
        units = sum(layer.out_features for layer in self._layers[:-1])
        total = torch.zeros((), device=self._layers[-1].weight.device)
        for layer, B in zip(layers, self.feedback, strict=False):
            total = total + (_wide(layer.weight) - _wide(B).T).square().sum()
        return total / max(units, 1)

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """Return the readout of the free state."""
        with torch.autocast(self._layers[-1].weight.device.type, enabled=False):
            x = self._flat(x)
            free = self.settle(x)
            return _linear(self._layers[-1], free[-1] if free else x).to(
                self._layers[-1].weight.dtype)

    def _flat(self, x: Any) -> Tensor:
        x = x[0] if isinstance(x, (tuple, list)) and len(x) == 1 else x
        if not isinstance(x, Tensor):
            raise ValueError(f"x must be a tensor, got {type(x).__name__}; the network is an "
                             "nn.Sequential, which takes one")
        return _wide(x.flatten(1))

    def _moved(self, x: Tensor, free: list[Tensor], y: Tensor) -> list[Tensor]:
        """Return ds/dbeta at beta = 0, from the contour of nudges."""
        # States of conjugate nudges are conjugate, so that half of the contour tells it all.
        turns = torch.arange(self.points // 2 + 1, device=x.device, dtype=x.dtype) / self.points
        weight = torch.where((turns == 0) | (turns == 0.5), 1.0, 2.0).to(x.dtype) / self.points
        beta = torch.polar(torch.full_like(turns, self.radius), 2 * math.pi * turns)
        if self.points <= 2:
            beta = beta.real
        beta = beta[:, None, None]
        states = [s.to(beta.dtype).expand(len(beta), *s.shape) for s in free]
        for _ in range(self.nudged_steps):
            states = self._step(x.to(beta.dtype), states, beta, y)
        moved = [(s - rest) / beta * weight[:, None, None]
                 for s, rest in zip(states, free, strict=True)]
        return [(m.real if m.is_complex() else m).sum(0) for m in moved]

    def _step(self, x: Tensor, states: list[Tensor], beta: Tensor | None = None,
              y: Tensor | None = None) -> list[Tensor]:
        inputs = self._inputs(x, states)
        if beta is not None and y is not None and states:
            weight = _wide(self._layers[-1].weight).to(x.dtype)
            scores = _linear(self._layers[-1], states[-1])
            shift = scores.real if scores.is_complex() else scores
            raised = (scores - shift.amax(-1, keepdim=True)).exp()
            label = functional.one_hot(y.clamp(min=0), scores.shape[-1])
            error = (raised / raised.sum(-1, keepdim=True) - label) * (y != -100)[:, None]
            inputs[-1] = inputs[-1] + beta * (error @ weight)
        return [_apply(activation, a) for activation, a in
                zip(self._activations, inputs, strict=True)]

    def _inputs(self, x: Tensor, states: list[Tensor]) -> list[Tensor]:
        """Return what each hidden layer hears from below and above."""
        found = []
        for i, (layer, below) in enumerate(zip(self._layers[:-1], [x, *states], strict=False)):
            a = _linear(layer, below)
            if i + 1 < len(states):
                above = self._layers[i + 1].weight.T if not self.feedback else self.feedback[i]
                a = a + states[i + 1] @ _wide(above).T.to(a.dtype)
            found.append(a)
        return found


def _read(network: nn.Module) -> tuple[list[nn.Linear], list[nn.Module]]:
    """Return the linear layers of `network` and the activations between them."""
    needs = ("network must be an nn.Sequential of linear layers with nn.Sigmoid, nn.Tanh or "
             "nn.SiLU after each but the last (nn.Flatten may come first), ")
    if not isinstance(network, nn.Sequential):
        raise ValueError(f"{needs}got {type(network).__name__}; try DualPropagation, which takes "
                         "any network")
    modules = list(network)
    modules = modules[1:] if modules and isinstance(modules[0], nn.Flatten) else modules
    for k, module in enumerate(modules):
        if not isinstance(module, HOLOMORPHIC if k % 2 else nn.Linear):
            raise ValueError(f"{needs}got {type(module).__name__} in place {k}; exchange it, or "
                             "try DualPropagation, which takes any network")
    if len(modules) % 2 == 0:
        raise ValueError(f"{needs}got no linear layer at its end; add one that gives the logits")
    return [m for m in modules if isinstance(m, nn.Linear)], modules[1::2]


def _drawn(layer: nn.Linear, generator: Generator | None) -> nn.Parameter:
    """Return a matrix back through `layer`, drawn as linear layers are."""
    like, bound = layer.weight, layer.out_features ** -0.5
    drawn = torch.empty(like.T.shape, device=like.device if generator is None else generator.device)
    return nn.Parameter(drawn.uniform_(-bound, bound, generator=generator).to(like))


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _linear(layer: nn.Linear, h: Tensor) -> Tensor:
    a = h @ _wide(layer.weight).T.to(h.dtype)
    return a if layer.bias is None else a + _wide(layer.bias)


def _apply(activation: nn.Module, a: Tensor) -> Tensor:
    if isinstance(activation, nn.Tanh):
        return a.tanh()
    return a.sigmoid() if isinstance(activation, nn.Sigmoid) else a * a.sigmoid()
