"""Sublayers, channels and heads taken out within one budget, each time the cheapest."""

import numpy as np
import pytest
import torch
from torch import nn

import netwright as nw
from netwright.errors import NothingToReshape
from netwright.models import gpt
from netwright.reshape import changes, prune_structures, prune_sublayers, remove_units
from netwright.reshape.pruning.prune_structures import _norms
from netwright.signals import apply, tensors
from tests.reshape.pruning.families import NETWORKS, PRETRAINED


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


def removed_of(model):
    (change,) = changes(model)
    return {name: said["ids"] for name, said in change.decision["units"]["removed"].items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_units_in_the_order_of_their_norms_change_nothing(name):
    model, x = NETWORKS[name][0](), NETWORKS[name][1]()
    found = nw.axes(model, x)
    weights = dict(model.named_parameters())
    groups = [g for g in found.groups if g.kind in ("hidden", "head") and g.permutable]
    assert groups
    for group in groups:
        norms = _norms(weights, group)
        assert norms.min() > 0
        order = np.argsort(norms) if group.blocks == 1 else np.arange(group.count)
        ordered = found.permute(group, order)
        assert torch.allclose(outputs(ordered, x), outputs(model, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("split", [(0, 1, 0), (0, 0, 1)])
def test_every_step_is_the_cheapest_of_all_that_could_be_taken(split):
    model, x = small()
    reference = outputs(model, x)

    def loss(new, _):
        return (new - reference).square().mean()

    found = nw.axes(model, x)
    kind = "hidden" if split[1] else "head"
    groups = [g for g in found.groups if g.kind == kind]
    assert len(groups) == 3
    orders = {g.name: np.argsort(_norms(dict(model.named_parameters()), g), kind="stable")
              for g in groups}
    step = {g.name: 1 if kind == "head" else g.count // 16 for g in groups}
    gone: dict[str, list[int]] = {}
    cut = groups[0].parameters * step[groups[0].name]
    for _ in range(4):
        costs = {}
        for g in groups:
            taken = len(gone.get(g.name, []))
            if taken + step[g.name] < g.count:
                more = {**gone, g.name: orders[g.name][:taken + step[g.name]].tolist()}
                costs[g.name] = float(loss(outputs(found.remove_all(more), x), x))
        best = min(costs, key=costs.__getitem__)
        gone[best] = orders[best][:len(gone.get(best, [])) + step[best]].tolist()
    smaller = prune_structures(model, x, (4 * cut + 1) / size(model), split=split, loss=loss)
    assert removed_of(smaller) == {name: sorted(ids) for name, ids in gone.items()}
    assert size(smaller) == size(model) - 4 * cut


def test_sublayers_alone_are_those_that_prune_sublayers_takes():
    model, x = small(depth=4)
    smaller = prune_structures(model, x, 0.4, split=(1, 0, 0))
    whole = prune_sublayers(model, x, remove=len(smaller.removed_sublayers))
    assert smaller.removed_sublayers == whole.removed_sublayers
    assert torch.equal(outputs(smaller, x), outputs(whole, x))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("uniform", [False, True])
def test_the_budget_is_kept_to_a_block_of_channels(name, uniform, tmp_path):
    model, x = NETWORKS[name][0](), NETWORKS[name][1]()
    smaller = prune_structures(model, x, 0.15, uniform=uniform)
    groups = [g for g in nw.axes(model, x).groups if g.kind == "hidden" and g.removable]
    block = [g.parameters * max(1, g.count // 16) for g in groups]
    missing = 0.15 * size(model) - (size(model) - size(smaller))
    assert 0 <= missing <= (sum(block) if uniform else max(block))
    nw.save(smaller, tmp_path)
    again = nw.load(tmp_path, None if hasattr(model, "config") else NETWORKS[name][0]())
    assert torch.equal(outputs(again, x), outputs(smaller, x))
    if uniform and name in PRETRAINED:
        plain = type(model).from_pretrained(tmp_path)
        assert torch.equal(outputs(plain, x), outputs(smaller, x))


def test_query_heads_stay_as_many_for_each_key_head_and_a_cache_does_what_a_full_pass_does():
    model, x = NETWORKS["llama"][0](), NETWORKS["llama"][1]()
    smaller = prune_structures(model, x, 0.25, split=(0, 0, 1))
    removed = removed_of(smaller)
    assert removed
    for layer in smaller.model.layers:
        attention = layer.self_attn
        assert attention.q_proj.out_features == 2 * attention.k_proj.out_features
    tokens = torch.arange(8)[None]
    written = smaller.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0,
                               attention_mask=torch.ones_like(tokens))
    full = smaller(written[:, :-1], use_cache=False).logits[:, 7:].argmax(-1)
    assert torch.equal(written[:, 8:], full)


def test_it_beats_structures_drawn_at_random():
    model, x = small(depth=4)
    smaller = prune_structures(model, x, 0.2, split=(0, 1, 0))
    error = (outputs(smaller, x) - outputs(model, x)).norm()
    generator = torch.Generator().manual_seed(0)
    units = {g.name: g.count for g in nw.axes(model, x).groups if g.kind == "hidden"}
    count = sum(len(ids) for ids in removed_of(smaller).values()) // len(units)
    drawn = [(outputs(remove_units(model, x, {
        name: torch.randperm(of, generator=generator)[:count].tolist()
        for name, of in units.items()}), x) - outputs(model, x)).norm() for _ in range(5)]
    assert error < min(drawn)


@pytest.mark.parametrize(("change", "message"), [
    ({"ratio": 0.0}, "ratio must be"), ({"ratio": 1.0}, "ratio must be"),
    ({"channels": 0}, "channels must be"), ({"split": (1, 2)}, "split must be"),
    ({"split": (0, 0, 0)}, "split must be"), ({"split": (1, -1, 1)}, "split must be"),
    ({"split": (1, 0, 0), "uniform": True}, "split must be"),
    ({"loss": lambda new, x: new.mean() * float("nan")}, "finite outputs"),
])
def test_what_makes_no_sense_is_refused(change, message):
    model, x = small()
    with pytest.raises(ValueError, match=message):
        prune_structures(model, x, **change)


def test_a_model_with_nothing_to_take_says_so():
    with pytest.raises(NothingToReshape, match="it has none of them"):
        prune_structures(nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4))
    model, x = small()
    with pytest.raises(NothingToReshape, match="the smallest has"):
        prune_structures(model, x, 1e-3)
