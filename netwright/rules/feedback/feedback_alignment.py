from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.autograd import Function
from torch.nn import functional
from torch.nn.parameter import Parameter, UninitializedParameter

from netwright import checks
from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.feedback.matrices import (
    Matrices,
    draw,
    handed_on,
    size_of,
)
from netwright.rules.rule import Rule, check_labels, output_for
from netwright.stages import Stages

__all__ = ["FeedbackAlignment"]


@method("rule", saves=["backpropagation"], needs=["labels"],
        variants={"plain": {}, "sign-symmetric": {"feedback": "sign_symmetric"},
                  "learned": {"feedback": "kolen_pollack"}})
class FeedbackAlignment(Rule):
    """Train with matrices of their own, instead of the weights, carrying the error backwards.

    y = W x + b;  dL/dx := B^T dL/dy;  dL/dW = dL/dy x^T;  B ~ N(0, s^2), fixed;
    s^2 = min(mean(W^2), 1/outputs).
    sign_symmetric: B = |B| sign(W).  kolen_pollack: B takes W's update, dL/dB := dL/dW.

    Holds for linear and (transposed) convolutional layers, Hugging Face's `Conv1D` and PyTorch
    Geometric's `Linear` included, wherever they stand in the network; layers that share a weight
    share its B. All else keeps its own derivative: norms, activations, attention's products,
    message passing. So do the weighted modules whose names are in `exact`, which compute with
    their weights themselves: recurrent layers, `nn.MultiheadAttention`, subclasses of a layer
    with a forward of their own. Any network does: it need not be a chain of stages.

    How B is drawn is a choice of this rule, made so that an error has the size that the weights
    would give it, whatever they were initialised with, but does not grow from layer to layer, as it
    would through a tied embedding of N(0, 1). Where W is all zeros, s^2 = 1/outputs. Of Liao's
    magnitudes beside W's signs (all equal, drawn anew for each batch, drawn once) these are the
    ones that are drawn once.

    With `kolen_pollack`, dL/dW is all that the call adds to `W.grad`: that of every layer that
    shares W, and of a tied embedding. So W - B shrinks by the optimizer's weight decay and by
    nothing else where the optimizer treats both alike: give it one that is decoupled (SGD's, which
    decays both by the same factor, AdamW's), and the same options for both. Clipping by each
    parameter's own norm would not.

    Args:
        feedback: "random", "sign_symmetric" or "kolen_pollack".

    Shapes: x as the network takes it; y as the loss takes it; B as W.

    Raises:
        ValueError: the network has no layer that B can serve, or one without weights yet.

    Papers: Lillicrap, Cownden, Tweed, Akerman, 2016, Random Synaptic Feedback Weights Support
    Error Backpropagation for Deep Learning. Liao, Leibo, Poggio, 2016, How Important Is Weight
    Symmetry in Backpropagation? Akrout, Wilson, Humphreys, Lillicrap, Tweed, 2019, Deep Learning
    without Weight Transport.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> rule = FeedbackAlignment(network)
    >>> rule(torch.randn(2, 4), torch.tensor([0, 2])).shape
    torch.Size([])
    >>> rule.feedback["2"].shape
    torch.Size([3, 8])
    """

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 feedback: Literal["random", "sign_symmetric", "kolen_pollack"] = "random",
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        checks.one_of(["random", "sign_symmetric", "kolen_pollack"], feedback=feedback)
        self.loss, self.signed = loss, feedback == "sign_symmetric"
        self.feedback = Matrices(learned=feedback == "kolen_pollack")
        layers, self.exact = find_layers(self.network)
        self._layers: list[tuple[nn.Module, Callable[..., Tensor]]] = []
        self._followed: dict[str, Any] = {}  # modules, whose weights may be put in others' places
        for module, name in layers:
            weight: Any = module.weight
            if self.network.get_submodule(name) is module:  # else its weight has its B already
                self.feedback.add(name, draw(weight.shape, size_for(module), weight, generator))
                if self.feedback.learned and isinstance(module.weight, Parameter):
                    self._followed[name] = module
            forward: Any = forward_of(module)
            self._layers.append((module, partial(forward, module, self.feedback, name,
                                                 self.signed)))

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add the update of feedback alignment to `.grad`; return the detached loss."""
        with handed_on(self._followed, self.feedback.used, self.feedback.learn):
            return send_back(self.network, self._layers, self.loss, x, y)


def send_back(network: nn.Module, layers: list[tuple[nn.Module, Callable[..., Tensor]]],
              loss: Callable[[Tensor, Tensor], Tensor], x: Any, y: Tensor) -> Tensor:
    """Differentiate the loss while `layers` have the forwards beside them; return it, detached."""
    own = [(module.__dict__, module.__dict__.get("forward")) for module, _ in layers]
    try:  # around the backward pass too: checkpoints run forward there
        for module, forward in layers:
            module.__dict__["forward"] = forward
        logits = output_for(loss, network, x)
        if loss is cross_entropy:
            check_labels(y, logits.shape[-1])
        value = loss(logits, y)
        if value.requires_grad:
            value.backward()
    finally:
        for attributes, before in own:
            if before is None:
                attributes.pop("forward", None)
            else:
                attributes["forward"] = before
    return value.detach()


def find_layers(network: nn.Module) -> tuple[list[tuple[Any, str]], list[str]]:
    """Return the layers that feedback can serve, and the names of the other weighted modules.

    Each layer comes with the name of the first one that has its weight.

    Raises:
        ValueError: there is no such layer, or one has no weight yet.
    """
    layers: list[tuple[Any, str]] = []
    names: dict[int, str] = {}
    exact: list[str] = []
    inside = {id(m) for parent in network.modules()
              if isinstance(parent, nn.MultiheadAttention) for m in parent.children()}
    for name, module in network.named_modules():
        if id(module) in inside or forward_of(module) is None:
            weights = [p for p in module.parameters(recurse=False) if p.ndim > 1]
            if weights and not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                exact.append(name)
            continue
        if isinstance(module.weight, UninitializedParameter):
            raise ValueError(f"network must have all its weights, got none yet in {name!r}; run "
                             "it once on an example first")
        key = id(module.weight) if isinstance(module.weight, Parameter) else id(module)
        layers.append((module, names.setdefault(key, name)))
    if not layers:
        raise ValueError(f"network must hold a linear or convolutional layer, got "
                         f"{type(network).__name__} without one; use Backprop")
    return layers, exact


def outputs_axis(module: nn.Module) -> int:
    """Return the axis of the outputs in the weight: 1 in `Conv1D` and transposed convolutions."""
    return int(forward_of(module) in (_transposed_linear, _transposed_convolution))


class _Linear(Function):
    """x W^T + b, whose input receives dL/dy B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor,
                signed: bool) -> Tensor:
        ctx.save_for_backward(x, feedback, weight if signed else None)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, feedback, signs = ctx.saved_tensors
        of_x, of_weight, of_bias, of_feedback, _ = ctx.needs_input_grad
        if signs is not None:
            feedback = torch.copysign(feedback, signs)
        if not x.dtype == feedback.dtype == gradient.dtype:  # under autocast
            x, feedback = x.to(gradient.dtype), feedback.to(gradient.dtype)
        dx = gradient @ feedback if of_x else None
        if gradient.ndim != 2:
            gradient, x = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        dw = gradient.T @ x if of_weight else None
        db = gradient.sum(0) if of_bias else None
        return dx, dw, db, dw if of_feedback else None, None


