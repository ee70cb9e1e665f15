from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

from netwright.blocks.mixing import Affine, ResMLP, ResMLPBlock
from netwright.data import digits


def test_the_block_is_its_formula():
    block = ResMLPBlock(5, 6, expansion=2).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, 6, dtype=torch.double)
    a, b, c = block.token_mixing.layers[0], block.feedforward[0], block.feedforward[2]
    first, second = block.token_affine, block.channel_affine
    mixed = torch.einsum("ts,bsc->btc", a.weight, x * first.weight + first.bias)
    u = x + block.token_scale * (mixed + a.bias[:, None])
    hidden = gelu((u * second.weight + second.bias) @ b.weight.T + b.bias)
    y = u + block.channel_scale * (hidden @ c.weight.T + c.bias)
    torch.testing.assert_close(block(x), y, rtol=0, atol=1e-12)


def test_an_affine_layer_can_be_merged_with_the_linear_layer_after_it():
    affine, layer, x = Affine(4).double(), nn.Linear(4, 3).double(), torch.randn(5, 4).double()
    assert torch.equal(affine(x), x)
    nn.init.normal_(affine.weight)
    nn.init.normal_(affine.bias)
    merged = deepcopy(layer)
    with torch.no_grad():
        merged.bias += merged.weight @ affine.bias
        merged.weight *= affine.weight
    torch.testing.assert_close(merged(x), layer(affine(x)), rtol=0, atol=1e-13)


def test_no_token_depends_on_another_but_through_the_layer_across_them():
    block, x = ResMLPBlock(5, 6), torch.randn(1, 5, 6)
    slope = torch.autograd.functional.jacobian(lambda x: block(x)[0, 0].sum(), x)[0]
    assert (slope.abs().sum(1) > 0).all()
    nn.init.zeros_(block.token_mixing.layers[0].weight)
    slope = torch.autograd.functional.jacobian(lambda x: block(x)[0, 0].sum(), x)[0]
    assert (slope[1:] == 0).all()


@pytest.mark.parametrize(("depth", "expected"), [(12, 0.1), (18, 0.1), (19, 1e-5), (24, 1e-5),
                                                 (25, 1e-6)])
def test_the_scales_start_where_the_depth_says(depth, expected):
    model = ResMLP(1, (4, 4), 2, patch=2, width=2, depth=depth)
    scales = [p for name, p in model.named_parameters() if name.endswith("scale")]
    assert len(scales) == 2 * depth
    assert all(torch.equal(s, torch.full((2,), expected)) for s in scales)
    given = ResMLP(1, (4, 4), 2, patch=2, width=2, depth=depth, init_scale=0.5)
    assert given[1].token_scale[0] == 0.5


def test_it_is_near_the_identity_at_first():
    x = torch.randn(2, 16, 8)
    assert (ResMLPBlock(16, 8, init_scale=1e-5)(x) - x).abs().max() < 1e-4


def test_it_learns_digits_and_needs_its_layers_across_patches():
    data = digits()
    found = {}
    for frozen in (False, True):
        torch.manual_seed(0)
        model = ResMLP(1, (8, 8), 10, patch=2, width=16, depth=2, init_scale=1.0)
        for block in (model[1], model[2]):
            if frozen:
                nn.init.zeros_(block.token_scale).requires_grad_(False)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
        for _ in range(40):
            rows = torch.randint(len(data.x_train), (64,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.x_train[rows]), data.y_train[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            found[frozen] = float((model(data.x_test).argmax(1) == data.y_test).float().mean())
    # Measured over five seeds: 0.41 to 0.63 more.
    assert found[False] > found[True] + 0.2


def test_round_trips_and_lower_precision():
    one, other = (ResMLP(1, (4, 4), 2, patch=2, width=6, depth=2) for _ in range(2))
    x = torch.randn(3, 1, 4, 4)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))
    assert torch.equal(one(x), deepcopy(one)(x))
    with torch.autocast("cpu", torch.bfloat16):
        one(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in one.parameters())
    assert one.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert ResMLPBlock(4, 6)(torch.zeros(2, 0, 4, 6)).shape == (2, 0, 4, 6)


def test_errors():
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        Affine(0)
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        ResMLPBlock(0, 4)
    with pytest.raises(ValueError, match=r"with tokens=4, got \(2, 5, 6\)"):
        ResMLPBlock(4, 6)(torch.zeros(2, 5, 6))
    with pytest.raises(ValueError, match="patch must divide"):
        ResMLP(1, (8, 8), 10)
