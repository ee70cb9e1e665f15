"""By which power of a factor each weight of a unit goes when the unit is made larger by it."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from netwright.anatomy.following import Followed, arguments
from netwright.anatomy.labels import axes
from netwright.anatomy.run import Operation, Value

# A tensor, and the axes on which the unit stands.
Key = tuple[int, tuple[int, ...]]
_HOMOGENEOUS = ("t", "relu", "leaky_relu", "neg", "abs", "clone", "_prelu_kernel", "prelu")
_POWERS = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0, "square": 2.0}
_MOVING = ("alias", "detach", "_to_copy", "lift", "contiguous", "max_pool", "avg_pool", "upsample",
           "sum", "mean", "amax", "amin", "cat", "stack", "view", "reshape", "permute",
           "transpose", "expand", "slice", "select", "split", "unbind", "index", "squeeze", "copy",
           "repeat", "flip", "roll", "chunk", "pixel", "embedding", "im2col", "unfold", "pad")
_PRODUCTS = ("mm", "bmm", "mv", "dot", "linear", "convolution", "_grouped_mm", "addmm", "baddbmm",
             "addmv", "addbmm")
_BIASES = ("self", "bias")


class Scales:
    """Which units of a network can be scaled, and how."""

    def __init__(self, followed: Followed) -> None:
        self.followed = followed
        self.standing: dict[int, list[tuple[tuple[int, ...], frozenset[int]]]] = {
            number: [(axes(f), frozenset(np.unique(followed.units.find(f)).tolist()))
                     for f in labels.factors] for number, labels in followed.labels.items()}
        self.using: dict[int, set[int]] = defaultdict(set)
        for i, operation in enumerate(followed.run.operations):
            for number in (*operation.taken, *operation.gave):
                for _, roots in self.standing.get(number, ()):
                    for root in roots:
                        self.using[root].add(i)

    def exponents(self, unit: Sequence[int], makers: Sequence[tuple[str, int]]
                  ) -> dict[tuple[str, int], float]:
        """Return the power for each weight, by its name and axis, that a unit stands on.

        `makers` are the weights that make the unit, one of which at least goes with a power of 1.
        Nothing is returned where there is no way to scale the unit.
        """
        system = _System(self, frozenset(unit))
        for i in sorted(set.union(*(self.using.get(u, set()) for u in unit))):
            system.follow(self.followed.run.operations[i])
        return system.solution(makers)


class _System:
    """Linear equations between the powers with which tensors go."""

    def __init__(self, scales: Scales, unit: frozenset[int]) -> None:
        self.scales, self.unit, self.run = scales, unit, scales.followed.run
        self.index: dict[Key, int] = {}
        self.rows: list[dict[int, float]] = []

    def keys(self, *numbers: int) -> list[Key]:
        """Return where the unit stands in tensors."""
        found = [(number, where) for number in dict.fromkeys(numbers)
                 for where, roots in self.scales.standing.get(number, ())
                 if not self.unit.isdisjoint(roots)]
        for key in found:
            self.index.setdefault(key, len(self.index))
        return found

    def zero(self, **weighted: list[Key]) -> None:
        """Let the powers of `plus`, less those of `minus`, be zero."""
        row: dict[int, float] = defaultdict(float)
        for side, sign in (("plus", 1.0), ("minus", -1.0)):
            for key in weighted.get(side, ()):
                row[self.index[key]] += sign
        self.rows.append(row)

    def still(self, keys: list[Key]) -> None:
        """Let each power be zero."""
        for key in keys:
            self.zero(plus=[key])

    def alike(self, keys: list[Key]) -> None:
        """Let all powers be the same."""
        for key in keys[1:]:
            self.zero(plus=keys[:1], minus=[key])

    def follow(self, operation: Operation) -> None:
        """Add what holds for an operation."""
        name, a = operation.name, arguments(operation)
        taken, gave = self.keys(*operation.taken), self.keys(*operation.gave)
        if name in ("t", "transpose", "permute") and len(taken) == len(gave) > 1:
            self._turned(operation, taken, gave, a)
        elif name in _PRODUCTS or "scaled_dot_product" in name:
            self._product(operation, a)
        elif any(len([k for k in (*taken, *gave) if k[0] == n]) > 1
                 for n in (*operation.taken, *operation.gave)):
            self.still([*taken, *gave])
        elif "norm" in name and "linalg" not in name and name != "norm":
            self._norm(operation, a, gave)
        elif name == "mul":
            self._plain(a, taken, gave, lambda: self.zero(plus=[k for n in operation.taken
                                                                for k in self.keys(n)],
                                                          minus=gave))
        elif name == "div" and a.get("rounding_mode") is None:
            over = self.keys(a["other"].number) if isinstance(a["other"], Value) else []
            self._plain(a, taken, gave, lambda: self.zero(
                plus=self.keys(a["self"].number), minus=[*over, *gave]))
        elif name in _POWERS or name == "pow":
            self._power(a, taken, gave, _POWERS.get(name, a.get("exponent")))
        elif name in ("add", "sub") and all(self.keys(n) for n in operation.taken) and (
                len(operation.taken) == 2):
            self.alike([*taken, *gave])
        elif name in _HOMOGENEOUS:
            self.still(taken[1:])
            self.alike([*taken[:1], *gave])
        elif any(part in name for part in _MOVING) and self._whole(operation, gave):
            self.alike([*taken, *gave])
        else:
            self.still([*taken, *gave])

    def _whole(self, operation: Operation, gave: list[Key]) -> bool:
        """Return whether the unit goes on, and is not added up with others."""
        summed = operation.name in ("sum", "mean", "amax", "amin")
        return bool(gave) or not summed

    def _turned(self, operation: Operation, taken: list[Key], gave: list[Key],
                a: dict[str, Any]) -> None:
        for key, other in zip(taken, gave[::-1] if len(taken) == 2 else gave, strict=True):
            self.alike([key, other])

    def _plain(self, a: dict[str, Any], taken: list[Key], gave: list[Key], rule: Any) -> None:
        """Apply a rule for products where what comes out is the unit's."""
        if len(gave) == 1:
            rule()
        else:
            self.still([*taken, *gave])

    def _power(self, a: dict[str, Any], taken: list[Key], gave: list[Key], power: Any) -> None:
        if not isinstance(power, (int, float)) or len(taken) != 1 or len(gave) != 1:
            self.still([*taken, *gave])
            return
        row = {self.index[gave[0]]: 1.0, self.index[taken[0]]: -float(power)}
        self.rows.append(row)

    def _norm(self, operation: Operation, a: dict[str, Any], gave: list[Key]) -> None:
        """Let what is normalised stay, and what is learned of the norm go with its output."""
        learned = [self.keys(a[name].number) for name in ("weight", "bias")
                   if isinstance(a.get(name), Value)]
        out = [key for key in gave if key[0] == operation.gave[0]]
        others = {k for n in operation.taken for k in self.keys(n)} - {
            k for keys in learned for k in keys}
        self.still([*others, *(k for k in gave if k not in out)])
        if learned and all(len(keys) == 1 for keys in learned) and len(out) == 1:
            self.alike([*out, *(k for keys in learned for k in keys)])
        else:
            self.still([*out, *(k for keys in learned for k in keys)])

    def _product(self, operation: Operation, a: dict[str, Any]) -> None:
        """Let a unit that is summed over cancel, and one that is not go with what comes out."""
        attending = "scaled_dot_product" in operation.name
        bias = [] if attending else [k for name in _BIASES if name != "self" or
                                     operation.name.startswith(("add", "badd"))
                                     if isinstance(a.get(name), Value)
                                     for k in self.keys(a[name].number)]
        sides = [k for n in operation.taken for k in self.keys(n) if k not in bias]
        out = self.keys(operation.gave[0])
        if attending and out:  # the values alone
            values = self.keys(a["value"].number)
            self.still([k for k in sides if k not in values])
            self.alike([*values, *out])
        elif len(sides) == len(set(sides)) and len(out) <= 1 and (len(sides) <= 2):
            self.zero(plus=sides, minus=out)
            self.alike([*out, *bias])
        else:
            self.still([*sides, *out, *bias])

    def solution(self, makers: Sequence[tuple[str, int]]) -> dict[tuple[str, int], float]:
        """Return powers that satisfy all equations, as few of which as can be are not zero."""
        run = self.run
        named = {key: (name, key[1][0]) for number, name in [*run.parameters.items(),
                                                            *run.buffers.items()]
                 for key in self.keys(number) if len(key[1]) == 1}
        matrix = np.zeros((len(self.rows), len(self.index)))
        for i, row in enumerate(self.rows):
            for column, value in row.items():
                matrix[i, column] = value
        for maker in makers:
            wanted = next((key for key, name in named.items() if name == maker), None)
            if wanted is None:
                continue
            found = _solved(matrix, {self.index[wanted]: 1.0})
            if found is None:
                continue
            fixed = {self.index[wanted]: 1.0}
            for key in named:
                if self.index[key] not in fixed:
                    tried = _solved(matrix, {**fixed, self.index[key]: 0.0})
                    if tried is not None:
                        found, fixed = tried, {**fixed, self.index[key]: 0.0}
            return {name: round(float(found[self.index[key]]), 6) for key, name in named.items()}
        return {}


def _solved(matrix: np.ndarray, fixed: dict[int, float]) -> np.ndarray | None:
    """Return a solution of matrix x = 0 with some entries given, None where there is none."""
    rest = [column for column in range(matrix.shape[1]) if column not in fixed]
    target = -sum((matrix[:, column] * value for column, value in fixed.items()),
                  np.zeros(len(matrix)))
    part, *_ = np.linalg.lstsq(matrix[:, rest], target, rcond=None)
    if len(matrix) and not np.allclose(matrix[:, rest] @ part, target, atol=1e-8):
        return None
    whole = np.zeros(matrix.shape[1])
    whole[rest] = part
    for column, value in fixed.items():
        whole[column] = value
    return whole
