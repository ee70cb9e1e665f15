from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, linear

from netwright.blocks.feedforward import RePaFeedForward, StructuredFeedForward
from netwright.errors import NothingToReshape, UnknownName
from netwright.models import patch_transformer
from netwright.reshape import reparameterize


def used(block, seed=0):
    """Give every parameter and running statistic a value of its own."""
    torch.manual_seed(seed)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return block.double()


def test_it_is_its_formula():
    block = used(RePaFeedForward(6, 20, 0.6))
    assert block.active == 8
    x = torch.randn(3, 5, 6, dtype=torch.double)

    def norm(h, layer):
        rows = h.reshape(-1, h.shape[-1])
        deviation = (rows.var(0, correction=0) + layer.eps).sqrt()
        return (h - rows.mean(0)) / deviation * layer.weight + layer.bias

    hidden = linear(norm(x, block.norm_in), block.up.weight, block.up.bias)
    hidden = torch.cat([gelu(hidden[..., :8]), hidden[..., 8:]], -1)
    expected = linear(norm(hidden, block.norm_hidden), block.down.weight, block.down.bias)
    torch.testing.assert_close(block.train()(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"norm": False}, {"bias": False}, {"idle_ratio": 0.0},
                                     {"idle_ratio": 0.96}, {"activation": "relu", "hidden": 7}])
def test_merged_equals_unmerged(options):
    block = used(RePaFeedForward(6, **options)).eval()
    before = deepcopy(block.state_dict())
    merged = reparameterize(block)
    x = torch.randn(3, 5, 6, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(merged(x), block(x), rtol=1e-12, atol=1e-12)
    signal = torch.randn(3, 5, 6, dtype=torch.double)
    (one,), (other,) = (torch.autograd.grad(m(x), x, signal) for m in (merged, block))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(before[name], value) for name, value in block.state_dict().items())
    single = deepcopy(block).float()
    torch.testing.assert_close(reparameterize(single)(x.float()), single(x.float()),
                               rtol=1e-5, atol=1e-5)
    assert merged(x[:, :0]).shape == (3, 0, 6)
    again = reparameterize(block)
    again.load_state_dict(merged.state_dict())
    assert torch.equal(again(x), merged(x))


def test_a_transformer_is_merged_everywhere_and_gets_smaller():
    network = used(patch_transformer(1, (8, 8), 10, patch=4, width=16, depth=2, heads=2,
                                     feedforward=RePaFeedForward)).eval()
    x = torch.randn(3, 1, 8, 8, dtype=torch.double)
    merged = reparameterize(network)
    torch.testing.assert_close(merged(x), network(x), rtol=1e-10, atol=1e-10)
    assert not any(isinstance(m, (RePaFeedForward, nn.BatchNorm1d)) for m in merged.modules())
    assert any(isinstance(m, RePaFeedForward) for m in network.modules())
    size = sum(p.numel() for p in merged[1].feedforward.parameters())
    assert size == 3 * 16 * 16 + 2 * 16  # instead of 8 * 16 * 16 and more
    assert not merged.training
    merged.train()(x).sum().backward()
    assert all(p.grad is not None for p in merged[1].feedforward.parameters())


def test_linear_pairs_are_merged_where_that_is_smaller():
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    chain = nn.Sequential(
        nn.Linear(8, 32), nn.Identity(), nn.Linear(32, 8, bias=False), nn.Linear(8, 8), nn.ReLU(),
        nn.Linear(8, 2, bias=False), nn.Linear(2, 8),  # low rank: its product is larger
        shared, nn.ReLU(), shared).double()
    x = torch.randn(5, 8, dtype=torch.double)
    merged = reparameterize(chain)
    torch.testing.assert_close(merged(x), chain(x), rtol=1e-12, atol=1e-12)
    kinds = [type(part).__name__ for part in merged]
    assert kinds == ["Linear", "Identity", "Identity", "Identity", "ReLU", "Linear", "Linear",
                     "Identity", "ReLU", "Linear"]
    plain = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8))
    with pytest.raises(NothingToReshape, match="no larger"):
        reparameterize(plain)
    hooked = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8))
    hooked[0].register_forward_hook(lambda *_: None)
    with pytest.raises(NothingToReshape):
        reparameterize(hooked)
    frozen = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8)).requires_grad_(False)
    assert not any(p.requires_grad for p in reparameterize(frozen).parameters())


def test_dtypes_and_autocast():
    block, x = RePaFeedForward(6, 24), torch.randn(4, 6)
    block(x)
    assert reparameterize(deepcopy(block).bfloat16())(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(reparameterize(block)(x).float(), block.eval()(x).float(),
                                   rtol=0.1, atol=0.1)


def test_what_cannot_be_is_refused():
    for options, says in [({"dim": 0}, "dim must be at least 1"),
                          ({"dim": 4, "hidden": 0}, "hidden must be at least 1"),
                          ({"dim": 4, "idle_ratio": 1.0}, "leave one of hidden=16 units active"),
                          ({"dim": 4, "idle_ratio": -0.1}, "idle_ratio must be at least 0")]:
        with pytest.raises(ValueError, match=says):
            RePaFeedForward(**options)
    with pytest.raises(UnknownName, match="gelu"):
        RePaFeedForward(4, activation="gelo")
    with pytest.raises(NothingToReshape, match="RePaFeedForward"):
        reparameterize(StructuredFeedForward(4))
