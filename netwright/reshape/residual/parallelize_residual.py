from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from netwright import checks
from netwright.anatomy.replacing import replace
from netwright.anatomy.residual import trace
from netwright.anatomy.residual_blocks import (
    Passed,
    example_of,
    put_around,
    respond,
    runs_of,
)
from netwright.anatomy.turns import joined, parted
from netwright.catalogue.facets import method
from netwright.errors import NothingToReshape
from netwright.reshape._layouts import layout_of, plain_layout
from netwright.reshape.change import decided, reshape
from netwright.runtime.modes import evaluating, same_buffers
from netwright.runtime.random_state import same_random_state

__all__ = ["parallelize_residual"]


@method(
    "reshape",
    papers=["004-042"],
    place="residual stream",
    needs=["training"],
    keeps_function=False,
    search={"group": [None, 2]},
    variants={"whole runs": {}, "pairs": {"group": 2}},
)
@reshape
def parallelize_residual(model: nn.Module, example: Any = None, *,
                         group: int | None = None) -> nn.Module:
    """Return a copy whose residual blocks stand side by side instead of one after another.

    h_k := h_k-1 + f_k(h_k-1), k = 1..n   becomes   h := h + sum_k f_k(h)

    The stack's output is a sum over all ways through it, h + sum f_k + sum f_k f_j + ...; what is
    left is the terms of first order, which one broad layer computes, none of whose parts waits
    for another. Where f_k changes its input little, so does this change the network; otherwise
    train it from the start, or fine-tune.

    A run of residual blocks is a row of modules beside one another, each of which takes what the
    one before returns, keeps its shape and adds to it what a module with weights returns. Runs
    are found by watching the model. f_k is the whole block without its input, block_k(h) - h, so
    that a transformer's feed-forward part still reads its attention, and blocks that normalise or
    activate after the sum have that in f_k. What comes before, between and after the runs stays
    as it is; masks, positions and whatever else a block is given are given to it still.

    In the place of a run's first block stands a `ParallelSum` of all of them, in the others'
    modules that pass the signal on. The result's `parallel_changes` says what was changed.

    Args:
        model: Any network with residual blocks.
        example: An input: a tensor, a tuple of positional or a mapping of keyword arguments. A
            Hugging Face model that takes tokens or images needs none.
        group: How many neighbouring blocks are put side by side; the groups stay one after
            another. All of a run where none is given; 1 would change nothing.

    Shapes: as the model's.

    Raises:
        NothingToReshape: there are no two residual blocks in a row; or the model is compiled.
        ValueError: `group` is below 2, or `example` is needed.

    Paper: Bermeitinger, Hrycej, Handschuh, 2023, Make Deep Networks Shallow Again.

    >>> import torch
    >>> from netwright.models import gpt
    >>> x = torch.zeros(1, 16, dtype=torch.long)
    >>> broad = parallelize_residual(gpt(96, context=16, depth=3), x)
    >>> broad.parallel_changes, broad(x).shape
    (('1 to 3: 3 blocks (Block) side by side',), torch.Size([1, 16, 96]))
    """
    checks.count(2, group=group, optional=True, advice="leave it out for whole runs")
    x = example_of(model) if example is None else example
    watched = deepcopy(model)
    with same_random_state(), evaluating(watched), same_buffers(watched):
        runs = runs_of(watched, x, trace(deepcopy(watched), x), alone=False)
    if not runs:
        raise NothingToReshape(
            f"{type(model).__name__} has no residual blocks in a row: modules beside one another "
            "of which each takes what the one before returns, keeps its shape and adds to it what "
            "a module with weights returns (h + g(h)); put its residual blocks into an "
            "nn.Sequential or an nn.ModuleList, and g with its activation into a module")
    groups = [run[i:i + (group or len(run))] for run in runs
              for i in range(0, len(run), group or len(run))]
    return decided({"groups": [[{"name": block.name, "response": plain_layout(block.response)}
                                for block in some] for some in groups if len(some) > 1]})


@parallelize_residual.applies
def _side_by_side(model: nn.Module, decision: Mapping[str, Any]) -> nn.Module:
    changed: Any = model
    changed.parallel_changes = tuple(_put(model, run) for run in decision["groups"])
    return changed


class ParallelSum(nn.Module):
    """Residual blocks that all read one signal: h + sum_k (block_k(h) - h)."""

    def __init__(self, blocks: Sequence[nn.Module], response: Any) -> None:
        super().__init__()
        self.blocks, self.response = nn.ModuleList(blocks), response

    def forward(self, h: Tensor, *args: Any, **options: Any) -> Any:
        """Return what the blocks make of `h`, in the form in which a block returned it."""
        total = h
        for block in self.blocks:
            total = total + _added(block, h, *args, **options)
        return respond(self.response, total)

    def outside(self, h: Tensor) -> Tensor:
        """Return the signal of what passes between the blocks."""
        return parted(h)[0]

    def in_turn(self) -> list[nn.Module]:
        """Return the blocks, each of which adds to a sum that passes beside the signal."""
        return list(self.blocks)

    def take_turn(self, k: int, h: Tensor, *args: Any, **options: Any) -> Any:
        """Return the signal and the sum after block `k`, the last time the sum alone."""
        h, total = (h, h) if k == 0 else parted(h)
        total = total + _added(self.blocks[k], h, *args, **options)
        return (respond(self.response, total) if k + 1 == len(self.blocks)
                else joined(h, total))

    def __getattr__(self, name: str) -> Any:
        """Return what models read off their layers, such as a kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            blocks = self.__dict__.get("_modules", {}).get("blocks")
            if blocks is None or name.startswith("_"):
                raise
            return getattr(blocks[0], name)


def _added(block: nn.Module, h: Tensor, *args: Any, **options: Any) -> Tensor:
    """Return what a block adds to its input."""
    output = block(h, *args, **options)
    return next(t for t in tree_leaves(output) if isinstance(t, Tensor)) - h


def _put(model: nn.Module, run: Sequence[Mapping[str, Any]]) -> str:
    """Put the blocks side by side into the place of the first; say what was done."""
    names = [block["name"] for block in run]
    modules = [model.get_submodule(name) for name in names]
    responses = [layout_of(block["response"]) for block in run]
    for name, module, response in zip(names[1:], modules[1:], responses[1:], strict=True):
        replace(model, name, Passed(response, module))
    put_around(model, names[0], ParallelSum(modules, responses[0]), modules)
    kinds = " and ".join(dict.fromkeys(type(module).__name__ for module in modules))
    return (f"{names[0]} to {names[-1].rpartition('.')[2]}: {len(run)} blocks ({kinds}) "
            "side by side")
