from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from netwright.catalogue.facets import method
from netwright.formal.learners.category import Learner
from netwright.formal.learners.lens import pair

__all__ = ["Game", "as_game"]


@dataclass(frozen=True)
class Game:
    """An open game: players that see x, play y, get r in return and pass s on.

    play: S x X -> Y;  coplay: S x X x R -> S';  respond: S x X x (Y -> R) -> S.

    `respond(strategy, x, outcome)` is the best response to a strategy where `outcome` says what
    every play would be answered with; a strategy that is its own best response is an equilibrium.
    In `f >> g` the outcome that f sees is what g passes on; in `f @ g` each sees the other's play
    as fixed. The strategies of both are pairs.

    Paper: Ghani, Hedges, Winschel, Zahn, 2018, Compositional game theory.
    """

    play: Callable[[Any, Any], Any]
    coplay: Callable[[Any, Any, Any], Any]
    respond: Callable[[Any, Any, Callable[[Any], Any]], Any]

    def is_best_response(self, strategy: Any, response: Any, x: Any,
                         outcome: Callable[[Any], Any]) -> bool:
        """Return whether `response` is the best response to `strategy`, all numbers equal."""
        best = tree_leaves(self.respond(strategy, x, outcome))
        given = tree_leaves(response)
        return len(best) == len(given) and all(map(_equal, best, given))

    def is_equilibrium(self, strategy: Any, x: Any, outcome: Callable[[Any], Any]) -> bool:
        """Return whether nobody would rather play another strategy."""
        return self.is_best_response(strategy, strategy, x, outcome)

    def __rshift__(self, other: "Game") -> "Game":
        if not isinstance(other, Game):
            return NotImplemented

        def play(strategies: Any, x: Any) -> Any:
            p, q = pair("strategy", strategies)
            return other.play(q, self.play(p, x))

        def coplay(strategies: Any, x: Any, r: Any) -> Any:
            p, q = pair("strategy", strategies)
            return self.coplay(p, x, other.coplay(q, self.play(p, x), r))

        def respond(strategies: Any, x: Any, outcome: Callable[[Any], Any]) -> Any:
            p, q = pair("strategy", strategies)
            return (self.respond(p, x, lambda y: other.coplay(q, y, outcome(other.play(q, y)))),
                    other.respond(q, self.play(p, x), outcome))

        return Game(play, coplay, respond)

    def __matmul__(self, other: "Game") -> "Game":
        if not isinstance(other, Game):
            return NotImplemented

        def play(strategies: Any, x: Any) -> Any:
            (p, q), (left, right) = pair("strategy", strategies), pair("x", x)
            return self.play(p, left), other.play(q, right)

        def coplay(strategies: Any, x: Any, r: Any) -> Any:
            (p, q), (left, right) = pair("strategy", strategies), pair("x", x)
            first, second = pair("r", r)
            return self.coplay(p, left, first), other.coplay(q, right, second)

        def respond(strategies: Any, x: Any, outcome: Callable[[Any], Any]) -> Any:
            (p, q), (left, right) = pair("strategy", strategies), pair("x", x)
            first, second = self.play(p, left), other.play(q, right)
            return (self.respond(p, left, lambda y: pair("r", outcome((y, second)))[0]),
                    other.respond(q, right, lambda y: pair("r", outcome((first, y)))[1]))

        return Game(play, coplay, respond)


@method("companion", papers=["002-149"])
def as_game(learner: Learner) -> Game:
    """Return the open game whose players set a learner's parameters.

    play = implement;  coplay = request;  respond(p, x, k) = update(p, x, k(implement(p, x))).

    The outcome k says which output would have been wanted in place of each. A best response is one
    step of learning, and an equilibrium is where nothing more is learnt. `as_game(f >> g)` is
    `as_game(f) >> as_game(g)`, and likewise for `@`. The strategies begin at `learner.params`.

    Paper: Hedges, 2019, From open learners to open games.

    >>> double = Learner(2.0, lambda p, a: p * a, lambda p, a, b: b / a, lambda p, a, b: b / p)
    >>> game = as_game(double)
    >>> game.respond(double.params, 3.0, lambda y: 12.0)
    4.0
    >>> game.is_equilibrium(4.0, 3.0, lambda y: 12.0)
    True
    """
    def respond(p: Any, x: Any, outcome: Callable[[Any], Any]) -> Any:
        return learner.update(p, x, outcome(learner.implement(p, x)))

    return Game(learner.implement, learner.request, respond)


def _equal(a: Any, b: Any) -> bool:
    both = isinstance(a, Tensor) and isinstance(b, Tensor)
    return torch.equal(a, b) if both else bool(a == b)
