"""Gives the tensors of a network other indices along some axes, and tells its modules the sizes."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from netwright.anatomy.layers import common, is_transposed

# Where on which tensor: its name, the axis, and the groups of a grouped convolution's second axis.
Where = tuple[str, int, int]
_CONVOLUTIONS = nn.modules.conv._ConvNd
_TRANSPOSED = nn.modules.conv._ConvTransposeNd


@dataclass(eq=False, repr=False)
class Resizing:
    """What is done to a network: for axes of its tensors the old index that each new one has.

    `counts` says how many units there were and are, by the kind of unit and the tensors it stands
    on. `changed` answers, for a class and an attribute of it, whether the attribute is the size
    that changes, where that cannot be told from the sizes alone.
    """

    order: dict[Where, np.ndarray]
    counts: list[tuple[str, int, int, frozenset[str]]] = field(default_factory=list)
    changed: Mapping[tuple[str, str], bool] = field(default_factory=dict)


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers by name, once each."""
    return {**dict(network.named_buffers()), **dict(network.named_parameters())}


def axis_sizes(network: nn.Module) -> dict[tuple[str, int], int]:
    """Return the size of each axis of each parameter and buffer."""
    return {(name, axis): size for name, t in tensors_of(network).items()
            for axis, size in enumerate(t.shape)}


def kept(network: nn.Module, gone: Mapping[Where, Sequence[int]]) -> dict[Where, np.ndarray]:
    """Return the indices that are left of each axis, in order."""
    full = axis_sizes(network)
    return {where: np.setdiff1d(np.arange(full[where[:2]] * where[2]), places)
            for where, places in gone.items()}


@torch.no_grad()
def resize(network: nn.Module, resizing: Resizing) -> set[tuple[str, str]]:
    """Carry out a resizing in place; return the attributes that may, or may not, be sizes."""
    held = tensors_of(network)
    before = {name: tuple(t.shape) for name, t in held.items()}
    groups_left = {name: _groups(network, name, before[name], orders)
                   for name, orders in _by_tensor(resizing.order).items()}
    give_orders(network, resizing.order)
    after = {name: tuple(t.shape) for name, t in held.items()}
    _tell_layers(network, before, after, groups_left)
    return _tell_others(network, before, after, resizing)


@torch.no_grad()
def give_orders(network: nn.Module, order: Mapping[Where, np.ndarray]) -> None:
    """Give the tensors of a network other indices along some axes, in place, and nothing else."""
    held = tensors_of(network)
    for name, orders in _by_tensor(order).items():
        held[name].data = _taken(held[name].data, orders)


def _by_tensor(order: Mapping[Where, np.ndarray]
               ) -> dict[str, dict[tuple[int, int], np.ndarray]]:
    asked: dict[str, dict[tuple[int, int], np.ndarray]] = defaultdict(dict)
    for (name, axis, groups), indices in order.items():
        asked[name][axis, groups] = indices
    return asked


