from copy import deepcopy

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.blocks.reversible import (
    DropVelocity,
    MomentumBlock,
    ReversibleSequential,
    StartVelocity,
)
from netwright.errors import CannotReverse


def dense(width=4):
    return nn.Sequential(nn.Linear(width, 2 * width), nn.BatchNorm1d(2 * width), nn.Tanh(),
                         nn.Dropout(0.3), nn.Linear(2 * width, width))


def conv(width=3):
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                         nn.Dropout(0.2), nn.Conv2d(width, width, 3, padding=1))


def stack(make, depth=5, **options):
    return [StartVelocity(), *[MomentumBlock(make(), **options) for _ in range(depth)]]


def step(network, x, *, seed=0):
    """Return output, gradients and buffers of a step whose dropout is drawn from `seed`."""
    torch.manual_seed(seed)
    y = network(x)
    y.square().sum().backward()
    return (y.detach(), [p.grad for p in network.parameters()],
            [b.clone() for b in network.buffers()])


def equal(got, wanted, tolerance=1e-10):
    return all(torch.allclose(g, w, atol=tolerance, rtol=tolerance)
               for g, w in zip(got, wanted, strict=True))


def test_the_update_is_the_papers():
    f = nn.Linear(3, 3)
    x, v = torch.randn(2, 3), torch.randn(2, 3)
    y = MomentumBlock(f, 0.7)(torch.cat([x, v], 1))
    moved = 0.7 * v + 0.3 * f(x)
    assert torch.allclose(y, torch.cat([x + moved, moved], 1), atol=1e-6)


def test_with_nearly_no_momentum_it_is_a_residual_block():
    f, x = nn.Linear(3, 3).double(), torch.randn(2, 3).double()
    y = nn.Sequential(StartVelocity(), MomentumBlock(f, 1e-9), DropVelocity())(x)
    assert torch.allclose(y, x + f(x), atol=1e-8)


@pytest.mark.parametrize("gamma", [0.5, 0.9, 1.0])
def test_inverse_of_forward(gamma):
    net = ReversibleSequential(*stack(dense, gamma=gamma, weight=0.1)).double().eval()
    x = torch.randn(6, 4).double()
    assert torch.allclose(net.inverse(net(x)), x, atol=1e-10, rtol=0)


def test_the_error_grows_as_gamma_to_the_minus_depth_and_exact_mode_has_none():
    torch.manual_seed(0)
    x = torch.randn(32, 4)

    def missed(gamma, depth):
        net = ReversibleSequential(*[MomentumBlock(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), gamma)
                                     for _ in range(depth)])
        start = StartVelocity()(x)
        with torch.no_grad():
            return float((net.inverse(net(start)) - start).abs().max())

    bound = {gamma: 20 * torch.finfo(torch.float32).eps * gamma ** -32 for gamma in (0.8, 0.9)}
    assert missed(0.9, 32) < bound[0.9] < missed(0.6, 32)  # the bound is one that can be missed
    assert missed(0.8, 32) < bound[0.8]


@pytest.mark.parametrize("gamma", [0.3, 0.9])
def test_exact_mode_reconstructs_bit_for_bit_at_any_gamma(gamma):
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    parts = stack(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()), 30, gamma=gamma)
    plain = nn.Sequential(*deepcopy(parts))
    _, wanted, _ = step(plain, x)
    _, got, _ = step(ReversibleSequential(*deepcopy(parts), exact=True), x)
    assert equal(got, wanted, 1e-6)
    if gamma < 0.5:  # without it the same network loses its gradients
        _, got, _ = step(ReversibleSequential(*parts), x)
        assert not equal(got, wanted, 1e-3)


@pytest.mark.parametrize("make", [dense, conv])
@pytest.mark.parametrize("needs", [False, True])
def test_gradients_and_buffers_are_those_of_autograd(make, needs):
    parts = stack(make)
    net = ReversibleSequential(*parts).double()
    plain = nn.Sequential(*deepcopy(parts)).double()
    x = torch.randn(6, 4) if make is dense else torch.randn(6, 3, 5, 4)
    x = x.double().requires_grad_(needs)
    before = x.detach().clone()
    y, gradients, buffers = step(net, x)
    of_input, x.grad = x.grad, None
    wanted, wanted_gradients, wanted_buffers = step(plain, x)
    assert equal([y], [wanted])
    assert equal(gradients, wanted_gradients)
    assert equal(buffers, wanted_buffers)
    assert equal([of_input], [x.grad]) if needs else of_input is None
    assert torch.equal(x, before)
    assert net.state_dict().keys() == plain.state_dict().keys()


