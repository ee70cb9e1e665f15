import math
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from netwright.blocks.feedforward import (
    LowRankFeedForward,
    SelfGuided,
    StructuredFeedForward,
    StructuredLinear,
)
from netwright.errors import NothingToReshape, UnknownName
from netwright.reshape.feedforward import guide, premerge, unguide

SIZES = [("lowrank", {"rank": 3}), ("blockdense", {"rank": 6, "blocks": 3}),
         ("blockdense", {"rank": 8, "blocks": 2}), ("blockshuffle", {"blocks": 2}),
         ("blockshuffle", {"blocks": 6})]


def filled(layer):
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.double()


def reference(layer):
    """The dense matrix, entry by entry from what the blocks mean."""
    first, second = layer.first.detach(), layer.second.detach()
    if layer.kind == "lowrank":
        return second @ first
    blocks, q, p = first.shape
    inner = torch.zeros(blocks * q, layer.in_features, dtype=first.dtype)
    for k in range(blocks):
        inner[k * q:(k + 1) * q, k * p:(k + 1) * p] = first[k]
    if layer.kind == "blockdense":
        return second @ inner
    _, s, r = second.shape
    outer = torch.zeros(layer.out_features, blocks * r, dtype=first.dtype)
    for block in range(blocks):  # which reads every blocks-th entry and writes every blocks-th
        for a in range(s):
            for b in range(r):
                outer[a * blocks + block, b * blocks + block] = second[block, a, b]
    return outer @ inner


@pytest.mark.parametrize("feature_major", [False, True])
@pytest.mark.parametrize(("before", "after"), [(12, 24), (24, 12), (12, 12)])
@pytest.mark.parametrize(("kind", "options"), SIZES)
def test_it_is_its_dense_matrix(kind, options, before, after, feature_major):
    torch.manual_seed(0)
    layer = filled(StructuredLinear(before, after, kind, feature_major=feature_major, **options))
    weight = reference(layer)
    torch.testing.assert_close(layer.dense_weight(), weight, rtol=0, atol=1e-13)
    x = torch.randn(2, 5, before, dtype=torch.double, requires_grad=True)
    signal = torch.randn(2, 5, after, dtype=torch.double)
    y = layer(x)
    torch.testing.assert_close(y, linear(x, weight, layer.bias), rtol=0, atol=1e-12)
    made = torch.autograd.grad(y, [x, *layer.parameters()], signal)
    expected = torch.autograd.grad(linear(x, layer.dense_weight(), layer.bias),
                                   [x, *layer.parameters()], signal)
    for one, other in zip(made, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("kind", "options"), SIZES)
def test_any_leading_shape_dtype_and_copy(kind, options):
    layer = StructuredLinear(12, 24, kind, feature_major=True, **options)
    other = StructuredLinear(12, 24, kind, **options)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 4, 12)
    y = layer(x)
    for shape in [(12,), (0, 12), (3, 0, 12), (24, 12)]:
        assert layer(torch.zeros(shape)).shape == (*shape[:-1], 24)
    torch.testing.assert_close(layer(x[0, 0, 0]), y[0, 0, 0])
    torch.testing.assert_close(other(x), y)
    assert torch.equal(deepcopy(layer)(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x).float(), y, rtol=0.05, atol=0.05)
    assert deepcopy(layer).bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_it_starts_where_the_paper_does():
    layer = StructuredLinear(40, 60, "lowrank", rank=10, generator=torch.Generator().manual_seed(3))
    gaussian = torch.randn(60, 40, generator=torch.Generator().manual_seed(3)) / 40 ** 0.5
    u, s, v = torch.linalg.svd(gaussian)
    best = u[:, :10] @ s[:10].diag() @ v[:10]
    torch.testing.assert_close(layer.dense_weight(), best, rtol=1e-4, atol=1e-5)
    for factor, side in ((layer.first, 1), (layer.second, 0)):
        torch.testing.assert_close(factor.square().sum(side).sort().values, s[:10].flip(0),
                                   rtol=1e-4, atol=1e-5)
    wide = StructuredLinear(60, 40, "lowrank", rank=10)
    assert torch.linalg.matrix_rank(wide.dense_weight()) == 10
    for kind in ("blockdense", "blockshuffle"):
        layer = StructuredLinear(40, 80, kind)
        for factor in (*layer.first, *(layer.second if kind == "blockshuffle" else
                                       layer.second[None])):
            small = factor if factor.shape[0] < factor.shape[1] else factor.mT
            torch.testing.assert_close(small @ small.mT, torch.eye(len(small)), atol=1e-5, rtol=0)
        assert torch.equal(layer.bias, torch.zeros(80))
    draws = [StructuredLinear(8, 8, kind, generator=torch.Generator().manual_seed(1))
             for kind in ("lowrank", "blockdense", "blockshuffle") for _ in range(2)]
    assert all(torch.equal(a.first, b.first) and torch.equal(a.second, b.second)
               for a, b in zip(draws[::2], draws[1::2], strict=True))


