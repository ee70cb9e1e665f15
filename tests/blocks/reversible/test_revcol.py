from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from netwright.blocks.reversible import (
    ColumnLevel,
    ColumnSupervision,
    RevCol,
    RevColumn,
    ReversibleSequential,
)
from netwright.data import digits
from netwright.errors import CannotReverse
from netwright.measure._allocations import Saved
from netwright.rules import Backprop, Reversible

CHANNELS = (4, 6, 8)


class Noisy(nn.Module):
    """A level that draws dropout masks and counts batch statistics."""

    def __init__(self, channels, below=None, above=None):
        super().__init__()
        self.level = ColumnLevel(channels, below=below, above=above)
        self.norm, self.drop = nn.BatchNorm2d(channels), nn.Dropout(0.3)

    def forward(self, below, above=None):
        return self.drop(self.norm(self.level(below, above)))


def noisy(columns, **options):
    def make(k, column):
        above = CHANNELS[k + 1] if column and k < 2 else None
        return Noisy(CHANNELS[k], below=CHANNELS[k - 1] if k else None, above=above)
    return RevCol([lambda t, k=k: make(k, t) for k in range(3)], CHANNELS, columns, **options)


def small(columns=4, **options):
    return RevCol.convolutional(CHANNELS, (1, 1, 1), columns, **options)


def by_hand(network, x):
    """The paper's recursion, written out, under plain autograd."""
    levels, h = [], x
    for level in network.first:
        h = level(h)
        levels.append(h)
    for column in network.columns:
        new = []
        for k, (level, scale) in enumerate(zip(column.levels, column.scales, strict=True)):
            below = new[-1] if new else x
            made = level(below, levels[k + 1]) if k + 1 < len(levels) else level(below)
            new.append(made + scale.gamma[:, None, None] * levels[k])
        levels = new
    return levels


def total(levels):
    return sum((k + 1) * level.square().mean() for k, level in enumerate(levels))


def images(dtype=torch.float32, **options):
    return torch.randn(3, 4, 8, 8, dtype=dtype, **options)


def awake(network):
    """Wake the blocks, which a layer scale of 1e-6 keeps asleep at first, and spread the scales."""
    for name, p in network.named_parameters():
        if name.endswith(".scale"):
            nn.init.normal_(p)
        if name.endswith("gamma"):
            nn.init.uniform_(p, 0.4, 1.2)
    return network


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_previous_column_comes_back_from_the_next(dtype, bound):
    network = awake(small(4)).to(dtype)
    x = images(dtype)
    (before, after) = network(x, taps=[2, 3])
    back = network.columns[-1].inverse((x, *after))
    for old, new in zip((x, *before), back, strict=True):
        assert (old - new).abs().amax() <= bound * old.abs().amax()


