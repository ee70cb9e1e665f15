"""Which modules write to a residual stream, found by watching one run of a model."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from netwright.runtime.modes import evaluating
from netwright.signals import call

_SUM = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_SAME_BRANCH = {"mul", "mul_", "__mul__", "__rmul__", "to", "type_as", "dropout"}


class Place(Enum):
    """Where something is in a sublayer's output."""

    STREAM = "what is added to the stream"


@dataclass(frozen=True)
class Sublayer:
    """A branch of a residual stream: the module that writes to it, and what feeds only that."""

    name: str
    feeders: tuple[str, ...] = ()


class Silent(nn.Module):
    """Stands where a sublayer stood: it adds nothing to the residual stream.

    `width` is the size of the output's last axis where it is not the input's; `layout` is what
    the sublayer returned, `Place.STREAM` where the stream's share was.
    """

    batch_first = False  # PyTorch's fused encoder layer looks for it

    def __init__(self, width: int | None, layout: Any) -> None:
        super().__init__()
        self.width, self.layout = width, layout

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros of the shape that the sublayer's output had."""
        h = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        shape = h.shape if self.width is None else (*h.shape[:-1], self.width)
        zeros = h.new_zeros(shape)
        return tree_map(lambda leaf: zeros if leaf is Place.STREAM else leaf, self.layout)

    def extra_repr(self) -> str:
        """Say what is not its input's."""
        return "" if self.width is None else f"width={self.width}"


@dataclass
class Trace:
    """What one run showed: the branches, and for every module how `Silent` would stand for it."""

    sublayers: list[Sublayer]
    silent: dict[str, Silent] = field(default_factory=dict)


@dataclass
class _Branch:
    """A tensor that may be added to a stream, by the modules whose outputs it sums."""

    tensor: Tensor  # held, so that its id stays its own
    writers: dict[str, Any]  # name -> graph node of the output


class _Watch(TorchFunctionMode):
    """Follows module outputs to the sums that put them onto a stream they depend on."""

    def __init__(self, names: dict[nn.Module, str]) -> None:
        super().__init__()
        self.names = names
        self.branches: dict[int, _Branch] = {}
        self.found: dict[str, Any] = {}
        self.calls: dict[str, list[tuple[Any, Any]]] = {}

    def returned(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = self.names[module]
        first = next((t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), None)
        out = next((t for t in tree_leaves(output) if isinstance(t, Tensor)), None)
        if first is None or out is None:
            return
        layout = tree_map(lambda leaf: Place.STREAM if leaf is out else
                          leaf if isinstance(leaf, (bool, int, float, str)) else None, output)
        self.calls.setdefault(name, []).append(((first.shape, out.shape), layout))
        if any(True for _ in module.parameters()) and out.requires_grad:
            self.branches[id(out)] = _Branch(out, {name: _node(out)})

    def __torch_function__(self, func: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        # Before the call, since an operation in place changes what its operand is.
        before = [(t, self.branches.get(id(t)), _node(t)) for t in args
                  if isinstance(t, Tensor)] if name in _SUM | _SAME_BRANCH else []
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, Tensor):
            return out
        if name in _SAME_BRANCH:
            known = [branch for _, branch, _ in before if branch]
            if len(known) == len(before) == 1:
                self.branches[id(out)] = _Branch(out, known[0].writers)
        elif name in _SUM and len(before) == 2:
            self._sum(before, out)
        return out

    def _sum(self, operands: list[tuple[Tensor, _Branch | None, Any]], out: Tensor) -> None:
        joined: dict[str, Any] = {}
        for (_, branch, node), (_, _, skip) in (operands, operands[::-1]):
            if branch and skip is not None and _reaches(node, skip):
                self.found |= branch.writers
                self.branches.pop(id(out), None)  # the sum is the stream
                return
            joined |= branch.writers if branch else {}
        if all(branch for _, branch, _ in operands):  # parallel branches are summed first
            self.branches[id(out)] = _Branch(out, joined)


def trace(model: nn.Module, x: Any) -> Trace:
    """Watch `model` run on `x`; return its sublayers in the order in which they write.

    A sublayer is the outermost module whose output is added to a tensor that the output was
    computed from. Its feeders are the modules whose weights matter only through it, such as the
    norm before it. `model` gets every parameter's `requires_grad` set: pass a copy.
    """
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point())
    x = tree_map(lambda t: t.detach().clone().requires_grad_(t.is_floating_point())
                 if isinstance(t, Tensor) else t, x)
    names = {module: name for name, module in model.named_modules() if name}
    watch = _Watch(names)
    handles = [module.register_forward_hook(watch.returned, with_kwargs=True) for module in names]
    try:
        with evaluating(model), torch.enable_grad(), watch:
            output = call(model, x)
    finally:
        for handle in handles:
            handle.remove()

    silent = {name: stub for name, calls in watch.calls.items() if (stub := _silent(calls))}
    writers = {name: node for name, node in watch.found.items() if name in silent}
    outer = [name for name in writers
             if not any(name.startswith(other + ".") for other in writers)]
    everything = _ancestors(_node(output))
    sublayers = []
    for name in outer:
        without = _ancestors(_node(output), apart=writers[name])
        sublayers.append(Sublayer(name, tuple(_feeders(
            model, name, silent, lost=everything - without))))
    return Trace(sublayers, silent)


def _feeders(model: nn.Module, writer: str, silent: dict[str, Silent],
             lost: set[Any]) -> Iterator[str]:
    for name, module in model.named_modules():
        own = [_node(p) for p in module.parameters(recurse=False)]
        if (own and name in silent and name != writer and not name.startswith(writer + ".")
                and all(node in lost for node in own)):
            yield name


def _silent(calls: list[tuple[Any, Any]]) -> Silent | None:
    """Return what can stand for a module, None where its output's shape does not follow."""
    if len(calls) != 1:
        return None
    (taken, given), layout = calls[0]
    if taken == given:
        return Silent(None, layout)
    if len(given) > 1 and taken[:-1] == given[:-1]:
        return Silent(given[-1], layout)
    return None


def _node(tensor: Tensor) -> Any:
    """Return the node of the autograd graph that `tensor` comes from."""
    if not tensor.requires_grad:
        return None
    return tensor.grad_fn or torch.autograd.graph.get_gradient_edge(tensor).node


def _reaches(node: Any, target: Any) -> bool:
    return node is not target and target in _ancestors(node)


def _ancestors(node: Any, apart: Any = None) -> set[Any]:
    """Return the nodes that `node` was computed from, on paths that avoid `apart`."""
    seen: set[Any] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or node is apart:
            continue
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
    return seen
