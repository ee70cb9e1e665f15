from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm

from netwright.blocks.feedforward import GLU
from netwright.blocks.mixing import MixerBlock, MLPMixer, NiNBlock, TokenMixing
from netwright.reshape import interpolate_mixer


def test_the_block_is_its_formula():
    block = NiNBlock(5, 6, 7, 8).double()
    x = torch.randn(2, 5, 6, dtype=torch.double)

    def mlp(h, layers):
        return gelu(h @ layers[0].weight.T + layers[0].bias) @ layers[2].weight.T + layers[2].bias

    n = layer_norm(x, (6,))
    inner = block.gate
    g = n + mlp(layer_norm(n, (6,)).transpose(1, 2), inner.token_mixing.layers).transpose(1, 2)
    g = g + mlp(layer_norm(g, (6,)), inner.feedforward)
    u = x + (n @ block.value.weight.T + block.value.bias) * g
    y = u + mlp(layer_norm(u, (6,)), block.feedforward)
    torch.testing.assert_close(block(x), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [NiNBlock, MixerBlock])
def test_what_a_token_takes_from_another_depends_on_the_image_where_it_is_gated(make):
    """Without norms and activations a mixer is linear, and a product of it with x is not."""
    block = make(4, 6, token_mixing=lambda tokens, dim: TokenMixing(tokens, layers=1),
                 feedforward=lambda dim, hidden: nn.Linear(dim, dim)).double()
    for module in list(block.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, nn.LayerNorm):
                setattr(module, name, nn.Identity())
    one, two = (torch.autograd.functional.jacobian(lambda x: block(x)[0].sum(), x)[1]
                for x in torch.randn(2, 4, 6, dtype=torch.double))
    assert ((one - two).abs().max() > 1e-3) == (make is NiNBlock)


def test_a_gate_of_ones_leaves_a_linear_layer():
    block, x = NiNBlock(4, 6), torch.randn(3, 4, 6)
    with torch.no_grad():
        for parameter in block.gate.parameters():
            parameter.zero_()
        block.gate_norm.weight.zero_()
        block.gate_norm.bias.fill_(1)  # then n = 1, the mixer returns n, and W n is one vector
    u = x + block.value(torch.ones(6))
    torch.testing.assert_close(block(x), u + block.feedforward(block.channel_norm(u)))


def test_it_stands_in_a_mixer_of_any_size_and_takes_any_parts():
    model = MLPMixer(1, (8, 8), 3, patch=2, width=6, depth=2, block=NiNBlock)
    wide = interpolate_mixer(model, 12)
    assert wide(torch.randn(2, 1, 12, 12)).shape == (2, 3)
    assert torch.equal(interpolate_mixer(wide, 8)(torch.ones(2, 1, 8, 8)),
                       model(torch.ones(2, 1, 8, 8)))
    block = NiNBlock(4, 6, feedforward=GLU, token_mixing=lambda tokens, dim: nn.Identity())
    assert isinstance(block.gate, MixerBlock)
    assert isinstance(block.gate.feedforward, GLU)
    assert isinstance(block.feedforward, GLU)
    assert block(torch.randn(4, 6)).shape == (4, 6)


def test_round_trips_lower_precision_and_empty_batches():
    one, other = NiNBlock(4, 6), NiNBlock(4, 6)
    x = torch.randn(2, 3, 4, 6)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))
    assert torch.equal(one(x), deepcopy(one)(x))
    with torch.autocast("cpu", torch.bfloat16):
        one(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in one.parameters())
    assert one(x[:0]).shape == (0, 3, 4, 6)
    assert one.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_errors():
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        NiNBlock(0, 6)
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        NiNBlock(4, 6, 4, 0)
    with pytest.raises(ValueError, match=r"tokens=4, got \(2, 5, 6\)"):
        NiNBlock(4, 6)(torch.zeros(2, 5, 6))
