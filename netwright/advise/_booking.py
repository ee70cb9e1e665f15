"""Passes of a network that are watched: which operation ran in which module, and what it took."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from netwright.measure._allocations import Allocations, Saved, storages
from netwright.signals import tensors


class Owner(NamedTuple):
    """An operation of PyTorch's own, and the innermost module that ran it."""

    module: str
    operation: Any


class Booked(NamedTuple):
    """What each owner took: FLOPs, bytes alive at the peak, and what no formula counts."""

    flops: dict[Owner, int]
    peak: dict[Owner, int]
    uncounted: tuple[str, ...]


@contextmanager
def inside(network: nn.Module) -> Iterator[list[str]]:
    """Yield a list whose last entry is the name of the module that runs, while the body runs.

    The hooks are not the network's own, which so stays as it is.
    """
    names = {id(module): name for name, module in network.named_modules()}
    stack = [""]

    def enter(module: nn.Module, args: Any) -> None:
        stack.append(names.get(id(module), stack[-1]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    handles = [register_module_forward_pre_hook(enter),
               register_module_forward_hook(leave, always_call=True)]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def booked(network: nn.Module, run: Callable[[], Any]) -> Booked:
    """Run once; return the FLOPs of each operation, and whose tensors were alive at the peak."""
    with inside(network) as stack:
        book = _Book(stack)
        with book:
            run()
    events = list(book.events)
    live, most, at = 0, 0, 0
    for i, (_, change) in enumerate(events):
        live += change
        if live > most:
            most, at = live, i + 1
    held: dict[int, int] = defaultdict(int)
    for number, change in events[:at]:
        held[number] += change
    peak: dict[Owner, int] = defaultdict(int)
    for number, count in held.items():
        if count:
            peak[book.makers[number]] += count
    return Booked(dict(book.of), dict(peak), tuple(sorted(book.uncounted)))


class _Book(Allocations):
    """Books each operation's FLOPs and storages under the module that ran it."""

    def __init__(self, stack: list[str]) -> None:
        super().__init__()
        self.stack, self._booked = stack, 0
        self.of: dict[Owner, int] = defaultdict(int)
        self.makers: list[Owner] = []  # of storages, by their numbers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        owner = Owner(self.stack[-1], func)  # what the operation was made of has been booked
        self.of[owner] += self.flops - self._booked
        self._booked = self.flops
        self.makers += [owner] * (len(self._watches) - len(self.makers))
        return out


def timed(network: nn.Module, run: Callable[[], Any], repeats: int) -> dict[Owner, float]:
    """Return the median seconds of each owner's operations over some runs."""
    wait = torch.cuda.synchronize if _on_cuda(network) else _nothing
    passes: list[dict[Owner, float]] = []
    with inside(network) as stack:
        for _ in range(repeats):
            clock = _Clock(stack, wait)
            with clock:
                run()
            passes.append(clock.of)
    return {owner: median(clock.get(owner, 0.0) for clock in passes)
            for owner in dict.fromkeys(owner for clock in passes for owner in clock)}


def seconds(network: nn.Module, run: Callable[[], Any], repeats: int) -> float:
    """Return the median seconds of a run that nobody watches."""
    wait = torch.cuda.synchronize if _on_cuda(network) else _nothing
    taken = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        run()
        wait()
        taken.append(time.perf_counter() - start)
    return median(taken)


class _Clock(TorchDispatchMode):
    """Adds up the time of operations, apart from the Python between them."""

    def __init__(self, stack: list[str], wait: Callable[[], None]) -> None:
        super().__init__()
        self.stack, self.wait = stack, wait
        self.of: dict[Owner, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.wait()
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        self.wait()
        self.of[Owner(self.stack[-1], func)] += time.perf_counter() - start
        return out


def saved(network: nn.Module, run: Callable[[], Any]) -> dict[Owner, int]:
    """Return the bytes that each operation would keep for a backward pass."""
    with inside(network) as stack:
        keeping = _Keeping(network, stack)
        with torch.enable_grad(), keeping.counting(), keeping.watching:
            output = run()
        keeping.settle(None)
    del output
    return {owner: count for owner, count in keeping.of.items() if count}


class _Keeping(Saved):
    """Counts what is saved under the operation that saves it.

    Inputs are saved before their operation runs, results after it.
    """

    def __init__(self, network: nn.Module, stack: list[str]) -> None:
        super().__init__([*network.parameters(), *network.buffers()])
        self.of: dict[Owner, int] = defaultdict(int)
        self.watching = _Following(self, stack)
        self.last: Owner | None = None
        self.made: set[int] = set()
        self.waiting = 0

    def _hold(self, tensor: Tensor) -> Any:
        before = self.live
        held = super()._hold(tensor)
        own = self.last is not None and any(s._cdata in self.made for s in storages([tensor]))
        if own and self.last is not None:
            self.of[self.last] += self.live - before
        else:
            self.waiting += self.live - before
        return held

    def settle(self, owner: Owner | None) -> None:
        """Book what was saved since the last operation under the one that comes."""
        owner = owner or self.last
        if owner is not None:
            self.of[owner] += self.waiting
        self.waiting = 0


class _Following(TorchDispatchMode):
    """Tells which operation runs and what it has made."""

    def __init__(self, keeping: _Keeping, stack: list[str]) -> None:
        super().__init__()
        self.keeping, self.stack = keeping, stack

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        owner = Owner(self.stack[-1], func)
        self.keeping.settle(owner)
        out = func(*args, **(kwargs or {}))
        self.keeping.last = owner
        self.keeping.made = {storage._cdata for storage in storages(tensors(out))}
        return out


def _on_cuda(network: nn.Module) -> bool:
    return any(p.is_cuda for p in network.parameters())


def _nothing() -> None:
    return None
