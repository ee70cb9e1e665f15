from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.autograd import Function

from netwright.errors import UnknownName
from netwright.losses import cross_entropy
from netwright.modes import (
    evaluating,
    random_state,
    rehearsing,
    same_buffers,
    set_random_state,
)
from netwright.rules.feedback.matrices import Matrices, draw
from netwright.rules.rule import Rule, check_labels
from netwright.stages import Stage, Stages, stages
from netwright.stages.stage import Context

INSIDE = "the first stage's output"
# activations that mix the units they read, or have weights of their own
MIXING = (nn.GLU, nn.MultiheadAttention, nn.PReLU, nn.Softmax, nn.Softmax2d, nn.Softmin,
          nn.LogSoftmax)


class Pepita(Rule):
    """Train every stage by how its output changes when the input is shifted by the output error.

    h_0 = x,  h_l = stage_l(h_(l-1));  e = N dL/dlogits;  then again with g_0 = x + F e;
    dL/dW_l := sum (h_l - g_l) g_(l-1)^T / N in hidden stages, sum e g_(n-1)^T / N in the last.
    F ~ N(0, scale^2 2/features), fixed.  mirror: F = -c B_n ... B_1, where B_l follows W_l.

    N is the number of labels, so that e is a sample's own error. A stage that is not one linear
    layer receives (h_l - g_l) / N as the gradient of its output, at its input g_(l-1): the
    outer product above, for a linear layer. The activations that end a stage pass it on as it
    is, as in the paper, where their derivative is nowhere; all else has its own derivative. Both
    passes draw the same dropout, and running statistics see the first pass alone.

    `presynaptic` says which input the change is paired with: "modulated", g_(l-1); "clean",
    h_(l-1); "own", each output with the input that made it, h_l h_(l-1)^T - g_l g_(l-1)^T, whose
    first half can be applied in the first pass, before the error is known. With the last two the
    last stage takes h_(n-1), a choice of this rule.

    F shifts x, a tuple's first part or a mapping's first part that is neither of whole numbers
    nor a mask. Where that is token ids, F shifts the first stage's output instead, which then
    changes by F e alone: that stage learns by direct feedback alignment.

    With `mirror` each B_l is a parameter, dL/dB_l := B_l - the covariance of N(0, 1) and what the
    stage makes of it, and c keeps F at the size it was drawn with. The minus
    makes the shift lower the loss, and h_l - g_l a step back along the error. (Without biases the
    noise may have any size; with them, one of 0.1 would let them decide which units answer it.)

    h_l - g_l is a small difference of large numbers; in bfloat16 most of it is rounding, which a
    larger `scale` outgrows.

    Shapes: x (*lead, *size); logits (*lead, classes); F (classes, *size), or
    (prod(logits[0]), *size) where only the batch axis is shared; B_l (features_l, features_(l-1)).

    Raises:
        ValueError: no example; logits without a class axis; what F shifts does not keep the batch
            axis; `mirror` where a stage does not keep the axes of the logits; a `scale` of 0.

    Papers: Dellaferrera, Kreiman, 2022, Error-driven Input Modulation: Solving the Credit
    Assignment Problem without a Backward Pass. Srinivasan, Mignacco, Sorbaro, Refinetti, Cooper,
    Kreiman, Dellaferrera, 2024, Forward Learning with Top-Down Feedback: Empirical and Analytical
    Characterization.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> rule = Pepita(network, example=torch.randn(2, 4))
    >>> rule(torch.randn(2, 4), torch.tensor([0, 2])).shape
    torch.Size([])
    >>> rule.feedback["F"].shape
    torch.Size([3, 4])
    """

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 feedback: Literal["random", "mirror"] = "random",
                 presynaptic: Literal["modulated", "clean", "own"] = "modulated",
                 scale: float = 0.05,
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        if feedback not in ("random", "mirror"):
            raise UnknownName("feedback", feedback, ["random", "mirror"])
        if presynaptic not in ("modulated", "clean", "own"):
            raise UnknownName("presynaptic factor", presynaptic, ["modulated", "clean", "own"])
        if not scale > 0:
            raise ValueError(f"scale must be above 0, got {scale}; without feedback nothing is "
                             "learned, the paper's is 0.05")
        if example is None:
            raise ValueError("example must be an input of the network, got None; the feedback "
                             "matrix takes its size from it")
        self.stages, self.loss, self.presynaptic = stages(network, example), loss, presynaptic
        self.feedback = Matrices(learned=feedback == "mirror")
        self._ends = list(dict.fromkeys(end for stage in self.stages for end in _ends_of(stage)))
        with evaluating(self.network), rehearsing(self.network):
            self._draw(example, scale)

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add the update of PEPITA to `.grad`; return the detached loss of the first pass."""
        state, place, context = random_state(), _place(x), self.stages.context(x)
        clean = self._outputs(x, context)
        logits = clean[-1].detach().requires_grad_()
        if self.loss is cross_entropy:
            check_labels(y, logits.shape[-1])
        loss = self.loss(logits, y)
        (error,) = torch.autograd.grad(loss, logits)
        count = _count(logits, y)
        start = self._shifted(_part(x, place, clean[0]), error * count)
        h = _with(x, place, start)
        if place is not INSIDE:
            context = self.stages.context(h)
        set_random_state(state)
        with same_buffers(self.network), _passing(self._ends):
            for i, stage in enumerate(self.stages):
                out, own = stage(h, context), clean.pop(0)
                if i == 0 and place is INSIDE:
                    out = out + (start - out.detach())
                h, last = out.detach(), not clean
                change = error if last else (own.detach() - h) / count
                if self.presynaptic == "modulated":
                    _send(out, change)
                elif self.presynaptic == "clean" or last:
                    _send(own, change)
                else:
                    _send(own, own.detach() / count)
                    _send(out, -h / count)
        if self.feedback.learned:
            self._mirror(x, start.shape[:self._lead], context)
        return loss.detach()

    def _outputs(self, x: Any, context: Context) -> list[Tensor]:
        outputs: list[Tensor] = []
        with _passing(self._ends):
            for stage in self.stages:
                out = stage(outputs[-1].detach() if outputs else x, context)
                outputs.append(out.detach() if self.presynaptic == "modulated" else out)
        return outputs

    def _draw(self, example: Any, scale: float) -> None:
        place, outputs = _place(example), self._outputs(example, self.stages.context(example))
        start, logits = _part(example, place, outputs[0]), outputs[-1]
        if logits.ndim < 2:
            raise ValueError("network must return (batch, classes) or (batch, *, classes), got "
                             f"{tuple(logits.shape)}; keep the batch axis and a class axis")
        together = start.shape[:logits.ndim - 1] == logits.shape[:-1]
        self._lead = lead = logits.ndim - 1 if together else 1
        chain = dict(zip(self.stages.names, outputs, strict=True))
        if place is INSIDE:
            del chain[self.stages.names[0]]
        named = {"what F shifts": start, **({} if not self.feedback.learned else chain)}
        for name, h in named.items():
            if h.ndim <= lead or h.shape[:lead] != logits.shape[:lead]:
                raise ValueError(f"{name} must keep the axes {tuple(logits.shape[:lead])} of the "
                                 f"logits, got {tuple(h.shape)}; use DirectFeedbackAlignment"
                                 + (", or feedback='random'" if self.feedback.learned else ""))
        self._size, rows = start.shape[lead:], logits.shape[lead:].numel()
        self._deviation = scale * (2 / self._size.numel()) ** 0.5
        if not self.feedback.learned:
            self.feedback.add("F", draw((rows, *self._size), self._deviation, start,
                                        self.generator))
            return
        self._sizes = [self._size, *(h.shape[lead:] for h in chain.values())]
        widths = [size.numel() for size in self._sizes]
        each = (self._deviation / prod(widths[1:-1]) ** 0.5) ** (1 / max(len(chain), 1))
        for name, (inputs, outputs_) in zip(chain, pairwise(widths), strict=True):
            self.feedback.add(name, draw((outputs_, inputs), each, start, self.generator))

    def _matrix(self) -> Tensor:
        """Return F (classes, *size)."""
        if not self.feedback.learned:
            return self.feedback["F"]
        names = self.stages.names[-len(self._sizes) + 1:]
        product = self.feedback[names[-1]].detach()
        for name in names[-2::-1]:
            product = product @ self.feedback[name].detach()
        size = self._deviation * product.numel() ** 0.5
        return (product * (-size / product.norm())).view(-1, *self._size)

    def _shifted(self, h: Tensor, error: Tensor) -> Tensor:
        """Return h + F e."""
        lead, size = h.shape[:self._lead], h.shape[self._lead:]
        if lead != error.shape[:self._lead] or (size != self._size and (
                self.feedback.learned or len(size) != len(self._size)
                or any(new > drawn for new, drawn in zip(size, self._size, strict=True)))):
            raise ValueError(
                f"x must give {('batch',) * self._lead} and at most {tuple(self._size)} to shift, "
                f"as the example did, got {tuple(h.shape)} beside logits of {tuple(error.shape)}; "
                "build the rule with an example like it")
        F = self._matrix()[(slice(None), *(slice(n) for n in size))].flatten(1)
        e = error.flatten(0, self._lead - 1).flatten(1)
        return h.detach() + (e @ F.to(e.dtype)).view(h.shape).to(h.dtype)

    def _mirror(self, x: Any, lead: torch.Size, context: Context) -> None:
        """Add to `.grad` of each B what makes it follow the covariance of noise and output."""
        place, net = _place(x), list(self.stages)[-len(self._sizes) + 1:]
        with same_buffers(self.network):
            for i, (stage, size) in enumerate(zip(net, self._sizes, strict=False)):
                B = self.feedback[stage.name]
                noise = draw((*lead, *size), 1.0, B, self.generator)
                made = stage(_with(x, place, noise) if i == 0 and place is not INSIDE else noise,
                             context)
                made, noise = made.detach().reshape(-1, B.shape[0]), noise.reshape(-1, B.shape[1])
                update = B.detach() - made.to(B.dtype).T @ noise / len(noise)
                B.grad = update if B.grad is None else B.grad + update


def _ends_of(stage: Stage) -> list[nn.Module]:
    """Return the activations of `stage` that stand after its last weighted module."""
    ends: list[nn.Module] = []
    for module in stage.modules:
        if any(True for _ in module.parameters()):
            ends = []
        elif type(module).__module__ == "torch.nn.modules.activation" and not isinstance(
                module, MIXING):
            ends.append(module)
    return ends


class _Pass(Function):
    """`function` of h, whose gradient is passed on as it is."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(h)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


