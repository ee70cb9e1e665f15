from typing import Any

from netwright.catalogue.facets import method
from netwright.formal.learners.category import Learner
from netwright.formal.learners.lens import Lens, ParaLens

__all__ = ["SymmetricLens", "learner_to_symmetric", "lens_to_learner"]


@method("companion", papers=["002-111"])
def lens_to_learner(lens: Lens) -> Learner:
    """Return the learner of an asymmetric lens: it has nothing to learn, and requests are puts.

    implement = get;  update = (), the only parameter there is;  request(a, b) = put(a, b).

    It preserves composition: that of `f >> g` behaves as that of f, then that of g.

    Paper: Fong, Johnson, 2019, Lenses and Learners.

    >>> first = Lens(lambda pair: pair[0], lambda pair, b: (b, pair[1]))
    >>> chosen = lens_to_learner(first)
    >>> chosen((1, 2)), chosen.request((), (1, 2), 5)
    (1, (5, 2))
    """
    def run(params: Any, a: Any) -> Any:
        b, back = lens.run(a)
        return b, lambda wanted: (params, back(wanted))

    return Learner.of((), ParaLens(lambda _, a: lens.get(a), run=run))


class SymmetricLens:
    """A span of lenses: what A and B share stands in a head S, from which both can be read.

    left: S -> A;  right: S -> B.

    `forward(s, a)` puts a in on the left and reads b on the right; `backward(s, b)` the other way.
    Both return the new head first. `f >> g` has heads (s, t) that agree on what is between them:
    what one side changes there is put in on the other side. The lenses need not keep the lens
    laws, and the right one of a learner does not, so after a way backward what is between is read
    off f again.

    >>> first = Lens(lambda pair: pair[0], lambda pair, a: (a, pair[1]))
    >>> second = Lens(lambda pair: pair[1], lambda pair, b: (pair[0], b))
    >>> SymmetricLens(first, second).forward((1, 2), 7)
    ((7, 2), 2)
    """

    def __init__(self, left: Lens, right: Lens) -> None:
        self.left, self.right = left, right

    def forward(self, head: Any, a: Any) -> tuple[Any, Any]:
        """Return the head after `a` was put in on the left, and what is read on the right."""
        head = self.left.put(head, a)
        return head, self.right.get(head)

    def backward(self, head: Any, b: Any) -> tuple[Any, Any]:
        """Return the head after `b` was put in on the right, and what is read on the left."""
        head = self.right.put(head, b)
        return head, self.left.get(head)

    def __rshift__(self, other: "SymmetricLens") -> "SymmetricLens":
        if not isinstance(other, SymmetricLens):
            return NotImplemented

        def put_left(heads: Any, a: Any) -> Any:
            s, b = self.forward(heads[0], a)
            return s, other.left.put(heads[1], b)

        def put_right(heads: Any, c: Any) -> Any:
            t, b = other.backward(heads[1], c)
            s = self.right.put(heads[0], b)
            return s, other.left.put(t, self.right.get(s))

        return SymmetricLens(Lens(lambda heads: self.left.get(heads[0]), put_left),
                             Lens(lambda heads: other.right.get(heads[1]), put_right))


@method("companion", papers=["002-111"])
def learner_to_symmetric(learner: Learner) -> SymmetricLens:
    """Return the symmetric lens of a learner; its heads are (parameters, input).

    left: get(p, a) = a, put((p, a), a') = (p, a')
    right: get(p, a) = implement(p, a), put((p, a), b) = (update(p, a, b), request(p, a, b)).

    The left one keeps p whatever is put in: a constant complement. Composition is preserved: the
    heads (p, a), (q, b) of a composite are those with b = implement(p, a).

    Paper: Fong, Johnson, 2019, Lenses and Learners.

    >>> double = Learner(2.0, lambda p, a: p * a, lambda p, a, b: b / a, lambda p, a, b: b / p)
    >>> both_ways = learner_to_symmetric(double)
    >>> both_ways.forward((2.0, 0.0), 3.0), both_ways.backward((2.0, 3.0), 12.0)
    (((2.0, 3.0), 6.0), ((4.0, 6.0), 6.0))
    """
    lens = learner.lens
    left = Lens(lambda head: head[1], lambda head, a: (head[0], a))
    right = Lens(lambda head: lens.get(*head), lambda head, b: lens.put(*head, b))
    return SymmetricLens(left, right)
