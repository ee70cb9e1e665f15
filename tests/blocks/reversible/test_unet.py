from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from netwright.blocks.reversible import ReversibleMBConv, ReversibleSequential, ReversibleUNet
from netwright.errors import CannotReverse
from netwright.measure._allocations import Saved
from netwright.rules import Backprop, Reversible


def volumes(channels, dims, dtype=torch.float32, batch=2):
    return torch.randn(batch, channels, *[8] * dims, dtype=dtype)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_input_comes_back(dims, dtype, bound):
    blocks = [ReversibleMBConv(7, 2, dims, squeeze=0.25) for _ in range(4)]
    network = ReversibleSequential(*blocks).to(dtype).eval()
    x = volumes(7, dims, dtype)
    assert (network.inverse(network(x)) - x).abs().amax() <= bound * x.abs().amax()


@pytest.mark.parametrize("needs", [False, True], ids=["input fixed", "input learned"])
def test_a_blocks_gradients_are_autograds_with_dropout_and_batch_norm(needs):
    def drops(channels):
        return nn.Sequential(nn.BatchNorm3d(channels), nn.Dropout(0.2))
    network = ReversibleSequential(*[ReversibleMBConv(6, 2, norm=drops) for _ in range(3)]).double()
    x = volumes(6, 3, torch.float64).requires_grad_(needs)
    x2, reference, before = x.detach().clone().requires_grad_(needs), deepcopy(network), x.tolist()
    for seed in (1, 2):
        torch.manual_seed(seed)
        mine = network(x)
        torch.manual_seed(seed)
        theirs = x2
        for block in reference:  # the published recursion, by hand
            a, b = theirs[:, :3], theirs[:, 3:]
            a = a + block.f(b)
            theirs = torch.cat([a, b + block.g(a)], 1)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
        mine.pow(3).mean().backward()
        theirs.pow(3).mean().backward()
    for p, q in zip([*network.parameters(), *network.buffers()],
                    [*reference.parameters(), *reference.buffers()], strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-10)
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-10)
    assert x.tolist() == before
    if needs:
        torch.testing.assert_close(x.grad, x2.grad, rtol=0, atol=1e-10)


def unet(depth=1, dims=3, **options):
    return ReversibleUNet(2, 3, (4, 6), (depth, depth), dims=dims, expand=2, **options)


def same_weights(network, **options):
    other = unet(len(network.encoder[0]), network.dims, **options).to(next(network.parameters()))
    other.load_state_dict(network.state_dict())
    return other


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_networks_gradients_are_the_stored_ones(dims):
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    network = unet(2, dims, norm=norm).double()
    stored = same_weights(network, stored=True, norm=norm)
    x = volumes(2, dims, torch.float64).requires_grad_()
    mine, theirs = network(x), stored(x)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    mine = torch.autograd.grad(mine.square().mean(), [x, *network.parameters()])
    theirs = torch.autograd.grad(theirs.square().mean(), [x, *stored.parameters()])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    for a, b in zip(network.buffers(), stored.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_under_rules_and_frozen():
    network, y = unet().double(), torch.randint(3, (2, 8, 8, 8))
    network.encoder[1].requires_grad_(False)
    x = volumes(2, 3, torch.float64)
    Backprop(network, loss=cross_entropy)(x, y)
    expected = [p.grad for p in network.parameters()]
    network.zero_grad()
    Reversible(network, x, loss=cross_entropy)(x, y)
    for p, g in zip(network.parameters(), expected, strict=True):
        assert (p.grad is None) == (g is None)
        if g is not None:
            torch.testing.assert_close(p.grad, g, rtol=0, atol=1e-10)
    assert sum(g is None for g in expected) == len([*network.encoder[1].parameters()])


def saved(network, x):
    network(x).square().mean().backward()  # the first call also looks at every block
    ledger = Saved([*network.parameters(), *network.buffers()])
    with ledger.counting():
        network(x).square().mean().backward()
    return ledger.peak


def test_stored_bytes_are_flat_in_the_blocks_of_a_resolution():
    x = volumes(2, 3, batch=1)
    flat = [saved(unet(depth), x) for depth in (1, 4)]
    assert flat[1] <= 1.02 * flat[0]
    stored = [saved(unet(depth, stored=True), x) for depth in (1, 4)]
    assert stored[1] > 3 * stored[0]
    assert stored[1] > 10 * flat[1]


def test_no_blocks_one_resolution_exact_autocast_and_bfloat16():
    x = volumes(2, 3)
    assert unet(0)(x).shape == (2, 3, 8, 8, 8)
    assert ReversibleUNet(2, 3, (4,), (1,))(x).shape == (2, 3, 8, 8, 8)
    exact, cast, low = unet(2, exact=True), unet(2), unet(2).bfloat16()
    exact(x).square().mean().backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = cast(x).square().mean()
    loss.backward()
    low(x.bfloat16()).square().mean().backward()
    for network in (exact, cast, low):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert torch.equal(deepcopy(exact)(x), exact(x))


def test_it_finds_the_brighter_ball_and_cannot_with_shuffled_voxels():
    grid = torch.stack(torch.meshgrid(*[torch.arange(8.0)] * 3, indexing="ij"))
    centres = torch.randint(2, 6, (6, 3, 1, 1, 1))
    y = ((grid - centres).square().sum(1) < 5).long()
    x = torch.randn(6, 2, 8, 8, 8) + y[:, None]

    def dice(target):
        torch.manual_seed(0)
        network = unet(1)
        optimizer = torch.optim.Adam(network.parameters(), 1e-2)
        for _ in range(15):
            optimizer.zero_grad()
            cross_entropy(network(x[:4]), target[:4]).backward()
            optimizer.step()
        found = network(x[4:]).argmax(1) == 1
        return float(2 * (found & (y[4:] == 1)).sum() / (found.sum() + y[4:].sum()))
    shuffled = y.flatten()[torch.randperm(y.numel())].view_as(y)
    assert dice(y) > 0.5
    assert dice(shuffled) < 0.2


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="depths must name one number for each of the 2 widths"):
        ReversibleUNet(1, 1, (4, 8), (1,))
    with pytest.raises(ValueError, match="depths must be at least 0"):
        ReversibleUNet(1, 1, (4, 8), (1, -1))
    with pytest.raises(ValueError, match="dims must be between 1 and 3, got 4"):
        ReversibleUNet(1, 1, (4,), (0,), dims=4)
    with pytest.raises(ValueError, match=r"multiples of 2\), got \(2, 2, 8, 8, 7\)"):
        unet()(volumes(2, 3)[..., :7])
    with pytest.raises(ValueError, match="channels must be at least 2"):
        ReversibleMBConv(1)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        ReversibleMBConv(4, kernel_size=2)
    with pytest.raises(CannotReverse, match=r"splits its input into \[3, 3\]"):
        ReversibleMBConv(6)(volumes(5, 3))
