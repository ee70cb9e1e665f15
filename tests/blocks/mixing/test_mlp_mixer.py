from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, gelu, layer_norm

import netwright as nw
from netwright.blocks.feedforward import GLU
from netwright.blocks.mixing import MixerBlock, MLPMixer, TokenMixing


def test_token_mixing_is_a_matrix_for_each_channel():
    mixing = TokenMixing(5, 7).double()
    x = torch.randn(2, 3, 5, 4, dtype=torch.double)
    first, last = mixing.layers[0], mixing.layers[2]
    hidden = gelu(torch.einsum("th,bnhc->bntc", first.weight, x) + first.bias[:, None])
    expected = torch.einsum("ht,bntc->bnhc", last.weight, hidden) + last.bias[:, None]
    torch.testing.assert_close(mixing(x), expected, rtol=0, atol=1e-13)


def test_one_layer_is_its_kronecker_matrix():
    mixing = TokenMixing(4, layers=1).double()
    x = torch.randn(3, 4, 5, dtype=torch.double)
    dense = torch.kron(mixing.layers[0].weight, torch.eye(5, dtype=torch.double))
    expected = x.flatten(1) @ dense.T + mixing.layers[0].bias.repeat_interleave(5)
    torch.testing.assert_close(mixing(x).flatten(1), expected, rtol=0, atol=1e-13)


def test_the_block_is_its_formula():
    block = MixerBlock(5, 6, 7, 8).double()
    x = torch.randn(2, 5, 6, dtype=torch.double)
    a, b = block.token_mixing.layers[0], block.token_mixing.layers[2]
    c, d = block.feedforward[0], block.feedforward[2]
    u = x + (gelu(layer_norm(x, (6,)).transpose(1, 2) @ a.weight.T + a.bias) @ b.weight.T
             + b.bias).transpose(1, 2)
    y = u + gelu(layer_norm(u, (6,)) @ c.weight.T + c.bias) @ d.weight.T + d.bias
    torch.testing.assert_close(block(x), y, rtol=0, atol=1e-13)


def test_it_holds_any_token_mixing_feedforward_and_block():
    seen = []

    def mixing(tokens, dim):
        seen.append((tokens, dim))
        return nn.Identity()

    model = MLPMixer(1, (8, 4), 3, patch=2, width=6, depth=2, token_mixing=mixing, feedforward=GLU)
    assert seen == [(8, 6), (8, 6)]
    assert isinstance(model[1].feedforward, GLU)
    assert model[1].feedforward.up.out_features == 24
    assert model.grid == (4, 2)
    other = MLPMixer(1, (8, 4), 3, patch=2, width=6, depth=2, block=mixing)
    assert isinstance(other[2], nn.Identity)
    assert model(torch.randn(5, 1, 8, 4)).shape == other(torch.randn(5, 1, 8, 4)).shape == (5, 3)


def test_patches_of_several_sizes_are_one_linear_layer_of_all():
    model = MLPMixer(2, (12, 8), 3, patch=4, width=5, depth=0, scales=(1, 2))
    x = torch.randn(3, 2, 12, 8)
    one, two = (p.weight for p in model[0].projections)
    bias = model[0].projections[0].bias
    patches = [nn.functional.unfold(x, k, stride=4, padding=(k - 4) // 2) for k in (4, 8)]
    weight = torch.cat([one.flatten(1), two.flatten(1)], 1)
    expected = (weight @ torch.cat(patches, 1)).mT + bias
    torch.testing.assert_close(model[0](x), expected, rtol=1e-4, atol=1e-5)
    plain = MLPMixer(2, (12, 8), 3, patch=4, width=5, depth=0)[0]
    assert torch.equal(plain(x)[:, 3], conv2d(x, plain.projections[0].weight,
                                              plain.projections[0].bias, 4)[..., 1, 1])


def test_it_is_a_chain_of_stages_and_round_trips():
    torch.manual_seed(0)
    model, other = (MLPMixer(1, (8, 8), 3, patch=2, width=6, depth=2) for _ in range(2))
    x = torch.randn(2, 1, 8, 8)
    assert len(nw.stages(model, x)) >= 4
    other.load_state_dict(model.state_dict())
    copy = deepcopy(model)
    assert torch.equal(model(x), other(x))
    assert torch.equal(model(x), copy(x))
    assert copy.grid == (4, 4)


def test_a_slice_is_a_backbone_with_the_same_names():
    model = MLPMixer(1, (8, 8), 3, patch=2, width=6, depth=2)
    x, backbone = torch.randn(2, 1, 8, 8), model[:-1]
    assert torch.equal(model[-1](backbone(x)), model(x))
    assert backbone(x).shape == (2, 6)
    assert set(backbone.state_dict()) < set(model.state_dict())


@pytest.mark.parametrize("autocast", [True, False])
def test_lower_precision_empty_batches_and_any_leading_shape(autocast):
    block = MixerBlock(5, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = (block if autocast else block.bfloat16())(
            torch.randn(2, 3, 5, 6, dtype=torch.float if autocast else torch.bfloat16))
    y.sum().backward()
    assert y.shape == (2, 3, 5, 6)
    assert all(p.grad.isfinite().all() for p in block.parameters())
    assert MixerBlock(5, 6)(torch.zeros(0, 5, 6)).shape == (0, 5, 6)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: MLPMixer(1, (8, 8), 3, patch=3), r"patch must divide both axes of size=\(8, 8\)"),
    (lambda: MLPMixer(1, (9, 9), 3, patch=3, scales=(1, 2)), "scales must be whole numbers"),
    (lambda: MLPMixer(1, (8, 8), 3, block=MixerBlock, feedforward=GLU), "give either block or"),
    (lambda: TokenMixing(0), "tokens must be at least 1, got 0"),
    (lambda: TokenMixing(4)(torch.zeros(2, 5, 3)), r"with tokens=4, got \(2, 5, 3\)"),
    (lambda: MLPMixer(1, (8, 8), 3, patch=4)(torch.zeros(1, 1, 12, 8)),
     r"x must be \(batch, channels, 8, 8\), got \(1, 1, 12, 8\)"),
    (lambda: MixerBlock(4, 6, channel_hidden=0), "hidden must be at least 1, got 0"),
])
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
