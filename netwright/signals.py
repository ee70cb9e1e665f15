"""What networks take and return: calling them, and the tensors inside nested arguments."""

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from netwright.errors import CannotStage

Path = tuple[Any, ...]
FEW = 2  # samples that show what is in a model as well as more do


def call(model: nn.Module, x: Any) -> Tensor:
    """Return the output tensor of `model` for `x`: a tensor, a tuple or a mapping of arguments.

    Where the model returns a `ModelOutput` its logits are returned, and its last hidden state
    where it has none.

    Raises:
        CannotStage: the output holds no such tensor.

    >>> import torch
    >>> call(nn.Bilinear(2, 3, 4), (torch.randn(5, 2), torch.randn(5, 3))).shape
    torch.Size([5, 4])
    """
    output = model(x) if isinstance(x, Tensor) else apply(model, x)
    return output if isinstance(output, Tensor) else tensor_of(output)


def apply(function: Callable[..., Any], x: Any, **options: Any) -> Any:
    """Return `function` of `x`: a tensor, a tuple of arguments or a mapping of keywords."""
    if isinstance(x, Tensor):  # asked first, since that takes the least time
        return function(x, **options)
    if isinstance(x, Mapping):
        return function(**{**x, **options})
    if isinstance(x, (tuple, list)):
        return function(*x, **options)
    return function(x, **options)


def few(example: Any) -> Any:
    """Return some samples of what a model takes, all of it where samples are not told apart.

    >>> import torch
    >>> few({"input_ids": torch.zeros(32, 5), "attention_mask": torch.ones(32, 5)})
    {'input_ids': tensor([[0., 0., 0., 0., 0.],
            [0., 0., 0., 0., 0.]]), 'attention_mask': tensor([[1., 1., 1., 1., 1.],
            [1., 1., 1., 1., 1.]])}
    """
    sizes = {len(t) if t.ndim > 1 else 0 for t in tree_leaves(dict(example) if isinstance(
        example, Mapping) else example) if isinstance(t, Tensor)}
    if len(sizes) != 1 or max(sizes) <= FEW:
        return example
    if isinstance(example, Mapping):
        example = dict(example)
    return tree_map_only(Tensor, lambda t: t[:FEW], example)


def first_argument(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return what a call of `module` gave for the first argument of its forward.

    >>> first_argument(nn.Linear(2, 3), (), {"input": 7})
    7
    """
    if args:
        return args[0]
    name = next(iter(inspect.signature(module.forward).parameters))
    return kwargs[name] if name in kwargs else next(iter(kwargs.values()))


def tensor_of(output: Any) -> Tensor:
    """Return the tensor that is meant when a model has returned `output`."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(output, (tuple, list)):
        for value in output:
            if isinstance(value, Tensor) and value.ndim:  # a scalar is the loss that labels make
                return value
    raise CannotStage(f"the network returned {type(output).__name__}, which has no tensor called "
                      "logits; wrap it in a module whose forward returns one tensor")


def all_of(output: Any) -> Any:
    """Return all that a model has returned where it is several tensors to learn from, or the one.

    A Hugging Face output that has logits, or a last hidden state, is those, unless it has what
    another head says beside them (`pred_boxes`, `mc_logits`).

    >>> import torch
    >>> len(all_of((torch.ones(2), torch.zeros(2))))
    2
    >>> all_of({"scores": torch.ones(2), "note": None})
    tensor([1., 1.])
    """
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "to_tuple") and isinstance(output, Mapping):
        held = [name for name, value in output.items() if isinstance(value, Tensor)]
        heads = [name for name in held if name.startswith("pred_") or name.endswith("_logits")]
        if not heads and {"logits", "last_hidden_state"} & set(held):
            return tensor_of(output)
    learnt = [t for t in tensors(output) if t.is_floating_point() or t.is_complex()]
    return learnt[0] if len(learnt) == 1 else output


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors inside nested tuples, lists and mappings, in their order.

    >>> import torch
    >>> [len(t) for t in tensors({"a": (torch.ones(1), 2), "b": [torch.ones(3)]})]
    [1, 3]
    """
    if isinstance(value, Tensor):  # asked first, since that takes the least time
        return [value]
    return [t for leaf in tree_leaves(value)
            for t in ([leaf] if isinstance(leaf, Tensor) else
                      tensors(dict(leaf)) if isinstance(leaf, Mapping) else [])]


def mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return `value` with `function` of each tensor inside; `value` itself where none changes.

    Mappings of other kinds than PyTorch knows become dictionaries.

    >>> import torch
    >>> mapped({"a": (torch.ones(2), 3)}, lambda t: t.sum())
    {'a': (tensor(2.), 3)}
    """
    if isinstance(value, Tensor):
        return function(value)
    leaves, kind = tree_flatten(value)
    made = [function(leaf) if isinstance(leaf, Tensor) else
            _mapping(leaf, function) if isinstance(leaf, Mapping) else leaf for leaf in leaves]
    return value if all(map(operator.is_, made, leaves)) else tree_unflatten(made, kind)


def _mapping(value: Mapping[Any, Any], function: Callable[[Tensor], Any]) -> Any:
    entries = dict(value)
    made = mapped(entries, function)
    return value if made is entries else made


def moved(value: Any, device: torch.device) -> Any:
    """Return `value` with its tensors on `device`, without waiting for those that are copied."""
    return mapped(value, lambda t: t if t.device == device else t.to(device, non_blocking=True))


def found(value: Any, wanted: Callable[[Any], bool]) -> list[Any]:
    """Return what inside `value` is `wanted`."""
    return [leaf for leaf in tree_leaves(value, is_leaf=wanted) if wanted(leaf)]


def placed(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Yield each tensor inside `value` with the path that leads to it.

    PyTorch's own paths do not lead into the outputs of Hugging Face's models.
    """
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from placed(item, (*path, i))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from placed(item, (*path, key))


def at(value: Any, path: Path) -> Any:
    """Return what `path` leads to inside `value`."""
    for key in path:
        value = value[key]
    return value


def copied(value: Any) -> Any:
    """Return a deep copy of what a network takes, caches among it, cut off from any graph.

    >>> import torch
    >>> h = torch.ones(2, requires_grad=True) * 2
    >>> copied({"h": (h, 1)})
    {'h': (tensor([2., 2.]), 1)}
    """
    return deepcopy(value, {id(t): t.detach().clone() for t in _held(value)})


def _held(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in `value`, those that its objects hold among them."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if id(part) in seen or isinstance(part, (type, ModuleType)):
            continue
        seen.add(id(part))
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, (tuple, list)):
            waiting += part
        else:
            waiting += part.values() if isinstance(part, dict) else []
            waiting += getattr(part, "__dict__", {}).values()
