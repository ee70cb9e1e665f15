from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.errors import NothingToReshape
from netwright.models import gpt
from netwright.reshape.feedforward import (
    FeedForwardWeights,
    feedforward_weights,
    feedforwards,
    put_block,
    with_blocks,
    write_feedforward,
)
from netwright.stages import call
from tests.reshape.feedforward.models import DENSE, EVERY, built, run, tokens


class OldLayer(nn.Module):
    """A feed-forward layer computed from another network's weights, as plain matrices."""

    def __init__(self, model, layer):
        super().__init__()
        self.weights = deepcopy(FeedForwardWeights(*(
            None if t is None else t.detach().clone() for t in feedforward_weights(model, layer))))
        self.activation = layer.activation

    def forward(self, x):
        return self.weights(x, self.activation)


def compute_by_hand(weights, x, activation):
    hidden = x @ weights.up.T + (0 if weights.up_bias is None else weights.up_bias)
    if weights.gate is None:
        hidden = activation(hidden)
    else:
        gate = x @ weights.gate.T + (0 if weights.gate_bias is None else weights.gate_bias)
        hidden = activation(gate) * hidden
    return hidden @ weights.down.T + (0 if weights.down_bias is None else weights.down_bias)


# What is found, and that it computes what the formula says.

@pytest.mark.parametrize("watched", [True, False], ids=["one run", "in parts"])
@pytest.mark.parametrize("name", DENSE)
def test_each_layer_is_the_formula_of_its_matrices(name, watched):
    model, x = built(name)
    layers = feedforwards(model, x if watched else None)
    assert len(layers) == (4 if name == "t5" else 2)
    for layer in layers:
        given, gave = [], []
        first, last = model.get_submodule(layer.up), model.get_submodule(layer.down)
        hooks = [
            first.register_forward_hook(lambda _, args, __, given=given: given.append(args[0])),
            last.register_forward_hook(lambda _, __, out, gave=gave: gave.append(out))]
        with torch.no_grad():
            run(model, x)
        for hook in hooks:
            hook.remove()
        weights = feedforward_weights(model, layer)
        assert weights.up.shape == (layer.hidden, layer.dim)
        assert weights.down.shape == (layer.out, layer.hidden)
        assert (layer.gate is None) == (weights.gate is None)
        torch.testing.assert_close(compute_by_hand(weights, given[0], layer.activation), gave[0],
                                   atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_one_run_and_the_parts_show_the_same(name):
    model, x = built(name)
    assert feedforwards(model, x) == feedforwards(model)


def test_a_block_of_experts_is_one_layer():
    model, x = built("mixtral")
    layers = feedforwards(model, x)
    assert [layer.name for layer in layers] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    layer = layers[0]
    assert (layer.experts, layer.dim, layer.hidden, layer.out) == (4, 32, 48, 32)
    assert layer.up is layer.down is layer.gate is None
    with pytest.raises(ValueError, match="4 experts"):
        feedforward_weights(model, layer)


def test_a_list_of_experts_counts_once_and_hides_what_is_in_it():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Sequential(
                nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(3))
            self.router = nn.Linear(8, 3)

        def forward(self, x):
            weights = self.router(x).softmax(-1)
            return sum(w[..., None] * e(x) for w, e in
                       zip(weights.unbind(-1), self.experts, strict=True))

    model = nn.Sequential(nn.Linear(4, 8), Experts())
    for example in (None, torch.randn(2, 4)):
        (layer,) = feedforwards(model, example)
        assert (layer.name, layer.experts, layer.dim, layer.hidden) == ("1", 3, 8, 12)


def test_functions_modules_and_gates_of_a_network_of_ones_own_are_read():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 6)
            self.scale = nn.Parameter(torch.tensor(1.7))
            self.norm = nn.LayerNorm(6)

        def forward(self, x):
            y = self.norm(x)
            g = self.a(y)
            g = g * torch.sigmoid(self.scale * g) + 0.1 * torch.tanh(g)
            return x + self.c(functional.dropout(self.b(y) * g, 0.1, self.training))

    model = nn.Sequential(Own(), Own())
    first, second = feedforwards(model, torch.randn(3, 6))
    assert (first.up, first.gate, first.down, first.whole) == ("0.b", "0.a", "0.c", False)
    h = torch.randn(5, 9)
    torch.testing.assert_close(first.activation(h),
                               h * torch.sigmoid(1.7 * h) + 0.1 * torch.tanh(h))
    assert second.name == "1"


def changed(change):
    """Return a feed-forward layer whose hidden units something else reads as well."""
    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
            self.other = nn.Linear(6, 9)

        def forward(self, x):
            return change(self, x)
    return Changed()


