"""What a network costs, told from its shapes and from a table of this machine's kernels."""

import hashlib
import json
import logging
import platform
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from netwright import checks
from netwright.compare.apply import apply as carry_out
from netwright.errors import CorruptCheckpoint
from netwright.measure._flops import flops
from netwright.reshape.saved import stored_bytes
from netwright.runtime.files import cache_folder
from netwright.runtime.machine import machine
from netwright.runtime.modes import evaluating, rehearsing
from netwright.runtime.random_state import same_random_state
from netwright.runtime.written import read_json, write_text
from netwright.signals import apply, copied, mapped

__all__ = ["Kernels", "Predicted", "predict"]

_COLD = 64 * 2**20  # bytes of operands in turn, so that each run finds its own out of the cache
_TURNS = 8  # the most operands in turn
_AT_LEAST = 4e-3  # seconds that a kernel is measured for
_RUNS = 3  # the fewest runs of it
_LOOKED_UP = ("embedding", "index_select")  # read the rows that whole numbers name


@dataclass(frozen=True)
class Predicted:
    """What a network would cost: its numbers and bytes on disk, and one forward pass.

    `bytes` are those of the files of weights that `nw.save` writes. `unmeasured` names operations
    whose time was guessed by what they read and write.
    """

    parameters: int
    bytes: int
    flops: int
    seconds: float
    unmeasured: tuple[str, ...] = ()

    def share(self, of: "Predicted") -> dict[str, float]:
        """Return how much that is of another's cost, by what it is asked for by.

        >>> Predicted(1, 30, 2, 0.5).share(Predicted(2, 40, 8, 1.0))["size"]
        0.75
        """
        pairs = {"parameters": (self.parameters, of.parameters), "size": (self.bytes, of.bytes),
                 "flops": (self.flops, of.flops), "inference_time": (self.seconds, of.seconds)}
        return {name: mine / other if other else 1.0 for name, (mine, other) in pairs.items()}


@checks.annotated
@torch.inference_mode(False)
def predict(model: nn.Module, example: Any, *, recipe: Any = None,
            kernels: "Kernels | None" = None) -> Predicted:
    """Return what a network would cost, without running it.

    seconds = Σ over the operations of a forward pass of the time of their kernel.

    Parameters, bytes and operations are exact. The pass goes over shapes alone, in eval mode and
    without gradients; each kernel, which is an operation with its shapes and dtypes, is measured
    once on this machine. A model that does not run on shapes alone, since what it does depends on
    numbers, is run once.

    Args:
        model: any module; it is left as it is.
        example: what it takes: a tensor, a tuple of arguments or a mapping of keywords. The time
            is that at its batch and length.
        recipe: a change, as `nw.recipe` reads it, that is carried out on a copy first, with the
            example for its calibration data: its choice is of no worth, but its shapes are right.
        kernels: the table of kernels; this machine's by default.

    Raises:
        NothingToReshape: `recipe` finds nothing to change in the model.

    >>> from tempfile import mkdtemp
    >>> from netwright.models import mlp
    >>> model, x = mlp(16, 4, hidden=(32,)), torch.randn(8, 16)
    >>> found = predict(model, x, kernels=Kernels(mkdtemp()))
    >>> found.parameters, found.flops == 2 * 8 * (16 * 32 + 32 * 4)
    (676, True)
    """
    if recipe is not None:
        model = carry_out(recipe, model, example)
    table = kernels or Kernels()
    seen = seen_in(model, copied(example))
    seconds, guessed = table.sum(seen)
    learned = sum(p.numel() for p in model.parameters())
    return Predicted(learned, stored_bytes(model), seen.flops, seconds, guessed)


