"""One run of a network, operation by operation: what each took and gave, and in which module."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from netwright.anatomy.calls import Call, watching
from netwright.anatomy.replacing import plain_paths
from netwright.errors import CannotStage
from netwright.runtime.modes import evaluating, rehearsing
from netwright.runtime.random_state import same_random_state
from netwright.signals import apply, copied, tensor_of, tensors

# The same numbers laid out anew; what only looks at a tensor differently says so itself.
_COPIES = ("_reshape_alias", "_to_copy", "_unsafe_view", "clone", "contiguous")


@dataclass(frozen=True)
class Value:
    """Stands in an operation's arguments for the tensor of that number."""

    number: int


@dataclass(eq=False, repr=False)
class Operation:
    """One operation of PyTorch's own: `taken` and `gave` number the tensors that it read and made.

    `call` is the innermost module that was running, `dropped` the probability where it stands for
    a dropout, which changes nothing in eval mode.
    """

    function: Any
    arguments: tuple[Any, Any]
    taken: tuple[int, ...]
    gave: tuple[int, ...]
    call: Call | None
    dropped: float = 0.0

    @property
    def name(self) -> str:
        """The name of the operation, without the underscore of those that work in place."""
        name: str = self.function.overloadpacket.__name__
        return name[:-1] if name.endswith("_") and not name.endswith("__") else name

    @property
    def elementwise(self) -> bool:
        """Whether each number of the result depends on the numbers at its own place alone."""
        return torch.Tag.pointwise in self.function.tags or self.dropped > 0

    @property
    def layout(self) -> bool:
        """Whether the result holds the numbers of the first tensor, or some of them, unchanged."""
        return self.function.is_view or self.name in _COPIES


@dataclass(eq=False, repr=False)
class Run:
    """What one run of `network` showed.

    Tensors are numbered in the order in which they came to be; one that is changed in place, or
    of which a part is, has a new number from then on. A view of all of a tensor in its own shape
    keeps the number. `output` is the one that is meant where the network returns several
    `outputs`, else the first, -1 where there is none; `meant` are the outputs apart from hidden
    states and the like beside logits. `fed` says which tensors depend on the
    input, `taught` which on parameters. `places` are where they are in memory: the storage, the
    offset in it, shape and strides; none where they have no strides.
    """

    network: nn.Module
    calls: list[Call] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    parameters: dict[int, str] = field(default_factory=dict)
    buffers: dict[int, str] = field(default_factory=dict)
    places: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    scalars: dict[int, Tensor] = field(default_factory=dict)
    fed: list[bool] = field(default_factory=list)
    taught: list[bool] = field(default_factory=list)
    output: int = -1
    outputs: tuple[int, ...] = ()
    meant: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.maker: dict[int, Operation] = {}
        self.readers: dict[int, list[Operation]] = defaultdict(list)

    def add(self, operation: Operation) -> None:
        """Append an operation."""
        self.operations.append(operation)
        for number in operation.gave:
            self.maker[number] = operation
            self.fed[number] = any(self.fed[n] for n in operation.taken)
            self.taught[number] = any(self.taught[n] for n in operation.taken)
        for number in dict.fromkeys(operation.taken):
            self.readers[number].append(operation)

    def ancestors(self, *numbers: int, apart: Collection[int] = ()) -> set[int]:
        """Return `numbers` and what they were computed from, on paths that avoid `apart`."""
        seen: set[int] = set()
        waiting = list(numbers)
        while waiting:
            number = waiting.pop()
            if number in seen or number in apart:
                continue
            seen.add(number)
            if number in self.maker:
                waiting += self.maker[number].taken
        return seen

    def reaches(self, number: int, target: int) -> bool:
        """Return whether `number` was computed from `target`, which is another one."""
        seen: set[int] = set()
        waiting = [number]
        while waiting:
            number = waiting.pop()
            if number in self.maker and number not in seen and number > target:
                seen.add(number)
                waiting += self.maker[number].taken
                if target in self.maker[number].taken:
                    return True
        return False

    def source(self, number: int) -> int:
        """Return the tensor of which `number` is a view or a copy in another layout."""
        while number in self.maker and self.maker[number].layout:
            number = self.maker[number].taken[0]
        return number

    def learned(self, number: int) -> bool:
        """Return whether `number` was computed from parameters, and not from the input."""
        return self.taught[number] and not self.fed[number]

    def end(self, call: Call) -> int:
        """Return the place in `operations` of the last one that ran in `call`, -1 for none."""
        return max((i for i, operation in enumerate(self.operations)
                    if operation.call is not None and call in operation.call.around()), default=-1)

    def learning(self) -> Iterator[tuple[Tensor, int]]:
        """Yield the network's parameters with their numbers."""
        numbers = {name: number for number, name in self.parameters.items()}
        for name, p in self.network.named_parameters():
            if name in numbers:
                yield p, numbers[name]

    def called(self, name: str) -> list[Call]:
        """Return the calls of the module called `name`."""
        return [call for call in self.calls if call.name == name]


def record(network: nn.Module, example: Any, **options: Any) -> Run:
    """Return what `network` does with `example` in eval mode, leaving everything as it was."""
    if any(map(is_lazy, [*network.parameters(), *network.buffers()])):
        network = deepcopy(network)
        with evaluating(network), torch.no_grad(), same_random_state():
            apply(network, copied(example))  # its first run makes its parameters
    run, example = Run(network), copied(example)
    recorder = _Recorder(run, example)
    with (evaluating(network), rehearsing(network), plain_paths(kernels=True),
          watching(network, run.calls, everywhere=True, values=recorder.numbers) as stack):
        recorder.stack = stack
        with _Dropouts(recorder), recorder:
            output = apply(network, example, **options)
    run.outputs = recorder.numbers(output)
    run.meant = recorder.numbers(meant(output))
    try:
        run.output = recorder.number(tensor_of(output))
    except CannotStage:  # several outputs, none of which is known to be the one that is meant
        run.output = run.outputs[0] if run.outputs else -1
    return run


