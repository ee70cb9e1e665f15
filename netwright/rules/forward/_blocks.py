from collections.abc import Sequence
from typing import Any

from torch import Tensor

from netwright import checks
from netwright.stages import Stage, Stages


class Block(Stage):
    """Several stages that run one after another and are differentiated as one."""

    def __init__(self, parts: Sequence[Stage]) -> None:
        super().__init__(parts[0].name, [module for part in parts for module in part.modules],
                         [parameter for part in parts for parameter in part.loose])
        self.parts = parts

    def __call__(self, h: Any, context: Any) -> Tensor:
        """Return what the stage after the last of them takes."""
        for part in self.parts:
            h = part(h, context)
        return h


def in_blocks(net: Stages, blocks: int | Sequence[str], depth: int) -> Stages:
    """Return the chain in which the first `depth` stages of `net` are joined into blocks.

    `blocks` is how many, as equal in length as can be, or the names of the stages at which a block
    begins, in their order; the first stage begins one whether it is named or not.

    Raises:
        UnknownName: a name is not that of a stage that can begin a block.
        ValueError: there are more blocks than stages, or the names are in another order.

    >>> from torch import nn
    >>> from netwright.stages import stages
    >>> net = stages(nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)]))
    >>> in_blocks(net, 2, 5).names, in_blocks(net, ["0", "3"], 5).names
    (['0', '2', '5'], ['0', '3', '5'])
    """
    names = net.names[:depth]
    if isinstance(blocks, int):
        checks.between(1, depth, whole=True, blocks=blocks,
                       advice=f"{depth} stages can be joined; give fewer, or the names of the "
                              "stages that begin one")
        starts = [i * depth // blocks for i in range(blocks)]
    else:
        for name in blocks:
            checks.one_of(names, stage_that_can_begin_a_block=name)
        starts = [names.index(name) for name in blocks]
        if starts != sorted(set(starts)):
            inorder = sorted(set(blocks), key=names.index)
            raise ValueError(f"blocks={list(blocks)!r} must name stages in the order in which they "
                             f"run, each once; try blocks={inorder!r}")
        starts = sorted({0, *starts})
    chain = list(net)
    joined = [Block(chain[a:b]) for a, b in zip(starts, [*starts[1:], depth], strict=True)]
    return Stages(net.model, [*joined, *chain[depth:]], net._make_context)
