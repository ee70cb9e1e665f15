from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.autograd import Function
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from netwright import checks
from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.rule import Rule, checked, output_for, targets
from netwright.runtime.modes import same_buffers
from netwright.runtime.random_state import random_state, same_random_state, set_random_state
from netwright.stages import Stages, call

__all__ = ["DualPropagation"]

# What units do with their input, each by itself. All else stands between units.
ACTIVATIONS = frozenset({
    torch.relu, torch.tanh, torch.sigmoid, torch.special.expit, torch.Tensor.relu,
    torch.Tensor.tanh, torch.Tensor.sigmoid, functional.celu, functional.elu, functional.gelu,
    functional.hardshrink, functional.hardsigmoid, functional.hardswish, functional.hardtanh,
    functional.leaky_relu, functional.logsigmoid, functional.mish, functional.relu,
    functional.relu6, functional.selu, functional.sigmoid, functional.silu, functional.softplus,
    functional.softshrink, functional.softsign, functional.tanh, functional.tanhshrink,
    functional.threshold})


@method(
    "rule",
    papers=["001-164"],
    saves=["backpropagation"],
    needs=["labels", "a chain of stages"],
    variants={"plain": {}, "dyads": {"means": "dyads"}, "alpha": {"alpha": 1.0}},
)
class DualPropagation(Rule):
    """Give each unit two states, whose mean is its activity and whose difference is its error.

    s = phi(A x), bottom up;  d = -beta dl/dlogits at the top, else A'^T (s+ - s-) of the layer
    above;  s+ = phi(A x + alpha d),  s- = phi(A x - (1 - alpha) d), top down, once;
    g = A'^T (s- - s+) / beta with respect to the weights of A, its mean over the targets.

    phi is an activation function, wherever the network calls one: a module, a function or a
    method of PyTorch's that takes each unit by itself, without weights. A is what stands between
    one activation and the next. In an MLP it is a linear layer, A'^T its transposed matrix, and
    all of this the paper's; elsewhere (convolutions, norms, pooling, attention, residual paths,
    an activation that is not in `ACTIVATIONS`) A'^T is A's vector-Jacobian product at the
    activities, which the paper does with max-pooling. l is the loss of one target, linearised at
    the logits, whatever loss it is.

    x is the activity of the forward pass, as in the paper's convolutional networks: then the
    whole costs what backpropagation does. With `means="dyads"` the weights learn at
    x = alpha s+ + (1 - alpha) s- of the layer below, as in the paper's MLPs, for which the
    network is run once more, with the same random draws and the same running statistics.

    A small `beta` or straight activations bring g to the exact gradient; at alpha = 1/2 what
    is off is of the order of beta^2. There is one sweep; the feedback gains between layers are 1.

    Args:
        alpha: the share of the error that s+ takes, between 0 and 1; s- takes the rest.
        beta: the strength of the error at the top, above 0.
        means: "forward" or "dyads": the activity at which the weights learn.

    Shapes: x as the network takes it; y as the loss takes it; s+ and s- as the activation returns.

    Activation checkpoints and reversible blocks keep their activations, since what is computed
    again would have no dyads.

    Raises:
        ValueError: `alpha` is not between 0 and 1, or `beta` is not above 0.
        UnknownName: `means` is neither "forward" nor "dyads".

    Paper: Høier, Staudt, Zach, 2023, Dual Propagation: Accelerating Contrastive Hebbian Learning
    with Dyadic Neurons.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> rule = DualPropagation(network)
    >>> rule(torch.randn(2, 4), torch.tensor([0, 2])).requires_grad
    False
    >>> network[0].weight.grad.shape
    torch.Size([8, 4])
    """

    keeps_activations = True

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 alpha: float = 0.5, beta: float = 1.0,
                 means: Literal["forward", "dyads"] = "forward",
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        checks.between(0, 1, alpha=alpha, advice="at 0.5 both states are nudged alike")
        checks.above(0, beta=beta, advice="try the default, 1")
        checks.one_of(["forward", "dyads"], kind_of_means=means)
        super().__init__(network, generator=generator)
        self.loss, self.alpha, self.beta, self.means = loss, alpha, beta, means

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add g to `.grad`; return the detached loss of the forward pass."""
        state = random_state() if self.means == "dyads" else None
        units = _Units(self.alpha, by_mean=self.means == "dyads")
        with units:
            logits = output_for(self.loss, self.network, x)
        if not isinstance(logits, Tensor):
            raise ValueError("network must return one tensor to be nudged, got "
                             f"{type(logits).__name__} of several; use Backprop")
        loss = checked(self.loss, logits, y)
        units.nudge = self.beta * targets(logits, y)
        if state is None:
            if loss.requires_grad:
                loss.backward()
            return loss.detach()

        error, *_ = torch.autograd.grad(loss, [logits, *units.inputs], allow_unused=True)
        with same_buffers(self.network), same_random_state():
            set_random_state(state)
            with units.at_means():
                outputs = [call(self.network, x), *units.inputs]
        learnt = [(output, pull)
                  for output, pull in zip(outputs, [error, *units.pulls], strict=True)
                  if output.requires_grad and pull is not None]
        if learnt:
            torch.autograd.backward([output for output, _ in learnt], [pull for _, pull in learnt])
        return loss.detach()


class _Units(TorchFunctionMode):
    """Hold a dyad in the place of each unit of the network that is run.

    `inputs` are what the activations were given, `pulls` what the dyads send back there and
    `means` their means, in the order of the calls; all three only where learning is `by_mean`.
    """

    def __init__(self, alpha: float, *, by_mean: bool) -> None:
        super().__init__()
        self.alpha, self.by_mean, self.settled = alpha, by_mean, False
        self.nudge: Tensor
        self.inputs: list[Tensor] = []
        self.pulls: list[Tensor | None] = []
        self.means: list[Tensor | None] = []

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function not in ACTIVATIONS or not torch.is_grad_enabled():
            return function(*args, **kwargs)
        options = {key: value for key, value in kwargs.items() if key not in ("input", "inplace")}
        a = args[0] if args else kwargs["input"]
        activation = partial(_apply, function, args[1:], options)
        if self.settled:
            mean = self.means[len(self.inputs)]
            self.inputs.append(a)
            return activation(a) if mean is None else mean
        if self.by_mean:
            a = a if a.requires_grad else a.detach().requires_grad_()
            self.inputs.append(a)
            self.pulls.append(None)
            self.means.append(None)
        elif not a.requires_grad:
            return activation(a)
        return _Dyad.apply(a, activation, self, len(self.inputs) - 1)

    def at_means(self) -> "_Units":
        """Return this mode, set to give each activation's mean as its value."""
        self.settled, self.inputs = True, []
        return self


