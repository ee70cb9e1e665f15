"""Groups of units, and what is done with them in place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from netwright.anatomy.resizing import Resizing, Where, axis_sizes, kept, resize, tensors_of

__all__ = ["Member", "UnitGroup"]

Ids = Sequence[int] | Tensor | np.ndarray
Sizes = Mapping[tuple[str, str, str], bool]  # a kind of unit, a class, an attribute of it


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of a parameter or buffer on which the units of a group stand.

    `indices` (units, places) has the indices of each unit in a row. `role` is "makes" where the
    weight makes the units, "reads" where it reads them, else "" as for biases and norms. `groups`
    is above 1 where the axis counts the channels of one group of a grouped convolution: then there
    are as many indices for each group, one group after the other. `exponent` is the power of a
    factor by which these weights go when the units are scaled.
    """

    tensor: str
    axis: int
    indices: np.ndarray = field(repr=False)
    role: str = ""
    groups: int = 1
    exponent: float = 0.0


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """Units of a network that can take one another's place.

    Attributes:
        name: the layer in which they stand first, and their kind.
        kind: "hidden"; "stream", to which several layers add; "head", with all the heads that
            share its keys and values; "head dimension"; "cell" of a recurrent layer; "block",
            which moves as a whole for another reason, as a group of a convolution does.
        count: how many units, those of all blocks together.
        blocks: how many blocks they stand in, one after the other. Units change places within
            their block, and each block must lose as many.
        members: where they stand.
        parameters: how many parameters go when one unit of each block does.
        pooled: whether a norm, a softmax or a sum computes with all of them at once, so that
            to remove a unit is not the same as to silence it.
        permutable: whether units can change places.
        removable: whether units can be taken out.
        scalable: whether a unit can be made larger and what reads it smaller.
        config: the fields of a Hugging Face configuration that state the size.
        reason: why something of this cannot be done.
    """

    name: str
    kind: str
    count: int
    blocks: int
    members: tuple[Member, ...] = field(repr=False)
    parameters: int
    pooled: bool
    permutable: bool = True
    removable: bool = True
    scalable: bool = False
    config: tuple[str, ...] = ()
    reason: str = ""

    @property
    def per_block(self) -> int:
        """How many units each block has."""
        return self.count // self.blocks


def permute(network: nn.Module, group: UnitGroup, order: np.ndarray) -> None:
    """Let each unit be the one that `order` names, in place."""
    orders: dict[Where, np.ndarray] = {}
    sizes = axis_sizes(network)
    for member in group.members:
        where = (member.tensor, member.axis, member.groups)
        every = np.arange(sizes[where[:2]] * member.groups)
        every[member.indices] = member.indices[order]
        orders[where] = every
    resize(network, Resizing(orders))


def remove(network: nn.Module, groups: Mapping[str, UnitGroup], ids: Mapping[str, np.ndarray],
           sizes: Sizes) -> set[tuple[str, str]]:
    """Take units out in place; return the attributes of which it cannot be told what they are."""
    orders = kept(network, places_of(groups, ids))
    counts = []
    for name, these in ids.items():
        group = groups[name]
        standing = frozenset(member.tensor for member in group.members)
        left = group.per_block - len(these) // group.blocks
        counts.append((group.kind, group.per_block, left, standing))
    kinds = {groups[name].kind for name in ids}
    changed = {key[1:]: is_size for key, is_size in sizes.items() if key[0] in kinds}
    return resize(network, Resizing(orders, counts, changed))


def places_of(groups: Mapping[str, UnitGroup], ids: Mapping[str, np.ndarray]
              ) -> dict[Where, list[int]]:
    """Return the indices at which units stand, by the axes that they stand on."""
    places: dict[Where, set[int]] = {}
    for name, these in ids.items():
        for member in groups[name].members:
            places.setdefault((member.tensor, member.axis, member.groups), set()).update(
                member.indices[these].ravel().tolist())
    return {where: sorted(indices) for where, indices in places.items()}


@torch.no_grad()
def scale(network: nn.Module, group: UnitGroup, factors: np.ndarray) -> None:
    """Multiply the weights of each unit by its factor, to the power that they go with."""
    held = tensors_of(network)
    for member in group.members:
        if member.exponent:
            _multiply(held[member.tensor], member, factors ** member.exponent)


@torch.no_grad()
def silence(network: nn.Module, group: UnitGroup, ids: np.ndarray, *,
            read: bool = False) -> None:
    """Set all parameters of units to zero, in place; with `read` those alone that read them."""
    held = dict(network.named_parameters())
    for member in group.members:
        if member.tensor in held and (not read or member.role == "reads"):
            gone = np.ones(group.count)
            gone[ids] = 0
            _multiply(held[member.tensor], member, gone)


def _multiply(tensor: Tensor, member: Member, factors: np.ndarray) -> None:
    whole = np.ones(tensor.shape[member.axis] * member.groups)
    whole[member.indices] = factors[:, None]
    shape = [1] * tensor.ndim
    shape[member.axis] = -1
    by = torch.from_numpy(whole).to(tensor.device, tensor.dtype)
    if member.groups == 1:
        tensor.data = tensor.data * by.reshape(shape)
        return
    rows = tensor.shape[0] // member.groups
    by = by.reshape(member.groups, -1).repeat_interleave(rows, 0)
    tensor.data = tensor.data * by.reshape(*by.shape, *(1,) * (tensor.ndim - 2))


def parameters_left(network: nn.Module, groups: Sequence[UnitGroup],
                    ids: Mapping[str, np.ndarray]) -> int:
    """Return how many parameters a network has left without some units, by the shapes alone."""
    gone: dict[str, dict[tuple[int, int], set[int]]] = {}
    for group in groups:
        for member in group.members:
            gone.setdefault(member.tensor, {}).setdefault(
                (member.axis, member.groups), set()).update(
                    member.indices[ids[group.name]].ravel().tolist())
    total = 0
    for name, p in network.named_parameters():
        shape: list[Any] = list(p.shape)
        grouped = next((key for key in gone.get(name, {}) if key[1] > 1), None)
        for (axis, groups_), places in gone.get(name, {}).items():
            if groups_ == 1:
                shape[axis] -= len(places)
        if grouped is not None:  # as many columns for each group that is left
            every = np.arange(p.shape[1] * grouped[1])
            kept = np.setdiff1d(every, sorted(gone[name][grouped]))
            shape[1] = len(kept) // len(np.unique(kept // p.shape[1]))
        total += int(np.prod(shape))
    return total
