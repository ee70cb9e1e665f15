import pytest
import torch
from torch import nn
from torch.nn.functional import linear, silu

from netwright.blocks.feedforward import GLU, FeedForward
from netwright.errors import UnknownName


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_it_is_linear_layers_with_activations_between(layers):
    block = FeedForward(6, 10, layers=layers, activation="tanh", out=3).double()
    x = torch.randn(2, 5, 6, dtype=torch.double)
    weights = [p for p in block if isinstance(p, nn.Linear)]
    assert len(weights) == layers
    h = x
    for i, layer in enumerate(weights):
        h = linear(h, layer.weight, layer.bias)
        h = h.tanh() if i < layers - 1 else h
    torch.testing.assert_close(block(x), h, rtol=0, atol=1e-14)


def test_glu_is_its_formula():
    block = GLU(6, 10, out=3, bias=True).double()
    x = torch.randn(2, 5, 6, dtype=torch.double)
    expected = block.down(silu(block.gate(x)) * block.up(x))
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-14)


def test_glu_has_as_many_parameters_as_a_plain_block_where_no_size_is_given():
    glu, plain = (sum(p.numel() for p in block.parameters())
                  for block in (GLU(96), FeedForward(96, bias=False)))
    assert glu == plain


@pytest.mark.parametrize("make", [FeedForward, GLU])
def test_what_it_cannot_build_is_named(make):
    with pytest.raises(UnknownName, match="swish"):
        make(6, activation="swish")
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        make(6, 0)
