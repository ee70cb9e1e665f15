from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.auxiliary_heads import AuxiliaryHead, blocks_of, needed, signals
from netwright.rules.readout import count_classes, first_parameter
from netwright.rules.rule import Rule, chain_of, checked
from netwright.stages import Stages

__all__ = ["LocalLosses"]


@method(
    "rule",
    papers=["003-055"],
    saves=["backpropagation", "training memory"],
    needs=["classes", "a chain of stages"],
    variants={"plain": {}, "two blocks": {"blocks": 2}},
)
class LocalLosses(Rule):
    """Train blocks of stages each by the loss of a small network of its own.

    a_j = block_j(a_{j-1}), a_{j-1} cut off from its graph;  L_j = loss(head_j(a_j), y);
    block j and head_j descend L_j. The last block's output is class scores, so it has no head.

    `blocks` is how many blocks of as many stages each, or the names of the stages at which they
    begin (the first takes all that comes before it), or None: every stage is a block. One block
    is backpropagation. No gradient passes from one block to another, and a block's activations
    are freed before the next block runs. The returned loss is the mean of the L_j.

    A head has a hidden layer of `width` units, and before it, where the block returns maps, a
    convolution between two steps of average pooling, to at most 8 and to 2 cells an axis. That is
    between the literature's heads: Nøkland and Eidnes pool and have one linear layer, Belilovsky
    et al. pool, take three convolutions of one cell and three linear layers, and later work one
    convolution of 3 cells and two linear layers. Theirs normalise batches; these do not, so that
    a batch of one will do. Tokens are averaged where there is one label for a sample.

    What passes beside the signal (the layers that a graph network joins at its end) is cut off
    like the signal.

    Args:
        blocks: how many there are, or the names of the stages at which they begin; by default every
            stage is one.
        width: units of a head's hidden layer.
        num_classes: the number of classes; by default the width of the network's output.

    Shapes: a_j (batch, *size_j); y (batch,), or (batch, tokens).

    Raises:
        ValueError: `blocks` does not divide the stages, `num_classes` is not what the last stage
            returns, or either it or an example is needed and missing.
        UnknownName: `blocks` holds a name that no stage has.

    Papers: Nøkland, Eidnes, 2019, Training Neural Networks with Local Error Signals (its
    prediction loss). Belilovsky, Eickenberg, Oyallon, 2020, Decoupled Greedy Learning of CNNs. It
    is what the blocks are compared with in Su et al., 2024, Momentum Auxiliary Network for
    Supervised Local Learning.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(),
    ...                         nn.Linear(8, 3))
    >>> rule = LocalLosses(network, blocks=2)
    >>> [[stage.name for stage in block] for block in rule.blocks]
    [['0', '2'], ['4']]
    >>> rule(torch.randn(2, 4), torch.tensor([0, 2])).requires_grad
    False
    """

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 blocks: int | Sequence[str] | None = None, width: int = 128,
                 num_classes: int | None = None,
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        checks.count(1, width=width, advice="the default is 128")
        self.stages, self.loss = chain_of(self, network, example, loss), loss
        self.blocks = blocks_of(self.stages, blocks)
        found, last = signals(self.stages, example)
        self.num_classes = count_classes(self.stages, num_classes, last)
        self.heads = nn.ModuleList()
        end = 0
        for block in self.blocks[:-1]:
            end += len(block)
            signal = needed(found[end - 1], self.stages, block[-1].name)
            self.heads.append(AuxiliaryHead(signal, self.num_classes, width=width,
                                            like=first_parameter(self.stages),
                                            generator=generator))

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add each block's own gradient to `.grad`; return the mean of the blocks' losses."""
        context, h = self.stages.context(x, live=len(self.blocks) == 1), x
        losses = []
        for block, head in zip(self.blocks, [*self.heads, None], strict=True):
            for stage in block:
                h = stage(h, context)
            loss = checked(self.loss, h if head is None else head(h, y, x), y)
            if loss.requires_grad:  # not so in a last block that is frozen
                loss.backward()
            losses.append(loss.detach())
            h = h.detach()
        return torch.stack(losses).mean()
