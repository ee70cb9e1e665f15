"""Sublayers chosen once for all by their single costs, exactly at a given size."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import netwright as nw
from netwright.errors import NothingToReshape
from netwright.models import gpt
from netwright.reshape import prune_additive, prune_sublayers
from netwright.reshape.pruning import sublayers, without_sublayers
from netwright.reshape.pruning.prune_additive import cheapest
from netwright.signals import apply, tensors
from tests.reshape.pruning.families import NETWORKS


def outputs(model, x):
    with torch.no_grad():
        return tensors(apply(model.eval(), x))[0]


def size(model):
    return sum(p.numel() for p in model.parameters())


def small(depth=3):
    torch.manual_seed(0)
    model = gpt(64, context=10, width=16, depth=depth, heads=4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    torch.manual_seed(1)
    return model.eval(), torch.randint(64, (4, 10))


@pytest.mark.parametrize("seed", range(6))
def test_the_set_is_the_cheapest_of_all_sets(seed):
    draw = np.random.default_rng(seed)
    costs, sizes = draw.random(10).tolist(), draw.integers(1, 30, 10).tolist()
    least = int(draw.integers(1, sum(sizes)))
    sets = [set(chosen) for k in range(11) for chosen in itertools.combinations(range(10), k)]
    able = [chosen for chosen in sets if sum(sizes[i] for i in chosen) >= least]
    best = min(able, key=lambda chosen: sum(costs[i] for i in chosen))
    assert sum(costs[i] for i in cheapest(costs, sizes, least)) == pytest.approx(
        sum(costs[i] for i in best))


def test_many_layers_of_few_sizes_take_no_time():
    costs = torch.rand(200, generator=torch.Generator().manual_seed(0)).tolist()
    sizes = [50_331_648, 135_266_304] * 100
    chosen = cheapest(costs, sizes, sum(sizes) // 2)
    assert sum(sizes[i] for i in chosen) >= sum(sizes) // 2
    assert len(chosen) < 200


def test_the_choice_is_that_of_least_summed_squares_measured_one_by_one():
    model, x = small()
    reference = outputs(model, x)
    names = sublayers(model, x)
    alone = {name: without_sublayers(model, x, [name]) for name in names}
    costs = {name: float((outputs(one, x) - reference).square().sum(-1).mean())
             for name, one in alone.items()}
    sizes = {name: size(model) - size(one) for name, one in alone.items()}
    smaller = prune_additive(model, x, 0.4)
    able = [chosen for k in range(len(names) + 1) for chosen in itertools.combinations(names, k)
            if sum(sizes[name] for name in chosen) >= 0.4 * size(model)]
    best = min(able, key=lambda chosen: sum(costs[name] for name in chosen))
    assert set(smaller.removed_sublayers) == set(best)
    assert size(smaller) == size(model) - sum(sizes[name] for name in best)
    assert torch.equal(outputs(smaller, x), outputs(without_sublayers(model, x, list(best)), x))


def test_where_one_is_enough_it_is_the_one_that_prune_sublayers_takes_first():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, h):
            return h + self.last(torch.relu(self.first(h)))

    torch.manual_seed(0)
    model, x = nn.Sequential(*(Branch() for _ in range(5))), torch.randn(20, 8)

    def squared(old, new):
        return (old - new).square().sum(-1)

    first = prune_sublayers(model, x, remove=1, distance=squared)
    assert prune_additive(model, x, 0.01).removed_sublayers == first.removed_sublayers
    assert prune_additive(model, x, 0.2).removed_sublayers == first.removed_sublayers


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit", "own"])
def test_it_is_saved_and_built_again(name, tmp_path):
    model, x = NETWORKS[name][0](), NETWORKS[name][1]()
    smaller = prune_additive(model, x, 0.1)
    assert size(smaller) <= 0.9 * size(model)
    nw.save(smaller, tmp_path)
    again = nw.load(tmp_path, None if hasattr(model, "config") else NETWORKS[name][0]())
    assert torch.equal(outputs(again, x), outputs(smaller, x))


def test_too_much_and_nothing_are_refused():
    model, x = small()
    with pytest.raises(NothingToReshape, match="all sublayers that can go have"):
        prune_additive(model, x, 0.99)
    with pytest.raises(NothingToReshape, match="has no sublayer"):
        prune_additive(nn.Sequential(nn.Linear(4, 4)), torch.randn(5, 4))
    with pytest.raises(ValueError, match="ratio must be"):
        prune_additive(model, x, 1.0)
    with pytest.raises(ValueError, match="distance"):
        prune_additive(model, x, 0.2, distance="cosine")
