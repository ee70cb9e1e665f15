from collections.abc import Callable
from functools import partial
from typing import Any

from netwright import checks
from netwright.catalogue.facets import method

__all__ = ["Lens", "ParaLens"]


@checks.annotated
class Lens:
    """Two functions that belong together: one forwards, one back.

    get: A -> B;  put: A x B' -> A'.

    `f >> g` is f, then g: its `put` is g's and then f's. `f @ g` is both beside each other, on
    pairs. `run(a)` returns b and the function that takes b' to a', so that what `get` has found
    need not be found again for `put`; where it is not given it is made of the two.

    >>> first = Lens(lambda pair: pair[0], lambda pair, b: (b, pair[1]))
    >>> inner = first >> first
    >>> inner.get(((1, 2), 3)), inner.put(((1, 2), 3), 9)
    (1, ((9, 2), 3))
    """

    def __init__(self, get: Callable[[Any], Any],
                 put: Callable[[Any, Any], Any] | None = None, *,
                 run: Callable[[Any], tuple[Any, Callable[[Any], Any]]] | None = None) -> None:
        self.get = get
        self.put, self.run = _both(get, put, run)

    def __rshift__(self, other: "Lens") -> "Lens":
        if not isinstance(other, Lens):
            return NotImplemented

        def run(a: Any) -> tuple[Any, Callable[[Any], Any]]:
            b, back = self.run(a)
            c, back_from_c = other.run(b)
            return c, lambda c: back(back_from_c(c))

        return Lens(lambda a: other.get(self.get(a)), run=run)

    def __matmul__(self, other: "Lens") -> "Lens":
        if not isinstance(other, Lens):
            return NotImplemented

        def get(a: Any) -> Any:
            left, right = pair("a", a)
            return self.get(left), other.get(right)

        def run(a: Any) -> tuple[Any, Callable[[Any], Any]]:
            left, right = pair("a", a)
            (b, back), (d, back_from_d) = self.run(left), other.run(right)

            def put(change: Any) -> Any:
                left, right = pair("b", change)
                return back(left), back_from_d(right)

            return (b, d), put

        return Lens(get, run=run)


@method("formal", papers=["003-145"])
class ParaLens:
    """A lens with parameters: what a layer is, a loss, and a whole network.

    get: P x A -> B;  put: P x A x B' -> P' x A'.

    The parameters of `f >> g` and of `f @ g` are the pair of both. `run(p, a)` returns b and the
    function that takes b' to (p', a').

    Args:
        get: the way forward, of (p, a).
        put: the way back, of (p, a, b').
        run: both in one, in their place, so that they share what they compute.

    Paper: Cruttwell, Gavranović, Ghani, Wilson, Zanasi, 2022, Categorical Foundations of
    Gradient-Based Learning.

    >>> scale = ParaLens(lambda p, a: p * a, lambda p, a, db: (a * db, p * db))
    >>> twice = scale >> scale
    >>> twice.get((2.0, 3.0), 5.0), twice.put((2.0, 3.0), 5.0, 1.0)
    (30.0, ((15.0, 10.0), 6.0))
    """

    def __init__(self, get: Callable[[Any, Any], Any],
                 put: Callable[[Any, Any, Any], tuple[Any, Any]] | None = None, *,
                 run: Callable[[Any, Any], tuple[Any, Callable[[Any], tuple[Any, Any]]]] | None
                 = None) -> None:
        self.get = get
        self.put, self.run = _both(get, put, run)

    def __rshift__(self, other: "ParaLens") -> "ParaLens":
        if not isinstance(other, ParaLens):
            return NotImplemented

        def get(params: Any, a: Any) -> Any:
            p, q = pair("params", params)
            return other.get(q, self.get(p, a))

        def run(params: Any, a: Any) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
            p, q = pair("params", params)
            b, back = self.run(p, a)
            c, back_from_c = other.run(q, b)

            def put(c: Any) -> tuple[Any, Any]:
                dq, db = back_from_c(c)
                dp, da = back(db)
                return (dp, dq), da

            return c, put

        return ParaLens(get, run=run)

    def __matmul__(self, other: "ParaLens") -> "ParaLens":
        if not isinstance(other, ParaLens):
            return NotImplemented

        def get(params: Any, a: Any) -> Any:
            (p, q), (left, right) = pair("params", params), pair("a", a)
            return self.get(p, left), other.get(q, right)

        def run(params: Any, a: Any) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
            (p, q), (left, right) = pair("params", params), pair("a", a)
            (b, back), (d, back_from_d) = self.run(p, left), other.run(q, right)

            def put(change: Any) -> tuple[Any, Any]:
                left, right = pair("b", change)
                (dp, da), (dq, dc) = back(left), back_from_d(right)
                return (dp, dq), (da, dc)

            return (b, d), put

        return ParaLens(get, run=run)


def pair(name: str, value: Any) -> tuple[Any, Any]:
    """Return `value` as the pair that it must be.

    >>> pair("a", [1, 2])
    (1, 2)
    """
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        got = f"{len(value)} parts" if isinstance(value, (tuple, list)) else type(value).__name__
        raise ValueError(f"{name} must be a pair, one part for each of the two that are composed, "
                         f"got {got}; where three are composed it is ((a, b), c)")
    return value[0], value[1]


def _both(get: Callable[..., Any], put: Callable[..., Any] | None,
          run: Callable[..., Any] | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return `put` and `run`, of which one is made of the other where it is missing."""
    if put is None and run is None:
        raise ValueError("put is missing: a lens needs put or run; give put=")
    if run is None:
        def from_put(*place: Any) -> tuple[Any, Callable[[Any], Any]]:
            assert put is not None
            return get(*place), partial(put, *place)
        run = from_put
    if put is None:
        def from_run(*arguments: Any) -> Any:
            *place, change = arguments
            return run(*place)[1](change)
        put = from_run
    return put, run
