"""Learners as open games: composing the learners is composing the games."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from netwright.formal.learners import as_game, learner


def layer(inputs, outputs):
    return learner(nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh()).double(), rate=0.2)


def outcomes(width):
    """Answers to a play: a fixed wish, and one that depends on the play."""
    wish = torch.randn(2, width).double()
    return [lambda y: wish, lambda y: y.flip(1) + wish]


def assert_same_game(one, other, strategies, x, r, outcome):
    for ours, theirs in ((one.play(strategies, x), other.play(strategies, x)),
                         (one.coplay(strategies, x, r), other.coplay(strategies, x, r)),
                         (one.respond(strategies, x, outcome),
                          other.respond(strategies, x, outcome))):
        for mine, yours in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
            torch.testing.assert_close(mine, yours)


@pytest.mark.parametrize("answer", [0, 1])
def test_the_game_of_a_composite_is_the_composite_of_the_games(answer):
    f, g, h = layer(4, 5), layer(5, 6), layer(6, 3)
    x, r = torch.randn(2, 4).double(), torch.randn(2, 3).double()
    chain = f >> g >> h
    games = as_game(f) >> as_game(g) >> as_game(h)
    assert_same_game(as_game(chain), games, chain.params, x, r, outcomes(3)[answer])


@pytest.mark.parametrize("answer", [0, 1])
def test_the_game_of_two_beside_each_other_is_their_games_beside_each_other(answer):
    f, g = layer(4, 5), layer(2, 3)
    x, r = ((torch.randn(2, 4).double(), torch.randn(2, 2).double()),
            (torch.randn(2, 5).double(), torch.randn(2, 3).double()))
    first, second = outcomes(5)[answer], outcomes(3)[answer]

    def outcome(y):
        return first(y[0]) + y[1].sum(), second(y[1]) - y[0].sum()  # each depends on both plays

    both = f @ g
    assert_same_game(as_game(both), as_game(f) @ as_game(g), both.params, x, r, outcome)


def test_a_best_response_is_a_step_of_gradient_descent():
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    net = learner(network[:2]) >> learner(network[2])
    x, wish = torch.randn(2, 4).double(), torch.randn(2, 3).double()
    response = as_game(net).respond(net.params, x, lambda y: wish)
    torch.optim.SGD(network.parameters(), 0.1)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    ((network(x) - wish).square().sum() / 2).backward()
    optimizer.step()
    for ours, theirs in zip(tree_leaves(response), network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach())


def test_equilibria_are_where_nothing_more_is_learnt():
    f = layer(4, 3)
    game, x = as_game(f), torch.randn(2, 4).double()
    assert game.is_equilibrium(f.params, x, lambda y: y)
    assert not game.is_equilibrium(f.params, x, lambda y: y + 1)
    after = f.update(f.params, x, f(x) + 1)
    assert game.is_best_response(f.params, after, x, lambda y: y + 1)
    assert not game.is_best_response(f.params, after, x, lambda y: y)
    assert not game.is_best_response(f.params, {}, x, lambda y: y)


def test_errors():
    game = as_game(layer(4, 3))
    for composed in (lambda: game >> 3, lambda: game @ 3):
        with pytest.raises(TypeError, match="unsupported operand"):
            composed()
    with pytest.raises(ValueError, match="x must be a pair"):
        (game @ game).play((1, 2), torch.zeros(3))
