"""Labels of the indices of tensors: which unit of a network stands at which index of which axis.

A unit is a number. A factor is an array of units with one axis for each of the tensor's, of size 1
where the unit is the same along it; the factors of a tensor have no axis in common.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

Factor = np.ndarray


@dataclass(frozen=True)
class Labels:
    """What is known of a tensor: its factors, and the axes along which its numbers are the same.

    Any other axis is fixed: its indices are what the input, or the code, makes them.
    """

    shape: tuple[int, ...]
    factors: tuple[Factor, ...] = ()
    same: frozenset[int] = frozenset()

    @property
    def fixed(self) -> frozenset[int]:
        """The axes that no unit stands on and that are not the same throughout."""
        labelled = {axis for factor in self.factors for axis in axes(factor)}
        return frozenset(axis for axis, size in enumerate(self.shape)
                         if size > 1 and axis not in labelled and axis not in self.same)


@dataclass(eq=False, repr=False)
class Units:
    """The units of a network: which are one, which move with which, and which must stay.

    What is `inside` a unit moves when it does: the members of a head in a head. `frozen` units
    stay where they are, for a reason that is named first of all that hold.
    """

    count: int = 0
    above: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    united: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    inside: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    frozen: list[tuple[np.ndarray, str]] = field(default_factory=list)
    parts: list[np.ndarray] = field(default_factory=list)  # units that stand for a part of an axis
    touched: list[np.ndarray] = field(default_factory=list)

    def new(self, *shape: int) -> np.ndarray:
        """Return new units in an array of that shape."""
        size = int(np.prod(shape))
        if self.count + size > len(self.above):
            room = np.arange(len(self.above), 2 * (self.count + size))
            self.above = np.concatenate([self.above, room])
        made = np.arange(self.count, self.count + size).reshape(shape)
        self.count += size
        return made

    def find(self, units: np.ndarray) -> np.ndarray:
        """Return for each unit the first of those that are one with it."""
        found = self.above[units]
        while True:
            further = self.above[found]
            if np.array_equal(further, found):
                self.above[units] = found
                return found
            found = further

    def unite(self, one: np.ndarray, two: np.ndarray) -> None:
        """Make units one, index by index."""
        one, two = (side.ravel() for side in np.broadcast_arrays(one, two))
        self.touched += [one, two]
        self.united.append((one, two))
        while True:
            one, two = self.find(one), self.find(two)
            apart = one != two
            if not apart.any():
                return
            one, two = one[apart], two[apart]
            np.minimum.at(self.above, np.maximum(one, two), np.minimum(one, two))

    def put(self, inner: np.ndarray, outer: np.ndarray) -> None:
        """Put units inside of others, index by index."""
        inner, outer = np.broadcast_arrays(inner, outer)
        self.inside.append((inner.ravel().copy(), outer.ravel().copy()))
        self.touched.append(inner.ravel().copy())

    def freeze(self, units: np.ndarray, reason: str) -> None:
        """Let units stay where they are."""
        if units.size:
            self.frozen.append((units.ravel(), reason))
            self.touched.append(units.ravel())

    def freeze_all(self, factors: Iterable[Factor], reason: str) -> None:
        """Let the units of all factors stay where they are."""
        for factor in factors:
            self.freeze(factor, reason)

    def part(self, units: np.ndarray) -> None:
        """Tell units that stand in one part of an axis, which the code cut out, from the others."""
        outer = self.new(1)
        self.parts.append(outer)
        self.put(np.unique(units), outer)

    def simple(self, factor: Factor) -> Factor:
        """Return a factor with size 1 along each axis on which its units do not depend."""
        for axis in axes(factor):
            first = factor.take([0], axis)
            if (self.find(factor) == self.find(first)).all():
                factor = first
        return factor

    def related(self, factors: Iterable[Factor], reason: str) -> list[Factor]:
        """Return factors that have no axis in common, having united and nested those that do.

        Units on the same axes are one. Units on more axes are inside those on fewer. Where two
        factors share some axes only, nothing is known, and both are frozen.
        """
        kept: list[Factor] = []
        for factor in map(self.simple, factors):
            standing: Factor | None = factor
            for other in list(kept):
                mine, others = set(axes(factor)), set(axes(other))
                if standing is None or not mine & others:
                    continue
                if mine == others:
                    self.unite(factor, other)
                    standing = None
                elif mine < others:
                    self.put(other, factor)
                    standing = None
                elif others < mine:
                    self.put(factor, other)
                    kept = [k for k in kept if k is not other]
                else:
                    self.freeze_all((factor, other), reason)
                    kept = [k for k in kept if k is not other]
                    standing = None
            if standing is not None and axes(standing):
                kept.append(standing)
        return kept

    def together(self, tensors: Sequence[Labels], shape: Sequence[int], reason: str) -> Labels:
        """Return the labels of what is computed of several tensors index by index."""
        shape = tuple(shape)
        wide = [widened(labels, len(shape)) for labels in tensors]
        kept = self.related((f for labels in wide for f in labels.factors), reason)
        kept = [factor for factor in kept if all(
            self._move_on(factor, labels.fixed) for labels in wide)]
        labelled = {axis for factor in kept for axis in axes(factor)}
        same = frozenset(axis for axis in range(len(shape)) if axis not in labelled and all(
            axis in labels.same or labels.shape[axis] == 1 for labels in wide))
        return Labels(shape, tuple(kept), same)

    def _move_on(self, factor: Factor, fixed: frozenset[int]) -> bool:
        """Hold units against axes that nothing can move; return whether any may still move."""
        if not set(axes(factor)) & fixed:
            return True
        if set(axes(factor)) <= fixed:
            self.freeze(factor, "the input")
            return False
        standing = self.new(*(size if axis in fixed else 1
                              for axis, size in enumerate(factor.shape)))
        self.freeze(standing, "the input")
        self.put(factor, standing)
        return True

    def summed(self, labels: Labels, over: Iterable[int], *, drop: bool) -> Labels:
        """Return the labels of what is summed, or normed, over axes, which are left with size 1.

        Units that are summed in one place and not in another are in the unit of that place. With
        `drop` false the tensor keeps its axes, as in a softmax.
        """
        over = set(over)
        kept: list[Factor] = []
        for factor in labels.factors:
            rest = [axis for axis in axes(factor) if axis not in over]
            if len(rest) == len(axes(factor)):
                kept.append(factor)
                continue
            if rest:
                kept.append(self._places(factor, rest))
            if not drop:
                kept.append(factor)
        shape = tuple(1 if drop and axis in over else size
                      for axis, size in enumerate(labels.shape))
        return Labels(shape, tuple(self.related(kept, "a sum")), labels.same | (
            over if drop else frozenset()))

    def _places(self, factor: Factor, rest: list[int]) -> Factor:
        """Return a unit for each place along `rest` that holds what is in the factor there."""
        shape = tuple(size if axis in rest else 1 for axis, size in enumerate(factor.shape))
        rows = np.moveaxis(factor, rest, range(len(rest)))
        rows = rows.reshape(int(np.prod([factor.shape[axis] for axis in rest])), -1)
        found = self.find(rows)
        if (found == found[:, :1]).all():
            return rows[:, 0].reshape(shape)
        _, which = np.unique(found, axis=0, return_inverse=True)
        which = which.reshape(-1)
        places = self.new(int(which.max()) + 1)[which]
        self.put(rows, places[:, None])
        return places.reshape(shape)


def axes(factor: Factor) -> tuple[int, ...]:
    """Return the axes on which the units of a factor depend."""
    return tuple(axis for axis, size in enumerate(factor.shape) if size > 1)


def widened(labels: Labels, ndim: int) -> Labels:
    """Return labels with axes of size 1 put before the first."""
    more = ndim - len(labels.shape)
    if not more:
        return labels
    front = (1,) * more
    return Labels(front + labels.shape, tuple(f.reshape(front + f.shape) for f in labels.factors),
                  frozenset({*range(more), *(axis + more for axis in labels.same)}))


def moved(labels: Labels, order: Sequence[int]) -> Labels:
    """Return labels whose axis i is axis order[i] of those given."""
    return Labels(tuple(labels.shape[axis] for axis in order),
                  tuple(f.transpose(order) for f in labels.factors),
                  frozenset(i for i, axis in enumerate(order) if axis in labels.same))


def reshaped(units: Units, labels: Labels, shape: Sequence[int], reason: str) -> Labels:
    """Return the labels of a tensor in another shape."""
    shape = tuple(shape)
    if labels.shape == shape:
        return labels
    pieces = list(_pieces(labels.shape, shape))
    factors = []
    for factor in labels.factors:
        whole, target = list(factor.shape), [1] * len(shape)
        for before, after in pieces:
            if any(factor.shape[axis] > 1 for axis in before):
                for axis in before:
                    whole[axis] = labels.shape[axis]
                for axis in after:
                    target[axis] = shape[axis]
        factors.append(np.broadcast_to(factor, whole).reshape(target))
    same = frozenset(axis for before, after in pieces for axis in after
                     if all(b in labels.same or labels.shape[b] == 1 for b in before))
    factors = [units.simple(factor) for factor in factors]
    return Labels(shape, tuple(_disjoint(units, factors, reason)), same)


def _disjoint(units: Units, factors: list[Factor], reason: str) -> list[Factor]:
    """Return the factors that share no axis with others; the rest are frozen."""
    kept = []
    for factor in factors:
        if any(set(axes(factor)) & set(axes(other)) for other in factors if other is not factor):
            units.freeze(factor, reason)
        elif axes(factor):
            kept.append(factor)
    return kept


def _pieces(before: Sequence[int], after: Sequence[int]) -> Iterable[tuple[list[int], list[int]]]:
    """Yield the axes before and after that hold the same numbers, few at a time."""
    i = j = 0
    while i < len(before) or j < len(after):
        left, right, one, two = list[int](), list[int](), 1, 1
        while i < len(before) and not left:
            left.append(i)
            one *= before[i]
            i += 1
        while j < len(after) and not right:
            right.append(j)
            two *= after[j]
            j += 1
        while one != two:
            if (one < two and i < len(before)) or j >= len(after):
                left.append(i)
                one *= before[i]
                i += 1
            else:
                right.append(j)
                two *= after[j]
                j += 1
        yield left, right
