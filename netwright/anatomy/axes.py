"""The axes of a network: which indices of which weights are the same unit."""

from collections import Counter
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from netwright import checks
from netwright.anatomy.following import Followed, follow
from netwright.anatomy.grouping import Found, grouped
from netwright.anatomy.run import record
from netwright.anatomy.scaling import Scales
from netwright.anatomy.unit_groups import (
    Ids,
    Member,
    UnitGroup,
    parameters_left,
    permute,
    places_of,
    remove,
    scale,
)
from netwright.anatomy.verifying import run_of, verified
from netwright.errors import NothingToReshape, UnknownName

__all__ = ["Axes", "Frozen", "axes"]


@dataclass(frozen=True)
class Frozen:
    """Indices of a weight that must stay where they are, and what holds them there.

    That is the input, the output, the kernel of a convolution, or an operation by its name.
    """

    tensor: str
    axis: int
    reason: str


@dataclass(frozen=True, eq=False, repr=False)
class Axes:
    """The groups of units of a network, and what can be done with them, each time on a copy.

    Attributes:
        network: the network that was looked at.
        groups: the groups, in the order of the weights that they stand in first.
        frozen: the axes of weights whose indices must stay, with the reason.
        unknown: operations that no units were followed through, with the module that ran them.
    """

    network: nn.Module
    example: Any
    groups: tuple[UnitGroup, ...]
    frozen: tuple[Frozen, ...]
    unknown: Mapping[str, str]
    sizes: Mapping[tuple[str, str, str], bool] = field(default_factory=dict)

    def group(self, name: str | UnitGroup) -> UnitGroup:
        """Return the group of that name.

        Raises:
            UnknownName: there is none.
        """
        for group in self.groups:
            if name in (group.name, group):
                return group
        raise UnknownName("group of units", getattr(name, "name", str(name)),
                          [group.name for group in self.groups])

    def table(self) -> list[dict[str, Any]]:
        """Return a row for each group: its name, kind, sizes, and what can be done with it."""
        return [{"name": g.name, "kind": g.kind, "units": g.count, "blocks": g.blocks,
                 "tensors": len({m.tensor for m in g.members}), "parameters": g.parameters,
                 "permutable": g.permutable, "removable": g.removable, "scalable": g.scalable,
                 "config": ", ".join(g.config), "reason": g.reason} for g in self.groups]

    def __repr__(self) -> str:
        lines = [f"Axes of {type(self.network).__name__}"]
        for g in self.groups:
            can = ", ".join(word for word in ("permutable", "removable", "scalable")
                            if getattr(g, word))
            within = f" in {g.blocks} blocks" if g.blocks > 1 else ""
            lines.append(f"  {g.name}: {g.count} units{within}; {can or g.reason}")
        reasons = Counter(frozen.reason for frozen in self.frozen)
        stays = ", ".join(f"{count} by {reason}" for reason, count in reasons.most_common())
        return "\n".join([*lines, f"  axes that stay as they are: {stays or 'none'}"])

    def permute(self, group: str | UnitGroup, order: Ids, *,
                network: nn.Module | None = None) -> nn.Module:
        """Return a copy in which unit i of a group is the one that was unit order[i].

        The network computes the same as before. `network` is what is copied, this one by default.

        Raises:
            ValueError: `order` does not name each unit once, or takes one out of its block.
            NothingToReshape: the group's units cannot change places.

        >>> found = axes(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)),
        ...              torch.zeros(1, 4))
        >>> found.permute("0: hidden", [2, 0, 1])[0].weight.shape
        torch.Size([3, 4])
        """
        chosen = self.group(group)
        order = _ids(order, chosen, "order")
        if not np.array_equal(np.sort(order), np.arange(chosen.count)):
            raise ValueError(f"order must have each of the {chosen.count} units of "
                             f"{chosen.name!r} once, got {_few(order)}")
        if (order // chosen.per_block != np.arange(chosen.count) // chosen.per_block).any():
            raise ValueError(f"order must leave each unit of {chosen.name!r} in its block of "
                             f"{chosen.per_block}, got {_few(order)}; whole blocks are permuted "
                             "as units of the group that they are in")
        _allowed(chosen, "permutable", "change places")
        model = self._copy(network)
        permute(model, chosen, order)
        return model

    def remove(self, group: str | UnitGroup, ids: Ids, *,
               network: nn.Module | None = None) -> nn.Module:
        """Return a copy without some units of a group, smaller in all that they stand in.

        Raises:
            ValueError: `ids` are not units of the group, are all of them, or are not as many in
                each block.
            NothingToReshape: the group's units cannot be removed.

        >>> found = axes(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)),
        ...              torch.zeros(1, 4))
        >>> found.remove("0: hidden", [1])[2]
        Linear(in_features=2, out_features=2, bias=True)
        """
        _allowed(self.group(group), "removable", "be removed")
        return self.remove_all({self.group(group).name: ids}, network=network)

    def remove_all(self, ids: Mapping[str, Ids], *, network: nn.Module | None = None
                   ) -> nn.Module:
        """Return a copy without some units of several groups, named in `ids`.

        What can only be removed together, such as the units of all layers of one LSTM, can be
        removed here.

        Raises:
            ValueError: as for `remove`.
            NothingToReshape: the result does not run.

        >>> found = axes(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5), nn.ReLU(),
        ...                            nn.Linear(5, 2)), torch.zeros(1, 4))
        >>> found.remove_all({"0: hidden": [1], "2: hidden": [0, 4]})[2]
        Linear(in_features=2, out_features=3, bias=True)
        """
        asked = self.leaving(ids)
        model = self._copy(network)
        self.take_out(model, asked)
        return model

    def leaving(self, ids: Mapping[str, Ids]) -> dict[str, np.ndarray]:
        """Return the units that are to be removed, in order, each once.

        Raises:
            ValueError: as for `remove`.
        """
        return {self.group(name).name: _leaving(self.group(name), these)
                for name, these in ids.items()}

    def take_out(self, network: nn.Module, leaving: Mapping[str, np.ndarray]) -> None:
        """Remove units from a copy of the network in place, and run it.

        Raises:
            NothingToReshape: it does not run then.
        """
        groups = {g.name: g for g in self.groups}
        for part in _by_kind(groups, leaving):
            remove(network, groups, part, self.sizes)
        _configure(network, self, leaving)
        try:
            run_of(network, self.example)
        except Exception as error:  # whatever a network's own code says to a new size
            raise NothingToReshape(
                f"ids removes units of {', '.join(leaving)}, and the result does not run: {error}; "
                "remove another number, or as many of all groups of the layer") from error

    def scale(self, group: str | UnitGroup, factor: float | Ids, *,
              network: nn.Module | None = None) -> nn.Module:
        """Return a copy in which units are larger by `factor`, and what reads them smaller.

        The network computes the same as before. `factor` is one number, or one for each unit.

        Raises:
            ValueError: `factor` is not above 0, or not as many as there are units.
            NothingToReshape: the group's units cannot be scaled.

        >>> found = axes(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)),
        ...              torch.zeros(1, 4))
        >>> found.scale("0: hidden", 2.0)[0].in_features
        4
        """
        chosen = self.group(group)
        factors = np.asarray(factor, dtype=np.float64)
        if factors.ndim > 1 or (factors.ndim == 1 and len(factors) != chosen.count):
            raise ValueError(f"factor must be one number, or one for each of the {chosen.count} "
                             f"units of {chosen.name!r}, got shape {factors.shape}")
        for value in factors.ravel().tolist():
            checks.above(0, factor=value, advice="a negative factor does not go through a ReLU")
        _allowed(chosen, "scalable", "be scaled")
        model = self._copy(network)
        scale(model, chosen, np.broadcast_to(factors, chosen.count))
        return model

    def _copy(self, network: nn.Module | None) -> nn.Module:
        return deepcopy(self.network if network is None else network)


@torch.inference_mode(False)
def axes(network: nn.Module, example: Any, *, verify: bool = True) -> Axes:
    """Return which indices of which weights are the same units, found by watching one run.

    Each index of each axis of a weight is followed through all operations of the run. An
    elementwise operation makes one of the units that it puts together; a product does so with
    those that it sums over, and hands on those of its weight's rows; a reshape, a split or a
    concatenation takes them to other places. Nothing is known of any architecture. What an
    operation without a rule takes stays as it is, and is named.

    With `verify` what was found is tried in double precision, on a copy whose weights are moved a
    little at random: all units permuted, scaled, removed. A group that does not pass says why.

    Args:
        network: any module.
        example: what it takes: a tensor, a tuple of positional or a mapping of keyword arguments.
        verify: whether to try what was found, which takes a few runs and a copy of the network.

    Raises:
        NothingToReshape: the network was compiled by torch.compile, which hides its parts.

    >>> network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 8),
    ...                         nn.Tanh(), nn.Linear(8, 3))
    >>> axes(network, torch.zeros(1, 1, 4, 4))
    Axes of Sequential
      0: hidden: 6 units; permutable, removable, scalable
      3: hidden: 8 units; permutable, removable
      axes that stay as they are: 2 by the kernel, 2 by the output
    """
    if hasattr(network, "_orig_mod"):
        raise NothingToReshape("network was compiled by torch.compile, which hides its parts; give "
                               "the module that was compiled, and compile the result")
    followed = follow(record(network, example))
    network = followed.run.network  # a copy where its first run made parameters
    groups = unit_groups(followed)
    sizes: dict[tuple[str, str, str], bool] = {}
    if verify and groups:
        groups, sizes = verified(network, example, groups)
    return Axes(network, example, tuple(_stated(network, group) for group in groups),
                tuple(_frozen(followed)), dict(followed.unknown), sizes)


def unit_groups(followed: Followed) -> list[UnitGroup]:
    """Return the groups of units that were followed through a run, as they are without a trial."""
    scales = Scales(followed)
    return _named(_plain(followed.run.network, scales, each) for each in grouped(followed)
                  if each.frozen is None)


def _plain(network: nn.Module, scales: Scales, found: Found) -> UnitGroup:
    """Return a group as plain data."""
    roles = {**dict.fromkeys(found.read, "reads"), **dict.fromkeys(found.made, "makes")}
    makers = [(spot.tensor, spot.axis) for i, spot in enumerate(found.spots) if i in found.made]
    if not found.pooled:  # behind a batch norm it is the norm's own weight that makes them larger
        makers += [(spot.tensor, spot.axis) for i, spot in enumerate(found.spots)
                   if i not in found.read]
    powers = scales.exponents(found.unit, makers)
    members = tuple(Member(spot.tensor, spot.axis, spot.indices, roles.get(i, ""), spot.groups,
                           powers.get((spot.tensor, spot.axis), 0.0))
                    for i, spot in enumerate(found.spots))
    count = len(found.spots[0].indices)
    owner = found.spots[0].tensor.rpartition(".")[0] or found.spots[0].tensor
    group = UnitGroup(f"{owner}: {found.kind}", found.kind, count, found.blocks, members, 0,
                      found.pooled, scalable=bool(powers))
    firsts = np.arange(found.blocks) * group.per_block
    total = sum(p.numel() for p in network.parameters())
    return replace(group, parameters=total - parameters_left(network, [group],
                                                             {group.name: firsts}))


def _named(groups: Iterable[UnitGroup]) -> list[UnitGroup]:
    """Return groups with a number behind a name that is taken."""
    taken: Counter[str] = Counter()
    named = []
    for group in groups:
        taken[group.name] += 1
        again = f" {taken[group.name]}" if taken[group.name] > 1 else ""
        named.append(replace(group, name=group.name + again))
    return named


def _frozen(followed: Followed) -> Iterable[Frozen]:
    """Yield the axes of parameters some indices of which must stay, with the first reason."""
    units = followed.units
    reasons: dict[int, str] = {}
    for stuck, reason in units.frozen:
        for root in np.unique(units.find(stuck)).tolist():
            reasons.setdefault(root, reason)
    parameters = dict(followed.run.network.named_parameters())
    for place in followed.places:
        if place.tensor in parameters and place.groups == 1:
            roots = units.find(np.arange(place.start, place.start + place.size)).tolist()
            held = next((reasons[root] for root in roots if root in reasons), None)
            if held is not None:
                yield Frozen(place.tensor, place.axis, held)


def _stated(network: nn.Module, group: UnitGroup) -> UnitGroup:
    """Return a group with the fields of the configuration that state its size."""
    config = getattr(network, "config", None)
    words = _WORDS.get(group.kind, ())
    held = dict(vars(config)) if hasattr(config, "to_dict") else {}
    stated = tuple(name for name, value in held.items()
                   if any(word in name for word in words)
                   and (_states(group, value) if type(value) is int else name == "n_inner"))
    return replace(group, config=stated)


# Words in the fields of Hugging Face's configurations.
_WORDS = {"hidden": ("intermediate", "inner", "ffn", "d_ff", "hidden_dim", "mlp_dim"),
          "stream": ("hidden_size", "embd", "d_model", "embed_dim", "proj_dim"),
          "head": ("heads", "n_head"), "head dimension": ("head_dim", "d_kv")}


def _states(group: UnitGroup, value: int) -> bool:
    if group.kind == "head":
        return value % group.count == 0
    return value == group.per_block


def _configure(network: Any, found: Axes, ids: Mapping[str, np.ndarray]) -> None:
    """Set the fields of the configuration whose size is the same wherever it is stated."""
    for name in dict.fromkeys(name for group in found.groups for name in group.config):
        value = getattr(network.config, name)
        stating = [group for group in found.groups if name in group.config]
        left = {(value or g.per_block) // g.per_block
                * (g.per_block - len(ids.get(g.name, ())) // g.blocks) for g in stating}
        if len(left) == 1 and any(group.name in ids for group in stating):
            setattr(network.config, name, left.pop())


def _ids(ids: Ids, group: UnitGroup, name: str) -> np.ndarray:
    given = ids.tolist() if isinstance(ids, (Tensor, np.ndarray)) else list(ids)
    for value in given if isinstance(given, list) else [given]:
        checks.between(0, group.count - 1, whole=True, **{name: value})
    return np.array(given, dtype=np.int64)


def _leaving(group: UnitGroup, ids: Ids) -> np.ndarray:
    """Return the units to remove, checked."""
    gone = np.unique(_ids(ids, group, "ids"))
    each = np.bincount(gone // group.per_block, minlength=group.blocks)
    if each.min() != each.max():
        raise ValueError(f"ids must be as many in each of the {group.blocks} blocks of "
                         f"{group.per_block} units of {group.name!r}, got {each.tolist()}")
    if each[0] == group.per_block:
        raise ValueError(f"ids must leave a unit of {group.name!r}, got all {group.count}; to "
                         "take a layer out use netwright.reshape.prune_sublayers")
    return gone


def _by_kind(groups: Mapping[str, UnitGroup], leaving: Mapping[str, np.ndarray]
             ) -> list[dict[str, np.ndarray]]:
    """Return units to remove one kind after the other, since each kind has sizes of its own.

    They are left together where two kinds stand on one axis, whose indices the first would move.
    """
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, these in leaving.items():
        parts.setdefault(groups[name].kind, {})[name] = these
    axes_of = [set(places_of(groups, part)) for part in parts.values()]
    apart = len(set().union(*axes_of)) == sum(map(len, axes_of))
    return list(parts.values()) if apart else [dict(leaving)]


def _allowed(group: UnitGroup, what: str, words: str) -> None:
    if not getattr(group, what):
        able = f"; groups that can say so: .{what}"
        raise NothingToReshape(f"units of {group.name!r} cannot {words}: "
                               f"{group.reason or 'nothing says how'}{able}")


def _few(order: np.ndarray) -> str:
    return str(order.tolist() if len(order) < 12 else [*order[:10].tolist(), "..."])