@dataclass(frozen=True)
class Operand:
    """A tensor's shape, strides and dtype."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @classmethod
    def of(cls, tensor: Tensor) -> "Operand":
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, str(tensor.device))

    @property
    def nbytes(self) -> int:
        """The bytes between its first number and its last."""
        return self._extent * self.dtype.itemsize

    @property
    def _extent(self) -> int:
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True)
                       if n)

    def make(self, rows: int) -> Tensor:
        """Return such a tensor with drawn numbers, whole ones below `rows`."""
        size, device = self._extent, self.device
        if self.dtype.is_floating_point or self.dtype.is_complex:
            flat = torch.randn(size, device=device).to(self.dtype)
        elif self.dtype is torch.bool:
            flat = torch.ones(size, dtype=self.dtype, device=device)
        else:
            flat = torch.randint(max(1, rows), (size,), device=device).to(self.dtype)
        return flat.as_strided(self.shape, self.strides)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        strides = "" if self.strides == _dense(self.shape) else f"/{self.strides}"
        return f"{str(self.dtype).removeprefix('torch.')}[{shape}{strides}]@{self.device}"


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for n in reversed(shape):
        strides.insert(0, step)
        step *= max(1, n)
    return tuple(strides)


class Kernel:
    """An operation with the operands that it is given; two are equal that are written alike."""

    def __init__(self, operation: Any, arguments: Any, gives: list[Operand]) -> None:
        self.operation, self.arguments, self.gives = operation, arguments, gives
        args, kwargs = arguments
        named = [f"{key}={value}" for key, value in kwargs.items()]
        self.text = f"{operation}({', '.join([*map(str, args), *named])})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kernel) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    @property
    def operands(self) -> list[Operand]:
        """The tensors that it is given."""
        return [leaf for leaf in tree_leaves(self.arguments) if isinstance(leaf, Operand)]

    def make(self) -> Any:
        """Return arguments that it could be given."""
        looked_up = any(name in str(self.operation) for name in _LOOKED_UP)
        tables = [o.shape[0] for o in self.operands if o.dtype.is_floating_point and o.shape]
        rows = min(tables, default=1) if looked_up else 1
        return tree_map(lambda leaf: leaf.make(rows) if isinstance(leaf, Operand) else leaf,
                        self.arguments)

    def measure(self) -> float:
        """Return the least seconds of a run, on operands that are not in the cache."""
        size = sum(operand.nbytes for operand in self.operands)
        turns = max(1, min(_TURNS, _COLD // max(1, size)))
        with same_random_state():
            torch.manual_seed(0)
            given = [self.make() for _ in range(turns)]
        wait = _waiting(self.operands)
        best, spent, runs = float("inf"), 0.0, -1  # the first run sets things up
        for args, kwargs in cycle(given):
            wait()
            start = time.perf_counter()
            self.operation(*args, **kwargs)
            wait()
            taken = time.perf_counter() - start
            runs += 1
            if runs:
                best, spent = min(best, taken), spent + taken
            if runs >= _RUNS and (spent >= _AT_LEAST or runs >= 200):
                return best
        return best


def _waiting(operands: list[Operand]) -> Any:
    on_cuda = any(operand.device.startswith("cuda") for operand in operands)
    return torch.cuda.synchronize if on_cuda else lambda: None


class Kernels:
    """How long each kernel takes on this machine, in a file that grows as more are asked for.

    The file is named after the machine, its threads and the release of PyTorch. Where it cannot
    be written, or is damaged, kernels are measured anew by each process.

    Args:
        folder: where the file is; by default NETWRIGHT_CACHE, else netwright in the user's folder
            for caches.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.path = Path(folder or cache_folder()) / f"kernels-{_machine()}.json"
        self.known = self._read()
        self._new = False

    def seconds(self, kernel: Kernel) -> float | None:
        """Return the time of a kernel, None where it cannot be run by itself."""
        if kernel.text not in self.known:
            try:
                with torch.no_grad():
                    self.known[kernel.text] = kernel.measure()
            except Exception:  # whatever operations raise of numbers that do not suit them
                self.known[kernel.text] = None
            self._new = True
        return self.known[kernel.text]

    def sum(self, seen: "_Shapes") -> tuple[float, tuple[str, ...]]:
        """Return the time of all kernels of a pass, and the operations whose time was guessed."""
        total, guessed = 0.0, set()
        for kernel, times in seen.kernels.items():
            taken = seen.measured.get(kernel, self.seconds(kernel))
            if taken is None:
                guessed.add(str(kernel.operation))
                taken = sum(self._copying(operand) for operand in kernel.operands + kernel.gives)
            total += times * taken
        self.keep()
        return total, tuple(sorted(guessed))

    def _copying(self, operand: Operand) -> float:
        copy = Kernel(torch.ops.aten.clone.default, ((operand,), {}), [operand])
        return self.seconds(copy) or 0.0

    def keep(self) -> None:
        """Write what is new, with what others wrote meanwhile."""
        if not self._new:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.known = self._read() | self.known
            write_text(self.path, json.dumps(self.known, indent=0, sort_keys=True))
        except OSError:
            return  # a folder that may not be written, or a full disk: only the table is lost
        self._new = False

    def _read(self) -> dict[str, float | None]:
        try:
            known = read_json(self.path, "a table of kernels")
        except (OSError, CorruptCheckpoint):
            return {}
        return {text: taken for text, taken in known.items() if taken is None
                or isinstance(taken, float)} if isinstance(known, dict) else {}


def _machine() -> str:
    here = {**machine(), "node": platform.node(), "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability()}
    return hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:12]


# The operations of a pass.

class _Shapes(TorchDispatchMode):
    """Counts the kernels of a pass, and its FLOPs."""

    def __init__(self, *, real: bool) -> None:
        super().__init__()
        self.real, self.flops = real, 0
        self.kernels: Counter[Kernel] = Counter()
        self.measured: dict[Kernel, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tree_map(_operand, (args, kwargs))
        start = time.perf_counter()
        out = func(*args, **kwargs)
        taken = time.perf_counter() - start
        self.flops += flops(func, args, kwargs, out) or 0
        gives = [Operand.of(t) for t in tree_leaves(out) if isinstance(t, Tensor)
                 and t.layout is torch.strided]
        kernel = Kernel(func, given, gives)
        self.kernels[kernel] += 1
        if self.real and any(isinstance(leaf, torch.ScriptObject) for leaf in tree_leaves(args)):
            # weights that are packed cannot be made from a shape
            self.measured[kernel] = min(taken, self.measured.get(kernel, taken))
        return out


def _operand(leaf: Any) -> Any:
    return Operand.of(leaf) if isinstance(leaf, Tensor) and leaf.layout is torch.strided else leaf


def seen_in(model: nn.Module, example: Any) -> _Shapes:
    seen = _Shapes(real=False)
    try:
        with (evaluating(model), rehearsing(model), _unsaid(),
              FakeTensorMode(allow_non_fake_inputs=True) as shapes, seen):
            apply(model, mapped(example, shapes.from_tensor))
    except Exception:  # of many kinds: numbers that are asked for, operations that have no shapes
        seen = _Shapes(real=True)
        with evaluating(model), rehearsing(model), seen:
            apply(model, example)
    return seen


@contextmanager
def _unsaid() -> Iterator[None]:
    """Keep PyTorch from logging that an operation has no shapes: it is run for real then."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
