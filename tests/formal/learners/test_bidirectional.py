"""Asymmetric lenses embed in learners, and learners in symmetric lenses: composition is kept."""

import random

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from netwright.formal.learners import (
    Lens,
    SymmetricLens,
    learner,
    learner_to_symmetric,
    lens_to_learner,
)

FIRST = Lens(lambda s: s[0], lambda s, b: (b, s[1]))
SECOND = Lens(lambda s: s[1], lambda s, b: (s[0], b))
SUM = Lens(lambda s: s[0] + s[1], lambda s, b: (b - s[1], s[1]))  # well-behaved
CLUMSY = Lens(lambda s: s % 10, lambda s, b: s + 7 * b + 1)  # keeps none of the laws


def trees(seed):
    """Random nested pairs of whole numbers."""
    draw = random.Random(seed)

    def number():
        return draw.randrange(-99, 99)
    return ((number(), number()), (number(), number())), number()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("f", "g"), [(FIRST, SUM), (SECOND, FIRST), (SECOND >> SUM, CLUMSY)])
def test_a_composite_lens_is_the_composite_of_the_learners(f, g, seed):
    a, wanted = trees(seed)
    one, other = lens_to_learner(f >> g), lens_to_learner(f) >> lens_to_learner(g)
    assert one(a) == other(a)
    assert one.request((), a, wanted) == other.request(((), ()), a, wanted)
    assert tree_leaves(one.update((), a, wanted)) == []
    assert tree_leaves(other.update(((), ()), a, wanted)) == []


def test_the_identity_and_lenses_beside_each_other_are_kept():
    nothing = lens_to_learner(Lens(lambda a: a, lambda a, b: b))
    assert (nothing(3), nothing.request((), 3, 5)) == (3, 5)
    a, b = ((1, 2), (3, 4)), (8, 9)
    one, other = lens_to_learner(FIRST @ SUM), lens_to_learner(FIRST) @ lens_to_learner(SUM)
    assert one(a) == other(a)
    assert one.request((), a, b) == other.request(((), ()), a, b)


def test_it_is_faithful():
    a, b = (1, 2), 9
    seen = {repr((net(a), net.request((), a, b))) for net in map(lens_to_learner,
                                                                 (FIRST, SECOND, SUM))}
    assert len(seen) == 3


def walk(lens, head, moves):
    seen = []
    for way, value in moves:
        head, found = getattr(lens, way)(head, value)
        seen.append(found)
    return head, seen


def test_a_composite_learner_is_the_composite_of_the_symmetric_lenses():
    def layer(inputs, outputs):
        return learner(nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh()).double())

    f, g = layer(4, 5), layer(5, 3)
    a = torch.randn(2, 4).double()
    one = learner_to_symmetric(f >> g)
    other = learner_to_symmetric(f) >> learner_to_symmetric(g)
    moves = [("forward", torch.randn(2, 4).double()) if random.Random(i).random() < 0.5 else
             ("backward", torch.randn(2, 3).double()) for i in range(12)]
    (params, last), ours = walk(one, ((f.params, g.params), a), moves)
    ((p, x), (q, between)), theirs = walk(other, ((f.params, a), (g.params, f(a))), moves)
    for mine, yours in zip(tree_leaves([params, last, ours]), tree_leaves([(p, q), x, theirs]),
                           strict=True):
        torch.testing.assert_close(mine, yours)
    torch.testing.assert_close(between, f.implement(p, x))


def test_the_left_leg_of_a_learner_keeps_its_parameters_and_the_laws():
    net = learner(nn.Linear(4, 3))
    left = learner_to_symmetric(net).left
    head, a, b = (net.params, torch.randn(2, 4)), torch.randn(2, 4), torch.randn(2, 4)
    assert left.put(head, left.get(head)) == head
    assert left.get(left.put(head, a)) is a
    assert left.put(left.put(head, a), b)[1] is b
    assert left.put(head, a)[0] is net.params


def test_errors():
    with pytest.raises(TypeError, match="unsupported operand"):
        SymmetricLens(FIRST, SECOND) >> FIRST
