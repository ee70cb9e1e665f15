from collections.abc import Callable
from typing import Any

from netwright import checks
from netwright.catalogue.facets import method
from netwright.formal.learners.lens import ParaLens

__all__ = ["Learner", "identity"]


@method("formal", papers=["003-062"])
class Learner:
    """A function that learns: what it does, how it changes, and what it asks of its input.

    implement: P x A -> B;  update: P x A x B -> P;  request: P x A x B -> A.

    Shown an input a and the output b that was wanted, it gets new parameters, and it tells whoever
    made a which input it would rather have had. That is all that one before it needs, so learners
    compose: `f >> g` shows f the request of g as its wanted output, and `f @ g` learns on pairs.
    `params` are the parameters now, any nesting of tensors; those of `f >> g` and `f @ g` are the
    pair of both, so that composing in another order nests the same leaves another way.

    Nothing is changed: `step` returns the learner that has learned.

    `f >> g` is linear in the number of learners, however they are nested: each runs once forwards
    and once back. A learner is a `ParaLens` whose ways back bear the types of its ways forward,
    with a point of P; `Learner.of(params, lens)` makes one of such a lens.

    Args:
        params: the parameters now, any nesting of tensors.
        implement: what it does, of (p, a).
        update: how it changes, of (p, a, b).
        request: what it asks of its input, of (p, a, b).

    Paper: Fong, Spivak, Tuyéras, 2019, Backprop as Functor: A compositional perspective on
    supervised learning.

    >>> halve = Learner(4.0, lambda p, a: p * a, lambda p, a, b: p + (b - p * a) / a,
    ...                 lambda p, a, b: b / p)
    >>> both = halve >> halve
    >>> both(1.0), both.step(1.0, 32.0).params
    (16.0, (8.0, 8.0))
    """

    def __init__(self, params: Any, implement: Callable[[Any, Any], Any],
                 update: Callable[[Any, Any, Any], Any],
                 request: Callable[[Any, Any, Any], Any]) -> None:
        self.params = params
        self.lens = ParaLens(implement, lambda p, a, b: (update(p, a, b), request(p, a, b)))

    @classmethod
    def of(cls, params: Any, lens: ParaLens) -> "Learner":
        """Return the learner of a lens whose `put` gives new parameters and a wanted input."""
        made = cls.__new__(cls)
        made.params, made.lens = params, lens
        return made

    def implement(self, params: Any, a: Any) -> Any:
        """Return the output for input `a`."""
        return self.lens.get(params, a)

    def update(self, params: Any, a: Any, b: Any) -> Any:
        """Return the parameters after input `a` where `b` was wanted."""
        return self.lens.put(params, a, b)[0]

    def request(self, params: Any, a: Any, b: Any) -> Any:
        """Return the input that it would rather have had than `a` where `b` was wanted."""
        return self.lens.put(params, a, b)[1]

    def __call__(self, a: Any) -> Any:
        """Return the output for input `a` with the parameters that it has."""
        return self.implement(self.params, a)

    def step(self, a: Any, b: Any) -> "Learner":
        """Return the learner that has been shown input `a` and wanted output `b`."""
        return Learner.of(self.update(self.params, a, b), self.lens)

    def __rshift__(self, other: "Learner") -> "Learner":
        if not isinstance(other, Learner):
            return NotImplemented
        return Learner.of((self.params, other.params), self.lens >> other.lens)

    def __matmul__(self, other: "Learner") -> "Learner":
        if not isinstance(other, Learner):
            return NotImplemented
        return Learner.of((self.params, other.params), self.lens @ other.lens)


@checks.annotated
def identity() -> Learner:
    """Return the learner that has nothing to learn: b = a, and the input it asks for is b.

    >>> identity().request((), 1.0, 2.0)
    2.0
    """
    return Learner((), lambda p, a: a, lambda p, a, b: p, lambda p, a, b: b)
