from copy import deepcopy

import pytest
import torch
from torch import nn

from netwright.errors import NothingToReshape, UnknownName
from netwright.reshape import find_bricks, keep_bricks
from netwright.reshape.feedforward import feedforwards
from tests.reshape.feedforward.models import built, run


def grouped(seed=0):
    """Return a network of 3 groups of 5 units, each of which one input switches, and that input."""
    draw = torch.Generator().manual_seed(seed)
    group = torch.randperm(15, generator=draw) % 3
    model = nn.Sequential(nn.Linear(3, 15), nn.ReLU(), nn.Linear(15, 4))
    with torch.no_grad():
        model[0].weight.copy_(0.05 * torch.randn(15, 3, generator=draw)
                              + nn.functional.one_hot(group, 3))
        model[0].bias.copy_(0.1 * torch.randn(15, generator=draw))
    return model, group, torch.randn(400, 3, generator=draw)


@pytest.mark.parametrize("seed", range(4))
def test_units_that_are_active_together_are_a_brick(seed):
    model, group, x = grouped(seed)
    (found,) = find_bricks(model, x, bricks=3)
    assert sorted(tuple(group[units].tolist()) for units in found.units) == [
        (0,) * 5, (1,) * 5, (2,) * 5]


def test_units_without_a_structure_do_not_become_those_groups():
    model, group, _ = grouped()
    torch.manual_seed(0)
    nn.init.normal_(model[0].weight)
    (found,) = find_bricks(model, torch.randn(400, 3), bricks=3)
    assert any(len(set(group[units].tolist())) > 1 for units in found.units)


@pytest.mark.parametrize("name", ["gpt", "gpt of GLU", "encoder", "bert", "gpt2", "llama", "vit"])
def test_kept_bricks_compute_what_they_did_with_the_others_silent(name):
    model, x = built(name)
    before = deepcopy(model.state_dict())
    found = find_bricks(model, x, bricks=4)
    assert [entry.layer for entry in found] == feedforwards(model, x)
    keep = [[i for i in range(len(entry.units)) if i != 1] for entry in found]
    part = keep_bricks(model, found, keep)
    handles = []
    for layer, units in found:
        mask = torch.ones(layer.hidden)
        mask[units[1]] = 0
        handles.append(model.get_submodule(layer.down).register_forward_pre_hook(
            lambda _, args, mask=mask: (args[0] * mask,)))
    expected = run(model, x)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(run(part, x), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(run(part, x), run(model, x), atol=1e-6)
    assert [layer.hidden for layer in feedforwards(part, x)] == [
        entry.layer.hidden - len(entry.units[1]) for entry in found]
    assert all(torch.equal(a, b) for a, b in
               zip(before.values(), model.state_dict().values(), strict=True))


def test_all_bricks_are_the_whole_network_and_every_unit_is_in_one():
    model, x = built("llama")
    found = find_bricks(model, [x, x.flip(0)], bricks=5)
    for entry in found:
        assert torch.equal(torch.cat(entry.units).sort().values, torch.arange(entry.layer.hidden))
    whole = keep_bricks(model, found, [range(len(entry.units)) for entry in found])
    assert torch.equal(run(whole, x), run(model, x))
    again = find_bricks(model, [x, x.flip(0)], bricks=5)
    assert all(torch.equal(a, b) for one, two in zip(found, again, strict=True)
               for a, b in zip(one.units, two.units, strict=True))


def test_named_layers_alone_are_cut_and_units_that_never_change_are_somewhere():
    model, x = built("gpt")
    with torch.no_grad():
        model[2].mlp_in.weight[:3] = 0
    (found,) = find_bricks(model, x, bricks=4, layers=["2"])
    assert found.layer.down == "2.mlp_out"
    assert len(torch.cat(found.units)) == found.layer.hidden
    part = keep_bricks(model, [found], [[0]])
    assert part[1].mlp_in.out_features == model[1].mlp_in.out_features
    assert find_bricks(model, x, bricks=1)[0].units[0].tolist() == list(range(128))


def test_what_does_not_fit_is_refused():
    model, x = built("gpt")
    with pytest.raises(ValueError, match=r"bricks must be between 1 and 128, got .* has 128 "):
        find_bricks(model, x, bricks=129)
    with pytest.raises(ValueError, match="calibration must be given"):
        find_bricks(model, None)
    with pytest.raises(UnknownName):
        find_bricks(model, x, layers=["9"])
    with pytest.raises(NothingToReshape):
        find_bricks(nn.Linear(3, 3), torch.randn(2, 3))
    with pytest.raises(NothingToReshape, match="experts"):
        find_bricks(*built("mixtral"))
    found = find_bricks(model, x, bricks=3)
    for keep, message in [([[0]], "an entry for each of the 2"), ([[0], []], "some of the bricks"),
                          ([[0], [3]], "bricks 0 to 2")]:
        with pytest.raises(ValueError, match=message):
            keep_bricks(model, found, keep)
    broken = deepcopy(model)
    nn.init.constant_(broken[1].mlp_in.bias, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        find_bricks(broken, x)
