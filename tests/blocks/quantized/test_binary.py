import pytest
import torch
from torch.nn.functional import conv2d

from netwright.blocks import BinaryConv2d, BinaryLinear


def test_the_scale_is_the_one_that_errs_least():
    weight = torch.randn(5, 32)
    signs, scale = weight.sign(), weight.abs().mean(1)
    for other in torch.linspace(0.5, 1.5, 21):
        errors = [(weight - a[:, None] * signs).square().sum(1) for a in (scale, scale * other)]
        assert (errors[0] <= errors[1] + 1e-5).all()
    layer = BinaryLinear(32, 5, binarize_input=False, bias=False)
    layer.weight.data = weight
    torch.testing.assert_close(layer(torch.eye(32)).T, scale[:, None] * signs)


@pytest.mark.parametrize("binarize_input", [True, False])
@pytest.mark.parametrize("settings", [{}, {"padding": 1}, {"stride": 2, "padding": 1}])
def test_a_packed_layer_is_the_layer_in_a_bit_for_each_weight(binarize_input, settings):
    layer = BinaryConv2d(8, 6, 3, binarize_input=binarize_input, **settings)
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(layer.pack()(x), layer(x), rtol=1e-5,
                               atol=0 if binarize_input else 1e-5)
    assert layer.pack().stored.codes.nbytes * 32 == layer.weight.nbytes
    dense = BinaryLinear(64, 16, binarize_input=binarize_input)
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(dense.pack()(x), dense(x), rtol=1e-5,
                               atol=0 if binarize_input else 1e-5)


def test_products_of_signs_are_scaled_by_what_each_filter_sees():
    layer = BinaryConv2d(3, 2, 3, padding=1, bias=False)
    x = torch.randn(1, 3, 5, 5)
    seen = conv2d(x.abs().mean(1, keepdim=True), torch.full((1, 1, 3, 3), 1 / 9), padding=1)
    signs = conv2d(torch.where(x >= 0, 1.0, -1.0), layer.weight.sign(), padding=1)
    scale = layer.weight.abs().mean((1, 2, 3))[:, None, None]
    torch.testing.assert_close(layer(x), signs * seen * scale)


def test_gradients_are_those_of_the_paper():
    layer, x = BinaryLinear(8, 3, bias=False), torch.randn(4, 8)
    layer.weight.data *= 4
    made = (layer.weight.abs().mean(1, keepdim=True) * layer.weight.sign()).detach()
    made.requires_grad_()
    near = torch.where(x >= 0, 1.0, -1.0) * x.abs().mean(1, keepdim=True)
    (near @ made.T).square().sum().backward()
    layer(x).square().sum().backward()
    scale = layer.weight.abs().mean(1, keepdim=True)
    expected = made.grad * (1 / 8 + scale * (layer.weight.abs() <= 1))
    torch.testing.assert_close(layer.weight.grad, expected.detach())
