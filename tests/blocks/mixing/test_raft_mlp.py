from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm

from netwright.blocks.feedforward import GLU
from netwright.blocks.mixing import MLPMixer, RaftBlock, RaftTokenMixing


def rafts(x, mlp, norm, size, rows):
    """Apply the MLP to one raft of one column or row after another."""
    height, width, channels = x.shape
    normalised = layer_norm(x, (channels,), norm.weight, norm.bias)
    out, count = torch.zeros_like(x), channels // size
    for raft in range(count):
        members = [raft + i * count for i in range(size)]
        for line in range(width if rows else height):
            part = normalised[:, line] if rows else normalised[line]
            taken = torch.cat([part[:, c] for c in members])
            given = mlp[2].weight @ gelu(mlp[0].weight @ taken + mlp[0].bias) + mlp[2].bias
            for c, values in zip(members, given.split(height if rows else width), strict=True):
                if rows:
                    out[:, line, c] = values
                else:
                    out[line, :, c] = values
    return out


@pytest.mark.parametrize("size", [1, 2, 3])
def test_it_mixes_raft_by_raft_and_line_by_line(size):
    mixing = RaftTokenMixing(3, 4, 6, size).double()
    for norm in (mixing.vertical_norm, mixing.horizontal_norm):
        nn.init.normal_(norm.weight)
    x = torch.randn(3, 4, 6, dtype=torch.double)
    down = rafts(x, mixing.vertical, mixing.vertical_norm, size, True)
    along = rafts(x + down, mixing.horizontal, mixing.horizontal_norm, size, False)
    torch.testing.assert_close(mixing(x.flatten(0, 1)), (down + along).flatten(0, 1),
                               rtol=0, atol=1e-13)
    many = x.flatten(0, 1).expand(2, 5, 12, 6)
    torch.testing.assert_close(mixing(many)[1, 4], mixing(x.flatten(0, 1)), rtol=0, atol=1e-13)


def test_the_block_is_its_formula():
    block = RaftBlock(3, 4, 6, 10).double()
    x = torch.randn(2, 12, 6, dtype=torch.double)
    u = x + block.token_mixing(x)
    y = u + block.feedforward(layer_norm(u, (6,)))
    torch.testing.assert_close(block(x), y, rtol=0, atol=1e-13)
    assert isinstance(RaftBlock(3, 4, 6, feedforward=GLU).feedforward, GLU)


def test_one_pass_reaches_a_cross_and_two_reach_all():
    mixing = RaftTokenMixing(3, 4, 4)
    slope = torch.autograd.functional.jacobian(
        lambda x: mixing._mixed(x, mixing.vertical, rows=True)[0].sum(), torch.randn(12, 4))
    reached = (slope.abs().sum(1) > 0).view(3, 4)
    assert reached[:, 0].all()
    assert not reached[:, 1:].any()
    slope = torch.autograd.functional.jacobian(lambda x: mixing(x)[0].sum(), torch.randn(12, 4))
    assert (slope.abs().sum(1) > 0).all()


def test_it_has_fewer_weights_than_all_tokens_at_once():
    def count(module):
        return sum(p.numel() for p in module.parameters() if p.ndim == 2)
    assert count(RaftTokenMixing(8, 8, 48, 2)) == 2 * 2 * (2 * 8) ** 2 * 2
    assert count(MLPMixer(3, (32, 32), 2)[1].token_mixing) == 2 * 64 * 32


def test_round_trips_lower_precision_and_empty_batches():
    one, other = RaftBlock(2, 3, 4), RaftBlock(2, 3, 4)
    x = torch.randn(2, 6, 4)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))
    assert torch.equal(one(x), deepcopy(one)(x))
    with torch.autocast("cpu", torch.bfloat16):
        one(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in one.parameters())
    assert one(x[:0]).shape == (0, 6, 4)
    assert one.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("make", "words"), [
    (lambda: RaftTokenMixing(2, 2, 5, 2), "raft_size must divide channels=5, got 2"),
    (lambda: RaftTokenMixing(0, 2, 4), "height must be at least 1, got 0"),
    (lambda: RaftTokenMixing(2, 2, 4, 0), "raft_size must be at least 1, got 0"),
    (lambda: RaftBlock(2, 3, 4)(torch.zeros(1, 5, 4)), r"tokens=6, got \(1, 5, 4\)"),
])
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