class _Convolution(Function):
    """A convolution with W and b, whose input receives the gradient of one with B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor,
                signed: bool, run: Callable[..., Tensor], how: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, feedback, weight if signed else None)
        ctx.how, ctx.outputs = how, None if bias is None else list(bias.shape)
        return run(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, feedback, signs = ctx.saved_tensors
        of_feedback = ctx.needs_input_grad[3]
        if signs is not None:
            feedback = torch.copysign(feedback, signs)
        dx, dw, db = torch.ops.aten.convolution_backward(
            gradient, x.to(gradient.dtype), feedback.to(gradient.dtype), ctx.outputs, *ctx.how,
            ctx.needs_input_grad[:3])
        return dx, dw, db, dw if of_feedback else None, None, None, None


def carrier(module: Any, feedback: Any, name: str) -> Tensor:
    """Return the matrix that carries errors back, without a graph where W's `.grad` teaches it.

    A weight that is made anew in each pass, as by `weight_norm`, has no `.grad`.
    """
    matrix: Tensor = feedback[name]
    feedback.used.add(name)
    return matrix.detach() if isinstance(module.weight, Parameter) else matrix


def _linear(module: Any, feedback: Matrices, name: str, signed: bool, x: Tensor) -> Tensor:
    if not x.requires_grad:  # the first layer sends nothing back
        return functional.linear(x, module.weight, module.bias)
    return _Linear.apply(x, module.weight, module.bias, carrier(module, feedback, name), signed)


def _transposed_linear(module: Any, feedback: Matrices, name: str, signed: bool,
                       x: Tensor) -> Tensor:
    if not x.requires_grad:
        return type(module).forward(module, x)
    return _Linear.apply(x, module.weight.T, module.bias, carrier(module, feedback, name).T, signed)


def _convolution(module: Any, feedback: Matrices, name: str, signed: bool, x: Tensor) -> Tensor:
    if not x.requires_grad:
        return type(module).forward(module, x)
    rank = len(module.kernel_size)
    padding, pads = module.padding, module._reversed_padding_repeated_twice
    if padding == "valid":
        padding = (0,) * rank
    elif padding == "same" or module.padding_mode != "zeros":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = functional.pad(x, pads, mode=mode), (0,) * rank
    run = partial(_CONVOLUTIONS[rank], stride=module.stride, padding=padding,
                  dilation=module.dilation, groups=module.groups)
    how = (module.stride, padding, module.dilation, False, (0,) * rank, module.groups)
    return _convolve(module, carrier(module, feedback, name), signed, x, run, how)


def _transposed_convolution(module: Any, feedback: Matrices, name: str, signed: bool, x: Tensor,
                            output_size: list[int] | None = None) -> Tensor:
    if not x.requires_grad:
        return type(module).forward(module, x, output_size)
    rank = len(module.kernel_size)
    extra = module._output_padding(x, output_size, module.stride, module.padding,
                                   module.kernel_size, rank, module.dilation)
    run = partial(_TRANSPOSED[rank], stride=module.stride, padding=module.padding,
                  output_padding=extra, dilation=module.dilation, groups=module.groups)
    how = (module.stride, module.padding, module.dilation, True, extra, module.groups)
    return _convolve(module, carrier(module, feedback, name), signed, x, run, how)


def _convolve(module: Any, feedback: Tensor, signed: bool, x: Tensor,
              run: Callable[..., Tensor], how: tuple[Any, ...]) -> Tensor:
    single = x.ndim == len(module.kernel_size) + 1  # one sample without a batch axis
    y = _Convolution.apply(x.unsqueeze(0) if single else x, module.weight, module.bias, feedback,
                           signed, run, how)
    return y.squeeze(0) if single else y


_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d,
               3: functional.conv_transpose3d}
_FORWARDS = {nn.Linear.forward: _linear,
             nn.Conv1d.forward: _convolution, nn.Conv2d.forward: _convolution,
             nn.Conv3d.forward: _convolution,
             nn.ConvTranspose1d.forward: _transposed_convolution,
             nn.ConvTranspose2d.forward: _transposed_convolution,
             nn.ConvTranspose3d.forward: _transposed_convolution}
_BY_NAME = {("transformers.pytorch_utils", "Conv1D"): _transposed_linear,
            ("torch_geometric.nn.dense.linear", "Linear"): _linear}


def forward_of(module: nn.Module) -> Callable[..., Tensor] | None:
    """Return `module`'s forward(module, feedback, name, signed, x), None where there is none."""
    # a subclass with a forward of its own may do anything with the weight: it keeps that
    kind = type(module)
    return _FORWARDS.get(kind.forward) or _BY_NAME.get((kind.__module__, kind.__name__))


def size_for(module: Any) -> float:
    """Return the deviation of what carries errors back in the place of `module`'s weight."""
    weight, swapped = module.weight, outputs_axis(module)
    inputs = weight.shape[0] if swapped else weight.shape[1] * getattr(module, "groups", 1)
    return size_of(weight, (inputs / max(weight.numel(), 1)) ** 0.5)
