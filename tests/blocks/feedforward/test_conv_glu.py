from copy import deepcopy
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

from netwright.blocks.feedforward import GLU, ConvGLU
from netwright.errors import UnknownName
from netwright.models import gpt, patch_transformer


def convolved(h, weight, bias, before):
    """The sum over offsets of each channel's weight times its neighbour: h (batch, *grid, C)."""
    grid, kernel = h.shape[1:-1], weight.shape[2:]
    out = torch.zeros_like(h) + bias
    for offset in product(*map(range, kernel)):
        shifts = [o - b for o, b in zip(offset, before, strict=True)]
        for place in product(*map(range, grid)):
            there = [p + s for p, s in zip(place, shifts, strict=True)]
            if all(0 <= t < n for t, n in zip(there, grid, strict=True)):
                out[(slice(None), *place)] += (weight[(slice(None), 0, *offset)]
                                               * h[(slice(None), *there)])
    return out


@pytest.mark.parametrize(("grid", "kernel", "before", "causal"), [
    ((7,), 3, (1,), False), ((7,), 4, (1,), False), ((7,), 4, (3,), True), ((5,), 1, (0,), True),
    ((3, 4), 3, (1, 1), False), ((3, 4), (1, 4), (0, 1), False), ((2, 3), 5, (2, 2), False),
    ((2, 3, 2), 3, (1, 1, 1), False)])
def test_it_is_its_formula_on_any_grid(grid, kernel, before, causal):
    block = ConvGLU(4, 6, kernel=kernel, axes=len(grid), causal=causal, out=3).double()
    x = torch.randn(2, *grid, 4, dtype=torch.double, requires_grad=True)
    layer = block.convolution
    seen = convolved(block.gate(x), layer.weight, layer.bias, before)
    expected = block.down(gelu(seen) * block.up(x))
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-13)
    signal, leaves = torch.randn_like(expected), [x, *block.parameters()]
    for mine, theirs in zip(torch.autograd.grad(block(x), leaves, signal),
                            torch.autograd.grad(expected, leaves, signal), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)
    tokens = ConvGLU(4, 6, kernel=kernel, axes=len(grid), causal=causal, out=3, size=grid).double()
    tokens.load_state_dict(block.state_dict())
    torch.testing.assert_close(tokens(x.flatten(1, -2)), block(x).flatten(1, -2),
                               rtol=0, atol=1e-13)


def test_a_kernel_of_one_entry_leaves_the_gated_block():
    block = ConvGLU(4, 6, activation="silu").double()
    glu = GLU(4, 6, bias=True).double()
    glu.load_state_dict({name: value for name, value in block.state_dict().items()
                         if "convolution" not in name})
    with torch.no_grad():
        nn.init.dirac_(block.convolution.weight, groups=6)
        block.convolution.bias.zero_()
    x = torch.randn(2, 3, 5, 4, dtype=torch.double)
    torch.testing.assert_close(block(x), glu(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("causal", [False, True])
def test_a_token_sees_those_before_it_and_after_it_where_it_may(causal):
    model = gpt(9, context=8, width=8, feedforward=lambda dim, hidden: ConvGLU(
        dim, hidden, axes=1, kernel=3, causal=causal)).double()
    x = torch.randint(9, (1, 8))
    later = torch.cat([x[:, :5], (x[:, 5:] + 1) % 9], 1)
    assert torch.equal(model(x)[:, :5], model(later)[:, :5]) == causal


def test_any_leading_shape_dtype_and_network():
    block = ConvGLU(4, 6)
    for shape in ((3, 5, 4), (2, 3, 5, 4), (2, 2, 3, 5, 4), (0, 3, 5, 4)):
        assert block(torch.randn(shape)).shape == shape
    x = torch.randn(2, 2, 3, 5, 4)
    torch.testing.assert_close(block(x)[1], block(x[1]))
    assert ConvGLU(4, 6, size=(3, 5))(torch.randn(15, 4)).shape == (15, 4)
    assert deepcopy(block).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x).dtype == torch.bfloat16
    other = ConvGLU(4, 6)
    other.load_state_dict(block.state_dict())
    assert torch.equal(other(x), block(x))
    assert [name for name, _ in ConvGLU(4, bias=False).named_parameters()] == [
        "gate.weight", "up.weight", "convolution.weight", "down.weight"]
    assert patch_transformer(1, (8, 8), 3, width=8, feedforward=lambda dim, hidden: ConvGLU(
        dim, hidden, size=(2, 2)))(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize(("options", "says"), [
    ({"axes": 4}, "axes must be 1, 2 or 3, got 4"),
    ({"kernel": (3, 3, 3)}, "kernel must have a number for each of axes=2"),
    ({"size": (9,)}, "size must have a number for each of axes=2"),
    ({"causal": True}, "causal must be False where axes=2"),
    ({"kernel": 0}, "kernel must be at least 1, got 0"),
    ({"size": (0, 3)}, "size must be at least 1, got 0"),
    ({"hidden": 0}, "hidden must be at least 1, got 0"),
    ({"activation": nn.GELU()}, "activation must be"),
])
def test_what_it_cannot_build_is_named(options, says):
    with pytest.raises(ValueError, match=says):
        ConvGLU(4, **options)
    with pytest.raises(UnknownName, match="swish"):
        ConvGLU(4, activation="swish")


def test_tokens_that_are_no_grid_are_refused():
    with pytest.raises(ValueError, match="x must have 12 tokens"):
        ConvGLU(4, size=(3, 4))(torch.randn(2, 11, 4))
    with pytest.raises(ValueError, match="x must end with 2 axes"):
        ConvGLU(4)(torch.randn(11, 4))
