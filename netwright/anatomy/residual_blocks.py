"""The residual blocks of a model that feed one another, and what can stand for them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from netwright.anatomy.calls import Call, watching
from netwright.anatomy.replacing import replace
from netwright.anatomy.residual import Place, Silent, Sublayer, Trace
from netwright.signals import call, tensors


class Passed(nn.Module):
    """Stands where a block stood that another module holds: it returns its input.

    It has what the block said of itself in numbers and words, such as a kind of attention, which
    models read off their layers.
    """

    batch_first = False  # PyTorch's encoder looks for it

    def __init__(self, response: Any, block: nn.Module) -> None:
        super().__init__()
        self.response = response
        for name, value in vars(block).items():
            if isinstance(value, (bool, int, float, str)) and not name.startswith("_"):
                setattr(self, name, value)

    def forward(self, h: Tensor, *args: Any, **options: Any) -> Any:
        """Return `h` in the form in which a block returned it."""
        return respond(self.response, h)


@dataclass
class Block:
    """One call of a residual block in the run that was watched."""

    name: str
    module: nn.Module
    taken: Tensor
    given: Tensor
    rest: tuple[Any, Any]
    response: Any
    sublayers: list[Sublayer]
    parts: list[tuple[str, dict[str, Silent]]] = field(default_factory=list)

    @property
    def parent(self) -> str:
        """The name of the module that holds it."""
        return self.name.rpartition(".")[0]

    @property
    def kind(self) -> str:
        """The name of its class."""
        return type(self.module).__name__


def runs_of(model: nn.Module, x: Any, found: Trace, *, alone: bool) -> list[list[Block]]:
    """Return the rows of residual blocks that feed one another, the innermost ones.

    `alone`: whether a single block with several sublayers is a row.
    """
    runs: list[list[Block]] = []
    for block in _blocks(model, x, found):
        run = next((run for run in runs if run[-1].given is block.taken
                    and run[-1].parent == block.parent and _same(run[-1].rest, block.rest)), None)
        if run is None:
            runs.append([block])
        else:
            run.append(block)
    runs = [run for run in runs if len(run) > 1 or (alone and len(run[0].sublayers) > 1)]
    inner = [block.name for run in runs for block in run]
    return [run for run in runs if not any(
        other.startswith(f"{block.name}.") for block in run for other in inner)]


def _blocks(model: nn.Module, x: Any, found: Trace) -> list[Block]:
    calls: list[Call] = []
    with torch.no_grad(), watching(model, calls, everywhere=True):
        call(model, x)
    blocks: dict[str, list[Block]] = {}
    for made in calls:
        args, options = made.arguments
        given = tensors(made.output)
        inside = [s for s in found.sublayers if s.name.startswith(f"{made.name}.")]
        if (made.name and inside and args and isinstance(args[0], Tensor) and len(given) == 1
                and given[0].shape == args[0].shape and given[0].dtype == args[0].dtype):
            response = tree_map(lambda leaf, signal=given[0]: Place.STREAM if leaf is signal
                                else leaf, made.output)
            blocks.setdefault(made.name, []).append(Block(
                made.name, made.module, args[0], given[0], (args[1:], options), response,
                inside))
    return [made[0] for made in blocks.values() if len(made) == 1]


def put_around(model: nn.Module, name: str, stack: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Put `stack`, which holds `blocks`, in the place of the module `name`; their modes stay."""
    modes = {part: part.training for block in blocks for part in block.modules()}
    replace(model, name, stack)
    for part, mode in modes.items():
        part.training = mode


def _same(a: Any, b: Any) -> bool:
    """Whether two blocks were given the same besides the signal."""
    ours, theirs = tree_leaves(a), tree_leaves(b)
    return len(ours) == len(theirs) and all(
        p is q or (not isinstance(p, Tensor) and not isinstance(q, Tensor) and p == q)
        for p, q in zip(ours, theirs, strict=True))


def respond(response: Any, h: Tensor) -> Any:
    """Return `h` in the form in which a block returned it."""
    if response is Place.STREAM:
        return h
    return tree_map(lambda leaf: h if leaf is Place.STREAM else leaf, response)


def example_of(model: Any) -> Any:
    """Return an input of a Hugging Face model; raise ValueError for any other."""
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    device = next((p.device for p in model.parameters()), None)
    if main == "input_ids" and hasattr(config, "vocab_size"):
        return {"input_ids": torch.arange(4, device=device)[None] % config.vocab_size}
    if main == "pixel_values" and hasattr(config, "num_channels"):
        size = getattr(config, "image_size", None) or 64
        sides = (size, size) if isinstance(size, int) else tuple(size)
        kind = next((p.dtype for p in model.parameters()), None)
        return {"pixel_values": torch.randn(1, config.num_channels, *sides, device=device,
                                            dtype=kind)}
    raise ValueError(f"example must be an input of {type(model).__name__}, got None; its residual "
                     "blocks are found by watching a run")
