from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from netwright.blocks.mixing import MLPMixer, RaftBlock, ResMLP, TokenMixing
from netwright.errors import NothingToReshape
from netwright.reshape import interpolate_mixer

MODELS = {
    "mixer": partial(MLPMixer, 2, (8, 12), 3, patch=4, width=8, depth=2),
    "res_mlp": partial(ResMLP, 2, (8, 12), 3, patch=4, width=8, depth=2, init_scale=1.0),
    "raft": partial(MLPMixer, 2, (8, 12), 3, patch=4, width=8, depth=2,
                    block=lambda _, dim: RaftBlock(2, 3, dim)),
    "held": lambda: nn.Sequential(nn.Identity(), MODELS["mixer"]())}


@pytest.mark.parametrize("name", MODELS)
def test_the_result_is_of_the_new_size_and_the_model_is_left_alone(name):
    model = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(5, 2, 8, 12)
    y = model(x)
    wide = interpolate_mixer(model, (16, 20))
    assert wide(torch.randn(5, 2, 16, 20)).shape == (5, 3)
    assert torch.equal(model(x), y)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert {key.replace("token_mixing.mixing.", "token_mixing."): value.shape
            for key, value in wide.state_dict().items()} == {
                key: value.shape for key, value in before.items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_size_that_it_had_gives_the_model_back(name):
    model, x = MODELS[name](), torch.randn(5, 2, 8, 12)
    assert torch.equal(interpolate_mixer(model, (8, 12))(x), model(x))
    back = interpolate_mixer(interpolate_mixer(model, 16), (8, 12))
    assert torch.equal(back(x), model(x))
    assert back.state_dict().keys() == model.state_dict().keys()
    twice = interpolate_mixer(interpolate_mixer(model, 40), 16)
    x = torch.randn(5, 2, 16, 16)
    assert torch.equal(twice(x), interpolate_mixer(model, 16)(x))


def test_it_interpolates_what_the_token_mixing_takes_and_gives():
    model = MLPMixer(1, (4, 6), 3, patch=2, width=5, depth=1).double()
    wide = interpolate_mixer(model, (8, 4))
    x = torch.randn(2, 8, 5, dtype=torch.double)

    def resized(x, old, new):
        image = x.transpose(1, 2).reshape(2, 5, *old)
        return interpolate(image, new, mode="bicubic").flatten(2).transpose(1, 2)

    block = model[1]
    mixed = resized(block.token_mixing(resized(block.token_norm(x), (4, 2), (2, 3))),
                    (2, 3), (4, 2))
    u = x + mixed
    expected = u + block.feedforward(block.channel_norm(u))
    torch.testing.assert_close(wide[1](x), expected, rtol=0, atol=1e-13)


def test_what_is_alike_everywhere_is_mixed_as_before():
    """Interpolation keeps constants, so that images of one colour are classified as before."""
    model = MODELS["mixer"]().double()
    for name, parameter in model.named_parameters():
        if "token_mixing" in name:
            nn.init.constant_(parameter, 0.1)
    colour = torch.randn(5, 2, 1, 1, dtype=torch.double)
    torch.testing.assert_close(interpolate_mixer(model, 24)(colour.expand(5, 2, 24, 24)),
                               model(colour.expand(5, 2, 8, 12)), rtol=0, atol=1e-12)


def test_a_smooth_field_of_tokens_is_mixed_as_it_was_on_the_old_grid():
    torch.manual_seed(0)

    def field(side, turned=False):
        at = (torch.arange(side, dtype=torch.double) + 0.5) / side
        rows, columns = (at, at[:, None]) if turned else (at[:, None], at)
        return torch.stack([(2 * rows).sin() + columns, rows * columns, columns.cos() + 0 * rows],
                           -1).flatten(0, 1)

    model = MLPMixer(1, (32, 32), 4, patch=4, width=3, depth=1,
                     token_mixing=lambda tokens, dim: nn.Identity())
    mixing = interpolate_mixer(model, 64)[1].token_mixing
    for side in (8, 16):
        right = interpolate_mixer(model, 4 * side)[1].token_mixing(field(side)) - field(side)
        wrong = field(side, turned=True) - field(side)
        # Measured: 0.02 on the finer grid, near the border.
        assert right.norm() < 0.1 * wrong.norm()
    assert not torch.equal(mixing(field(16)), field(16))


def test_gradients_autocast_and_lower_precision():
    wide = interpolate_mixer(MODELS["raft"](), 16)
    x = torch.randn(3, 2, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        wide(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in wide.parameters())
    assert wide(x[:0]).shape == (0, 3)
    assert wide.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("model", "size", "error", "words"), [
    (nn.Linear(3, 3), 8, NothingToReshape, "model must be an MLPMixer or hold one, got Linear"),
    (MLPMixer(2, (8, 8), 3, block=lambda tokens, dim: TokenMixing(tokens)), 16, NothingToReshape,
     "a module called token_mixing, got TokenMixing"),
    (MLPMixer(2, (8, 8), 3), 18, ValueError, r"multiples of patch=4, got \(18, 18\)"),
    (MLPMixer(2, (8, 8), 3), (8, 8, 8), ValueError, "size must be two multiples"),
])
def test_errors(model, size, error, words):
    with pytest.raises(error, match=words):
        interpolate_mixer(model, size)


def test_another_size_is_refused_until_it_is_interpolated():
    model = MLPMixer(2, (8, 8), 3)
    with pytest.raises(ValueError, match="interpolate_mixer"):
        model(torch.zeros(1, 2, 16, 16))
