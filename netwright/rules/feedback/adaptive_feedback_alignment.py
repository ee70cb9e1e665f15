from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.autograd import forward_ad

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
from netwright.rules.forward._forward_mode import plain_kernels
from netwright.rules.rule import Rule, chain_of, check_labels
from netwright.runtime.modes import evaluating, rehearsing, same_buffers
from netwright.runtime.random_state import random_state, set_random_state
from netwright.stages import Stages
from netwright.stages.stage import Context

__all__ = ["AdaptiveFeedbackAlignment"]


@method(
    "rule",
    papers=["003-020"],
    saves=["backpropagation"],
    needs=["labels", "a chain of stages"],
)
class AdaptiveFeedbackAlignment(Rule):
    """Send the output error to every stage through the weights that lead there from the input.

    h_0 = x,  h_l = stage_l(h_(l-1));  e = N dL/dlogits;  v_0 = F e,  v_l = (dh_l/dh_(l-1)) v_(l-1);
    dL/dW_l := -sum v_l h_(l-1)^T / N in hidden stages, sum e h_(n-1)^T / N in the last.
    F ~ N(0, scale^2 2/features), fixed.

    In the first stage that is the feedback matrix -F W_1^T, behind it -F W_1^T D_1 W_2^T with D_1
    the derivatives of the activations: feedback alignment whose matrices follow the weights.
    v_l is how h_l answers to a small shift of the input by F e. It is found by forward-mode
    differentiation, so that this rule is what `Pepita` comes to as its shift goes to nothing.

    N is the number of labels. A stage that is not one linear layer receives -v_l / N as the
    gradient of its output; the activations that end it pass that on as it is, since v_l holds
    their derivative already; all else has its own derivative. Both passes draw the same dropout.

    F reaches x, a tuple's first part or a mapping's first part that is neither of whole numbers
    nor a mask. Where that is token ids, v_1 = F e in place of the first stage's answer: that stage
    learns by direct feedback alignment, and F is as much larger or smaller as its output is than 1.
    Padding, where an `attention_mask` is 0, teaches nothing. Under autocast the v_l keep the
    parameters' precision.

    Args:
        scale: of F, and so of the hidden updates.

    Shapes: x (*lead, *size); logits (*lead, classes); v_l as h_l; F (classes, *size), or
    (prod(logits[0]), *size) where only the batch axis is shared.

    Raises:
        ValueError: no example; logits without a class axis; what F reaches does not keep the
            batch axis; a `scale` of 0.
        TypeError: an operation of the network has no forward-mode derivative.

    Paper: Srinivasan, Mignacco, Sorbaro, Refinetti, Cooper, Kreiman, Dellaferrera, 2024, Forward
    Learning with Top-Down Feedback: Empirical and Analytical Characterization.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> rule = AdaptiveFeedbackAlignment(network, example=torch.randn(2, 4))
    >>> rule(torch.randn(2, 4), torch.tensor([0, 2])).shape
    torch.Size([])
    >>> rule.feedback["F"].shape
    torch.Size([3, 4])
    """

    def __init__(self, network: nn.Module | Stages, example: Any = None, *, scale: float = 0.05,
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        checks.above(0, scale=scale, advice="without feedback nothing is learned, PEPITA's is 0.05")
        if example is None:
            raise ValueError("example must be an input of the network, got None; the feedback "
                             "matrix takes its size from it")
        self.stages, self.loss = chain_of(self, network, example, loss), loss
        self.feedback = Matrices(learned=False)
        self._ends = list(dict.fromkeys(end for stage in self.stages for end in ends_of(stage)))
        with evaluating(self.network), rehearsing(self.network):
            outputs = self._outputs(example, self.stages.context(example))
        start, logits = part_of(example, place_of(example), outputs[0]), outputs[-1]
        self._lead = shared_axes(start, logits)
        check_axes("what F reaches", start, logits, self._lead)
        size, rows = start.shape[self._lead:], logits.shape[self._lead:].numel()
        deviation = shift_size(start, place_of(example), self._lead, scale)
        self.feedback.add("F", draw((rows, *size), deviation, start, generator))

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add the update of adaptive feedback alignment to `.grad`; return the detached loss."""
        state, context = random_state(), self.stages.context(x)
        outputs = self._outputs(x, context)
        logits = outputs[-1].detach().requires_grad_()
        if self.loss is cross_entropy:
            check_labels(y, logits.shape[-1])
        loss = self.loss(logits, y)
        (error,) = torch.autograd.grad(loss, logits)
        count = labels_in(logits, y)
        start = part_of(x, place_of(x), outputs[0])
        shift = projected(error * count, self.feedback["F"], start, self._lead)
        after = random_state()
        set_random_state(state)
        answers = self._answers(x, shift, [out.detach() for out in outputs], context)
        set_random_state(after)
        send(outputs.pop(), error)
        while outputs:  # what a stage stored for its derivative is freed before the one below
            send(outputs.pop(), -answers.pop() / count, x)
        return loss.detach()

    def _outputs(self, x: Any, context: Context) -> list[Tensor]:
        outputs: list[Tensor] = []
        with passing(self._ends):
            for stage in self.stages:
                outputs.append(stage(outputs[-1].detach() if outputs else x, context))
        return outputs

    @torch.no_grad()
    def _answers(self, x: Any, shift: Tensor, outputs: list[Tensor],
                 context: Context) -> list[Tensor]:
        """Return v_l of the hidden stages, whose inputs are `x` and `outputs`."""
        place, precision = place_of(x), self.feedback["F"].dtype
        answers: list[Tensor] = []
        with same_buffers(self.network), plain_kernels(self.network), forward_ad.dual_level():
            for i, stage in enumerate(list(self.stages)[:-1]):
                if i == 0 and place is INSIDE:
                    stage(x, context)  # draws what it drew before
                    answers.append(shift)
                    continue
                h = (outputs[i - 1] if i else part_of(x, place, shift)).to(precision)
                answer = (answers[-1] if i else shift).to(precision)
                dual = forward_ad.make_dual(h.contiguous(), answer)
                try:
                    out = stage(dual if i else with_part(x, place, dual), context)
                except NotImplementedError as error:
                    raise TypeError(
                        "network must have forward-mode derivatives, and one of its operations "
                        f"has none ({str(error).splitlines()[0]}); use Pepita, which needs "
                        "none") from error
                found = forward_ad.unpack_dual(out).tangent
                answers.append(torch.zeros_like(out) if found is None else found)
        return answers