@pytest.mark.parametrize("kind", ["lowrank", "blockdense", "blockshuffle"])
def test_blocks_have_a_third_of_the_parameters(kind):
    block = StructuredFeedForward(128, 512, kind=kind, bias=False)
    share = sum(p.numel() for p in block.parameters()) / (2 * 128 * 512)
    assert 0.29 < share < 0.35
    up, activation, down = block
    x = torch.randn(2, 5, 128)
    expected = down.dense_weight() @ activation(up.dense_weight() @ x.reshape(-1, 128).T)
    torch.testing.assert_close(block(x), expected.T.reshape(2, 5, 128), rtol=1e-4, atol=1e-5)
    low = LowRankFeedForward(128)
    assert [part.rank for part in (low[0], low[2])] == [32, 32]
    assert StructuredFeedForward(128, kind=kind, out=64, dropout=0.1)(x).shape == (2, 5, 64)


def model():
    torch.manual_seed(0)
    return nn.Sequential(StructuredFeedForward(12, 24, kind="blockshuffle", blocks=2),
                         StructuredFeedForward(12, 24, kind="blockdense", rank=6, blocks=3),
                         StructuredLinear(12, 12)).double()


def test_merged_equals_unmerged():
    network, x = model(), torch.randn(7, 12, dtype=torch.double)
    before = deepcopy(network.state_dict())
    merged, some = premerge(network), premerge(network, rows=7)
    assert not any(isinstance(m, StructuredLinear) for m in merged.modules())
    for copy in (merged, some, deepcopy(some)):
        torch.testing.assert_close(copy(x), network(x), rtol=0, atol=1e-13)
        torch.testing.assert_close(copy(x[None].expand(3, -1, -1)), network(x).expand(3, -1, -1),
                                   rtol=0, atol=1e-13)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    assert all(p.requires_grad for p in [*network.parameters(), *merged.parameters()])
    assert not any(p.requires_grad for p in some.parameters())
    seen = []
    some[2].layer.register_forward_hook(lambda *_: seen.append(1))
    some(x)
    assert seen == []  # the product alone
    some(torch.randn(8, 12, dtype=torch.double))
    assert seen == [1]
    assert isinstance(premerge(network[2]), nn.Linear)
    shared = StructuredLinear(8, 8)
    tied = premerge(nn.Sequential(shared, nn.ReLU(), shared))
    assert tied[0] is tied[2]


def test_guiding_fades_by_its_formula_and_ends_exactly_structured():
    network = model()
    guided, x = guide(network, steps=4), torch.randn(5, 12, dtype=torch.double)
    assert sum(isinstance(m, SelfGuided) for m in guided.modules()) == 5
    torch.testing.assert_close(guided.eval()(x), network(x), rtol=0, atol=1e-13)
    assert not any(isinstance(m, SelfGuided) for m in network.modules())
    guided.train()
    layer = guided[2]
    nn.init.normal_(layer.weight)
    given = []
    layer.register_forward_hook(lambda _, args, out: given.append((args[0], out)))
    for t in range(6):
        guided.zero_grad()
        guided(x).sum().backward()
        ratio = (1 + math.cos(math.pi * t / 4)) / 2 if t < 4 else 0
        assert layer.ratio == pytest.approx(ratio, abs=1e-12)
        before, after = given[-1]
        weight = ratio * layer.weight + (1 - ratio) * layer.layer.dense_weight()
        torch.testing.assert_close(after, linear(before, weight, layer.layer.bias), rtol=0,
                                   atol=1e-12)
        assert (layer.weight.grad is not None) == (t < 4)
        if t < 4:
            with pytest.raises(ValueError, match="steps=4 passes"):
                unguide(guided)
            again = guide(network, steps=4)
            again.load_state_dict(guided.state_dict())
            assert again[2].ratio == layer.ratio
            assert torch.equal(again.eval()(x), guided.eval()(x))
            guided.train()
    plain = unguide(guided)
    assert torch.equal(plain(x), guided(x))
    assert not any(isinstance(m, SelfGuided) for m in plain.modules())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_pass_that_is_run_again_does_not_count(reentrant):
    network, x = model(), torch.randn(5, 12, dtype=torch.double, requires_grad=True)
    plain, again = guide(network, steps=4), guide(network, steps=4)
    for _ in range(3):
        plain(x).square().sum().backward()
        checkpoint(again, x, use_reentrant=reentrant).square().sum().backward()
    assert again[2].passes == plain[2].passes == 3
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fades", [True, False])
def test_the_structure_has_learnt_when_the_dense_matrix_is_gone(fades):
    """The control's dense matrix hardly fades in training and is then cut off."""
    left = []
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(64, 16)
        y = 3 * StructuredLinear(16, 16)(x).detach()
        network = guide(StructuredLinear(16, 16), steps=200 if fades else 10 ** 6)
        optimizer = torch.optim.SGD(network.parameters(), 0.05)
        start = (network.layer(x) - y).square().mean().item()
        for _ in range(200):
            optimizer.zero_grad()
            (network(x) - y).square().mean().backward()
            optimizer.step()
        left.append((network.layer(x) - y).square().mean().item() / start)
    # Measured: at most 0.25 and at least 0.99.
    assert max(left) < 0.5 if fades else min(left) > 0.9


