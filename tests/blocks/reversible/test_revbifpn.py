from copy import deepcopy

import pytest
import torch
from torch import nn

from netwright.blocks.reversible import MBConv, RevBiFPN, ReversibleSequential, RevSilo
from netwright.blocks.reversible.revbifpn import _folded, _unfolded
from netwright.errors import CannotReverse
from netwright.measure._allocations import Saved
from netwright.rules import Reversible

CHANNELS = (4, 6, 8)


def maps(dtype=torch.float32, batch=3, **options):
    return tuple(torch.randn(batch, c, s, s, dtype=dtype, **options)
                 for c, s in zip(CHANNELS, (16, 8, 4), strict=True))


def total(levels):
    return sum((k + 1) * level.square().mean() for k, level in enumerate(levels))


class Drops(nn.Module):
    """A branch with batch norm and dropout that takes level i to level j."""

    def __init__(self, i, j):
        super().__init__()
        self.body = nn.Sequential(MBConv(CHANNELS[i], CHANNELS[j]), nn.Dropout(0.3))
        self.size = nn.Upsample(scale_factor=2.0 ** (i - j))

    def forward(self, x):
        return self.size(self.body(x))


def silos(depth, **options):
    return ReversibleSequential(*[RevSilo(CHANNELS, make_down=Drops, make_up=Drops)
                                  for _ in range(depth)], **options)


def by_hand(network, levels):
    """The two sums of each silo, written out under plain autograd."""
    for silo in network:
        for modules, reads in ((silo.down, lambda i, j: i < j), (silo.up, lambda i, j: i > j)):
            new = list(levels)
            for pair, module in modules.items():
                i, j = map(int, pair.split("_"))
                assert reads(i, j)
                new[j] = new[j] + module(levels[i])
            levels = new
    return levels


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_maps_come_back(dtype, bound):
    network = ReversibleSequential(*[RevSilo(CHANNELS) for _ in range(3)]).to(dtype).eval()
    for old, new in zip(maps(dtype), network.inverse(network(maps(dtype))), strict=True):
        assert old.shape == new.shape
    given = maps(dtype)
    for old, new in zip(given, network.inverse(network(given)), strict=True):
        assert (old - new).abs().amax() <= bound * old.abs().amax()


