"""Residual streams and what adds to them, found by watching one run of a model."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from netwright.anatomy.calls import Call
from netwright.anatomy.run import Operation, Run, Value, record
from netwright.signals import Path, at, placed, tensors


class Place(Enum):
    """Where something is in a sublayer's output."""

    STREAM = "what is added to the stream"


@dataclass(frozen=True)
class Given:
    """Where a sublayer returned what it was given: the place in its (args, kwargs)."""

    path: Path


@dataclass(frozen=True)
class Sublayer:
    """A branch of a residual stream: the module that writes to it, and what feeds only that."""

    name: str
    feeders: tuple[str, ...] = ()


class Silent(nn.Module):
    """Stands where a sublayer stood: it adds nothing to the residual stream.

    `width` is the size of the output's last axis where it is not the input's; `layout` is what
    the sublayer returned, `Place.STREAM` where the stream's share was and `Given` where something
    was passed on.
    """

    batch_first = False  # PyTorch's fused encoder layer looks for it

    def __init__(self, width: int | None, layout: Any) -> None:
        super().__init__()
        self.width, self.layout = width, layout

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros of the shape that the sublayer's output had."""
        h = tensors((args, kwargs))[0]
        shape = h.shape if self.width is None else (*h.shape[:-1], self.width)
        zeros = h.new_zeros(shape)
        return tree_map(lambda leaf: zeros if leaf is Place.STREAM else
                        at((args, kwargs), leaf.path) if isinstance(leaf, Given) else leaf,
                        self.layout)

    def extra_repr(self) -> str:
        """Say what is not its input's."""
        return "" if self.width is None else f"width={self.width}"


@dataclass
class Trace:
    """What one run showed: the branches, and for every module how `Silent` would stand for it."""

    sublayers: list[Sublayer]
    silent: dict[str, Silent] = field(default_factory=dict)


@dataclass(frozen=True)
class Sum:
    """One addition to a residual stream, by the numbers of its tensors.

    `before` is the stream, `branch` what is added, computed from it, and `after` their sum;
    `writers` are the modules whose outputs the branch sums, with what each gave.
    """

    before: int
    branch: int
    after: int
    writers: dict[str, int]


def sums(run: Run) -> list[Sum]:
    """Return the additions of something to what it was computed from, h + g(h), in order."""
    writers: dict[int, dict[str, int]] = {}
    for call in run.calls:  # an outer module begins before those inside it
        if call.name and call.taken and call.gave and run.taught[call.gave[0]] and any(
                True for _ in call.module.parameters()):
            writers.setdefault(call.gave[0], {call.name: call.gave[0]})
    found = []
    for operation in run.operations:
        if operation.name == "add" and len(operands := _operands(operation)) == 2:
            made = _sum(run, operation, operands, writers)
            if made is not None:
                found.append(made)
        elif (passed := _passed(run, operation)) in writers:
            writers.setdefault(operation.gave[0], writers[passed])
    return found


def _sum(run: Run, operation: Operation, operands: list[int],
         writers: dict[int, dict[str, int]]) -> Sum | None:
    """Return the addition to a stream; note what is summed before it is added to one."""
    after = operation.gave[0]
    for branch, before in (operands, operands[::-1]):
        if branch in writers and run.reaches(branch, before):
            return Sum(before, branch, after, writers[branch])
    if all(n in writers for n in operands):  # parallel branches are summed first
        writers[after] = {**writers[operands[0]], **writers[operands[1]]}
    return None


def _operands(operation: Operation) -> list[int]:
    args, kwargs = operation.arguments
    plain = kwargs.get("alpha", 1) == 1
    return [a.number for a in args if isinstance(a, Value)] if plain else []


def _passed(run: Run, operation: Operation) -> int:
    """Return what `operation` only scales, drops from or lays out anew, -1 for any other."""
    numbers = [n for n in operation.taken if run.fed[n]]
    if len(numbers) != 1 or not operation.gave:
        return -1
    whole = prod(run.shapes[numbers[0]]) == prod(run.shapes[operation.gave[0]])
    scaled = operation.layout or operation.name in ("mul", "roll")  # a dropout is a clone
    return numbers[0] if scaled and whole else -1


def trace(model: nn.Module, x: Any) -> Trace:
    """Watch `model` run on `x`; return its sublayers in the order in which they write.

    A sublayer is the outermost module whose output is added to a tensor that the output was
    computed from, and that makes nothing else with its weights that others use, such as the first
    layer's position bias in T5. Its feeders are the modules that matter only through it, such as
    the norm before it.
    """
    run = record(model, x)
    silent = {name: stub for name, calls in _by_name(run).items() if (stub := _silent(calls))}
    writers = {name: number for made in sums(run) for name, number in made.writers.items()
               if name in silent and not _makes_more(run, name, number)}
    return Trace([Sublayer(name, tuple(outermost([
        feeder for feeder in feeders(run, name, writers[name]) if feeder in silent])))
        for name in outermost(list(writers))], silent)


def _makes_more(run: Run, name: str, number: int) -> bool:
    """Return whether others use what a module made with its weights besides tensor `number`."""
    (call,) = run.called(name)
    more = [n for n in call.gave if n != number and n not in call.taken and run.taught[n]]
    return bool(more) and not run.ancestors(run.output, apart=[number]).isdisjoint(more)


def outermost(names: list[str]) -> list[str]:
    """Return those of `names` that are inside no other."""
    return [name for name in names
            if not any(name.startswith(other + ".") for other in names)]


def feeders(run: Run, writer: str, number: int) -> Iterator[str]:
    """Yield the modules that matter only through what `writer` gave: their weights and outputs."""
    needed = run.ancestors(run.output, apart=[number])
    lost = run.ancestors(run.output) - needed
    numbers = {id(p): n for p, n in run.learning()}
    gave = {call.name: call.gave for call in run.calls}
    for name, module in run.network.named_modules():
        if name in ("", writer) or f"{writer}.".startswith(f"{name}.") or name.startswith(
                f"{writer}."):
            continue
        held = [numbers[id(p)] for p in module.parameters()]
        if held and all(n in lost for n in held) and needed.isdisjoint(gave.get(name, ())):
            yield name


def _by_name(run: Run) -> dict[str, list[Call]]:
    found: dict[str, list[Call]] = {}
    for call in run.calls:
        if call.name and call.taken and call.gave:
            found.setdefault(call.name, []).append(call)
    return found


def _silent(calls: list[Call]) -> Silent | None:
    """Return what can stand for a module, None where its output's shape does not follow."""
    if len(calls) != 1:
        return None
    call = calls[0]
    taken, given = tensors(call.arguments)[0], tensors(call.output)[0]
    passed = {id(t): Given(path) for path, t in placed(call.arguments)}
    layout = tree_map(lambda leaf: Place.STREAM if leaf is given else
                      passed.get(id(leaf)) if isinstance(leaf, Tensor) else
                      leaf if isinstance(leaf, (bool, int, float, str)) else None, call.output)
    if taken.shape == given.shape:
        return Silent(None, layout)
    if given.ndim > 1 and taken.shape[:-1] == given.shape[:-1]:
        return Silent(given.shape[-1], layout)
    return None