NOT_ONE = {
    "a softmax": lambda m, x: m.down(m.up(x).softmax(-1)),
    "a norm": lambda m, x: m.down(functional.layer_norm(m.up(x), (9,))),
    "no activation": lambda m, x: m.down(m.up(x)),
    "also returned": lambda m, x: (lambda h: (m.down(h), h))(torch.relu(m.up(x))),
    "also summed": lambda m, x: (lambda h: m.down(h) + h.sum())(torch.relu(m.up(x))),
    "used twice": lambda m, x: m.down(torch.relu(m.up(x))) + m.up(x)[..., :6],
    "two inputs": lambda m, x: m.down(torch.relu(m.up(x)) * m.other(2 * x)),
    "two activations": lambda m, x: m.down(torch.relu(m.up(x)) * torch.tanh(m.other(x))),
    "a sum of two": lambda m, x: m.down(torch.relu(m.up(x)) + m.other(x)),
    "another axis": lambda m, x: m.down(torch.relu(m.up(x)).flip(0)),
    "written into": lambda m, x: _write_into(m, x),
}


def _write_into(m, x):
    h, kept = torch.relu(m.up(x)), torch.zeros(len(x), 9)
    kept[:] = h
    return m.down(h) + kept[..., :6]


@pytest.mark.parametrize("change", NOT_ONE.values(), ids=NOT_ONE)
def test_what_is_no_feed_forward_layer_is_not_taken_for_one(change):
    with pytest.raises(NothingToReshape, match="elementwise"):
        feedforwards(changed(change), torch.randn(4, 6))


def test_a_classifier_is_listed_when_asked_for():
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 10))
    with pytest.raises(NothingToReshape, match="square=False"):
        feedforwards(model)
    (layer,) = feedforwards(model, square=False)
    assert (layer.name, layer.dim, layer.hidden, layer.out) == ("", 20, 32, 10)


def test_a_shared_layer_is_named_once():
    mlp = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6))
    assert [layer.name for layer in feedforwards(nn.Sequential(mlp, mlp), torch.randn(2, 6))] == [
        "0"]


