from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

from netwright import checks
from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.auxiliary_heads import AuxiliaryHead, blocks_of, needed, signals
from netwright.rules.readout import count_classes, first_parameter
from netwright.rules.rule import Rule, chain_of, checked
from netwright.stages import Stage, Stages

__all__ = ["MomentumAuxiliary"]


@method(
    "rule",
    papers=["003-055"],
    saves=["backpropagation", "training memory"],
    needs=["classes", "a chain of stages"],
    variants={"plain": {}, "two blocks": {"blocks": 2}},
)
class MomentumAuxiliary(Rule):
    """Train blocks of stages each through a moving average of the stage that follows.

    a_j = block_j(a_{j-1}), a_{j-1} cut off from its graph;  s is the first stage of block j + 1,
    with weights theta;  b_j = s(a_j; average_j) + s(a_j; correction_j);
    L_j = loss(head_j(b_j), y);  block j, correction_j and head_j descend L_j, the last block the
    loss of its own output;  average_j := momentum average_j + (1 - momentum) theta.

    The average tells a block what the next one makes of its output, without a gradient between
    them; the correction, weights of the same shapes that learn (the paper's learnable bias), makes
    up for the average being behind and made for other features. Both start as theta. Where s ends
    the network, b_j is class scores and there is no head. Heads, `blocks` and `width` are those of
    `LocalLosses`, as is the returned loss, the mean of the L_j.

    An average advances in the first call after the following stage's gradients were cleared: once
    for each optimizer step, however many calls it gathers gradients from, all of which see the
    same averages. (The paper's code advances at every call and uses the new average from the next
    call on; there both start as draws of their own.)

    Average and correction have running statistics of their own where s normalises batches;
    parameters of s that belong to none of its modules are used as they are.

    Args:
        blocks: how many there are, or the names of the stages at which they begin; by default every
            stage is one.
        momentum: of the averages, between 0 and 1; at 1 they stay as they began.
        width: units of a head's hidden layer.
        num_classes: the number of classes; by default the width of the network's output.

    Shapes: a_j (batch, *size_j); average_j, correction_j as theta; y (batch,), or (batch, tokens).

    Raises:
        ValueError: `momentum` is not between 0 and 1, `blocks` does not divide the stages,
            `num_classes` is not what the last stage returns, or either it or an example is needed
            and missing, or the following stage's weights have no shape yet.
        UnknownName: `blocks` holds a name that no stage has.

    Paper: Su, Cai, Zhu, He, Xu, Guan, Si, 2024, Momentum Auxiliary Network for Supervised Local
    Learning.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(),
    ...                         nn.Linear(6, 3))
    >>> rule = MomentumAuxiliary(network)
    >>> [list(average.state_dict()) for average in rule.averages]
    [['0.weight', '0.bias'], ['0.weight', '0.bias']]
    >>> rule(torch.randn(2, 4), torch.tensor([0, 2])).requires_grad
    False
    """

    keeps_activations = True

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 blocks: int | Sequence[str] | None = None, momentum: float = 0.995,
                 width: int = 128, num_classes: int | None = None,
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        checks.count(1, width=width, advice="the default is 128")
        checks.between(0, 1, momentum=momentum, advice="0 takes the following stage's weights as "
                       "they are, 1 as they were at first; try 0.995")
        self.stages = chain_of(self, network, example, loss)
        self.loss, self.momentum = loss, momentum
        self.blocks = blocks_of(self.stages, blocks)
        found, last = signals(self.stages, example)
        self.num_classes = count_classes(self.stages, num_classes, last)
        self.averages, self.corrections = nn.ModuleList(), nn.ModuleList()
        self.heads = nn.ModuleList()
        # A list, so that the network's weights are not registered once more.
        self.following = [_Following(block[0]) for block in self.blocks[1:]]
        for following in self.following:
            stage = following.stage
            if any(map(nn.parameter.is_lazy, stage.parameters())):
                raise ValueError(f"stage {stage.name} must have weights to average, got lazy ones "
                                 "without a shape; run the network on an input first")
            self.averages.append(_without_parameters(deepcopy(following.parts)))
            self.corrections.append(deepcopy(following.parts).requires_grad_(True))
            i = self.stages.names.index(stage.name)
            if i < len(self.stages) - 1:
                signal = needed(found[i], self.stages, stage.name)
                self.heads.append(AuxiliaryHead(signal, self.num_classes, width=width,
                                                like=first_parameter(self.stages),
                                                generator=generator))

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add each block's own gradient to `.grad`; return the mean of the blocks' losses."""
        first = [following.has_no_gradient() for following in self.following]
        context, h = self.stages.context(x, live=len(self.blocks) == 1), x
        losses = []
        for j, block in enumerate(self.blocks):
            for stage in block:
                h = stage(h, context)
            scores, inputs = h, None
            if j < len(self.following):
                following, correction = self.following[j], self.corrections[j]
                average = self._average(j, advance=first[j])
                scores = (following.run(average, h, context)
                          + following.run(_tensors(correction), h, context))
                if following.stage.loose:  # they are not swapped, and must not learn from this
                    own = [p for stage in block for p in stage.parameters()]
                    own += [*correction.parameters(), *self.heads[j:j + 1].parameters()]
                    inputs = [p for p in own if p.requires_grad]
            if j < len(self.heads):
                scores = self.heads[j](scores, y, x)
            loss = checked(self.loss, scores, y)
            if j < len(self.following) and first[j]:  # not before y was found to be right
                with torch.no_grad():
                    for name, value in _tensors(self.averages[j]).items():
                        if average[name] is not value:  # running statistics are up to date
                            value.copy_(average[name])
            if loss.requires_grad:  # not so in a last block that is frozen
                loss.backward(inputs=inputs)
            losses.append(loss.detach())
            h = h.detach()
        return torch.stack(losses).mean()

    @torch.no_grad()
    def _average(self, j: int, *, advance: bool) -> dict[str, Tensor]:
        """Return the average and its running statistics; a new one where it is to advance."""
        average = _tensors(self.averages[j])
        if advance:
            for name, weight in self.following[j].parts.named_parameters():
                average[name] = average[name].lerp(weight, 1 - self.momentum)
        return average


class _Following(nn.Module):
    """A stage that can be run with other weights than its own."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage, self.parts = stage, nn.ModuleList(stage.modules)

    def forward(self, h: Tensor, context: Any) -> Tensor:
        return self.stage(h, context)

    def run(self, tensors: dict[str, Tensor], h: Tensor, context: Any) -> Tensor:
        """Run the stage with `tensors` as the parameters and buffers of its parts."""
        state = {f"parts.{name}": value for name, value in tensors.items()}
        return functional_call(self, state, (h, context))

    def has_no_gradient(self) -> bool:
        """Whether no gradient of the stage's weights waits for the optimizer."""
        return not any(p.grad is not None and p.grad.any() for p in self.parts.parameters())


def _tensors(parts: nn.Module) -> dict[str, Tensor]:
    return {**dict(parts.named_parameters()), **dict(parts.named_buffers())}


def _without_parameters(parts: nn.Module) -> nn.Module:
    """Make a buffer of every parameter, so that no optimizer takes it."""
    for module in parts.modules():
        for name, p in list(module._parameters.items()):
            del module._parameters[name]
            module.register_buffer(name, None if p is None else p.detach())
    return parts
