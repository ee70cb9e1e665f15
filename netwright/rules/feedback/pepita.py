from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.feedback.inputs import (
    INSIDE,
    check_axes,
    ends_of,
    labels_in,
    part_of,
    passing,
    place_of,
    projected,
    send,
    shared_axes,
    shift_size,
    with_part,
)
from netwright.rules.feedback.matrices import Matrices, draw
from netwright.rules.rule import Rule, chain_of, check_labels
from netwright.runtime.modes import evaluating, rehearsing, same_buffers
from netwright.runtime.random_state import random_state, set_random_state
from netwright.stages import Stages
from netwright.stages.stage import Context

__all__ = ["Pepita"]


@method(
    "rule",
    papers=["003-020"],
    saves=["backpropagation"],
    needs=["labels", "a chain of stages"],
    variants={"plain": {}, "clean": {"presynaptic": "clean"}, "own": {"presynaptic": "own"},
              "mirrored": {"feedback": "mirror"}},
)
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
    changes by F e alone: that stage learns by direct feedback alignment, and F is as much larger or
    smaller as that output is than 1. Padding, where an `attention_mask` is 0, teaches nothing.

    With `mirror` each B_l is a parameter, dL/dB_l := B_l - the covariance of N(0, 1) and what the
    stage makes of it, and c keeps F at the size it was drawn with. The minus
    makes the shift lower the loss, and h_l - g_l a step back along the error. (Without biases the
    noise may have any size; with them, one of 0.1 would let them decide which units answer it.)

    h_l - g_l is a small difference of large numbers; in bfloat16 most of it is rounding, which a
    larger `scale` outgrows.

    Args:
        feedback: "random", or "mirror" for an F that follows the weights.
        presynaptic: "modulated", "clean" or "own": the input that a change is paired with.
        scale: of F, and so of the shift.

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

    @property
    def same_in_shares(self) -> bool:  # type: ignore[override]
        """Not where the feedback follows the weights by noise that is drawn."""
        return not self.feedback.learned

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 feedback: Literal["random", "mirror"] = "random",
                 presynaptic: Literal["modulated", "clean", "own"] = "modulated",
                 scale: float = 0.05,
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        checks.one_of(["random", "mirror"], feedback=feedback)
        checks.one_of(["modulated", "clean", "own"], presynaptic_factor=presynaptic)
        checks.above(0, scale=scale,
                     advice="without feedback nothing is learned, the paper's is 0.05")
        if example is None:
            raise ValueError("example must be an input of the network, got None; the feedback "
                             "matrix takes its size from it")
        self.stages = chain_of(self, network, example, loss)
        self.loss, self.presynaptic = loss, presynaptic
        self.feedback = Matrices(learned=feedback == "mirror")
        self._ends = list(dict.fromkeys(end for stage in self.stages for end in ends_of(stage)))
        with evaluating(self.network), rehearsing(self.network):
            self._draw(example, scale)

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add the update of PEPITA to `.grad`; return the detached loss of the first pass."""
        state, place, context = random_state(), place_of(x), self.stages.context(x)
        clean = self._outputs(x, context)
        logits = clean[-1].detach().requires_grad_()
        if self.loss is cross_entropy:
            check_labels(y, logits.shape[-1])
        loss = self.loss(logits, y)
        (error,) = torch.autograd.grad(loss, logits)
        count = labels_in(logits, y)
        start = self._shifted(part_of(x, place, clean[0]), error * count)
        h = with_part(x, place, start)
        if place is not INSIDE:
            context = self.stages.context(h)
        set_random_state(state)
        with same_buffers(self.network), passing(self._ends):
            for i, stage in enumerate(self.stages):
                out, own = stage(h, context), clean.pop(0)
                if i == 0 and place is INSIDE:
                    out = out + (start - out.detach())
                h, last = out.detach(), not clean
                change = error if last else (own.detach() - h) / count
                padded = None if last else x
                if self.presynaptic == "modulated":
                    send(out, change, padded)
                elif self.presynaptic == "clean" or last:
                    send(own, change, padded)
                else:
                    send(own, own.detach() / count, padded)
                    send(out, -h / count, padded)
        if self.feedback.learned:
            self._mirror(x, start.shape[:self._lead], context)
        return loss.detach()

    def _outputs(self, x: Any, context: Context) -> list[Tensor]:
        outputs: list[Tensor] = []
        with passing(self._ends):
            for stage in self.stages:
                out = stage(outputs[-1].detach() if outputs else x, context)
                outputs.append(out.detach() if self.presynaptic == "modulated" else out)
        return outputs

    def _draw(self, example: Any, scale: float) -> None:
        place, outputs = place_of(example), self._outputs(example, self.stages.context(example))
        start, logits = part_of(example, place, outputs[0]), outputs[-1]
        self._lead = lead = shared_axes(start, logits)
        chain = dict(zip(self.stages.names, outputs, strict=True))
        if place is INSIDE:
            del chain[self.stages.names[0]]
        check_axes("what F shifts", start, logits, lead,
                   ", or feedback='random'" if self.feedback.learned else "")
        for name, h in chain.items() if self.feedback.learned else ():
            check_axes(name, h, logits, lead, ", or feedback='random'")
        self._size, rows = start.shape[lead:], logits.shape[lead:].numel()
        deviation = shift_size(start, place, lead, scale)
        if not self.feedback.learned:
            self.feedback.add("F", draw((rows, *self._size), deviation, start, self.generator))
            return
        self.register_buffer("deviation", start.new_tensor(deviation))  # F's, whatever B becomes
        self._sizes = [self._size, *(h.shape[lead:] for h in chain.values())]
        widths = [size.numel() for size in self._sizes]
        each = (deviation / prod(widths[1:-1]) ** 0.5) ** (1 / max(len(chain), 1))
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
        size = self.get_buffer("deviation") * product.numel() ** 0.5
        return (product * (-size / product.norm())).view(-1, *self._size)

    def _shifted(self, h: Tensor, error: Tensor) -> Tensor:
        """Return h + F e."""
        return h.detach() + projected(error, self._matrix(), h, self._lead,
                                      whole=self.feedback.learned)

    def _mirror(self, x: Any, lead: torch.Size, context: Context) -> None:
        """Add to `.grad` of each B what makes it follow the covariance of noise and output."""
        place, net = place_of(x), list(self.stages)[-len(self._sizes) + 1:]
        with same_buffers(self.network):
            for i, (stage, size) in enumerate(zip(net, self._sizes, strict=False)):
                B = self.feedback[stage.name]
                noise = draw((*lead, *size), 1.0, B, self.generator)
                first = i == 0 and place is not INSIDE
                made = stage(with_part(x, place, noise) if first else noise, context)
                made, noise = made.detach().reshape(-1, B.shape[0]), noise.reshape(-1, B.shape[1])
                update = B.detach() - made.to(B.dtype).T @ noise / len(noise)
                B.grad = update if B.grad is None else B.grad + update
