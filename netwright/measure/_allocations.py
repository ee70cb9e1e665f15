"""What PyTorch's dispatcher and its saved-tensor hooks tell about a step."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from netwright.measure._flops import flops, operation

Storage = torch.UntypedStorage


def storages(tensors: Iterable[Any]) -> list[Storage]:
    """Return the storages under every tensor of `tensors`, each once."""
    found = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            for part in _strided(tensor):
                storage = part.untyped_storage()
                found[storage._cdata] = storage
    return list(found.values())


def _strided(tensor: Tensor) -> list[Tensor]:
    if tensor.layout == torch.strided:
        return [tensor]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


def size(tensors: Iterable[Any]) -> int:
    """Return the bytes of the storages under `tensors`, each counted once."""
    return sum(storage.nbytes() for storage in storages(tensors))


class Allocations(TorchDispatchMode):
    """Books the birth and death of every storage that the body makes, and its FLOPs.

    A storage that an operation takes before any operation made it was there before the body. The
    book is read afterwards, when it is known which storages have become gradients.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.uncounted: set[str] = set()  # operations that sum products and have no formula
        self.events: list[tuple[int, int]] = []  # (number of the storage, change of live bytes)
        self._number: dict[int, int] = {}  # by the address of the storage while it lives
        self._watches: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload) and func is not torch.ops.prim.device.default:
            with self:  # an operation made of others, as inference mode passes them on
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        for storage in storages(tree_leaves((args, kwargs))):
            if storage._cdata not in self._number:
                self._watch(storage, 0)
        out = func(*args, **kwargs)
        for storage in storages(tree_leaves(out)):
            if storage._cdata not in self._number:
                self._watch(storage, storage.nbytes())
        found = flops(func, args, kwargs, out)
        if found is None:
            self.uncounted.add(operation(func))
        self.flops += found or 0
        return out

    def numbers(self, tensors: Iterable[Any]) -> set[int]:
        """Return the numbers under which the storages of `tensors` are booked."""
        addresses = {storage._cdata for storage in storages(tensors)}
        return {self._number[address] for address in addresses if address in self._number}

    def _watch(self, storage: Storage, nbytes: int) -> None:
        number, address = len(self._watches), storage._cdata

        def died(_: Any) -> None:
            self.events.append((number, -nbytes))
            if self._number.get(address) == number:
                del self._number[address]

        self.events.append((number, nbytes))
        self._number[address] = number
        self._watches[number] = weakref.ref(storage, died)


def peaks(events: Iterable[tuple[int, int]], gradients: set[int]) -> tuple[int, int, int]:
    """Return the peak of the live bytes, those of gradients among them, and the peak without."""
    live = kept = peak = kept_at_peak = working = 0
    for number, change in events:
        live += change
        if number in gradients:
            kept += change
        if live > peak:
            peak, kept_at_peak = live, kept
        working = max(working, live - kept)
    return peak, kept_at_peak, working


class Saved:
    """Counts the bytes that wait for a backward pass, and the most of them at one time."""

    def __init__(self, apart: Iterable[Any]) -> None:
        self._apart = {storage._cdata for storage in storages(apart)}
        self._holders: dict[int, int] = {}
        self.live = self.peak = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what the body saves.

        `torch.func` refuses to run under saved-tensor hooks because a hook could compute with
        the tensors of a transform outside of it. These hooks only hold them, so that the refusal
        is lifted for the time of the body.
        """
        graph = torch.autograd.graph
        refuse = graph.disable_saved_tensors_hooks
        graph.disable_saved_tensors_hooks = nullcontext  # type: ignore[assignment]
        try:
            with graph.saved_tensors_hooks(self._hold, lambda held: held.tensor):
                yield
        finally:
            graph.disable_saved_tensors_hooks = refuse

    def _hold(self, tensor: Tensor) -> "_Held":
        bare = tensor
        while is_functorch_wrapped_tensor(bare):
            bare = get_unwrapped(bare)
        held = _Held(tensor)
        for storage in storages([bare]):
            if storage._cdata not in self._apart:
                self._count(storage._cdata, storage.nbytes(), held)
        return held

    def _count(self, address: int, nbytes: int, held: "_Held") -> None:
        def released() -> None:
            self._holders[address] -= 1
            if not self._holders[address]:
                self.live -= nbytes

        self._holders[address] = self._holders.get(address, 0) + 1
        if self._holders[address] == 1:
            self.live += nbytes
            self.peak = max(self.peak, self.live)
        weakref.finalize(held, released)


class _Held:
    """A tensor that waits for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