def meant(output: Any) -> Any:
    """Return an output without what a model tells of its inside beside logits."""
    if not (isinstance(output, Mapping) and "logits" in output):
        return output
    inner = ("hidden_state", "attentions", "key_values")
    return {key: value for key, value in output.items() if not any(i in key for i in inner)}


class _Recorder(TorchDispatchMode):
    """Numbers tensors by the place in memory that they look at."""

    def __init__(self, run: Run, example: Any) -> None:
        super().__init__()
        self.run, self.stack, self.dropped = run, list[Call](), 0.0
        self.known: dict[Any, tuple[int, int]] = {}  # place -> number, and when it got it
        self.written: dict[int, tuple[int, int]] = {}  # storage -> number and time of last write
        self.held: dict[int, Any] = {}  # so that no other tensor gets their place in memory
        self.time = 0
        for name, p in run.network.named_parameters():
            run.parameters[self._source(p, fed=False)] = name
        for number in run.parameters:
            run.taught[number] = True
        for name, b in run.network.named_buffers():
            run.buffers.setdefault(self._source(b, fed=False), name)
        for t in tensors(example):
            self._source(t, fed=True)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the mere definition of a mode loads the compiler

    def numbers(self, value: Any) -> tuple[int, ...]:
        """Return the numbers of the tensors in `value`."""
        return tuple(self.number(t) for t in tensors(value))

    def number(self, tensor: Tensor) -> int:
        """Return the number of a tensor as it is now."""
        place, storage = self._place(tensor)
        number, time = self.known.get(place, (-1, -1))
        wrote, when = self.written.get(storage, (-1, -1))
        if number < 0:
            number = self._source(tensor, fed=wrote < 0 and tensor.ndim > 0)
            if wrote >= 0:  # a view that no operation made
                self.run.add(Operation(torch.ops.aten.alias.default, ((Value(wrote),), {}),
                                       (wrote,), (number,), self._call()))
        elif time < when and number != wrote:  # what it looks at was changed since
            old, number = number, self._new(tensor)
            self.known[place] = number, self.time
            self.run.add(Operation(torch.ops.aten.copy.default, ((Value(old), Value(wrote)), {}),
                                   (old, wrote), (number,), self._call()))
        return number

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = tree_map(
            lambda leaf: Value(self.number(leaf)) if isinstance(leaf, Tensor) else leaf,
            (args, kwargs))
        output = function(*args, **kwargs)
        taken = tuple(v.number for v in tree_leaves(arguments) if isinstance(v, Value))
        self.time += 1
        changed = [t for value in _changed(function, args, kwargs) for t in tensors(value)]
        gave = [self._made(t) for t in changed]
        for t in tensors(output):
            if not any(t is c for c in changed):
                place, _ = self._place(t)
                known = self.known.get(place, (-1, -1))[0]
                if known < 0 or known not in taken:
                    gave.append(self._made(t, new=not function.is_view))
        if gave:
            self.run.add(Operation(function, arguments, taken, tuple(gave), self._call(),
                                   self.dropped))
        return output

    def _source(self, tensor: Tensor, *, fed: bool) -> int:
        """Number a tensor that no operation made."""
        place, storage = self._place(tensor)
        if place in self.known:
            return self.known[place][0]
        number = self._new(tensor, fed)
        self.known[place] = number, self.time
        self.written.setdefault(storage, (number, self.time))
        return number

    def _made(self, tensor: Tensor, new: bool = True) -> int:
        place, storage = self._place(tensor)
        number = self._new(tensor)
        self.known[place] = number, self.time
        if new or storage not in self.written:
            self.written[storage] = number, self.time
        return number

    def _new(self, tensor: Tensor, fed: bool = False) -> int:
        self.run.shapes.append(tuple(tensor.shape))
        self.run.fed.append(fed)
        self.run.taught.append(False)
        place, _ = self._place(tensor)
        if isinstance(place, tuple):
            self.run.places[len(self.run.shapes) - 1] = place[:4]
        if tensor.numel() == 1:
            self.run.scalars[len(self.run.shapes) - 1] = tensor
        return len(self.run.shapes) - 1

    def _place(self, tensor: Tensor) -> tuple[Any, int]:
        if tensor.layout is not torch.strided:
            self.held[id(tensor)] = tensor
            return id(tensor), id(tensor)
        storage = tensor.untyped_storage()
        self.held[storage._cdata] = storage
        return (storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(),
                tensor.dtype), storage._cdata

    def _call(self) -> Call | None:
        return self.stack[-1] if self.stack else None


class _Dropouts(TorchFunctionMode):
    """Makes dropouts seen, which in eval mode return what they are given."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "").endswith("dropout") and args and output is args[0]:
            self.recorder.dropped = _probability(args, kwargs or {})
            output = output.clone()
            self.recorder.dropped = 0.0
        return output


def _probability(args: Any, kwargs: Any) -> float:
    return float(kwargs.get("p", args[1] if len(args) > 1 else 0.5))


def _changed(function: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """Yield the arguments that `function` writes to."""
    for i, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if value is not None:
                yield value
