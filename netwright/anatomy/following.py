"""Follows the units of a network through one run: which indices of which weights are the same.

There is a rule for each operation of PyTorch's that says where the units on the axes of what it
takes stand in what it gives, and which it makes one. What an operation without a rule takes stays
as it is, and so does whatever a rule cannot tell.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from netwright.anatomy.labels import (
    Factor,
    Labels,
    Units,
    axes,
    moved,
    reshaped,
    widened,
)
from netwright.anatomy.run import Operation, Run, Value

Rule = Callable[["Followed", Operation, dict[str, Any]], None]


@dataclass(frozen=True)
class Place:
    """The axis of a parameter or buffer that some units stand on, from `start` on.

    With `groups` the axis is that of a grouped convolution's weight which counts the channels of
    one group: there are units for each group.
    """

    tensor: str
    axis: int
    start: int
    size: int
    groups: int = 1


@dataclass(eq=False, repr=False)
class Followed:
    """What was found: the units, where they stand, and what is done with them."""

    run: Run
    units: Units = field(default_factory=Units)
    places: list[Place] = field(default_factory=list)
    labels: dict[int, Labels] = field(default_factory=dict)
    made: list[np.ndarray] = field(default_factory=list)  # by the rows of a weight
    read: list[np.ndarray] = field(default_factory=list)  # by its columns, or by one another
    added: list[np.ndarray] = field(default_factory=list)  # by two parts of the network
    columns: list[np.ndarray] = field(default_factory=list)  # of a weight that reads
    attended: list[np.ndarray] = field(default_factory=list)  # summed between two activations
    heads: list[np.ndarray] = field(default_factory=list)  # in which that is done apart
    pooled: list[np.ndarray] = field(default_factory=list)  # in a norm, a softmax or a sum
    unknown: dict[str, str] = field(default_factory=dict)  # operation -> where it ran
    grouped: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    times: dict[int, int] = field(default_factory=dict)  # when a tensor came to be
    writes: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def of(self, number: int) -> Labels:
        """Return the labels of a tensor as they are by now.

        All axes of one that nothing is known of are fixed, and so is an axis whose units have all
        become one.
        """
        labels = self.labels.get(number) or Labels(self.run.shapes[number])
        factors = (self.units.simple(factor) for factor in labels.factors)
        return replace(labels, factors=tuple(f for f in factors if axes(f)))

    def give(self, operation: Operation, labels: Labels, which: int = 0) -> None:
        """Set the labels of what an operation gives."""
        if which < len(operation.gave):
            self.labels[operation.gave[which]] = labels

    def stop(self, operation: Operation, factors: Iterable[Factor] | None = None) -> None:
        """Freeze what an operation takes, or some of it, for its sake."""
        if factors is None:
            factors = [f for number in operation.taken for f in self.of(number).factors]
        factors = list(factors)
        if factors:
            self.unknown.setdefault(operation.name, _where(operation))
            self.units.freeze_all(factors, operation.name)

    def stand(self, tensor: str, axis: int, shape: tuple[int, ...], groups: int = 1) -> Factor:
        """Return new units that stand on an axis of a weight."""
        made = self.units.new(*shape)
        self.places.append(Place(tensor, axis, int(made.ravel()[0]), made.size, groups))
        return made


def follow(run: Run) -> Followed:
    """Return the units of a network, followed through a run of it."""
    followed = Followed(run)
    held: dict[str, torch.Tensor] = {**dict(run.network.named_parameters()),
                                     **dict(run.network.named_buffers())}
    for number, name in [*run.parameters.items(), *run.buffers.items()]:
        if name in held and number not in followed.labels:
            shape = tuple(held[name].shape)
            followed.labels[number] = Labels(shape, tuple(
                followed.stand(name, axis, tuple(size if a == axis else 1
                                                 for a in range(len(shape))))
                for axis, size in enumerate(shape) if size > 1))
    for time, operation in enumerate(run.operations):
        _step(followed, operation, time)
    for number in run.meant:
        followed.units.freeze_all(followed.of(number).factors, "the output")
    _once(followed)
    return followed


def _step(followed: Followed, operation: Operation, time: int) -> None:
    """Follow the units through one operation, none of which is lost without a word."""
    rule = RULES.get(operation.name)
    places = followed.run.places
    if operation.function is torch.ops.aten.copy.default:
        rule = _overwritten if operation.gave[0] in places else None
    if operation.function is torch.ops.aten.alias.default and (
            places.get(operation.gave[0], ())[1:] != places.get(operation.taken[0], ())[1:]):
        rule = None  # a view that no operation was seen to make
    if operation.dropped or (rule is None and operation.elementwise):
        rule = _elementwise
    if rule is None and "scaled_dot_product" in operation.name:
        rule = _attention
    if rule is None and "batch_norm" in operation.name:
        rule = _batch_norm
    if rule is None:
        followed.stop(operation)
    elif operation.gave and 0 in followed.run.shapes[operation.gave[0]]:
        pass  # what is empty holds no unit
    elif rule is not _joined and any(0 in followed.run.shapes[n] for n in operation.taken):
        followed.stop(operation)
    else:
        _conserving(followed, operation, rule)
    for number in operation.gave:
        followed.times[number] = time
        if operation.function._schema.is_mutable and number in followed.run.places:
            storage = followed.run.places[number][0]
            followed.writes.setdefault(storage, []).append((time, number))


def _conserving(followed: Followed, operation: Operation, rule: Rule) -> None:
    """Apply a rule, and freeze units that went in and neither came out nor were read in it."""
    units = followed.units
    notes: tuple[list[Any], ...] = (followed.read, followed.pooled, units.frozen, units.inside)
    before = [len(note) for note in notes]
    taken = [f for number in operation.taken for f in followed.of(number).factors]
    rule(followed, operation, arguments(operation))
    if not taken or rule in _DROPPING:
        return
    new = [entry for note, start in zip(notes, before, strict=True) for entry in note[start:]]
    kept = [f for number in operation.gave for f in followed.of(number).factors]
    kept += [entry if isinstance(entry, np.ndarray) else entry[0] for entry in new]
    kept += [outer for _, outer in units.inside[before[3]:]]
    went, came = (np.unique(units.find(np.concatenate([f.ravel() for f in factors])))
                  if factors else np.zeros(0, np.int64) for factors in (taken, kept))
    units.freeze(np.setdiff1d(went, came), operation.name)


def arguments(operation: Operation) -> dict[str, Any]:
    """Return what an operation was given, by name, with the defaults of what was left out."""
    args, kwargs = operation.arguments
    found = {}
    for i, argument in enumerate(operation.function._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        found[argument.name] = args[i] if i < len(args) else kwargs.get(argument.name, default)
    return found


def _once(followed: Followed) -> None:
    """Freeze the weights of grouped convolutions that something else uses as well."""
    touched = np.unique(np.concatenate(followed.units.touched or [np.zeros(0, np.int64)]))
    grouped = {(place.tensor, place.axis): place for place in followed.places if place.groups > 1}
    for place in followed.places:
        other = grouped.get((place.tensor, place.axis))
        stood = np.arange(place.start, place.start + place.size)
        if other is not None and other is not place and np.isin(stood, touched).any():
            followed.units.freeze(stood, "two uses of a weight")
            followed.units.freeze(np.arange(other.start, other.start + other.size),
                                  "two uses of a weight")


def _where(operation: Operation) -> str:
    return operation.call.name if operation.call is not None else ""


def _number(value: Any) -> int:
    assert isinstance(value, Value)
    return value.number


def _values(value: Any) -> list[int]:
    """Return the numbers of the tensors in an argument."""
    members = value if isinstance(value, (list, tuple)) else [value]
    return [member.number for member in members if isinstance(member, Value)]


def _axis(axis: int, ndim: int) -> int:
    return axis % ndim if ndim else 0


# Elementwise functions and what makes tensors out of nothing.

def _elementwise(followed: Followed, operation: Operation, _: dict[str, Any]) -> None:
    shape = followed.run.shapes[operation.gave[0]]
    taken = [followed.of(number) for number in operation.taken]
    if operation.name in ("add", "sub", "rsub"):
        fed = [widened(t, len(shape)) for number, t in zip(operation.taken, taken, strict=True)
               if followed.run.fed[number]]
        followed.added += [f for t in fed[:1] for f in t.factors for o in fed[1:]
                           for g in o.factors if axes(f) == axes(g) and not np.array_equal(
                               followed.units.find(f), followed.units.find(g))]
    labels = followed.units.together(taken, shape, operation.name)
    for which in range(len(operation.gave)):
        followed.give(operation, labels, which)


def _uniform(followed: Followed, operation: Operation, _: dict[str, Any]) -> None:
    for which, number in enumerate(operation.gave):
        shape = followed.run.shapes[number]
        followed.give(operation, Labels(shape, (), frozenset(range(len(shape)))), which)


def _drawn(_: Followed, __: Operation, ___: dict[str, Any]) -> None:
    """Leave all axes of what is counted or drawn fixed: no unit goes in."""


def _identity(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    first = next(v for v in a.values() if isinstance(v, Value))
    followed.give(operation, followed.of(first.number))


def _copied(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    shape = followed.run.shapes[operation.gave[0]]
    followed.give(operation, followed.units.together(
        [followed.of(_number(a["src"]))], shape, operation.name))


def _overwritten(followed: Followed, operation: Operation, _: dict[str, Any]) -> None:
    """Label a tensor parts of which were written to through other views of its memory."""
    old, (number,) = operation.taken[0], operation.gave
    storage, *place = followed.run.places[number]
    labels = followed.of(old)
    mine = _memory(*place)
    for time, wrote in followed.writes.get(storage, []):
        if time <= followed.times.get(old, -1):
            continue
        others = followed.run.places[wrote][1:]
        if others == tuple(place):
            labels = followed.of(wrote)
            continue
        its = _memory(*others)
        if np.isin(its, mine).any():
            labels = _overlaid(followed, operation, labels, mine, followed.of(wrote), its)
    followed.give(operation, labels)


def _memory(offset: int, shape: Sequence[int], stride: Sequence[int]) -> np.ndarray:
    """Return where in memory each number of a tensor is."""
    place = np.full((1,) * len(shape), offset)
    for axis, (size, step) in enumerate(zip(shape, stride, strict=True)):
        place = place + (np.arange(size) * step).reshape(
            [-1 if a == axis else 1 for a in range(len(shape))])
    return place


def _overlaid(followed: Followed, operation: Operation, labels: Labels, mine: np.ndarray,
              wrote: Labels, its: np.ndarray) -> Labels:
    """Return the labels of a tensor with those of what was written to a part of it."""
    if len(labels.factors) > 1 or len(wrote.factors) != 1:
        followed.stop(operation, (*labels.factors, *wrote.factors))
        return Labels(labels.shape)
    nobody = followed.units.new(1)
    followed.units.freeze(nobody, "the input")
    dense = np.full(mine.shape, nobody[0])
    for factor in labels.factors:
        dense[...] = factor
    order = np.argsort(its, axis=None)
    spots = np.searchsorted(its.ravel()[order], mine).clip(max=its.size - 1)
    hit = its.ravel()[order][spots] == mine
    dense[hit] = np.broadcast_to(wrote.factors[0], its.shape).ravel()[order][spots][hit]
    factor = followed.units.simple(dense)
    return Labels(labels.shape, (factor,) if axes(factor) else ())


# The same numbers in other places.

def _reshape(followed: Followed, operation: Operation, _: dict[str, Any]) -> None:
    taken = followed.of(operation.taken[0])
    shape = followed.run.shapes[operation.gave[0]]
    followed.give(operation, reshaped(followed.units, taken, shape, operation.name))


def _permute(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    labels = followed.of(_number(a["self"]))
    ndim = len(labels.shape)
    if operation.name in ("t", "numpy_T"):
        order = list(range(ndim))[::-1]
    elif "dims" in a and operation.name == "permute":
        order = [_axis(axis, ndim) for axis in a["dims"]]
    else:
        order = list(range(ndim))
        one, two = (_axis(a[name], ndim) for name in
                    (("dim0", "dim1") if "dim0" in a else ("axis0", "axis1")))
        order[one], order[two] = order[two], order[one]
    followed.give(operation, moved(labels, order))


def _expand(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    shape = followed.run.shapes[operation.gave[0]]
    labels = widened(followed.of(_number(a["self"])), len(shape))
    same = labels.same | {axis for axis, size in enumerate(shape)
                          if labels.shape[axis] == 1 and size > 1}
    followed.give(operation, Labels(shape, labels.factors, same))


def _cut(followed: Followed, operation: Operation, number: int, axis: int,
         index: Any, which: int = 0, *, drop: bool = False) -> None:
    """Take some indices of an axis; with `drop` a single one, and the axis goes."""
    labels = followed.of(number)
    shape = list(labels.shape)
    taken = np.arange(shape[axis])[index]
    factors = []
    for factor in labels.factors:
        if axis in axes(factor):
            part = factor[(slice(None),) * axis + (taken,)]
            if drop and not axes(part):
                followed.stop(operation, [part])
            elif not np.array_equal(taken, np.arange(shape[axis])):
                followed.units.part(part)
            factor = part
        factors.append(factor)
    shape[axis] = taken.size
    factors = [f for f in map(followed.units.simple, factors) if axes(f)]
    found = Labels(tuple(shape), tuple(factors), labels.same)
    if drop:
        found = _dropped(found, axis)
    followed.give(operation, found, which)


def _dropped(labels: Labels, axis: int) -> Labels:
    """Return labels without an axis of size 1."""
    rest = [i for i in range(len(labels.shape)) if i != axis]
    return Labels(tuple(labels.shape[i] for i in rest),
                  tuple(f.squeeze(axis) for f in labels.factors),
                  frozenset(new for new, i in enumerate(rest) if i in labels.same))


def _slice(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    number = _number(a["self"])
    axis = _axis(a["dim"], len(followed.of(number).shape))
    _cut(followed, operation, number, axis, slice(a["start"], a["end"], a["step"]))


def _select(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    number = _number(a["self"])
    axis = _axis(a["dim"], len(followed.of(number).shape))
    size = followed.of(number).shape[axis]
    _cut(followed, operation, number, axis, [a["index"] % size], drop=True)


def _split(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    number = _number(a["self"])
    axis = _axis(a["dim"], len(followed.of(number).shape))
    start = 0
    for which, gave in enumerate(operation.gave):
        if operation.name == "unbind":
            _cut(followed, operation, number, axis, [which], which, drop=True)
            continue
        end = start + followed.run.shapes[gave][axis]
        _cut(followed, operation, number, axis, slice(start, end), which)
        start = end


def _joined(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    """Put tensors one after another, or on an axis of their own."""
    shape = followed.run.shapes[operation.gave[0]]
    axis = _axis(a["dim"], len(shape))
    parts = [followed.of(number) for number in _values(a["tensors"])]
    if operation.name == "stack":
        parts = [_inserted(part, axis) for part in parts]
    parts = [part for part in parts if len(part.shape) == len(shape) and 0 not in part.shape]
    reach = {a for part in parts for f in part.factors for a in axes(f)
             if axis in axes(f) or (operation.name == "stack" and len(part.factors) == 1)}
    along = [_along(followed, operation, part, reach) for part in parts]
    rest = followed.units.together(
        [Labels(tuple(1 if i == axis else size for i, size in enumerate(part.shape)),
                tuple(f for f in part.factors if not reach & set(axes(f))),
                part.same | {axis} | reach) for part in parts],
        tuple(1 if i == axis else size for i, size in enumerate(shape)), operation.name)
    _give_joined(followed, operation, parts, along, rest, axis, shape)


def _give_joined(followed: Followed, operation: Operation, parts: list[Labels],
                 along: list[Factor | None], rest: Labels, axis: int,
                 shape: tuple[int, ...]) -> None:
    if all(factor is None for factor in along):
        same = rest.same - {axis}
        if all(axis in part.same for part in parts):
            same |= {axis}  # zeros beside zeros: what differs is frozen where it meets a unit
            same = same if _one_number(followed, operation) else same - {axis}
        followed.give(operation, Labels(shape, rest.factors, frozenset(same)))
        return
    target = [max(sizes) for sizes in zip(
        *(f.shape for f in along if f is not None), strict=True)]
    pieces = []
    for part, factor in zip(parts, along, strict=True):
        wanted = [part.shape[i] if i == axis else size for i, size in enumerate(target)]
        if factor is None:
            factor = followed.units.new(*(n if i == axis else 1 for i, n in enumerate(wanted)))
            followed.units.freeze(factor, "the input")
        pieces.append(np.broadcast_to(factor, wanted))
    factor = followed.units.simple(np.concatenate(pieces, axis))
    kept = followed.units.related((*rest.factors, factor), operation.name)
    labelled = {i for f in kept for i in axes(f)}
    followed.give(operation, Labels(shape, tuple(kept), rest.same - labelled - {axis}))


def _one_number(followed: Followed, operation: Operation) -> bool:
    """Return whether all that is joined was made by one filling, so that it is all alike."""
    return len(set(operation.taken)) == 1


def _inserted(labels: Labels, axis: int) -> Labels:
    """Return labels with an axis of size 1 before the one of that number."""
    front, back = labels.shape[:axis], labels.shape[axis:]
    return Labels((*front, 1, *back), tuple(np.expand_dims(f, axis) for f in labels.factors),
                  frozenset({axis, *(a + (a >= axis) for a in labels.same)}))


def _along(followed: Followed, operation: Operation, part: Labels,
           reach: set[int]) -> Factor | None:
    """Return the factor of a joined part that may differ from those of the others."""
    found = [factor for factor in part.factors if reach & set(axes(factor))]
    if len(found) > 1:
        followed.stop(operation, found)
    return found[0] if len(found) == 1 else None


def _index(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    labels = followed.of(_number(a["self"]))
    chosen = [(axis, _number(index)) for axis, index in enumerate(a["indices"])
              if isinstance(index, Value)]
    _looked_up(followed, operation, labels, [axis for axis, _ in chosen],
               [number for _, number in chosen])


def _looked_up(followed: Followed, operation: Operation, labels: Labels, at: list[int],
               numbers: list[int]) -> None:
    """Look up entries on the axes `at`, which are replaced by those of the indices."""
    shape = followed.run.shapes[operation.gave[0]]
    if len(at) == 1 and _known(followed, numbers[0]) is not None:
        index = _known(followed, numbers[0])
        if index is not None and index.ndim == 1 and index.dtype != torch.bool:
            _cut(followed, operation, _number(arguments(operation)["self"]), at[0],
                 index.numpy())
            return
    rest = [axis for axis in range(len(labels.shape)) if axis not in at]
    new = len(shape) - len(rest)
    joined = at == list(range(at[0], at[0] + len(at)))
    first = at[0] if joined else 0
    order = [*rest[:first], *range(-new, 0), *rest[first:]]
    factors = []
    for factor in labels.factors:
        if set(axes(factor)) & set(at):
            followed.units.freeze(factor, "the input")
        else:
            factors.append(factor.reshape(
                [1 if axis < 0 else factor.shape[axis] for axis in order]))
    same = frozenset(i for i, axis in enumerate(order) if axis >= 0 and axis in labels.same)
    followed.give(operation, Labels(shape, tuple(factors), same))


def _known(followed: Followed, number: int) -> torch.Tensor | None:
    """Return indices that are kept in the network."""
    name = followed.run.buffers.get(followed.run.source(number))
    held = dict(followed.run.network.named_buffers()).get(name or "")
    shape = followed.run.shapes[number]
    return held.cpu() if held is not None and tuple(held.shape) == shape else None


def _index_select(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    labels = followed.of(_number(a["self"]))
    _looked_up(followed, operation, labels, [_axis(a["dim"], len(labels.shape))],
               [_number(a["index"])])


def _embedding(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    table = followed.of(_number(a["weight"]))
    shape = followed.run.shapes[operation.gave[0]]
    factors = []
    for factor in table.factors:
        if 0 in axes(factor):
            followed.units.freeze(factor, "the input")
        else:
            factors.append(factor.reshape((1,) * (len(shape) - 1) + (-1,)))
            followed.made.append(factor)
    followed.give(operation, Labels(shape, tuple(factors)))


def _dense(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    """Move whole arrays of units, as the operation does the numbers."""
    labels = followed.of(_number(a["self"]))
    shape = followed.run.shapes[operation.gave[0]]
    factors: list[Factor] = []
    for factor in labels.factors:
        whole = torch.from_numpy(np.broadcast_to(factor, labels.shape).copy())
        others = {name: value for name, value in a.items() if name != "self"}
        found = operation.function(whole, **others).numpy()
        units = np.unique(factor)
        counts = np.bincount(found.ravel(), minlength=int(units[-1]) + 1)[units]
        for count in np.unique(counts) if counts.min() != counts.max() else ():
            followed.units.part(units[counts == count])
        factors.append(followed.units.simple(found))
    kept = followed.units.related(factors, operation.name)
    followed.give(operation, Labels(shape, tuple(kept)))


def _padded(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    labels = followed.of(_number(a["self"]))
    shape = followed.run.shapes[operation.gave[0]]
    pads = list(a["pad"])
    sides = {len(shape) - 1 - i: (pads[2 * i], pads[2 * i + 1]) for i in range(len(pads) // 2)}
    sides = {axis: pair for axis, pair in sides.items() if any(pair)}
    factors = []
    for factor in labels.factors:
        for axis in [axis for axis in axes(factor) if axis in sides]:
            if min(sides[axis]) < 0:
                followed.stop(operation, [factor])
                break
            ends = []
            for size in sides[axis]:
                ends.append(followed.units.new(*(size if i == axis else n for i, n in
                                                 enumerate(factor.shape))))
                followed.units.freeze(ends[-1], "the input")
            factor = np.concatenate([ends[0], factor, ends[1]], axis)
        else:
            factors.append(factor)
    followed.give(operation, Labels(shape, tuple(factors), labels.same - set(sides)))


def _unfolded(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    """Label patches, which hold each channel once for every place of the kernel."""
    labels = followed.of(_number(a["self"]))
    shape = followed.run.shapes[operation.gave[0]]
    factors = []
    for factor in labels.factors:
        if axes(factor) == (1,):
            factors.append(np.repeat(factor.reshape(1, -1, 1), shape[1] // factor.shape[1], 1))
        else:
            followed.stop(operation, [factor])
    followed.give(operation, Labels(shape, tuple(factors)))


def _along_one(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    """Sort, choose, gather or count along one axis, on which no unit may stand."""
    tensors = [followed.of(number) for number in operation.taken]
    ndim = max(len(labels.shape) for labels in tensors)
    dim = a.get("dim")
    over = range(ndim) if dim is None else [_axis(dim, ndim)]
    kept = []
    for labels in tensors:
        if len(labels.shape) != ndim:
            followed.stop(operation, labels.factors)
            continue
        followed.stop(operation, [f for f in labels.factors if set(axes(f)) & set(over)])
        kept.append(Labels(
            tuple(1 if i in over else size for i, size in enumerate(labels.shape)),
            tuple(f for f in labels.factors if not set(axes(f)) & set(over)), labels.same))
    if len({labels.shape for labels in kept}) > 1:  # some reach over a part of an axis only
        followed.stop(operation, [f for labels in kept for f in labels.factors])
        return
    for which, number in enumerate(operation.gave):
        shape = followed.run.shapes[number]
        wide = followed.units.together(
            kept, [1 if i in over else size for i, size in enumerate(kept[0].shape)],
            operation.name)
        if len(shape) != ndim:
            for axis in sorted(over, reverse=True):
                wide = _dropped(wide, axis)
        followed.give(operation, Labels(shape, wide.factors, wide.same - (
            set(over) if len(shape) == ndim else set())), which)


def _added_at(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    """Add rows at indices of one axis, on which no unit may stand."""
    into = followed.of(_number(a["self"]))
    axis = _axis(a["dim"], len(into.shape))
    rows = followed.of(_number(a["source"]))
    both = []
    for labels in (into, rows):
        followed.stop(operation, [f for f in labels.factors if axis in axes(f)])
        both.append(Labels(tuple(1 if i == axis else n for i, n in enumerate(labels.shape)),
                           tuple(f for f in labels.factors if axis not in axes(f)), labels.same))
    found = followed.units.together(
        both, [1 if i == axis else n for i, n in enumerate(into.shape)], operation.name)
    followed.give(operation, Labels(into.shape, found.factors, found.same - {axis}))


def _put_at(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    """Write values at indices of the first axes, on which no unit may stand."""
    into, values = followed.of(_number(a["self"])), followed.of(_number(a["values"]))
    indices = list(a["indices"])
    if any(not isinstance(index, Value) for index in indices):
        followed.stop(operation)
        return
    at = set(range(len(indices)))
    if any(followed.run.shapes[_number(index)] != followed.run.shapes[_number(indices[0])]
           for index in indices) or set(axes_of(into)) & at:
        followed.stop(operation)
        return
    rest = [axis for axis in range(len(into.shape)) if axis not in at]
    trailing = widened(values, max(len(rest), len(values.shape)))
    front = len(trailing.shape) - len(rest)
    if any(axis < front for axis in axes_of(trailing)):
        followed.stop(operation)
        return
    ones = (1,) * len(at)
    placed = Labels(ones + trailing.shape[front:],
                    tuple(f.reshape(ones + f.shape[front:]) for f in trailing.factors),
                    frozenset(axis - front + len(at) for axis in trailing.same if axis >= front))
    inner = Labels(ones + into.shape[len(at):], into.factors, into.same)
    found = followed.units.together([inner, placed], ones + into.shape[len(at):], operation.name)
    followed.give(operation, Labels(into.shape, found.factors, found.same - at))


def axes_of(labels: Labels) -> set[int]:
    """Return the axes that units stand on."""
    return {axis for factor in labels.factors for axis in axes(factor)}


# Products.

def contracted(followed: Followed, operation: Operation, one: Labels, two: Labels,
               letters: str, *, attending: bool = False) -> Labels:
    """Return the labels of a product, "bi,io->bo" a letter for each axis: summed where it goes.

    `attending` is whether both are activations.
    """
    taken, gave = letters.split("->")
    first, second = taken.split(",")
    every = list(dict.fromkeys(first + second))
    sides = [_spread(labels, names, every) for labels, names in ((one, first), (two, second))]
    shape = [max(side.shape[i] for side in sides) for i in range(len(every))]
    over = [i for i, letter in enumerate(every) if letter not in gave]
    for side in sides:
        followed.read += [f for f in side.factors if set(axes(f)) & set(over)]
    if attending:
        followed.attended += [f for f in sides[0].factors if set(axes(f)) & set(over)]
    both = followed.units.together(sides, shape, operation.name)
    left = followed.units.summed(both, over, drop=True)
    if attending:
        batch = {i for i, letter in enumerate(every) if letter in first and letter in second}
        followed.heads += [f for f in left.factors if set(axes(f)) <= batch]
    order = [every.index(letter) for letter in gave]
    rest = [i for i in range(len(every)) if i not in order]
    whole = moved(left, [*order, *rest])
    return Labels(whole.shape[:len(order)],
                  tuple(f.reshape(f.shape[:len(order)]) for f in whole.factors),
                  frozenset(axis for axis in whole.same if axis < len(order)))


def _spread(labels: Labels, names: str, every: list[str]) -> Labels:
    """Return labels with an axis for each letter, of size 1 where they have none."""
    order = [names.index(letter) for letter in every if letter in names]
    found = moved(labels, order)
    for axis, letter in enumerate(every):
        if letter not in names:
            found = _inserted(found, axis)
    return found


def _product(followed: Followed, operation: Operation, one: int, two: int, letters: str) -> Labels:
    for number, other in ((one, two), (two, one)):
        if followed.run.learned(number) and not followed.run.learned(other):
            taken, gave = letters.split("->")
            names = taken.split(",")[number == two]
            for factor in followed.of(number).factors:
                kept = all(names[axis] in gave for axis in axes(factor))
                (followed.made if kept else followed.columns).append(factor)
    return contracted(followed, operation, followed.of(one), followed.of(two), letters,
                      attending=all(followed.run.fed[n] and followed.run.taught[n]
                                    for n in (one, two)))


_LETTERS = {"mm": "ic,co->io", "addmm": "ic,co->io", "bmm": "bic,bco->bio",
            "baddbmm": "bic,bco->bio", "addbmm": "bic,bco->io", "mv": "ic,c->i",
            "addmv": "ic,c->i", "dot": "c,c->", "vdot": "c,c->", "outer": "i,o->io",
            "ger": "i,o->io"}
_SIDES = (("mat1", "mat2"), ("self", "mat2"), ("batch1", "batch2"), ("mat", "vec"),
          ("self", "vec"), ("self", "tensor"), ("self", "other"), ("self", "vec2"))


def _multiplied(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    one, two = next((a[p], a[q]) for p, q in _SIDES
                    if isinstance(a.get(p), Value) and isinstance(a.get(q), Value))
    found = _product(followed, operation, one.number, two.number, _LETTERS[operation.name])
    if operation.name.startswith("add") or operation.name == "baddbmm":
        found = followed.units.together([found, followed.of(_number(a["self"]))],
                                        followed.run.shapes[operation.gave[0]], operation.name)
    followed.give(operation, found)


def _linear(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    one, two = _number(a["input"]), _number(a["weight"])
    front = "abdefgh"[:len(followed.of(one).shape) - 1]
    found = _product(followed, operation, one, two, f"{front}c,oc->{front}o")
    if isinstance(a.get("bias"), Value):
        found = followed.units.together([found, followed.of(_number(a["bias"]))],
                                        found.shape, operation.name)
    followed.give(operation, found)


def _grouped_product(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    """Multiply each row by the matrix of its group, which the input decides on."""
    one, two = _number(a["self"]), _number(a["mat2"])
    if (len(followed.of(one).shape), len(followed.of(two).shape)) != (2, 3):
        followed.stop(operation)
        return
    weights = followed.of(two)
    chosen = [f for f in weights.factors if 0 in axes(f)]
    followed.units.freeze_all(chosen, "the input")
    rest = Labels((1, *weights.shape[1:]), tuple(f for f in weights.factors if 0 not in axes(f)),
                  weights.same)
    followed.columns += [f for f in rest.factors if axes(f) == (1,)]
    followed.made += [f for f in rest.factors if axes(f) != (1,)]
    followed.give(operation, contracted(followed, operation, followed.of(one), _dropped(rest, 0),
                                        "ic,co->io"))


def _convolution(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    labels, weight = followed.of(_number(a["input"])), followed.of(_number(a["weight"]))
    shape, groups = followed.run.shapes[operation.gave[0]], a["groups"]
    followed.stop(operation, [f for f in labels.factors if max(axes(f)) > 1])
    followed.units.freeze_all([f for f in weight.factors if max(axes(f)) > 1], "the kernel")
    flat = Labels(labels.shape[:2], tuple(f.reshape(f.shape[:2]) for f in labels.factors
                                          if max(axes(f)) <= 1), labels.same & {0, 1})
    split = reshaped(followed.units, flat, (labels.shape[0], groups, labels.shape[1] // groups),
                     operation.name)
    kernels = _kernels(followed, operation, _number(a["weight"]), weight, groups)
    inputs, outputs = (1, 2) if a["transposed"] else (2, 1)
    columns = [f for f in kernels.factors if inputs in axes(f)]
    rows = [f.reshape(1, f.shape[0], f.shape[outputs]) for f in kernels.factors
            if inputs not in axes(f)]
    followed.columns += columns
    followed.made += rows
    labelled = axes_of(kernels)
    read = Labels(tuple(1 if i == outputs else n for i, n in enumerate(kernels.shape)),
                  tuple(columns), kernels.same | {outputs} | ({0} & labelled))
    found = contracted(followed, operation, split, read,
                       "bgi,gio->bgo" if a["transposed"] else "bgi,goi->bgo")
    whole = (shape[0], groups, shape[1] // groups)
    made = Labels((1, *whole[1:]), tuple(rows), frozenset({0}))
    found = followed.units.together([found, made], whole, operation.name)
    found = reshaped(followed.units, found, shape[:2], operation.name)
    if isinstance(a["bias"], Value):
        found = followed.units.together([found, followed.of(_number(a["bias"]))], shape[:2],
                                        operation.name)
    ones = (1,) * (len(shape) - 2)
    followed.give(operation, Labels(shape, tuple(f.reshape(f.shape + ones)
                                                 for f in found.factors), found.same))


def _kernels(followed: Followed, operation: Operation, number: int, weight: Labels,
             groups: int) -> Labels:
    """Return the labels of a convolution's weight as (groups, outputs or inputs, the others).

    The second axis counts the channels of a group, and each group has its own.
    """
    first, second = weight.shape[:2]
    flat = Labels((first, second), tuple(f.reshape(f.shape[:2]) for f in weight.factors
                                         if max(axes(f)) <= 1))
    found = reshaped(followed.units, flat, (groups, first // groups, second), operation.name)
    name = followed.run.parameters.get(number)
    if groups == 1 or second == 1 or name is None:
        return found
    if (number, groups) not in followed.grouped:
        followed.grouped[number, groups] = followed.stand(name, 1, (groups, 1, second), groups)
    if len([key for key in followed.grouped if key[0] == number]) > 1:
        followed.stop(operation, [followed.grouped[key] for key in followed.grouped
                                  if key[0] == number])
    followed.read += weight.factors  # those of a group's own channels stand for the second axis
    return Labels(found.shape, (*(f for f in found.factors if axes(f) != (2,)),
                                followed.grouped[number, groups]), found.same)


def _attention(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    """Attend: query and key are multiplied, and a softmax of that and value; heads are repeated."""
    query, key, value = (followed.of(_number(a[name])) for name in ("query", "key", "value"))
    ndim = len(query.shape)
    key, value = (_repeated(labels, query.shape[-3]) if ndim > 3 else labels
                  for labels in (key, value))
    front = "abdefg"[:ndim - 2]
    scores = contracted(followed, operation, query, key, f"{front}ic,{front}jc->{front}ij",
                        attending=True)
    for name in ("attn_mask", "attn_bias"):
        if isinstance(a.get(name), Value):
            scores = followed.units.together([scores, followed.of(_number(a[name]))],
                                             scores.shape, operation.name)
    scores = followed.units.summed(scores, [ndim - 1], drop=False)
    followed.give(operation, contracted(followed, operation, scores, value,
                                        f"{front}ij,{front}jo->{front}io"))


def _repeated(labels: Labels, heads: int) -> Labels:
    """Return the labels of keys or values, repeated for the heads that share them."""
    axis = len(labels.shape) - 3
    times = heads // labels.shape[axis]
    if times == 1:
        return labels
    shape = tuple(heads if i == axis else n for i, n in enumerate(labels.shape))
    return Labels(shape, tuple(f.repeat(times, axis) if f.shape[axis] > 1 else f
                               for f in labels.factors), labels.same)


# Norms, sums and pools.

def _reduced(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    number = next(v.number for v in a.values() if isinstance(v, Value))
    labels = followed.of(number)
    dim = a.get("dim", a.get("axis"))
    dims = [dim] if isinstance(dim, int) else dim
    ndim = len(labels.shape)
    over = [_axis(axis, ndim) for axis in dims] if dims else list(range(ndim))
    found = _pooled(followed, labels, over, drop=True)
    for which, gave in enumerate(operation.gave):
        shape, kept = followed.run.shapes[gave], found
        if len(shape) != ndim:
            for axis in sorted(over, reverse=True):
                kept = _dropped(kept, axis)
        followed.give(operation, kept, which)


def _pooled(followed: Followed, labels: Labels, over: Iterable[int], *, drop: bool) -> Labels:
    over = set(over)
    followed.pooled += [f for f in labels.factors if set(axes(f)) & over]
    return followed.units.summed(labels, over, drop=drop)


def _softmax(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    labels = followed.of(_number(a["self"]))
    followed.give(operation, _pooled(followed, labels, [_axis(a["dim"], len(labels.shape))],
                                     drop=False))


def _layer_norm(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    labels = followed.of(_number(a["input"]))
    ndim = len(labels.shape)
    normed = _pooled(followed, labels, range(ndim - len(a["normalized_shape"]), ndim), drop=False)
    learnt = [followed.of(v.number) for v in (a.get("weight"), a.get("bias"))
              if isinstance(v, Value)]
    followed.give(operation, followed.units.together([normed, *learnt], labels.shape,
                                                     operation.name))


def _weight_norm(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    labels = followed.of(_number(a["v"]))
    ndim = len(labels.shape)
    normed = _pooled(followed, labels, set(range(ndim)) - {_axis(a["dim"], ndim)}, drop=False)
    followed.give(operation, followed.units.together(
        [normed, followed.of(_number(a["g"]))], labels.shape, operation.name))


def _batch_norm(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    labels = followed.of(_number(a["input"]))
    normed = _pooled(followed, labels, [i for i in range(len(labels.shape)) if i != 1], drop=False)
    _give_channels(followed, operation, normed, [
        followed.of(v.number) for name, v in a.items() if name != "input" and isinstance(v, Value)
        and len(followed.of(v.number).shape) == 1])


def _group_norm(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    labels = followed.of(_number(a["input"]))
    groups, rest = a["group"], labels.shape[2:]
    split = reshaped(followed.units, labels, (labels.shape[0], groups, labels.shape[1] // groups,
                                              *rest), operation.name)
    normed = _pooled(followed, split, range(2, len(split.shape)), drop=False)
    normed = reshaped(followed.units, normed, labels.shape, operation.name)
    _give_channels(followed, operation, normed, [
        followed.of(v.number) for v in (a.get("weight"), a.get("bias")) if isinstance(v, Value)])


def _give_channels(followed: Followed, operation: Operation, labels: Labels,
                   learnt: list[Labels]) -> None:
    """Give what numbers for each channel, the second axis, are multiplied with and added to."""
    ones = (1,) * (len(labels.shape) - 2)
    wide = [Labels(vector.shape + ones, tuple(f.reshape(f.shape + ones) for f in vector.factors),
                   vector.same) for vector in learnt]
    followed.give(operation, followed.units.together([labels, *wide], labels.shape,
                                                     operation.name))


def _spatial(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    """Pool, resize or pad the last axes, on which no unit may stand."""
    labels = followed.of(next(v.number for v in a.values() if isinstance(v, Value)))
    count = next(int(d) for d in "123" if f"{d}d" in operation.name)
    last = set(range(len(labels.shape) - count, len(labels.shape)))
    followed.stop(operation, [f for f in labels.factors if set(axes(f)) & last])
    kept = tuple(f for f in labels.factors if not set(axes(f)) & last)
    for which, gave in enumerate(operation.gave):
        shape = followed.run.shapes[gave]
        if len(shape) == len(labels.shape):
            followed.give(operation, Labels(shape, kept, labels.same - last), which)


def _gated(followed: Followed, operation: Operation, a: dict[str, Any]) -> None:
    """Multiply one half of an axis by a function of the other."""
    number = _number(a["self"])
    labels = followed.of(number)
    axis = _axis(a["dim"], len(labels.shape))
    half, halves = labels.shape[axis] // 2, []
    for part in (slice(None, half), slice(half, None)):
        _cut(followed, operation, number, axis, part)
        halves.append(followed.labels.pop(operation.gave[0]))
    followed.give(operation, followed.units.together(halves, halves[0].shape, operation.name))


RULES: dict[str, Rule] = {
    **dict.fromkeys(("zeros", "ones", "full", "empty", "scalar_tensor", "fill", "zero",
                     "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like",
                     "full_like", "empty_like", "new_empty_strided", "empty_strided"), _uniform),
    **dict.fromkeys(("arange", "eye", "linspace", "randn", "rand", "randint", "randperm", "normal",
                     "uniform", "rand_like", "randn_like", "tril_indices", "triu_indices"),
                    _drawn),
    **dict.fromkeys(("alias", "clone", "contiguous", "detach", "lift_fresh", "lift",
                     "_to_copy", "view_as_real_copy"), _identity),
    "copy": _copied,
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze",
                     "flatten", "unflatten", "_reshape_copy", "view_copy"), _reshape),
    **dict.fromkeys(("permute", "transpose", "t", "numpy_T", "swapaxes", "swapdims"), _permute),
    "expand": _expand, "slice": _slice, "select": _select,
    **dict.fromkeys(("split", "unsafe_split", "split_with_sizes", "unsafe_split_with_sizes",
                     "chunk", "unsafe_chunk", "unbind", "tensor_split"), _split),
    **dict.fromkeys(("cat", "concat", "stack"), _joined),
    "index": _index, "index_select": _index_select, "embedding": _embedding,
    **dict.fromkeys(("unfold", "diagonal", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
                     "native_channel_shuffle", "rot90", "flip", "roll", "repeat", "tile"), _dense),
    "constant_pad_nd": _padded, "im2col": _unfolded,
    **dict.fromkeys(("sort", "topk", "argsort", "argmax", "argmin", "max", "min", "median", "mode",
                     "kthvalue", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp",
                     "gather"), _along_one),
    **dict.fromkeys(("index_add", "index_copy"), _added_at),
    **dict.fromkeys(("index_put", "_index_put_impl"), _put_at),
    **dict.fromkeys(_LETTERS, _multiplied),
    "linear": _linear, "_grouped_mm": _grouped_product, "convolution": _convolution,
    **dict.fromkeys(("mean", "sum", "amax", "amin", "prod", "norm", "linalg_vector_norm",
                     "logsumexp", "var", "std", "var_mean", "std_mean", "any", "all",
                     "count_nonzero", "nansum"), _reduced),
    **dict.fromkeys(("_softmax", "_log_softmax", "softmax", "log_softmax"), _softmax),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm", "rms_norm"), _layer_norm),
    "native_group_norm": _group_norm, "_weight_norm_interface": _weight_norm,
    **dict.fromkeys((f"{kind}{size}d{more}" for size in "123" for kind, more in (
        ("max_pool", "_with_indices"), ("max_pool", ""), ("avg_pool", ""),
        ("adaptive_avg_pool", ""), ("_adaptive_avg_pool", ""), ("adaptive_max_pool", ""),
        ("upsample_nearest", ""), ("_upsample_nearest_exact", ""), ("upsample_bilinear", ""),
        ("upsample_linear", ""), ("upsample_bicubic", ""), ("upsample_trilinear", ""),
        ("_upsample_bilinear", "_aa"), ("_upsample_bicubic", "_aa"), ("reflection_pad", ""),
        ("replication_pad", ""))), _spatial),
    "glu": _gated,
}
# Rules that leave units out on purpose: what is cut off, overwritten, or a pattern for its shape.
_DROPPING = (_slice, _select, _split, _index, _index_select, _uniform, _drawn, _overwritten,
             _copied)
