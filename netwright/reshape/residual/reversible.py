from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from netwright import checks
from netwright.anatomy.calls import Call, watching
from netwright.anatomy.replacing import replace, standing_in, without_fused_paths
from netwright.anatomy.residual import Silent, Trace, trace
from netwright.anatomy.residual_blocks import (
    Block,
    Passed,
    example_of,
    put_around,
    respond,
    runs_of,
)
from netwright.anatomy.turns import joined, parted
from netwright.blocks.reversible.block import ReversibleBlock
from netwright.blocks.reversible.sequential import ReversibleSequential
from netwright.catalogue.facets import method
from netwright.errors import CannotReverse, NothingToReshape
from netwright.reshape._layouts import layout_of, plain_layout, plain_silent, silent_of
from netwright.reshape.change import decided, reshape
from netwright.reversing.engine import Add, Update
from netwright.runtime.modes import evaluating, same_buffers
from netwright.runtime.random_state import same_random_state
from netwright.stages._transformers import is_cache

__all__ = ["reversible"]

How = Literal["coupling", "momentum"]


@method(
    "reshape",
    papers=["001-010"],
    place="residual stream",
    saves=["training memory"],
    needs=["a residual network", "training"],
    keeps_function=False,
    search={"how": ["coupling", "momentum"]},
    variants={"coupling": {}, "momentum": {"how": "momentum"}},
)
@reshape
def reversible(model: nn.Module, example: Any = None, *, how: How = "coupling",
               gamma: float = 0.9, exact: bool | None = None) -> nn.Module:
    """Return a copy whose residual blocks can be undone, so that training stores none of them.

    coupling:  a, b := h;  then, block after block, for each of a block's branches f in turn
    a := a + f(b), and with the streams' parts changed b := b + f(a);  h := (a + b) / 2.
    momentum:  v := 0;  for each block f:  v := gamma v + (1 - gamma) f(h);  h := h + v.

    A run of residual blocks is a row of modules beside one another, each of which takes what the
    one before returns, keeps its shape and adds to it. Runs are found by watching the model. In a
    coupling the branches are a block's sublayers, attention and feed-forward for instance, where
    the block is the same as its sublayers one after another; otherwise (blocks with one branch, or
    that normalise or activate after the sum) f is the whole block without its input,
    f(h) = block(h) - h. Momentum keeps each block whole in this way. What comes before, between
    and after the runs, blocks that change the shape among them, stays as it is; masks, positions
    and whatever else a block is given are given to it still.

    The parameters are kept, so that training goes on from them, but the function is another one:
    fine-tune, or train from the start. The nearer `gamma` is to 0, the nearer the momentum network
    is to the one given.

    In the place of a run's first block stands the `ReversibleStack`, which holds all of them, in
    the others' modules that pass the signal on. The result's `reversible_changes` says which runs
    were changed, `reversible_keys` where parameters are now: a `state_dict` of the model given
    loads into the result all the same. Caches are for inference: a Hugging Face model's
    `config.use_cache` is set to False, `generate` uses one as before.

    Args:
        model: Any network with residual blocks.
        example: An input: a tensor, a tuple of positional or a mapping of keyword arguments. A
            Hugging Face model that takes tokens or images needs none.
        how: `"coupling"` or `"momentum"`.
        gamma: How much of the velocity is left at a block, above 0 and below 1.
        exact: Whether rounding errors are kept, about a byte a number and step, so that the
            reconstruction is bit for bit. None keeps them for momentum, whose inverse divides by
            `gamma` at each block.

    Shapes: as the model's.

    Raises:
        NothingToReshape: there are no two residual blocks in a row, and no block with two
            branches; or the model is compiled.
        UnknownName: `how` is neither.
        ValueError: `gamma` is not between 0 and 1, or `example` is needed.

    Papers: Gomez, Ren, Urtasun, Grosse, 2017, The Reversible Residual Network: Backpropagation
    Without Storing Activations. Mangalam, Fan, Li, Wu, Xiong, Feichtenhofer, Malik, 2022,
    Reversible Vision Transformers. Sander, Ablin, Blondel, Peyré, 2021, Momentum Residual Neural
    Networks.

    >>> from netwright.models import gpt
    >>> x = torch.zeros(1, 16, dtype=torch.long)
    >>> flat = reversible(gpt(96, context=16, depth=3), x)
    >>> flat.reversible_changes
    ('1 to 3: 3 blocks (Block) in two coupled streams, each in 2 parts: attention_out, mlp_out',)
    >>> flat(x).shape
    torch.Size([1, 16, 96])
    """
    checks.one_of(["coupling", "momentum"], way_to_make_a_network_reversible=how)
    checks.between(0, 1, ends=(False, False), gamma=gamma,
                   advice="at 0 the network is the one given, which cannot be undone")
    x = example_of(model) if example is None else example
    watched = _without_cache_and_fused_paths(deepcopy(model))
    with same_random_state(), evaluating(watched), same_buffers(watched):
        found = trace(deepcopy(watched), x)
        runs = _runs(watched, x, found, how, alone=how == "coupling")
        # What looked like a block of several branches inside a block may be none.
        runs = runs or _runs(watched, x, found, how, alone=False)
    if not runs:
        raise NothingToReshape(
            f"{type(model).__name__} has no residual blocks in a row: modules beside one another "
            "of which each takes what the one before returns, keeps its shape and adds to it "
            "(h + g(h)); put its residual blocks into an nn.Sequential or an nn.ModuleList")
    return decided({
        "how": how, "gamma": gamma, "exact": how == "momentum" if exact is None else exact,
        "runs": [[{"name": block.name, "response": plain_layout(block.response),
                   "parts": [[name, {short: plain_silent(stub) for short, stub in silent.items()}]
                             for name, silent in block.parts]} for block in run] for run in runs]})


