"""Sorts the units of a network into groups within which they can take one another's place."""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from netwright.anatomy.following import Followed, Place


@dataclass(frozen=True)
class Spot:
    """Where the units of a group stand on one axis of a parameter or buffer.

    `indices` (units, places) has a row for each unit. `groups` is above 1 where the axis counts the
    channels of one group of a grouped convolution: its indices then count group by group.
    """

    tensor: str
    axis: int
    indices: np.ndarray = field(repr=False)
    groups: int = 1


@dataclass(frozen=True)
class Found:
    """Units that are alike: block by block, a row of `spots` for each, and why they must stay."""

    kind: str
    spots: tuple[Spot, ...]
    blocks: int
    pooled: bool
    frozen: str | None
    first: int
    made: tuple[int, ...]  # the spots whose weights make the units, and those that read them
    read: tuple[int, ...]
    unit: tuple[int, ...]  # the first of the units, with all that is in it


@dataclass(eq=False, repr=False)
class _Graph:
    """The units as they are after all: where each stands, what is in it and what it is in.

    `nearest` says which of its members was put in which place, and how often, where `outer` has
    the block that this became a part of: places of one block are not the same place. `pattern` is
    a number that is the same for units whose members were united in the same way.
    """

    places: dict[int, list[tuple[int, int]]]
    outer: dict[int, set[int]]
    nearest: dict[int, set[tuple[int, int, int, int, int]]]
    pattern: dict[int, int]
    inner: dict[int, set[int]]
    frozen: dict[int, str]
    parts: set[int]
    marks: dict[str, set[int]]


def grouped(followed: Followed) -> list[Found]:
    """Return the groups of units of a network, in the order of the weights they stand in first.

    Two units are alike where what is in them stands on the same axes, as often, and is in the same
    other units or in units of the same block.
    """
    graph = _nested(followed)
    buckets: dict[tuple, dict[tuple, list[list[int]]]] = defaultdict(lambda: defaultdict(list))
    for unit in sorted(graph.outer):
        if unit in graph.parts:
            continue
        held = _within(graph, unit)
        if held is None or not any(graph.places.get(u) for u in held):
            continue
        frozen = next((graph.frozen[u] for u in held if u in graph.frozen), None)
        kind = tuple((graph.pattern.get(u, 0), *sorted(_counts(graph, u).items())) for u in held)
        inside = set(held)
        outside = tuple(frozenset(entry[:4] for entry in graph.nearest[u]
                                  if entry[4] not in inside) for u in held)
        buckets[kind, frozen][outside].append(held)
    found = []
    for (_, frozen), cells in buckets.items():
        for cell in _blocks(graph, cells):
            made = _group(followed, graph, cell, frozen)
            if made is not None:
                found.append(made)
    return sorted(found, key=lambda group: (group.first, -group.blocks))


def _nested(followed: Followed) -> _Graph:
    """Return the graph of what is in what, where blocks that hold the same are one.

    A block all of whose members are in another one is in that one too.
    """
    for _ in range(8):
        graph = _graph(followed)
        same: list[tuple[int, int]] = []
        for unit, members in list(graph.inner.items()):
            if unit in graph.parts or not members:
                continue
            for other in set.intersection(*(graph.outer[m] for m in members)) - {unit}:
                if other in graph.parts or other in graph.outer[unit]:
                    continue
                if graph.inner[other] - {unit} == members - {other}:
                    same.append((unit, other))
                elif other not in members:
                    graph.outer[unit].add(other)
                    graph.nearest[unit].add((-1, 0, other, 1, other))
                    graph.inner[other].add(unit)
        if not same:
            return graph
        one, two = np.array(same).T
        followed.units.unite(one, two)
    return graph


def _graph(followed: Followed) -> _Graph:
    units = followed.units
    every = units.find(np.arange(units.count))
    places: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for which, place in enumerate(followed.places):
        roots = every[place.start:place.start + place.size].tolist()
        for index, root in enumerate(roots):
            places[root].append((which, index))
    outer: dict[int, set[int]] = {root: set() for root in np.unique(every).tolist()}
    nearest: dict[int, set[tuple[int, int, int, int, int]]] = {root: set() for root in outer}
    inner: dict[int, set[int]] = defaultdict(set)
    stands, rank = _ranks(followed, every)
    for one, two in units.inside:
        rows, often = np.unique(np.stack([every[one], stands[one], rank[one], two, every[two]]),
                                axis=1, return_counts=True)
        rows = np.concatenate([rows, often[None]])[:, rows[0] != rows[4]]
        for child, where, which, place, parent, times in rows.T.tolist():
            outer[child].add(parent)
            nearest[child].add((where, which, place, times, parent))
            inner[parent].add(child)
    frozen: dict[int, str] = {}
    for stuck, reason in units.frozen:
        for root in np.unique(every[stuck]).tolist():
            frozen.setdefault(root, reason)
    marks = {name: set(np.unique(every[np.concatenate([f.ravel() for f in factors])]).tolist())
             if factors else set() for name, factors in (
                 ("made", followed.made), ("read", followed.read), ("added", followed.added),
                 ("pooled", followed.pooled), ("attended", followed.attended),
                 ("heads", followed.heads))}
    parts = {int(root) for part in units.parts for root in every[part]}
    patterns = _patterns(followed, every, stands, rank)
    return _Graph(places, outer, nearest, patterns, inner, frozen, parts, marks)


