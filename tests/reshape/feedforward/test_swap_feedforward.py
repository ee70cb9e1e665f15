from copy import deepcopy

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.blocks.feedforward import GLU, FeedForward
from netwright.errors import Diverged, NothingToReshape, UnknownName
from netwright.models import gpt
from netwright.reshape import swap_feedforward
from netwright.reshape.feedforward import feedforwards, unswap_feedforward
from netwright.stages import call
from tests.reshape.feedforward.models import EVERY, built, tokens

INPUTS = torch.Generator().manual_seed(3)


def make(dim, hidden):
    return GLU(dim, 2 * hidden // 3)


def same_weights(before, model):
    return all(torch.equal(a, b) for a, b in
               zip(before.values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", EVERY)
def test_swapping_and_swapping_back_returns_the_same_outputs(name):
    model, x = built(name)
    before, expected = deepcopy(model.state_dict()), call(model, x)
    swapped = swap_feedforward(model, make, x)
    assert len(swapped.swapped_feedforward) == len(feedforwards(model, x))
    assert not torch.allclose(call(swapped, x), expected)
    assert all(isinstance(block, GLU) for block in blocks_of(swapped))
    back = unswap_feedforward(swapped, model)
    assert torch.equal(call(back, x), expected)
    assert same_weights(before, model)
    assert same_weights(before, back)
    assert list(back.state_dict()) == list(before)


def blocks_of(swapped):
    """Return the outermost gated blocks."""
    return [m for m in swapped.modules() if isinstance(m, GLU)]


@pytest.mark.parametrize("name", ["gpt", "bert", "gpt2"])
def test_only_the_named_layers_are_swapped_and_put_back(name):
    model, x = built(name)
    first, second = feedforwards(model, x)
    swapped = swap_feedforward(model, make, x, layers=[second.down])
    (swap,) = swapped.swapped_feedforward
    assert swap.layer == second
    assert first in feedforwards(swapped, x)
    both = swap_feedforward(model, make, x)
    one_back = unswap_feedforward(both, model, layers=[first.name])
    assert [s.layer for s in one_back.swapped_feedforward] == [second]
    assert len(blocks_of(one_back)) == 1


def test_a_block_of_the_same_kind_learns_to_be_the_layer():
    """Held-out outputs come near the model's, which undistilled blocks' do not."""
    model, _ = built("encoder")
    for layer in model.layers:
        nn.init.normal_(layer.linear1.weight, std=0.15)
        nn.init.normal_(layer.linear2.weight, std=0.15)
    calibration = torch.randn(64, 12, 16, generator=INPUTS)
    fresh = torch.randn(8, 12, 16, generator=INPUTS)
    torch.manual_seed(0)
    undistilled = swap_feedforward(model, FeedForward, calibration)
    distilled = swap_feedforward(model, FeedForward, calibration=calibration, steps=120)
    errors = [swap.error for swap in distilled.swapped_feedforward]
    assert max(errors) < 0.12  # at most 0.08 over 3 seeds
    assert all(swap.error is None for swap in undistilled.swapped_feedforward)
    with torch.no_grad():
        far, near = ((call(m, fresh) - call(model, fresh)).square().mean()
                     for m in (undistilled, distilled))
    assert near < far / 10  # a nineteenth at most, over 3 seeds


def test_the_record_of_a_layer_is_what_it_takes_and_gives():
    from netwright.reshape.feedforward.swap_feedforward import record
    for name in ("gpt", "bert", "encoder", "mixtral", "llama"):
        model, x = built(name)
        layer = feedforwards(model, x)[1]
        ((taken, given, _),) = record(model, [layer], [x])[layer]
        seen = []
        part = model.get_submodule(layer.down or layer.name)
        handle = part.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        call(model, x)
        handle.remove()
        assert taken.shape == (*given.shape[:-1], layer.dim)
        if seen:  # PyTorch's fused path calls no linear layer
            torch.testing.assert_close(given, seen[0])


def test_a_layer_whose_outputs_are_tiny_is_learnt_as_well():
    """As those of a fresh model of Hugging Face are, where a block's own scale is 1000 times."""
    model, _ = built("llama")
    x = torch.randint(64, (32, 10), generator=torch.Generator().manual_seed(4))
    torch.manual_seed(0)
    swapped = swap_feedforward(model, make, calibration=x, steps=60, layers=["model.layers.0.mlp"])
    assert swapped.swapped_feedforward[0].error < 0.5  # at most 0.18 over 3 seeds


class Scaled(FeedForward):
    """A block that does not end in a linear layer."""

    def forward(self, x):
        return 1.0 * super().forward(x)


def test_the_last_linear_layer_is_at_its_least_squares():
    from netwright.reshape.feedforward.swap_feedforward import record
    model, x = built("gpt")
    x = torch.randint(64, (64, 8), generator=torch.Generator().manual_seed(5))
    torch.manual_seed(0)
    swapped = swap_feedforward(model, lambda dim, hidden: FeedForward(dim, 12), calibration=x,
                               steps=3, layers=["1"])
    block = swapped[1].mlp_out.block
    layer = swapped.swapped_feedforward[0].layer
    ((taken, given, _),) = record(model, [layer], [x])[layer]
    with torch.no_grad():
        h = nn.Sequential(*list(block)[:-1])(taken).flatten(0, 1).double()
        h = torch.cat([h, torch.ones(len(h), 1)], 1)
        best = torch.linalg.lstsq(h, given.flatten(0, 1).double()).solution
        torch.testing.assert_close(block(taken).flatten(0, 1), (h @ best).float(), atol=1e-4,
                                   rtol=1e-3)
    torch.manual_seed(0)
    other = swap_feedforward(model, lambda dim, hidden: Scaled(dim, 12), calibration=x, steps=3,
                             layers=["1"])
    assert other.swapped_feedforward[0].error > swapped.swapped_feedforward[0].error


def test_distillation_follows_its_generator_and_the_error_is_what_it_says():
    model, x = built("gpt")

    def swap(seed):
        torch.manual_seed(0)
        return swap_feedforward(model, FeedForward, calibration=[x, x.flip(0)], steps=5,
                                layers=["1"], generator=torch.Generator().manual_seed(seed))
    first, again = swap(0), swap(0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(),
                                                 strict=True))
    from netwright.reshape.feedforward.swap_feedforward import record
    (layer,) = (s.layer for s in first.swapped_feedforward)
    block = first.get_submodule(layer.down).block
    samples = record(model, [layer], [x, x.flip(0)])[layer]
    taken, given = (torch.cat(t) for t in list(zip(*samples, strict=True))[:2])
    expected = (block(taken) - given).square().mean() / given.flatten(0, 1).var(
        0, unbiased=False).mean()
    assert first.swapped_feedforward[0].error == pytest.approx(expected.item(), rel=1e-4)
    assert all(p.grad is None for p in first.parameters())


def test_the_swapped_network_learns_and_its_state_loads():
    model, x = built("bert")
    swapped = nw.reshape.swap_feedforward(model.train(), make, x)
    assert swapped.training
    call(swapped, x).sum().backward()
    assert all(p.grad is not None for block in blocks_of(swapped) for p in block.parameters())
    other = swap_feedforward(model, make, x)
    other.load_state_dict(swapped.state_dict())
    assert torch.equal(call(other.eval(), x), call(swapped.eval(), x))


def test_blocks_take_the_precision_of_the_layer():
    for dtype in (torch.float64, torch.bfloat16):
        model = gpt(64, context=8, width=32).to(dtype)
        swapped = swap_feedforward(model, make, calibration=tokens(), steps=2)
        assert {p.dtype for p in swapped.parameters()} == {dtype}
        assert call(swapped, tokens()).dtype == dtype


def test_a_swapped_network_can_be_swapped_again_and_back_twice():
    model, x = built("gpt")
    once = swap_feedforward(model, make, x)
    twice = swap_feedforward(once, lambda dim, hidden: FeedForward(dim, hidden), x)
    back = unswap_feedforward(twice, once)
    assert torch.equal(call(back, x), call(once, x))
    assert torch.equal(call(unswap_feedforward(back, model), x), call(model, x))


# What bad input gets.

BAD = {
    "no module": (lambda dim, hidden: None, {}, TypeError, "must return a module"),
    "output": (lambda dim, hidden: nn.Linear(dim, dim + 1), {}, ValueError, r"must give \(2, 7"),
    "two outputs": (lambda dim, hidden: nn.LSTM(dim, dim), {}, ValueError, "got tuple"),
    "input": (lambda dim, hidden: nn.Linear(dim + 1, dim), {}, ValueError, "must take"),
    "name": (make, {"layers": ["3"]}, UnknownName, "no feed-forward layer is called '3'"),
    "one name": (make, {"layers": "1"}, ValueError, "layers must be a list of a string"),
    "steps": (make, {"steps": 0}, ValueError, "steps must be at least 1"),
    "calibration": (make, {"calibration": []}, ValueError, "calibration must hold"),
    "rate": (make, {"calibration": tokens(), "lr": 1e30}, Diverged, "lower lr"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused_and_nothing_changes(case):
    wrong, options, error, message = case
    model, x = built("gpt")
    before = deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        swap_feedforward(model, wrong, x, **options)
    assert same_weights(before, model)
    assert len(feedforwards(model, x)) == 2


def test_a_network_without_feed_forward_layers_is_refused():
    with pytest.raises(NothingToReshape, match="no feed-forward layer"):
        swap_feedforward(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), make)


def test_experts_that_return_more_than_a_tensor_are_refused():
    model, x = built("gpt-oss")
    with pytest.raises(ValueError, match="one tensor"):
        swap_feedforward(model, make, x)


def test_only_what_was_swapped_can_be_put_back_and_only_from_where_it_was():
    model, x = built("gpt")
    with pytest.raises(ValueError, match="does not say what was swapped"):
        unswap_feedforward(model, model)
    swapped = swap_feedforward(model, make, x)
    with pytest.raises(ValueError, match="given to swap_feedforward"):
        unswap_feedforward(swapped, nn.Linear(2, 2))
    with pytest.raises(UnknownName):
        unswap_feedforward(swapped, model, layers=["7"])


def test_blocks_of_narrow_models_are_distilled_in_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    x = torch.randn(64, 12, 16, generator=torch.Generator().manual_seed(1))
    errors = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        swapped = swap_feedforward(
            deepcopy(model).to(dtype), FeedForward, calibration=x.to(dtype), steps=100,
            generator=torch.Generator().manual_seed(2), progress=False)
        assert {p.dtype for p in swapped.parameters()} == {dtype}
        errors.append(swapped.swapped_feedforward[0].error)
    assert errors[1] == pytest.approx(errors[0], rel=0.05, abs=1e-3)
    assert errors[2] == pytest.approx(errors[0], rel=0.2, abs=1e-3)
