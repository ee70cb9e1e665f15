import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from netwright import checks
from netwright.catalogue.facets import method
from netwright.rules.rule import Rule, check_labels, targets
from netwright.stages import Stages

__all__ = ["DisinhibitoryHebb"]

# Rates that do not fall when the potential rises, and nowhere by more than it.
RATES = (nn.ReLU, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU)


@method("rule", papers=["003-067"], saves=["backpropagation"], needs=["classes", "linear layers"],
        variants={"plain": {}, "linear inverse": {"inverse": "linear"}})
class DisinhibitoryHebb(Rule):
    """Train a circuit by a Hebbian rule whose sign is set by each unit's inhibition.

    A hidden unit has a potential u, a rate r = phi(u), and an inhibitory partner of potential v:
    u_i = W_i r_{i-1} + b_i - I_i + psi(0),  I_i = psi(v_i),  v_i = r_i - c Q_i,
    psi = inhibition softplus;
    the output is steered: o = W_n r_{n-1} + b_n + c,  c = gain (label - softmax(o)).
    Errors arrive as dis-inhibition: c quiets the partner of a unit that should fire more.

    step of W_i = (r_i - psi^-1(I_i)) phi'(u_i) r_{i-1}^T;  step of W_n = c r_{n-1}^T,
    both where the circuit has come to rest; `.grad` gets their negative mean over the targets.

    So a synapse grows where its unit fires more than its inhibition answers for, and shrinks where
    less: the sign follows the inhibition alone. `inverse="linear"` replaces psi^-1 by its tangent
    at the unit's mean inhibition in the batch without feedback, as a synapse could know it:
    then I_i is a threshold that slides, and without inhibition the step's sign depends on the
    rate alone.

    Q_i (classes, units_i) is dO/dv_i without feedback and without the damping by inhibition, for
    each sample, divided by its length, times `feedback`: what the paper takes for granted that the
    brain has learned. No graph is built.

    psi(0), which is not in the paper, is as if the biases started higher: a silent partner takes
    nothing, so that units that are silent below a threshold (ReLU) are not silent from the start.

    The circuit, with its inhibition, is what is trained: use `predict`. Its equations are not
    integrated but relaxed to their rest, `steps` sweeps through the layers each for the circuit
    without and with feedback, at which the error has shrunk by (inhibition / (1 + inhibition)) for
    each sweep. The controller's integral and proportional parts come to one gain there. All is
    computed in at least float32.

    Args:
        network: An `nn.Sequential` of linear layers with a rate after each but the last.
        example: Not needed.
        inverse: `"exact"` or `"linear"`.
        gain: How strongly the output is steered.
        inhibition: The scale of psi.
        feedback: The length of each sample's Q_i.
        steps: How many sweeps bring the circuit to rest.
        generator: Not needed: nothing is drawn.

    Shapes: x (batch, *size), flattened; u_i, v_i, r_i (batch, units_i); y (batch,).

    Raises:
        ValueError: the network is no such `nn.Sequential`, or a setting is out of range.

    Paper: Rossbroich, Zenke, 2023, Dis-inhibitory Neuronal Circuits Can Control the Sign of
    Synaptic Plasticity.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Softplus(), nn.Linear(8, 3))
    >>> rule = DisinhibitoryHebb(network)
    >>> rule(torch.randn(2, 4), torch.tensor([0, 2])).requires_grad
    False
    >>> u = torch.ones(2)  # the same unit under little and under much inhibition
    >>> softplus = functional.softplus
    >>> rule.plasticity(0, u, softplus(softplus(u) + torch.tensor([-1, 1]))).sign()
    tensor([ 1., -1.])
    """

    @property
    def same_in_shares(self) -> bool:  # type: ignore[override]
        """Not where the inverse is a tangent at the average of the share."""
        return self.inverse != "linear"

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 inverse: Literal["exact", "linear"] = "exact", gain: float = 0.6,
                 inhibition: float = 1.0, feedback: float = 1.0, steps: int = 30,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        checks.one_of(["exact", "linear"], inverse=inverse)
        checks.above(0, gain=gain, inhibition=inhibition, feedback=feedback,
                     advice="try the default")
        checks.count(1, steps=steps, advice="try the default, 30")
        self._layers, self._rates = _read(self.network)
        self.inverse, self.gain, self.inhibition = inverse, gain, inhibition
        self.feedback, self.steps = feedback, steps

    @torch.no_grad()
    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add the negative steps to `.grad`; return the loss of the circuit without feedback."""
        with torch.autocast(self._layers[0].weight.device.type, enabled=False):
            x = self._flat(x)
            free = self._settled(x)
            check_labels(y, free.output.shape[-1])
            loss = functional.cross_entropy(free.output, y)
            counts = (y != -100)[:, None].to(x.dtype)
            label = functional.one_hot(y.clamp(min=0), free.output.shape[-1]).to(x.dtype)
            rest = self._settled(x, label, free)
            weight = counts / targets(free.output, y)
            below = x
            for i, (u, v, average) in enumerate(zip(rest.u, rest.v, free.v, strict=True)):
                usual = (self._psi(average) * weight).sum(0) if self.inverse == "linear" else None
                self._learn(i, self.plasticity(i, u, self._psi(v), usual) * weight, below)
                below = self._rates[i](u)
            self._learn(len(rest.u), rest.control * weight, below)
        return loss

    def settle(self, x: Any) -> Tensor:
        """Return the output of the circuit without feedback, at rest.

        Where gradients are on it can be differentiated through every sweep, which gives what the
        steps are to be compared with.
        """
        return self._settled(self._flat(x)).output

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """Return the output of the circuit without feedback."""
        with torch.autocast(self._layers[0].weight.device.type, enabled=False):
            return self.settle(x).to(self._layers[-1].weight.dtype)

    def plasticity(self, layer: int, u: Tensor, inhibition: Tensor,
                   usual: Tensor | None = None) -> Tensor:
        """Return what a synapse of rate 1 onto units of hidden `layer` is changed by.

        (phi(u) - psi^-1(inhibition)) phi'(u), or with psi^-1's tangent at the inhibition `usual`.

        Shapes: u, inhibition (*, units); usual (units,).
        """
        if usual is None:
            v = _inverse(inhibition / self.inhibition)
        else:
            v0 = _inverse(usual / self.inhibition)
            v = v0 + (inhibition - usual) / (self.inhibition * v0.sigmoid())
        rate = self._rates[layer]
        return (rate(u) - v) * _slope(rate, u)

    def _settled(self, x: Tensor, label: Tensor | None = None,
                 free: "_Rest | None" = None) -> "_Rest":
        """Return the circuit at rest, from silence, or steered to `label` from rest at `free`."""
        *hidden, readout = self._layers
        first = _linear(hidden[0], x) if hidden else x
        if free is None:
            us = [x.new_zeros(len(x), layer.out_features) for layer in hidden]
            c = x.new_zeros(len(x), readout.out_features)
            Q: list[Tensor] = []
        else:
            us, c, Q = list(free.u), torch.zeros_like(free.output), self._feedback(free)
        vs = list(us)
        output = c
        for _ in range(self.steps):
            r = x
            for i, rate in enumerate(self._rates):
                drive = first if i == 0 else _linear(hidden[i], r)
                vs[i] = self._partner(rate, us[i], c, Q, i)
                drive = drive - self._psi(vs[i]) + self.inhibition * math.log(2)
                us[i] = us[i] + (drive - us[i]) / (1 + self.inhibition)
                r = rate(us[i])
            output = _linear(readout, r) + c
            if label is not None:
                c = (c + self.gain * (label - output.softmax(-1))) / 2
        vs = [self._partner(rate, us[i], c, Q, i) for i, rate in enumerate(self._rates)]
        return _Rest(us, vs, output, c)

    def _partner(self, rate: Callable[[Tensor], Tensor], u: Tensor, c: Tensor, Q: list[Tensor],
                 i: int) -> Tensor:
        v = rate(u)
        return v - torch.einsum("bc,bcu->bu", c, Q[i]) if Q else v

    def _feedback(self, free: "_Rest") -> list[Tensor]:
        """Return Q of each hidden layer."""
        found: list[Tensor] = []
        J = _wide(self._layers[-1].weight).expand(len(free.output), -1, -1)
        for i in reversed(range(len(self._rates))):
            J = J * _slope(self._rates[i], free.u[i])[:, None]
            Q = J * (self.inhibition * free.v[i].sigmoid())[:, None]
            length = Q.flatten(1).norm(dim=1).clamp_min(1e-12)
            found.append(self.feedback * Q / length[:, None, None])
            J = J @ _wide(self._layers[i].weight)
        return found[::-1]

    def _psi(self, v: Tensor) -> Tensor:
        return self.inhibition * functional.softplus(v)

    def _learn(self, i: int, after: Tensor, before: Tensor) -> None:
        layer = self._layers[i]
        for p, step in ((layer.weight, after.T @ before), (layer.bias, after.sum(0))):
            if p is not None and p.requires_grad:
                change = -step.to(p.dtype)
                p.grad = change if p.grad is None else p.grad.add_(change)

    def _flat(self, x: Any) -> Tensor:
        x = x[0] if isinstance(x, (tuple, list)) and len(x) == 1 else x
        if not isinstance(x, Tensor):
            raise ValueError(f"x must be a tensor, got {type(x).__name__}; the network is an "
                             "nn.Sequential, which takes one")
        return _wide(x.flatten(1))


class _Rest(NamedTuple):
    """The circuit at rest: potentials and partners of the hidden layers, output and control."""

    u: list[Tensor]
    v: list[Tensor]
    output: Tensor
    control: Tensor


def _inverse(rate: Tensor) -> Tensor:
    """Return softplus's inverse."""
    rate = rate.clamp_min(torch.finfo(rate.dtype).tiny)
    return rate + torch.log(-torch.expm1(-rate))