def _taken(tensor: Tensor, orders: dict[tuple[int, int], np.ndarray]) -> Tensor:
    """Return a tensor with other indices along its axes."""
    grouped = next(((groups, order) for (_, groups), order in orders.items() if groups > 1), None)
    for (axis, groups), order in orders.items():
        if groups == 1 and not (grouped and axis == 0):
            tensor = tensor.index_select(axis, torch.from_numpy(order).to(tensor.device))
    if grouped is None:
        return tensor.contiguous()
    groups, order = grouped
    rows = orders.get((0, 1), np.arange(len(tensor)))
    inner = tensor.shape[1]
    left = len(np.unique(order // inner))
    pieces = [tensor[row][:, column % inner] for row, column in zip(
        np.split(rows, left), np.split(order, left), strict=True)]
    return torch.cat(pieces).contiguous()


def _groups(network: nn.Module, name: str, shape: tuple[int, ...],
            orders: dict[tuple[int, int], np.ndarray]) -> int:
    """Return how many groups of channels a module has left, 0 where it has none."""
    owner: Any = network.get_submodule(name.rpartition(".")[0])
    count = getattr(owner, "groups", getattr(owner, "num_groups", 0))
    rows = orders.get((0, 1))
    if not isinstance(count, int) or count < 1 or shape[0] % count:
        return 0
    return count if rows is None else len(np.unique(rows // (shape[0] // count)))


def _tell_layers(network: nn.Module, before: dict[str, tuple[int, ...]],
                 after: dict[str, tuple[int, ...]], groups: dict[str, int]) -> None:
    """Set the sizes that PyTorch's own layers keep beside their weights."""
    changed = {name.rpartition(".")[0] for name in before if before[name] != after[name]}
    names = {re.sub(r"(^|\.)parametrizations\..*", "", name) for name in changed}
    for module_name in sorted(names):
        layer: Any = network.get_submodule(module_name)
        own = {name.rpartition(".")[2]: after[name] for name in after
               if name.rpartition(".")[0] == module_name}
        computed = getattr(layer, "weight", None)  # such as a parametrized one
        weight = (own.get("weight") or (tuple(computed.shape) if isinstance(computed, Tensor)
                                        else next(iter(own.values()), ())))
        count = groups.get(f"{module_name}.weight".lstrip("."), 0)
        for attribute, size in _sizes(layer, weight, own, count).items():
            setattr(layer, attribute, size)


def _sizes(layer: Any, weight: tuple[int, ...], own: dict[str, tuple[int, ...]],
           groups: int) -> dict[str, Any]:
    """Return the sizes that a layer of PyTorch's keeps, by the shapes of its weights."""
    if is_transposed(layer):
        return {"nx": weight[0], "nf": weight[1]}
    if isinstance(layer, nn.Linear):
        return {"out_features": weight[0], "in_features": weight[1]}
    if isinstance(layer, nn.Bilinear):
        return dict(zip(("out_features", "in1_features", "in2_features"), weight, strict=True))
    if isinstance(layer, _CONVOLUTIONS):
        groups = groups or layer.groups
        one, two = ((weight[1] * groups, weight[0]) if isinstance(layer, _TRANSPOSED) else
                    (weight[0], weight[1] * groups))
        return {"out_channels": one, "in_channels": two, "groups": groups}
    if isinstance(layer, nn.GroupNorm):
        return {"num_channels": weight[0], "num_groups": groups or layer.num_groups}
    if isinstance(layer, nn.modules.batchnorm._NormBase):
        return {"num_features": weight[0]}
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return {"normalized_shape": weight}
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return {"num_embeddings": weight[0], "embedding_dim": weight[1]}
    if isinstance(layer, nn.RNNBase):
        return {"hidden_size": own["weight_hh_l0"][0] // _gates(layer),
                "input_size": own["weight_ih_l0"][1]}
    if isinstance(layer, nn.RNNCellBase):
        return {"hidden_size": own["weight_hh"][1], "input_size": own["weight_ih"][1]}
    if isinstance(layer, nn.PReLU):
        return {"num_parameters": weight[0]}
    if isinstance(layer, nn.MultiheadAttention) and "in_proj_weight" in own:
        width = own["in_proj_weight"][1]
        return {"embed_dim": width, "kdim": width, "vdim": width}
    return {}


def _gates(layer: Any) -> int:
    return {"LSTM": 4, "GRU": 3}.get(layer.mode, 1)


def _tell_others(network: nn.Module, before: dict[str, tuple[int, ...]],
                 after: dict[str, tuple[int, ...]],
                 resizing: Resizing) -> set[tuple[str, str]]:
    """Set sizes that other modules keep as whole numbers; return those that cannot be told."""
    unsure: set[tuple[str, str]] = set()
    near = [common(sorted(c[3])) for c in resizing.counts]
    for name, module in network.named_modules():
        inside = [t for t in before if t.startswith(f"{name}." if name else "")]
        moved, stayed = _seen(inside, before, after)
        if not moved:
            continue
        counts = [c for c in resizing.counts if c[3] & set(inside)]
        for attribute, value in list(_whole(module)):
            key = (type(module).__qualname__, attribute)
            choice = _choice(attribute, value, moved, stayed, counts)
            if choice is None:
                continue
            size, sure = choice
            if not sure and not any(_within(name, part) for part in near):
                continue
            if not sure:
                unsure.add(key)
            if resizing.changed.get(key, sure):
                setattr(module, attribute, type(value)(size))
    return unsure


def _whole(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the whole numbers that a module which is not PyTorch's keeps, and shapes of one."""
    if is_transposed(module):
        return
    if type(module).__module__.startswith("torch.nn") and not isinstance(
            module, (nn.LayerNorm, nn.RMSNorm)):
        return
    for attribute, value in vars(module).items():
        if type(value) is int and value > 1:
            yield attribute, value
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, tuple) and len(shape) == 1:
        yield "normalized_shape", shape


def _within(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def _seen(inside: list[str], before: dict[str, tuple[int, ...]],
          after: dict[str, tuple[int, ...]]) -> tuple[dict[int, set[int]], set[int]]:
    """Return which sizes became which, and which of the same stayed elsewhere."""
    moved: dict[int, set[int]] = defaultdict(set)
    stayed: set[int] = set()
    for name in inside:
        for old, new in zip(before[name], after[name], strict=True):
            if old != new:
                moved[old].add(new)
            else:
                stayed.add(old)
    return moved, stayed


def _choice(attribute: str, value: Any, moved: dict[int, set[int]], stayed: set[int],
            counts: list[tuple[str, int, int, frozenset[str]]]) -> tuple[Any, bool] | None:
    """Return what a size becomes and whether that is sure, None where it stays."""
    if isinstance(value, tuple):
        news = moved.get(value[0], set())
        return ((next(iter(news)),), True) if len(news) == 1 else None
    headed = "head" in attribute or attribute in ("n_kv", "d_kv")
    wide = any(word in attribute for word in ("dim", "size", "width", "d_kv", "channels"))
    for kind, old, new, _ in counts:
        if old == new or "group" in attribute:
            continue
        if kind == "head" and headed:
            return (value // old * new, True) if not wide and value % old == 0 else None
        if kind == "head dimension" and headed and wide and value == old:
            return new, True
    news = moved.get(value, set())
    if len(news) == 1:
        return next(iter(news)), value not in stayed
    for _, old, new, _ in counts:
        if value == old and old != new and "group" not in attribute:
            return new, False
    for old, news in moved.items():  # one of several parts that stand side by side in a weight
        parts = old // value
        if len(news) == 1 and parts in (2, 3, 4) and old % value == 0:
            (new,) = news
            return (new // parts, False) if new % parts == 0 else None
    return None