@reversible.applies
def _undoable(model: nn.Module, decision: Mapping[str, Any]) -> nn.Module:
    changed: Any = _without_cache_and_fused_paths(model)
    gamma = decision["gamma"] if decision["how"] == "momentum" else None
    said, keys = [], dict[str, str]()
    for run in decision["runs"]:
        said.append(_said(model, run, gamma))
        keys |= _put(changed, run, gamma, decision["exact"])
    changed.reversible_changes, changed.reversible_keys = tuple(said), keys
    return changed


def _runs(model: nn.Module, x: Any, found: Trace, how: How, *, alone: bool) -> list[list[Block]]:
    """Return the rows of blocks with more than one part, and the parts in them."""
    runs = runs_of(model, x, found, alone=alone)
    for block in (block for run in runs for block in run):
        block.parts = _parts(block, found) if how == "coupling" else [(block.kind, {})]
    return [run for run in runs if sum(len(block.parts) for block in run) > 1]


def _without_cache_and_fused_paths(model: Any) -> Any:
    for part in model.modules():  # a pretrained model may be the backbone of another
        if hasattr(getattr(part, "config", None), "use_cache"):
            part.config.use_cache = False
    without_fused_paths(model, every=True)  # which would not see the parts' roles
    return model


class ReversibleStack(nn.Module):
    """Residual blocks that take turns on two streams, and store neither."""

    def __init__(self, blocks: Sequence[ReversibleBlock], response: Any, *, momentum: bool,
                 exact: bool) -> None:
        super().__init__()
        self.blocks = ReversibleSequential(*blocks, exact=exact)
        self.response, self.momentum = response, momentum

    def forward(self, h: Tensor, *args: Any, **options: Any) -> Any:
        """Return what the blocks make of `h`, in the form in which a block returned it."""
        if torch.is_grad_enabled() and any(map(is_cache, tree_leaves(
                (args, options), is_leaf=is_cache))):
            raise CannotReverse("a key-value cache cannot be filled while gradients are on, since "
                                "blocks run twice; set use_cache=False, or use torch.no_grad()")
        return self._end(self.blocks(self._begin(h), *args, **options))

    def outside(self, h: Tensor) -> Tensor:
        """Return the signal of what passes between the blocks."""
        return parted(h)[0]

    def in_turn(self) -> list[nn.Module]:
        """Return the blocks, each of which takes and gives both streams."""
        return list(self.blocks)

    def take_turn(self, k: int, h: Tensor, *args: Any, **options: Any) -> Any:
        """Return the streams after block `k` side by side, after the last one the output."""
        streams = self._begin(h) if k == 0 else tuple(parted(h))
        streams = self.blocks[k](streams, *args, **options)
        return self._end(streams) if k + 1 == len(self.blocks) else joined(*streams)

    def _begin(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return h, torch.zeros_like(h) if self.momentum else h

    def _end(self, streams: tuple[Tensor, Tensor]) -> Any:
        first, second = streams
        return respond(self.response, first if self.momentum else (first + second) / 2)

    def extra_repr(self) -> str:
        """Say what the streams are."""
        return "position and velocity" if self.momentum else "two coupled streams"

    def __getattr__(self, name: str) -> Any:
        """Return what models read off their layers, such as a kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            blocks = self.__dict__.get("_modules", {}).get("blocks")
            if blocks is None or name.startswith("_"):
                raise
            return getattr(blocks[0].block, name)


class Coupled(ReversibleBlock):
    """The parts of one residual block, which add to one of two streams what they read in the other.

    `turn` is which stream the first part adds to.
    """

    streams = None

    def __init__(self, block: nn.Module, parts: Sequence[tuple[str, dict[str, Silent]]],
                 turn: int) -> None:
        super().__init__()
        self.block, self.turn = block, turn
        self.parts = tuple((name, (_Branch(block, silent),)) for name, silent in parts)

    def updates(self, *args: Any, **options: Any) -> list[Update]:
        """Return one addition for each part."""
        turns = [(self.turn + k) % 2 for k in range(len(self.parts))]
        return [Add(name, branch, (1 - turn,), turn, args, options)
                for turn, (name, (branch,)) in zip(turns, self.parts, strict=True)]


class Momentum(ReversibleBlock):
    """A residual block with a velocity: v := gamma v + (1 - gamma) f(h);  h := h + v."""

    streams = None

    def __init__(self, block: nn.Module, gamma: float) -> None:
        super().__init__()
        self.block, self.gamma = block, gamma
        self.parts = (_Branch(block, {}),)

    def updates(self, *args: Any, **options: Any) -> list[Update]:
        """Return the velocity's step and the position's."""
        return [_Velocity(type(self.block).__name__, self.parts[0], (0,), (1,), args, options,
                          gamma=self.gamma), Add("velocity", nn.Identity(), (1,), 0)]


class _Velocity(Update):

    def __init__(self, *given: Any, gamma: float) -> None:
        super().__init__(*given)
        self.gamma = gamma

    def change(self, x: Sequence[Tensor], made: Tensor) -> list[Tensor]:
        """Return gamma v + (1 - gamma) f."""
        return [(self.gamma * x[0] + (1 - self.gamma) * made).to(x[0].dtype)]

    def restore(self, y: Sequence[Tensor], made: Tensor) -> list[Tensor]:
        """Return (v - (1 - gamma) f) / gamma."""
        return [((y[0] - (1 - self.gamma) * made) / self.gamma).to(y[0].dtype)]


class _Branch(nn.Module):
    """What a block adds to its input while some of its sublayers are silent."""

    def __init__(self, block: nn.Module, silent: dict[str, Silent]) -> None:
        super().__init__()
        self.block = block
        self.silent = tuple((name, (stub,)) for name, stub in silent.items())

    def forward(self, h: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return f(h), of the shape of h."""
        with (standing_in(self.block, {name: stub for name, (stub,) in self.silent}),
              _without_checkpoints(self.block)):
            output = self.block(h, *args, **options)
        return next(t for t in tree_leaves(output) if isinstance(t, Tensor)) - h


@contextmanager
def _without_checkpoints(block: nn.Module) -> Iterator[None]:
    """Hold back transformers' checkpoints: there is nothing to store, and parts change places."""
    on = [part for part in block.modules() if part.__dict__.get("gradient_checkpointing")]
    try:
        for part in on:
            part.__dict__["gradient_checkpointing"] = False
        yield
    finally:
        for part in on:
            part.__dict__["gradient_checkpointing"] = True


@torch.no_grad()
def _parts(block: Block, found: Trace) -> list[tuple[str, dict[str, Silent]]]:
    """Return the block's sublayers with what is silent beside each, or the block as one part."""
    whole: list[tuple[str, dict[str, Silent]]] = [(block.kind, {})]
    if len(block.sublayers) < 2:
        return whole
    parts = []
    for sublayer in block.sublayers:
        others = [name for other in block.sublayers if other is not sublayer
                  for name in (other.name, *other.feeders)]
        inside = {name.removeprefix(f"{block.name}."): name for name in others}
        if not all(name.startswith(f"{block.name}.") for name in others):
            return whole
        parts.append((sublayer.name.removeprefix(f"{block.name}."),
                      {short: deepcopy(found.silent[name]) for short, name in inside.items()}))
    args, options = block.rest
    other = deepcopy(block.module)  # what holds for fresh weights alone, such as a norm of a norm
    for p in other.parameters():    # being the norm, must not count
        p.add_(torch.randn_like(p), alpha=0.1)
    h = block.taken
    expected = _Branch(other, {})(h, *args, **options) + h
    for _, silent in parts:
        h = h + _Branch(other, silent)(h, *args, **options)
    coarse = max(torch.finfo(h.dtype).eps, 1e-7) ** 0.5
    near = bool((h - expected).abs().amax() <= 0.3 * coarse * expected.abs().amax())
    return parts if near and _apart(other, parts, block) else whole


def _apart(module: nn.Module, parts: Sequence[tuple[str, dict[str, Silent]]],
           block: Block) -> bool:
    """Return whether nothing with weights runs in two parts, which a cache would see twice."""
    args, options = block.rest
    weighted = {part for part in module.modules() if part is not module
                and any(True for _ in part.parameters())}
    ran: list[nn.Module] = []
    for _, silent in parts:
        calls: list[Call] = []
        with watching(module, calls, everywhere=True):
            _Branch(module, silent)(block.taken, *args, **options)
        ran += {made.module for made in calls if made.module in weighted}
    return len(ran) == len(set(ran))


def _put(model: nn.Module, run: Sequence[Mapping[str, Any]], gamma: float | None,
         exact: bool) -> dict[str, str]:
    """Put the stack in the run's place; return where the blocks' parameters are now."""
    outer = run[0]["name"].rpartition(".")[0]
    parent = model.get_submodule(outer)
    turn, blocks = 0, list[Coupled | Momentum]()
    for block in run:
        module = model.get_submodule(block["name"])
        parts = [(name, {short: silent_of(stub) for short, stub in silent.items()})
                 for name, silent in block["parts"]]
        blocks.append(Coupled(module, parts, turn) if gamma is None else Momentum(module, gamma))
        turn = (turn + len(parts)) % 2
    names = [block["name"].rpartition(".")[2] for block in run]
    responses = [layout_of(block["response"]) for block in run]
    stack = ReversibleStack(blocks, responses[0], momentum=gamma is not None, exact=exact)
    for block, response in zip(run[1:], responses[1:], strict=True):
        replace(model, block["name"], Passed(response, model.get_submodule(block["name"])))
    put_around(model, run[0]["name"], stack, [block.block for block in blocks])
    moves = {f"{name}.": f"{names[0]}.blocks.{k}.block." for k, name in enumerate(names)}
    parent._register_load_state_dict_pre_hook(partial(_moved, moves))
    outer = f"{outer}." if outer else ""
    return {outer + old: outer + new for old, new in moves.items()}


def _moved(moves: dict[str, str], state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give a state of the model as it was the names that it has now."""
    first = next(iter(moves.values())).partition(".")[0]
    if any(key.startswith(f"{prefix}{first}.blocks.0.block.") for key in state):
        return
    for key in list(state):
        for old, new in moves.items():
            if key.startswith(prefix + old):
                state[prefix + new + key.removeprefix(prefix + old)] = state.pop(key)
                break


def _said(model: nn.Module, run: Sequence[Mapping[str, Any]], gamma: float | None) -> str:
    names = [block["name"] for block in run]
    where = names[0] if len(run) == 1 else f"{names[0]} to {names[-1].rpartition('.')[2]}"
    kinds = " and ".join(dict.fromkeys(type(model.get_submodule(name)).__name__ for name in names))
    what = f"{len(run)} block{'s' * (len(run) > 1)} ({kinds})"
    if gamma is not None:
        return f"{where}: {what} with momentum {gamma}"
    parts = [name for name, _ in run[0]["parts"]]
    inside = (f"each in {len(parts)} parts: {', '.join(parts)}" if len(parts) > 1
              else "each as a whole")
    return f"{where}: {what} in two coupled streams, {inside}"
