"""Watches an example run: which module was called when, with which tensors, returning which."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from netwright.anatomy.layers import count_weighted, reversible
from netwright.anatomy.turns import Turn, turns_of
from netwright.signals import Path, apply, placed, tensors


@dataclass(eq=False, repr=False)
class Call:
    """One call of a module: `start` and `end` count the events of the run.

    `taken` and `gave` are the numbers of the values that it was given and returned, where a
    `Run` counts them.
    """

    module: nn.Module
    name: str
    parent: "Call | None"
    start: float
    arguments: Any
    versions: dict[int, int]
    end: float = 0
    output: Any = None
    output_versions: dict[int, int] = field(default_factory=dict)
    children: list["Call"] = field(default_factory=list)
    weights: int = 0
    taken: tuple[int, ...] = ()
    gave: tuple[int, ...] = ()

    def inside(self, other: "Call") -> bool:
        """Whether this call was made while `other` ran."""
        return other.start < self.start and self.end < other.end

    def around(self) -> list["Call"]:
        """Return the calls in which this one was made, itself first and the model's last."""
        chain: list[Call] = [self]
        while chain[-1].parent is not None:
            chain.append(chain[-1].parent)
        return chain


def version(tensor: Tensor) -> int:
    """Return how often `tensor` was changed in place, 0 where that is not counted."""
    return 0 if tensor.is_inference() else tensor._version


def watch(model: nn.Module, x: Any, **options: Any) -> tuple[list[Call], Any]:
    """Return the calls of one run of `model` in the order of their starts, and its output.

    The first call is the model's own.
    """
    calls: list[Call] = []
    with watching(model, calls):
        output = apply(model, x, **options)
    return calls, output


@contextmanager
def watching(model: nn.Module, calls: list[Call], *, everywhere: bool = False,
             values: Callable[[Any], tuple[int, ...]] = lambda _: ()) -> Iterator[list[Call]]:
    """Add to `calls` whatever is called inside `model`; the `end` of what raised stays 0.

    What is inside a module that has an inverse is left out unless `everywhere`, since such a
    module may run its parts in an order of its own. `values` numbers the tensors in what a module
    takes and returns. The calls that are running are yielded, innermost last.
    """
    stack: list[Call] = []
    clock = iter(range(1 << 62))
    inside = {part for module in model.modules() if module is not model and reversible(module)
              for part in module.modules() if part is not module and not everywhere}
    names = {module: name for name, module in reversed(list(model.named_modules()))
             if module not in inside}

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        arguments = (args, kwargs)
        made = Call(module, names[module], stack[-1] if stack else None, next(clock), arguments,
                    {id(t): version(t) for t in tensors(arguments)},
                    weights=count_weighted(module), taken=values(arguments))
        if stack:
            stack[-1].children.append(made)
        stack.append(made)
        calls.append(made)

    def finish(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        made = stack.pop()
        made.output, made.end = output, next(clock)
        made.output_versions = {id(t): version(t) for t in tensors(output)}
        made.gave = values(output)

    handles = []
    try:
        for module in names:
            handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            handles.append(module.register_forward_hook(finish, with_kwargs=True))
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def in_turns(calls: list[Call]) -> list[Call]:
    """Return `calls` with the turns of modules that run in turns, for whatever was called in them.

    What passes between turns is stood for by empty tensors.
    """
    turns: dict[nn.Module, list[Turn]] = {}
    result: list[Call] = []
    for call in calls:
        if any(around.module in turns for around in call.around()[1:]):
            continue
        result.append(call)
        if call.module not in turns and (found := _turns(call)):
            turns[call.module] = found
        if call.module in turns:
            call.children = _taken(call, turns[call.module])
            result += call.children
    return result


def _turns(call: Call) -> list[Turn]:
    args = call.arguments[0]
    return turns_of(call.module) if args and isinstance(args[0], Tensor) else []


def _taken(whole: Call, turns: list[Turn]) -> list[Call]:
    """Return a call for each of the turns that `whole` consists of."""
    (h, *rest), options = whole.arguments
    step = (whole.end - whole.start) / (2 * len(turns) + 1)
    between = [h, *(torch.empty(0) for _ in turns[1:])]
    made = []
    for k, turn in enumerate(turns):
        start = whole.start + (2 * k + 1) * step
        last = k + 1 == len(turns)
        output = whole.output if last else between[k + 1]
        made.append(Call(
            turn, f"{whole.name}.{turn.name}".removeprefix("."), whole, start,
            ((between[k], *rest), options), whole.versions | {id(between[k]): version(between[k])},
            start + step, output,
            whole.output_versions if last else {id(output): version(output)},
            weights=count_weighted(turn)))
    return made


def link(before: Call, after: Call, calls: list[Call]) -> tuple[Path, Path] | None:
    """Return where the output of `before` holds the tensor that `after` takes, and where it is.

    None where no output of `before` is an input of `after`, or where it was changed on the way:
    in place, or by a module such as an identity that returned the tensor that it took.
    """
    if before.end > after.start:
        return None
    for path, tensor in placed(before.output):
        for slot, other in placed(after.arguments):
            if (other is tensor
                    and before.output_versions.get(id(tensor)) == after.versions[id(tensor)]
                    and not any(before.end < c.start and c.end < after.start
                                and any(t is tensor for t in tensors(c.output))
                                for c in calls)):
                return path, slot
    return None