def _apply(function: Callable[..., Tensor], rest: tuple[Any, ...], options: dict[str, Any],
           a: Tensor) -> Tensor:
    return function(a, *rest, **options)


class _Dyad(Function):
    """phi, whose derivative is the difference of the two states over the nudge."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, activation: Callable[[Tensor], Tensor], units: _Units,
                index: int) -> Tensor:
        ctx.save_for_backward(a)
        ctx.activation, ctx.units, ctx.index = activation, units, index
        return activation(a)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        units, (a,) = ctx.units, ctx.saved_tensors
        # The states differ by little, for which autocast's types have too few digits.
        a = a.to(torch.promote_types(a.dtype, torch.float32))
        error, nudge = gradient.to(a.dtype), units.nudge.to(a.dtype)
        plus = ctx.activation(torch.addcmul(a, error, nudge, value=-units.alpha))
        minus = ctx.activation(torch.addcmul(a, error, nudge, value=1 - units.alpha))
        if units.by_mean:
            units.means[ctx.index] = torch.lerp(minus, plus, units.alpha).to(gradient.dtype)
        pull = minus.sub_(plus).div_(nudge).to(gradient.dtype)  # in place, which spares the memory
        if units.by_mean:
            units.pulls[ctx.index] = pull
        return pull, None, None, None