@pytest.mark.parametrize("needs", [False, True], ids=["input fixed", "input learned"])
@pytest.mark.parametrize("growth", [None, 10.0, 1.0])
def test_outputs_and_gradients_are_autograds_with_dropout_and_batch_norm(needs, growth):
    network = awake(noisy(4, growth=growth)).double()
    x = images(torch.float64, requires_grad=needs)
    reference, x2 = deepcopy(network), x.detach().clone().requires_grad_(needs)
    before = x.detach().clone()
    for seed in (1, 2):  # the first call also checks the levels, the second does not
        torch.manual_seed(seed)
        mine = network(x)
        torch.manual_seed(seed)
        theirs = by_hand(reference, x2)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        total(mine).backward()
        total(theirs).backward()
    for (name, p), q in zip(network.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-10, msg=name)
    for a, b in zip(network.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert torch.equal(x.detach(), before)
    if needs:
        torch.testing.assert_close(x.grad, x2.grad, rtol=0, atol=1e-10)


def test_torch_autograd_grad():
    network, x = awake(small(3)).double(), images(torch.float64, requires_grad=True)
    tensors = [x, *network.parameters()]
    mine = torch.autograd.grad(total(network(x)), tensors)
    theirs = torch.autograd.grad(total(by_hand(network, x)), tensors)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_frozen_parameters_get_no_gradient():
    network = small(3)
    network.columns[0].levels[1].requires_grad_(False)
    total(network(images())).backward()
    assert all(p.grad is None for p in network.columns[0].levels[1].parameters())
    assert network.columns[0].scales[1].gamma.grad is not None


def test_stored_bytes_are_flat_in_the_number_of_columns():
    def saved(network):
        total(network(images())).backward()  # the first call also looks at every level
        ledger = Saved([*network.parameters(), *network.buffers()])
        with ledger.counting():
            total(network(images())).backward()
        return ledger.peak
    flat = [saved(small(columns, growth=None)) for columns in (3, 7)]
    assert flat[1] <= 1.02 * flat[0]
    assert saved(small(7, shortcut_scale=1.0)) <= 1.02 * flat[0]  # nothing grows, nothing is kept

    class Stored(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            return by_hand(self.network, x)

    stored = [saved(Stored(small(columns))) for columns in (3, 7)]
    assert stored[1] > 1.7 * stored[0]
    kept = saved(small(7))
    assert flat[1] < kept < stored[1] / 1.5


def test_which_columns_are_kept():
    assert small(12)._kept() == {2, 5, 8}  # 1 / 0.5^3 = 8 <= 10 < 16
    assert small(12, growth=None)._kept() == set()
    assert small(12, exact=True)._kept() == set()
    assert small(12, shortcut_scale=-1.0)._kept() == set()
    assert small(4, growth=1.0)._kept() == {1, 2}
    network = small(6, shortcut_scale=1.0)
    with torch.no_grad():
        network.columns[2].scales[1].gamma[0] = 0.05  # 20-fold on the way back from column 3
    assert network._kept() == {2, 3}
    assert replaced(network, growth=20)._kept() == set()


def replaced(network, growth):
    network.growth = growth
    return network


def relative(network, x):
    network.zero_grad()
    total(network(x)).backward()
    mine = torch.cat([p.grad.flatten() for p in network.parameters()])
    network.zero_grad()
    total(by_hand(network, x)).backward()
    theirs = torch.cat([p.grad.flatten() for p in network.parameters()])
    return float((mine - theirs).norm() / theirs.norm())


def test_kept_columns_hold_the_gradient_where_the_last_one_alone_loses_it():
    x = images()
    assert relative(small(20, growth=None), x) > 1e-2
    assert relative(small(20), x) < 1e-5
    assert relative(small(20, exact=True), x) < 1e-5
    assert relative(small(20, growth=None, shortcut_scale=1.0), x) < 1e-5


def test_scales_stay_away_from_0_by_value_and_still_learn():
    column = small(2).double().columns[0]
    gamma = column.scales[0].gamma
    with torch.no_grad():
        gamma.copy_(torch.tensor([0.0, 1e-9, -1e-9, 2.0]))
    one = torch.ones(1, 4, 1, 1, dtype=torch.float64)
    held = column.scales[0](one)
    torch.testing.assert_close(held.flatten(), torch.tensor([1e-3, 1e-3, -1e-3, 2.0]).double())
    (held * one).sum().backward()
    torch.testing.assert_close(gamma.grad, torch.ones(4).double())
    assert gamma[0] == 0  # what is learned is not overwritten
    streams = (images(torch.float64), *(torch.randn(3, c, s, s).double()
                                        for c, s in zip(CHANNELS, (8, 4, 2), strict=True)))
    for old, new in zip(streams, column.inverse(column(streams)), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=1e-10)


def test_any_levels_will_do():
    class Mixed(nn.Module):
        def __init__(self, attends):
            super().__init__()
            self.f = (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) if attends
                      else nn.Sequential(nn.Linear(8, 8), nn.Tanh()))

        def forward(self, below, above=None):
            return self.f(below if above is None else below + above)

    network = RevCol([lambda t: Mixed(False), lambda t: Mixed(True)], [8, 8], 4, dim=-1)
    levels = network(torch.randn(2, 5, 8))
    total(levels).backward()
    assert [tuple(level.shape) for level in levels] == [(2, 5, 8)] * 2
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_sequences_images_and_volumes(dims):
    network = RevCol.convolutional((4, 6), (1, 1), 2, dims=dims)
    low, high = network(torch.randn(2, 4, *[8] * dims))
    assert low.shape == (2, 4, *[8] * dims)
    assert high.shape == (2, 6, *[4] * dims)


def test_one_column_one_level_and_states():
    assert len(small(1)(images())) == 3
    total(small(1)(images())).backward()
    single = RevCol.convolutional((4,), (1,), 3)
    total(single(images())).backward()
    network, other = awake(small(3)), small(3)
    other.load_state_dict(network.state_dict())
    for a, b, c in zip(network(images().fill_(1)), other(images().fill_(1)),
                       deepcopy(network)(images().fill_(1)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_autocast_and_bfloat16():
    network, x = small(6, growth=1.0), images()
    with torch.autocast("cpu", torch.bfloat16):
        loss = total(network(x))
    loss.backward()
    low = small(6, growth=1.0).bfloat16()
    total(low(x.bfloat16())).backward()
    for net in (network, low):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        assert {p.grad.dtype for p in net.parameters()} == {p.dtype for p in net.parameters()}


class Head(nn.Module):
    """Logits of the highest level's mean."""

    def __init__(self, classes=10):
        super().__init__()
        self.linear = nn.Linear(CHANNELS[-1], classes)

    def forward(self, h):
        return self.linear(h.mean((2, 3)))


def test_under_rules():
    network = nn.Sequential(nn.Conv2d(1, 4, 1), awake(small(4, level=-1)), Head()).double()
    x, y = torch.rand(5, 1, 8, 8).double(), torch.tensor([0, 3, 9, 1, 1])
    Backprop(network)(x, y)
    expected = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    Reversible(network, x)(x, y)
    for p, g in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=1e-10)


def supervised(columns=4, heads=2, **options):
    return ColumnSupervision(small(columns), Head,
                             lambda: nn.Sequential(nn.Conv2d(8, 16, 1), nn.PixelShuffle(4)),
                             heads=heads, stem=nn.Conv2d(1, 4, 1), **options)


def test_supervision_is_the_weighted_sum_of_its_heads():
    network = supervised(columns=8, heads=4)
    assert network.taps == [1, 3, 5, 7]
    x, y = torch.rand(5, 1, 8, 8), torch.tensor([0, 3, 9, 1, 1])
    h = network.stem(x)
    tops = [levels[-1] for levels in network.columns(h, taps=[1, 3, 5, 7])]
    for t, top in zip((1, 3, 5, 7), tops, strict=True):
        alone = RevCol.convolutional(CHANNELS, (1, 1, 1), t + 1)
        alone.load_state_dict(network.columns.state_dict(), strict=False)
        torch.testing.assert_close(alone(h)[-1], top)
    expected = cross_entropy(network.classifiers[3](tops[3]), y)
    for i, (alpha, beta) in enumerate([(4, 0.2), (4 * 2 / 3, 0.4), (4 / 3, 0.6)]):
        expected = (expected + beta * cross_entropy(network.classifiers[i](tops[i]), y) + alpha *
                    binary_cross_entropy_with_logits(network.decoders[i](tops[i]), x))
    torch.testing.assert_close(network.loss(x, y), expected)
    torch.testing.assert_close(network(x), network.classifiers[3](tops[3]))
    assert len(supervised(heads=1).decoders) == 0


def test_it_learns_digits_and_cannot_from_shuffled_labels():
    split = digits()

    def accuracy(y):
        torch.manual_seed(1)
        network = ColumnSupervision(
            RevCol.convolutional((8, 16), (1, 1), 3),
            lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
            lambda: nn.Sequential(nn.Conv2d(16, 4, 1), nn.PixelShuffle(2)), heads=2,
            stem=nn.Conv2d(1, 8, 1))
        optimizer = torch.optim.Adam(network.parameters(), 2e-2)
        for _ in range(2):
            for rows in torch.randperm(len(y)).split(48):
                optimizer.zero_grad()
                network.loss(split.x_train[rows], y[rows]).backward()
                optimizer.step()
        with torch.no_grad():
            return float((network(split.x_test).argmax(1) == split.y_test).float().mean())
    found = accuracy(split.y_train), accuracy(split.y_train[torch.randperm(len(split.y_train))])
    assert found[0] > 0.4
    assert found[1] < 0.25


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        small(0)
    with pytest.raises(ValueError, match="channels must name one number for each of the 1"):
        RevCol([lambda t: nn.Identity()], [4, 4], 2)
    with pytest.raises(ValueError, match="blocks must name"):
        RevCol.convolutional((4, 8), (1,), 2)
    with pytest.raises(ValueError, match=r"growth must be at least 1, got 0\.5"):
        small(growth=0.5)
    with pytest.raises(ValueError, match="least_scale must be above 0 and at most"):
        small(shortcut_scale=1e-4)
    with pytest.raises(ValueError, match="channels must name"):
        RevColumn([nn.Identity()], [])
    with pytest.raises(ValueError, match=r"level must be .* -3 and 2, got 3; there are 3 levels"):
        small(level=3)
    with pytest.raises(CannotReverse, match=r"4 tensors, got 2 tensors"):
        small(2).columns[0]((images(), images()))
    with pytest.raises(CannotReverse, match=r"4 tensors, got a tensor"):
        small(2).columns[0].inverse(images())
    with pytest.raises(ValueError, match="dims must be between 1 and 3"):
        ColumnLevel(4, dims=4)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        ColumnLevel(4, kernel_size=2)
    with pytest.raises(ValueError, match=r"taps must be columns of 4, 0 to 3, got \[4\]"):
        small(4)(images(), taps=[4])
    with pytest.raises(ValueError, match="heads must be between 1 and 4"):
        supervised(heads=5)
    with pytest.raises(ValueError, match=r"x must be in 0\.\.1"):
        supervised().loss(torch.full((2, 1, 8, 8), 2.0), torch.zeros(2, dtype=torch.long))


def test_a_level_of_another_shape_is_named():
    class Grows(nn.Module):
        def __init__(self, column):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=0 if column else 1)

        def forward(self, below):
            return self.conv(below)

    with pytest.raises(CannotReverse, match="level 1 must return its stream's shape"):
        RevCol([Grows], [4], 2)(images())


def test_columns_work_in_a_reversible_sequential():
    columns = ReversibleSequential(*[small(2).columns[0] for _ in range(3)]).double()
    streams = (images(torch.float64), *(torch.randn(3, c, s, s).double()
                                        for c, s in zip(CHANNELS, (8, 4, 2), strict=True)))
    for old, new in zip(streams, columns.inverse(columns(streams)), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=1e-10)
