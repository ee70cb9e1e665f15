import pytest
import torch
from torch import nn

from netwright.blocks import DoReFaConv2d, DoReFaLinear
from netwright.blocks.quantized.dorefa import rounded_gradient


def test_rounded_gradients_are_right_on_average_and_on_few_levels():
    g = torch.randn(4, 6)
    draws = torch.stack([rounded_gradient(g, 2, torch.rand(4, 6) - 0.5) for _ in range(4000)])
    error = draws.std(0) / 4000**0.5
    assert ((draws.mean(0) - g).abs() <= 4 * error + 1e-6).all()
    for sample in range(4):
        assert len(draws[:, sample].round(decimals=4).unique()) <= 4
    assert not rounded_gradient(torch.zeros(2, 3), 2).any()
    near = rounded_gradient(g, 2)
    assert torch.equal(near, rounded_gradient(g, 2))
    assert ((near - g).abs() <= g.abs().amax(1, keepdim=True) / 3 + 1e-6).all()


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_weights_and_inputs_have_as_many_levels(bits):
    layer = DoReFaLinear(64, 8, w_bits=bits, a_bits=bits)
    assert len(layer.rounded_weight().round(decimals=5).unique()) <= 2**bits
    if bits == 1:
        sizes, mean = layer.rounded_weight().abs(), layer.weight.abs().mean()
        assert torch.allclose(sizes, mean.expand_as(sizes), rtol=1e-4)


def test_thirty_two_bits_are_the_layer_itself():
    layer = DoReFaConv2d(3, 4, 3, padding=1, w_bits=32, a_bits=32, g_bits=32)
    same = nn.Conv2d(3, 4, 3, padding=1)
    same.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(layer(x), same(x))


def test_bits_out_of_range_are_refused():
    with pytest.raises(ValueError, match="a_bits must be"):
        DoReFaLinear(4, 4, a_bits=0)
