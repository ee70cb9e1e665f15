from copy import deepcopy

import pytest
import torch
from torch import nn

from netwright.errors import NothingToReshape, UnknownName
from netwright.models import gpt
from netwright.reshape import share_feedforward
from netwright.reshape.feedforward import feedforward_weights, feedforwards
from netwright.stages import call
from tests.reshape.feedforward.models import DENSE, built, run, tokens


def parameters(model):
    return sum(p.numel() for p in model.parameters())


ONE_STACK = [name for name in DENSE if name not in ("t5", "transformer")]


@pytest.mark.parametrize("name", ONE_STACK)
def test_every_layer_computes_with_the_first_ones_weights(name):
    model, x = built(name)
    before = deepcopy(model.state_dict())
    shared = share_feedforward(model, example=x, start="first")
    by_hand, layers = deepcopy(model), feedforwards(model, x)
    for layer in layers[1:]:
        for source, target in zip((layers[0].up, layers[0].down, layers[0].gate),
                                  (layer.up, layer.down, layer.gate), strict=True):
            if source:
                by_hand.get_submodule(target).load_state_dict(
                    by_hand.get_submodule(source).state_dict())
    torch.testing.assert_close(run(shared, x), run(by_hand, x))
    assert not torch.allclose(run(shared, x), run(model, x))
    one = sum(t.numel() for t in feedforward_weights(model, layers[0]) if t is not None)
    assert parameters(model) - parameters(shared) == one * (len(layers) - 1)
    assert all(torch.equal(a, b) for a, b in
               zip(before.values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["transformer", "t5"])
def test_the_decoder_loses_its_layers(name):
    model, x = built(name)
    shared = share_feedforward(model, example=x, start="first")
    by_hand = deepcopy(model)
    layers = feedforwards(model, x)
    for layer in layers:
        if "decoder" in layer.down:
            for p in by_hand.get_submodule(layer.down).parameters():
                nn.init.zeros_(p)
        elif layer is not layers[0]:
            for source, target in zip((layers[0].up, layers[0].down, layers[0].gate),
                                      (layer.up, layer.down, layer.gate), strict=True):
                if source:
                    by_hand.get_submodule(target).load_state_dict(
                        by_hand.get_submodule(source).state_dict())
    torch.testing.assert_close(run(shared, x), run(by_hand, x))
    kept = share_feedforward(model, example=x, drop_decoder=False)
    assert [layer.down for layer in feedforwards(kept, x)][1:] == [
        layer.down for layer in layers if "decoder" in layer.down]


def test_a_norm_before_a_dropped_layer_goes_with_it_and_one_after_it_stays():
    model, x = built("t5")
    shared = share_feedforward(model, example=x)
    assert isinstance(shared.decoder.block[0].layer[2].layer_norm, nn.Identity)
    assert not isinstance(shared.encoder.block[0].layer[1].layer_norm, nn.Identity)
    model, x = built("transformer")
    assert isinstance(share_feedforward(model, example=x).decoder.layers[0].norm3, nn.LayerNorm)


@pytest.mark.parametrize("name", [*ONE_STACK, "transformer", "t5"])
def test_the_budget_is_kept(name):
    model, x = built(name)
    wide = share_feedforward(model, "budget")
    layer = feedforwards(model, x)[0]
    unit = 2 + (layer.gate is not None)
    assert 0 <= parameters(model) - parameters(wide) < unit * (layer.dim + 1)
    assert call(wide, x).isfinite().all()


def test_more_units_that_begin_silent_change_nothing():
    for name in ("gpt", "gpt2", "llama"):
        model, x = built(name)
        narrow = share_feedforward(model, start="first")
        wide = share_feedforward(model, 300, start="first")
        torch.testing.assert_close(run(wide, x), run(narrow, x))


def test_the_shared_layer_gathers_the_gradients_of_all_layers():
    model, x = built("gpt")
    shared = share_feedforward(model, start="first")
    by_hand = deepcopy(model)
    for source, target in ((by_hand[1].mlp_in, by_hand[2].mlp_in),
                           (by_hand[1].mlp_out, by_hand[2].mlp_out)):
        target.load_state_dict(source.state_dict())
    shared(x).square().sum().backward()
    by_hand(x).square().sum().backward()
    torch.testing.assert_close(shared[1].mlp_in.weight.grad,
                               by_hand[1].mlp_in.weight.grad + by_hand[2].mlp_in.weight.grad)
    copy = deepcopy(shared)
    assert copy[1].mlp_in is copy[2].mlp_in
    other = share_feedforward(model)
    other.load_state_dict(shared.state_dict())
    assert torch.equal(other(x), shared(x))


def test_new_weights_follow_the_generator_and_leave_the_global_state():
    model = gpt(64, context=8, width=32)
    state = torch.get_rng_state()
    one, two, other = (share_feedforward(model, generator=torch.Generator().manual_seed(s))
                       for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one[1].mlp_in.weight, two[1].mlp_in.weight)
    assert not torch.equal(one[1].mlp_in.weight, other[1].mlp_in.weight)
    assert one[1].mlp_in.weight.abs().max() <= 32 ** -0.5
    assert one.double()(tokens()).dtype == torch.float64


def test_what_does_not_fit_is_refused():
    model, x = built("gpt")
    with pytest.raises(UnknownName, match="start"):
        share_feedforward(model, start="last")
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        share_feedforward(model, 0)
    with pytest.raises(ValueError, match="hidden must be at least 128, got"):
        share_feedforward(model, 8, start="first")
    with pytest.raises(NothingToReshape):
        share_feedforward(nn.Linear(3, 3))
    model[2].mlp_in, model[2].mlp_out = nn.Linear(32, 8), nn.Linear(8, 32)
    with pytest.raises(ValueError, match="must be alike"):
        share_feedforward(model, example=x)
    with pytest.raises(ValueError, match="4 experts"):
        share_feedforward(built("mixtral")[0])