def _slope(rate: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        (slope,) = torch.autograd.grad(rate(u).sum(), u)
    return slope.detach()


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _linear(layer: nn.Linear, h: Tensor) -> Tensor:
    return functional.linear(h, _wide(layer.weight).to(h.dtype),
                             None if layer.bias is None else _wide(layer.bias).to(h.dtype))


def _read(network: nn.Module) -> tuple[list[nn.Linear], list[Callable[[Tensor], Tensor]]]:
    """Return the linear layers of `network` and the rates between them."""
    needs = ("network must be an nn.Sequential of linear layers with one of "
             f"{', '.join(f'nn.{rate.__name__}' for rate in RATES)} after each but the last "
             "(nn.Flatten may come first), ")
    if not isinstance(network, nn.Sequential):
        raise ValueError(f"{needs}got {type(network).__name__}; try FeedbackAlignment, which takes "
                         "any network")
    modules = list(network)
    modules = modules[1:] if modules and isinstance(modules[0], nn.Flatten) else modules
    for k, module in enumerate(modules):
        if not isinstance(module, RATES if k % 2 else nn.Linear):
            raise ValueError(f"{needs}got {type(module).__name__} in place {k}; exchange it, or "
                             "try FeedbackAlignment, which takes any network")
    if len(modules) % 2 == 0:
        raise ValueError(f"{needs}got no linear layer at its end; add one that gives the logits")
    return ([module for module in modules if isinstance(module, nn.Linear)],
            [_Rate(module) for module in modules[1::2]])


class _Rate:
    """An activation that leaves its input as it is."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, u: Tensor) -> Tensor:
        rate: Tensor = self.module(u.clone() if getattr(self.module, "inplace", False) else u)
        return rate