def test_the_model_the_random_state_and_the_modes_stay():
    model, x = built("encoder")
    model.layers[0].train()
    state, modes = deepcopy(model.state_dict()), [m.training for m in model.modules()]
    fused = [layer.activation_relu_or_gelu for layer in model.layers]
    before = torch.get_rng_state()
    feedforwards(model, x)
    feedforwards(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.modules()] == modes
    assert [layer.activation_relu_or_gelu for layer in model.layers] == fused
    assert all(torch.equal(a, b) for a, b in
               zip(state.values(), model.state_dict().values(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_network_without_any_says_what_was_looked_for():
    with pytest.raises(NothingToReshape, match="no linear layer's output goes only"):
        feedforwards(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(1, 3, 8, 8))
    with pytest.raises(NothingToReshape, match="example="):
        feedforwards(nn.Linear(3, 3))


# Writing weights.

@pytest.mark.parametrize("name", ["gpt", "bert", "gpt2", "llama"])
def test_weights_that_are_read_and_written_leave_the_outputs(name):
    model, x = built(name)
    changed_model = deepcopy(model)
    for layer in feedforwards(model, x):
        weights = feedforward_weights(changed_model, layer)
        order = torch.randperm(layer.hidden)
        write_feedforward(changed_model, layer, weights.units(order))  # their order is free
    torch.testing.assert_close(call(changed_model, x), call(model, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_a_layer_may_have_other_widths(name):
    model, x = built(name)
    layer = feedforwards(model, x)[0]
    model.get_submodule(layer.up).weight.requires_grad_(False)
    weights = feedforward_weights(model, layer)
    half = weights.units(range(layer.hidden // 2))
    write_feedforward(model, layer, half)
    assert not model.get_submodule(layer.up).weight.requires_grad
    assert feedforwards(model, x)[0].hidden == layer.hidden // 2
    assert call(model, x).isfinite().all()


def test_weights_that_do_not_fit_are_refused():
    model, x = built("llama")
    layer = feedforwards(model, x)[0]
    weights = feedforward_weights(model, layer)
    for wrong, message in [
            (weights._replace(down=weights.down[:, 1:]), "weights.down must be"),
            (weights._replace(gate=None), "must be given where the layer has a gate"),
            (weights._replace(up_bias=torch.zeros(3)), "weights.up_bias must be")]:
        before = deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            write_feedforward(model, layer, wrong)
        assert all(torch.equal(a, b) for a, b in
                   zip(before.values(), model.state_dict().values(), strict=True))


# Putting blocks in.

@pytest.mark.parametrize("name", DENSE)
def test_a_block_that_computes_the_same_leaves_the_outputs(name):
    model, x = built(name)
    expected = run(model, x)
    layers = feedforwards(model, x)
    same = with_blocks(model, {layer: OldLayer(model, layer) for layer in layers})
    assert not same.training
    torch.testing.assert_close(call(same, x), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(NothingToReshape):
        feedforwards(same, x)  # there are no linear layers in the blocks
    torch.testing.assert_close(call(deepcopy(same), x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", DENSE)
def test_what_surrounds_a_layer_stays(name):
    model, x = built(name)
    silenced, layers = deepcopy(model), feedforwards(model, x)
    for layer in layers:
        down = silenced.get_submodule(layer.down)
        for p in down.parameters():
            p.data.zero_()
    swapped = with_blocks(model, {layer: Zeros() for layer in layers})
    run(silenced, x)
    torch.testing.assert_close(call(swapped, x), call(silenced, x))


class Zeros(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def test_the_dropout_that_a_module_ends_in_stays():
    model, x = built("gpt2")
    layer = feedforwards(model, x)[0]
    assert layer.dropout == pytest.approx(0.1)
    ones = nn.Linear(32, 32)
    nn.init.zeros_(ones.weight), nn.init.ones_(ones.bias)
    part = with_blocks(model, {layer: ones}).get_submodule(layer.name).train()
    y = part(torch.zeros(400, 32))
    assert float((y == 0).float().mean()) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("name", ["bert", "encoder", "gpt"])
def test_an_entry_and_an_exit_work_with_gradients_and_keep_nothing(name):
    model, x = built(name)
    layers = feedforwards(model, x)
    dim = layers[0].dim
    torch.manual_seed(0)
    swapped = with_blocks(model, {layer: nn.Linear(dim, dim) for layer in layers})
    call(swapped, x).square().sum().backward()
    assert all(part.keeper.kept is None for part in swapped.modules() if hasattr(part, "keeper"))
    exits = [swapped.get_submodule(layer.down) for layer in layers]
    assert all(part.block.weight.grad.abs().sum() > 0 for part in exits)
    expected = [part.block.weight.grad.clone() for part in exits]
    swapped.zero_grad()
    other = deepcopy(swapped)
    other.load_state_dict(swapped.state_dict())
    rerun = partial(torch.utils.checkpoint.checkpoint, lambda x: call(other, x),
                    use_reentrant=False)
    rerun(x).square().sum().backward()
    for layer, grad in zip(layers, expected, strict=True):
        torch.testing.assert_close(other.get_submodule(layer.down).block.weight.grad, grad)
    assert all(p.grad is None for p in swapped.parameters())


def test_an_exit_without_its_entry_says_so():
    model, _ = built("gpt")
    layer = feedforwards(model)[0]
    swapped = with_blocks(model, {layer: nn.Identity()})
    with pytest.raises(RuntimeError, match="without its entry"):
        swapped.get_submodule(layer.down)(torch.zeros(2, 1))


def test_a_model_that_is_a_feed_forward_layer_becomes_the_block():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)).eval()
    (layer,) = feedforwards(model)
    block = put_block(deepcopy(model), layer, nn.Identity())
    assert isinstance(block, nn.Identity)
    assert not block.training


def test_a_block_of_experts_that_returns_more_is_refused():
    model, x = built("gpt-oss")
    layer = feedforwards(model, x)[0]
    with pytest.raises(ValueError, match="router scores"):
        with_blocks(model, {layer: nn.Identity()})


def test_a_shared_layer_is_replaced_wherever_it_is():
    mlp = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6))
    model = nn.Sequential(mlp, nn.Tanh(), mlp)
    (layer,) = feedforwards(model)
    block = nn.Linear(6, 6)
    swapped = with_blocks(model, {layer: block})
    assert swapped[0] is swapped[2] is block
    assert model[0] is model[2] is mlp


def test_experts_are_replaced_as_a_whole():
    model, x = built("mixtral")
    swapped = with_blocks(model, {layer: nn.Linear(32, 32) for layer in feedforwards(model, x)})
    assert call(swapped, x).shape == call(model, x).shape
    assert not any("experts" in name for name in swapped.state_dict())


def test_autocast_and_other_precisions_are_found_alike():
    for dtype in (torch.float64, torch.bfloat16):
        model = gpt(64, context=8, width=32).to(dtype)
        assert len(feedforwards(model, tokens())) == len(feedforwards(model)) == 2


SPEECH_AND_TEXT = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 20,
                   "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                   "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}


def test_layers_that_run_on_no_tensor_alone_are_found_by_a_run_or_an_example_is_asked_for():
    transformers = pytest.importorskip("transformers")
    translator = transformers.BartModel(transformers.BartConfig(**SPEECH_AND_TEXT))
    assert [layer.down for layer in feedforwards(translator)] == [
        f"{part}.layers.{i}.fc2" for part in ("encoder", "decoder") for i in range(2)]
    writer = transformers.WhisperModel(transformers.WhisperConfig(
        **SPEECH_AND_TEXT, num_mel_bins=4, max_source_positions=8, pad_token_id=0))
    with pytest.raises(ValueError, match=r"example must be .* its part 'encoder\.layers\.0' takes"):
        feedforwards(writer)
    x = {"input_features": torch.randn(1, 4, 16), "decoder_input_ids": tokens()[:1] % 20}
    assert len(feedforwards(writer, x)) == 4