def _ranks(followed: Followed, every: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each unit, as it came to be, on which axis it stands, and its rank there.

    The rank counts those that became one and stand on the same axis.
    """
    stands, index = np.full(len(every), -1), np.zeros(len(every), np.int64)
    for which, place in enumerate(followed.places):
        stands[place.start:place.start + place.size] = which
        index[place.start:place.start + place.size] = np.arange(place.size)
    order = np.lexsort((index, stands, every))
    new = np.ones(len(every), bool)
    new[1:] = (every[order][1:] != every[order][:-1]) | (stands[order][1:] != stands[order][:-1])
    starts = np.maximum.accumulate(np.where(new, np.arange(len(every)), 0))
    rank = np.zeros(len(every), np.int64)
    rank[order] = np.arange(len(every)) - starts
    rank[stands < 0] = 0
    return stands, rank


def _patterns(followed: Followed, every: np.ndarray, stands: np.ndarray,
              rank: np.ndarray) -> dict[int, int]:
    """Return a number for each unit that tells how its members were united: which with which."""
    total = np.zeros(len(every), np.uint64)
    for event, (one, two) in enumerate(followed.units.united):
        mixed = np.full(len(one), event + 1, np.uint64)
        for part in (stands[one], rank[one], stands[two], rank[two]):
            mixed = (mixed ^ (part + 2).astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
        np.add.at(total, every[one], mixed)
    return {root: value for root, value in enumerate(total.tolist()) if value}


def _within(graph: _Graph, unit: int) -> list[int] | None:
    """Return a unit and all that is in it, in the order of where it stands.

    None where the unit is in itself.
    """
    held, waiting = {unit}, [unit]
    while waiting:
        for member in graph.inner.get(waiting.pop(), ()):
            if member == unit:
                return None
            if member not in held:
                held.add(member)
                waiting.append(member)
    return [unit, *sorted(held - {unit}, key=lambda u: (not graph.places.get(u), graph.places.get(
        u, [(0, u)])[0]))]


def _counts(graph: _Graph, unit: int) -> dict[int, int]:
    """Return how often a unit stands in each place."""
    counts: dict[int, int] = defaultdict(int)
    for which, _ in graph.places.get(unit, ()):
        counts[which] += 1
    return counts


def _blocks(graph: _Graph, cells: dict[tuple, list[list[int]]]) -> list[list[list[list[int]]]]:
    """Return groups of blocks of units: cells of the same size that differ in their blocks alone.

    Cells that the code cut apart are groups of their own.
    """
    groups: dict[tuple, list[list[list[int]]]] = defaultdict(list)
    for outside, members in cells.items():
        cut = tuple(frozenset(entry for entry in outer if entry[2] in graph.parts)
                    for outer in outside)
        groups[len(members), cut].append(members)
    return list(groups.values())


def _group(followed: Followed, graph: _Graph, blocks: list[list[list[int]]],
           frozen: str | None) -> Found | None:
    """Return a group, None where it is none: a single unit, or one that nothing makes and reads."""
    units = [held for block in blocks for held in block]
    inside = set(units[0])
    if len(blocks[0]) < 2 or not inside & graph.marks["read"] or not inside & graph.marks["made"]:
        return None
    spots = tuple(_spots(followed.places, graph, units))
    made, read = (tuple(i for i, spot in enumerate(spots)
                        if _stands(followed, spot, factors))
                  for factors in (followed.made, followed.columns))
    kind = _kind(followed.run.network, graph, units[0], spots)
    return Found(kind, spots, len(blocks), bool(inside & graph.marks["pooled"]), frozen,
                 min(which for unit in units[0] for which, _ in graph.places.get(unit, ())),
                 made, read, tuple(units[0]))


def _stands(followed: Followed, spot: Spot, factors: list[np.ndarray]) -> bool:
    """Return whether the places of a spot themselves are among those of the factors."""
    place = next(p for p in followed.places if (p.tensor, p.axis, p.groups) == (
        spot.tensor, spot.axis, spot.groups))
    wanted = place.start + int(spot.indices.flat[0])
    return any(factor.ravel()[0] <= wanted <= factor.ravel()[-1] and wanted in factor
               for factor in factors)


def _spots(places: list[Place], graph: _Graph, units: list[list[int]]) -> list[Spot]:
    """Return where units stand, in the order of the weights; member by member in each unit."""
    found: dict[int, list[list[int]]] = defaultdict(lambda: [[] for _ in units])
    for row, held in enumerate(units):
        for unit in held:
            for which, index in graph.places.get(unit, ()):
                found[which][row].append(index)
    return [Spot(places[which].tensor, places[which].axis, np.array(rows), places[which].groups)
            for which, rows in sorted(found.items())]


def _kind(network: nn.Module, graph: _Graph, held: list[int], spots: tuple[Spot, ...]) -> str:
    """Return what a unit is called."""
    attended, heads = graph.marks["attended"], graph.marks["heads"]
    if held[0] in heads:
        return "head"
    if set(held) & attended or any(graph.outer[unit] & heads for unit in held):
        return "head dimension"
    owners = [network.get_submodule(spot.tensor.rpartition(".")[0]) for spot in spots
              if spot.axis == 0]
    if any(isinstance(owner, (nn.RNNBase, nn.RNNCellBase)) for owner in owners):
        return "cell"
    if len(held) > 1:
        return "block"
    return "stream" if set(held) & graph.marks["added"] else "hidden"