def test_through_autograd_grad_with_frozen_parameters_and_a_velocity_of_its_own():
    parts = [StartVelocity(nn.Linear(4, 4)), *[MomentumBlock(dense()) for _ in range(3)]]
    parts[2].requires_grad_(False)
    net, plain = (ReversibleSequential(*parts).double(), nn.Sequential(*deepcopy(parts)).double())
    x = torch.randn(6, 4).double().requires_grad_()
    grads = []
    for network in (net, plain):
        torch.manual_seed(0)
        wanted = [x, *[p for p in network.parameters() if p.requires_grad]]
        grads.append(torch.autograd.grad(network(x).square().sum(), wanted))
    assert equal(*grads)


def test_memory_does_not_grow_with_depth():
    def cost(depth, rule):
        network = nn.Sequential(*stack(dense, depth), DropVelocity(), nn.Linear(4, 3))
        batch = torch.randn(256, 4), torch.randint(3, (256,))
        return nw.measure.cost(rule(network), batch, repeats=1, warmup=0)

    flat = [cost(depth, nw.rules.Reversible) for depth in (4, 32)]
    assert flat[1].saved_bytes == flat[0].saved_bytes
    assert flat[1].working_bytes < 1.2 * flat[0].working_bytes
    assert cost(32, nw.rules.Backprop).saved_bytes > 5 * flat[1].saved_bytes


def test_it_learns_and_its_f_matters():
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    y = (x.norm(dim=1) > 1.8).long()

    def accuracy(frozen):
        torch.manual_seed(0)
        blocks = [MomentumBlock(nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4)))
                  for _ in range(8)]
        for block in blocks:
            block.requires_grad_(not frozen)
        network = nn.Sequential(ReversibleSequential(StartVelocity(), *blocks), DropVelocity(),
                                nn.Linear(4, 2))
        optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 1e-2)
        rule = nw.rules.Reversible(network)
        for _ in range(60):
            optimizer.zero_grad()
            rule(x, y)
            optimizer.step()
        return float((network(x).argmax(1) == y).float().mean())

    assert accuracy(frozen=False) > 0.95
    assert accuracy(frozen=True) < 0.75


def test_along_the_last_dimension_in_bfloat16_and_after_a_round_trip():
    net = ReversibleSequential(StartVelocity(dim=-1), *[
        MomentumBlock(nn.Linear(4, 4), dim=-1) for _ in range(3)])
    x = torch.randn(2, 7, 4)
    copy = deepcopy(net)
    copy.load_state_dict(net.state_dict())
    assert torch.equal(copy(x), net(x))
    narrow = net.bfloat16()
    y = narrow(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.allclose(narrow.inverse(y), x.bfloat16(), atol=0.1)
    assert torch.equal(DropVelocity(-1)(StartVelocity(dim=-1)(x)), x)


def test_under_autocast_the_gradients_are_those_of_autograd():
    parts = stack(dense, 3)
    x = torch.randn(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        _, got, _ = step(ReversibleSequential(*deepcopy(parts)), x)
        _, wanted, _ = step(nn.Sequential(*parts), x)
    assert equal(got, wanted, 0.02)


@pytest.mark.parametrize("gamma", [0.0, -0.1, 1.1])
def test_a_gamma_that_loses_the_velocity_is_refused(gamma):
    with pytest.raises(ValueError, match=f"gamma must be above 0 and at most 1, got {gamma}"):
        MomentumBlock(nn.Linear(2, 2), gamma)


def test_a_weight_of_nothing_is_refused():
    with pytest.raises(ValueError, match="count nothing"):
        MomentumBlock(nn.Linear(2, 2), 1.0)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(CannotReverse, match="2 equal parts"):
        MomentumBlock(nn.Linear(2, 2))(torch.randn(2, 3))
    with pytest.raises(CannotReverse, match="f must keep the shape"):
        ReversibleSequential(MomentumBlock(nn.Conv1d(2, 2, 1, stride=2)))(torch.randn(2, 4, 4))
    with pytest.raises(CannotReverse, match="f must keep the shape"):  # would broadcast
        MomentumBlock(nn.Linear(2, 1))(torch.randn(2, 4))
    with pytest.raises(ValueError, match="keep the shape"):
        StartVelocity(nn.Linear(4, 3))(torch.randn(2, 4))