@contextmanager
def _passing(modules: list[nn.Module]) -> Iterator[None]:
    """Let `modules` pass gradients on as they are."""
    own = [module.__dict__.get("forward") for module in modules]
    try:
        for module in modules:
            module.__dict__["forward"] = partial(_pass, module, module.forward)
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before


def _pass(module: nn.Module, function: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    return _Pass.apply(h.clone() if getattr(module, "inplace", False) else h, function)


def _send(out: Tensor, signal: Tensor) -> None:
    if out.requires_grad:  # a frozen stage has nothing to learn
        out.backward(signal.to(out.dtype))


def _count(logits: Tensor, y: Tensor) -> Tensor | int:
    if y.dtype == torch.int64 and y.shape == logits.shape[:-1]:
        return (y != -100).sum().clamp_min(1)
    return logits.shape[:-1].numel()


def _place(x: Any) -> Any:
    """Return the key of what F shifts in `x`: None for all of it, INSIDE for nothing of it."""
    if isinstance(x, Tensor):
        return None if x.is_floating_point() else INSIDE
    parts = x.items() if isinstance(x, Mapping) else [(0, x[0])]
    return next((key for key, part in parts if isinstance(part, Tensor)
                 and part.is_floating_point() and "mask" not in str(key)), INSIDE)


def _part(x: Any, place: Any, inside: Tensor) -> Tensor:
    if place is INSIDE:
        return inside
    return x if place is None else x[place]


def _with(x: Any, place: Any, h: Tensor) -> Any:
    if place is INSIDE:
        return x
    if place is None:
        return h
    return {**x, place: h} if isinstance(x, Mapping) else (h, *x[1:])
