from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from netwright.blocks.experts import (
    ConstantExpert,
    CopyExpert,
    PathwayRouter,
    TopKRouter,
    ZeroExpert,
    link_gates,
    moe_plus_plus,
)
from netwright.blocks.feedforward import GLU

DIM = 6


def layer(**options):
    return moe_plus_plus(DIM, lambda: GLU(DIM, 5), 4, **options).double()


def linked(depth=3):
    torch.manual_seed(0)
    network = link_gates(nn.Sequential(*(layer() for _ in range(depth))))
    for one in network[1:]:
        nn.init.normal_(one.router.residual)
    return network


def test_the_formula():
    torch.manual_seed(0)
    moe, x = layer(), torch.randn(12, DIM, dtype=torch.double)
    assert [type(expert) for expert in moe.experts[4:]] == [ZeroExpert, CopyExpert, ConstantExpert,
                                                            ConstantExpert]
    shares = (x @ moe.router.weight.T).softmax(1)
    chosen = shares.topk(2)[1]
    y = torch.zeros_like(x)
    for row in range(12):
        for e in chosen[row].tolist():
            one = x[row]
            if e < 4:
                made = moe.experts[e](one)
            elif e < 6:
                made = one * (e - 4)
            else:
                a = (moe.experts[e].weight @ one).softmax(0)
                made = a[0] * one + a[1] * moe.experts[e].constant
            y[row] += shares[row, e] * made
    torch.testing.assert_close(moe(x), y, rtol=1e-11, atol=1e-12)
    moe.fused = False
    torch.testing.assert_close(moe(x), y, rtol=1e-11, atol=1e-12)
    assert moe(x.view(3, 4, DIM)).shape == (3, 4, DIM)
    assert moe(x[:0]).shape == (0, DIM)


def test_gates_read_those_before():
    network, x = linked(), torch.randn(7, DIM, dtype=torch.double)
    network(x)
    before, h = None, x
    for one in network:
        logits = h @ one.router.weight.T
        if before is not None:
            logits = logits + before @ one.router.residual.T
        routing = one.router(h)
        torch.testing.assert_close(routing.logits, logits)
        before, h = logits, one(h)
    network(x).square().sum().backward()
    assert all(one.router.residual.grad.any() for one in network[1:])
    assert network[0].router.residual is None


def test_without_links_it_is_the_switch_router():
    torch.manual_seed(0)
    router, other = PathwayRouter(DIM, 4), TopKRouter(DIM, 4, softmax="all")
    other.weight = router.weight
    x = torch.randn(9, DIM)
    for mine, theirs in zip(router(x)[:4], other(x)[:4], strict=True):
        assert torch.equal(mine, theirs)
    after = PathwayRouter(DIM, 4)
    after.follow(router)  # V is zeros at first
    other.weight = after.weight
    assert torch.equal(after(x).logits, other(x).logits)


def test_free_experts_take_their_share():
    loads = {}
    for share in (0.25, 4.0):
        torch.manual_seed(0)
        moe = moe_plus_plus(DIM, lambda: GLU(DIM, 5), 4, share=share, balance=1.0)
        optimizer = torch.optim.Adam(moe.router.parameters(), 0.02)
        for _ in range(60):
            optimizer.zero_grad()
            moe(torch.randn(64, DIM)).mean().backward()
            optimizer.step()
        loads[share] = float(moe.usage.load[4:].sum() / moe.usage.load.sum())
    # Measured: 0.68 to 0.77 and 0.18 to 0.23 over 5 seeds.
    assert loads[4.0] < 0.35 < 0.65 < loads[0.25]


def test_copies_and_passes_that_are_run_again():
    network, x = linked(), torch.randn(7, DIM, dtype=torch.double)
    y = network(x)
    copy = deepcopy(network)  # after a pass
    assert torch.equal(copy(x), y)
    assert copy[1].router._before[0] is copy[0].router
    names = set(network.state_dict())
    assert "1.router.residual" in names
    assert not any("_before" in name for name in names)
    y.square().sum().backward()
    h = x
    for one in copy:
        h = checkpoint(one, h, use_reentrant=False)
    h.square().sum().backward()
    for mine, theirs in zip(network.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: layer(zero=-1), "zero must be at least 0"),
    (lambda: layer(share=0.0), "share must be above 0"),
    (lambda: layer(k=9), "k must be between 1 and 8, got 9; .*n_experts=8 twice"),
    (lambda: moe_plus_plus(DIM, lambda: GLU(DIM, 5)), "n_experts must be at least 1"),
    (lambda: moe_plus_plus(DIM, [GLU(DIM, 5)], 2), "number of experts, 1, got 2"),
    (lambda: link_gates(layer()), "at least two PathwayRouters, got 1"),
    (lambda: linked()[1](torch.randn(3, DIM, dtype=torch.double)), "the same 3 tokens, got 0"),
])
def test_what_cannot_be(make, words):
    with pytest.raises(ValueError, match=words):
        make()