@pytest.mark.parametrize(("make", "says"), [
    (lambda: StructuredLinear(0, 4), "in_features must be at least 1"),
    (lambda: StructuredLinear(4, 4, share=1.5), "share must be above 0 and below 1"),
    (lambda: StructuredLinear(12, 24, rank=13), "rank must be between 1 and 12"),
    (lambda: StructuredLinear(12, 24, blocks=2), "blocks must be None"),
    (lambda: StructuredLinear(12, 24, "blockdense", blocks=5), "blocks must divide in_features=12"),
    (lambda: StructuredLinear(12, 24, "blockdense", blocks=3, rank=7), "multiple of blocks=3"),
    (lambda: StructuredLinear(12, 20, "blockshuffle", blocks=3), "out_features=20, got 3"),
    (lambda: StructuredLinear(12, 24, "blockshuffle", rank=3), "rank must be None"),
    (lambda: StructuredLinear(12, 24)(torch.zeros(3, 11)), r"x must be \(\*, 12\)"),
    (lambda: premerge(model(), rows=1)(torch.zeros(3, 11).double()), r"x must be \(\*, 12\)"),
    (lambda: StructuredFeedForward(8, 0), "hidden must be at least 1"),
    (lambda: LowRankFeedForward(8, rank=9), "rank must be between 1 and 8"),
    (lambda: premerge(model(), rows=0), "rows must be at least 1"),
    (lambda: guide(model(), steps=0), "steps must be at least 1"),
    (lambda: guide(guide(model(), steps=1), steps=1), "guided already"),
])
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_what_is_not_there_is_named():
    with pytest.raises(UnknownName, match="lowrank"):
        StructuredLinear(4, 4, "lowrnk")
    for change in (premerge, unguide, lambda plain: guide(plain, steps=1)):
        with pytest.raises(NothingToReshape, match="Linear"):
            change(nn.Linear(4, 4))


def test_a_compiler_makes_two_programs_of_a_fading_layer():
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = SelfGuided(StructuredLinear(8, 16), steps=5)
    plain, counter = deepcopy(layer), CompileCounter()
    compiled = torch.compile(layer, backend=counter)
    for _ in range(8):
        x = torch.randn(4, 8)
        assert torch.equal(compiled(x), plain(x))
    assert layer.passes == 8
    assert counter.frame_count == 2


@pytest.mark.parametrize(("before", "after"), [(7, 9), (64, 65), (8, 8 * 31 + 1), (5, 5 * 2 - 1)])
def test_blocks_that_save_nothing_are_refused(before, after):
    with pytest.raises(ValueError, match="must have a common divisor of about"):
        StructuredLinear(before, after, "blockshuffle")
    dense = StructuredLinear(before, after, "blockshuffle", blocks=1)  # who asks for it gets it
    assert dense.first.numel() + dense.second.numel() >= before * after


@pytest.mark.parametrize("kind", ["lowrank", "blockdense", "blockshuffle"])
@pytest.mark.parametrize("share", [0.16, 0.32, 0.63])
def test_what_is_built_has_fewer_parameters_or_is_refused(kind, share):
    for before in range(6, 70, 7):
        for after in range(8, 90, 9):
            if kind == "blockshuffle" and before + after >= max(before, after) * math.gcd(
                    before, after):
                with pytest.raises(ValueError, match="common divisor"):
                    StructuredLinear(before, after, kind, share=share)
                continue
            layer = StructuredLinear(before, after, kind, share=share)
            assert layer.first.numel() + layer.second.numel() < before * after