@pytest.mark.parametrize("needs", [False, True], ids=["input fixed", "input learned"])
def test_gradients_are_autograds_with_dropout_and_batch_norm(needs):
    network = silos(2).double()
    given = maps(torch.float64, requires_grad=needs)
    before = [x.detach().clone() for x in given]
    reference = deepcopy(network)
    given2 = [x.detach().clone().requires_grad_(needs) for x in given]
    for seed in (1, 2):
        torch.manual_seed(seed)
        mine = network(given)
        torch.manual_seed(seed)
        theirs = by_hand(reference, given2)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        total(mine).backward()
        total(theirs).backward()
    for (name, p), q in zip(network.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-10, msg=name)
    for a, b in zip(network.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert all(torch.equal(x, old) for x, old in zip(given, before, strict=True))
    if needs:
        for x, x2 in zip(given, given2, strict=True):
            torch.testing.assert_close(x.grad, x2.grad, rtol=0, atol=1e-10)


def test_every_level_hears_of_every_other():
    silo = RevSilo(CHANNELS).double()
    for i in range(3):
        given = maps(torch.float64, requires_grad=True)
        out = silo(given)[i].square().sum()
        assert all(g.abs().sum() > 0 for g in torch.autograd.grad(out, given))


def small(depth=1, **options):
    return RevBiFPN([8, 6, 10], depth, inputs=2, fold=2, blocks=1, **options)


def test_the_pyramids_gradients_are_plain_autograds():
    network = small().double()
    reference, x = deepcopy(network), torch.randn(2, 2, 16, 16).double().requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    tensors = [x, *network.parameters()]
    mine = torch.autograd.grad(total(network(x)), tensors)
    h = (_folded(x2, 2),)
    for part in reference.pyramid:  # each block by itself is an ordinary module
        h = part(h)
        h = h if isinstance(h, tuple) else (h,)
    theirs = torch.autograd.grad(total(h), [x2, *reference.parameters()])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    for a, b in zip(network.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_input_comes_back_from_the_maps(dims):
    network = RevBiFPN([2 ** dims * 3, 6], 1, inputs=2, fold=2, blocks=1, dims=dims).double().eval()
    x = torch.randn(2, 2, *[8] * dims).double()
    low, high = network(x)
    assert low.shape == (2, 2 ** dims * 3, *[4] * dims)
    assert high.shape == (2, 6, *[2] * dims)
    torch.testing.assert_close(network.inverse((low, high)), x, rtol=0, atol=1e-10)
    torch.testing.assert_close(_unfolded(_folded(x, 2), 2), x)
    if dims == 2:
        torch.testing.assert_close(_folded(x, 2).sort(1).values,
                                   nn.functional.pixel_unshuffle(x, 2).sort(1).values)


def test_the_published_sizes():
    network = RevBiFPN().eval()
    assert [tuple(level.shape) for level in network(torch.randn(1, 3, 64, 64))] == [
        (1, 48, 16, 16), (1, 64, 8, 8), (1, 80, 4, 4), (1, 160, 2, 2)]


def saved(network, x):
    total(network(x)).backward()  # the first call also looks whether steps can be undone
    ledger = Saved([*network.parameters(), *network.buffers()])
    with ledger.counting():
        total(network(x)).backward()
    return ledger.peak


def test_stored_bytes_are_flat_in_depth():
    x = torch.randn(2, 2, 16, 16)
    shallow, deep = saved(small(1), x), saved(small(4), x)
    assert deep <= 1.02 * shallow

    class Stored(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            h = _folded(x, 2)
            for part in self.network.pyramid:
                h = part(h)
            return h

    assert saved(Stored(small(4)), x) > max(2 * saved(Stored(small(1)), x), 10 * deep)


def test_exact_autocast_bfloat16_and_states():
    x = torch.randn(2, 2, 16, 16)
    exact = small(2, exact=True)
    total(exact(x)).backward()
    network = small(1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = total(network(x))
    loss.backward()
    low = small(1).bfloat16()
    total(low(x.bfloat16())).backward()
    for net in (exact, network, low):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    other = small(1)
    other.load_state_dict(network.state_dict())
    for a, b, c in zip(network.eval()(x), other.eval()(x), deepcopy(network)(x), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


class Classifier(nn.Module):
    """A pyramid whose levels' means are classified."""

    def __init__(self):
        super().__init__()
        self.pyramid, self.linear = small(1), nn.Linear(24, 3)

    def forward(self, x):
        return self.linear(torch.cat([h.mean((2, 3)) for h in self.pyramid(x)], 1))


def test_it_learns_where_a_bar_is_and_cannot_when_frozen():
    x, y = torch.zeros(48, 2, 16, 16), torch.arange(48) % 3
    for k in range(48):  # a bar, upright or lying, or a spot of as many pixels
        i, shape = k % 13, [(16, 1), (1, 16), (4, 4)][k % 3]
        x[k, :, i:i + shape[0], :shape[1]] = 1

    def accuracy(frozen):
        torch.manual_seed(0)
        network = Classifier()
        network.pyramid.requires_grad_(not frozen)
        rule = Reversible(network, x)
        optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            rule(x, y)
            optimizer.step()
        return float((network(x).argmax(1) == y).float().mean())
    assert accuracy(frozen=False) > 0.9
    assert accuracy(frozen=True) < 0.85


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="at least two levels"):
        RevSilo([4])
    with pytest.raises(ValueError, match="at least two levels"):
        RevBiFPN([16])
    with pytest.raises(ValueError, match=r"channels\[0\]=10 must be a multiple"):
        RevBiFPN([10, 8], fold=2)
    with pytest.raises(ValueError, match="depth must be at least 0, got -1"):
        RevBiFPN(depth=-1)
    with pytest.raises(ValueError, match="dims must be between 1 and 3"):
        RevBiFPN(dims=4)
    with pytest.raises(ValueError, match=r"sizes that are multiples of 8\), got \(2, 2, 12, 16\)"):
        small()(torch.randn(2, 2, 12, 16))
    with pytest.raises(CannotReverse, match=r"maps of \[4, 6, 8\] channels"):
        RevSilo(CHANNELS)(maps()[:2])
    low, *rest = maps()
    with pytest.raises(CannotReverse, match="down 0 to 2 must make its level's shape"):
        RevSilo(CHANNELS)((low[..., :12], *rest))
    with pytest.raises(ValueError, match="dims must be"):
        MBConv(4, 4, dims=0)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        MBConv(4, 4, kernel_size=4)
    with pytest.raises(ValueError, match="must be at least 1"):
        MBConv(4, 0)
