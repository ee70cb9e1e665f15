"""What every transform of images must do, whatever it is."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from netwright.generative.flows import (
    ActNorm,
    Flow,
    InvConv2d,
    InvertibleConv3x3,
    Part,
    QuadCoupling,
    Squeeze,
    image_coupling,
    multi_scale,
)
from netwright.measure import cost

SIZE = (4, 4, 6)


def noisy(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
                         nn.Dropout(0.2), nn.Conv2d(6, outputs, 1))


def level(channels):
    return [ActNorm(channels), InvConv2d(channels), image_coupling(channels, 4)]


MAKERS = {
    "InvertibleConv3x3": lambda: [InvertibleConv3x3(4), InvertibleConv3x3(4, "bottom-right")],
    "InvConv2d": lambda: [InvConv2d(4), InvConv2d(4, 2, "TR")],
    "QuadCoupling": lambda: [QuadCoupling(4, nets=[noisy(i, 2) for i in (1, 2, 3)])],
    "image_coupling": lambda: [image_coupling(4, 5), image_coupling(4, 5, flip=True)],
    "ActNorm": lambda: [ActNorm(4)],
    "Squeeze": lambda: [Squeeze(), Squeeze(back=True)],
    "Part": lambda: [Part([Squeeze(), ActNorm(12), image_coupling(12, 4), Squeeze(back=True)], 3)],
    "multi_scale": lambda: multi_scale(4, 1, level),
}


@pytest.fixture(params=MAKERS)
def flow(request):
    """A flow in float64 that has seen its first batch, and whose weights are then drawn anew."""
    torch.manual_seed(0)
    flow = Flow(MAKERS[request.param](), SIZE).double()
    flow(2 + 3 * torch.randn(5, *SIZE).double())
    for parameter in flow.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return flow


def batch(n=3, dtype=torch.float64):
    return torch.randn(n, *SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)


def gradients(flow, x, *, by_hand=False):
    """Return the loss, the gradients of input and parameters, and the buffers after the step."""
    flow = deepcopy(flow)
    torch.manual_seed(3)
    loss = -flow.log_prob(x).mean()
    wanted = [*([x] if x.requires_grad else []), *flow.parameters()]
    if by_hand:
        found = torch.autograd.grad(loss, wanted) if wanted else []
    else:
        if wanted:
            loss.backward()
        found = [t.grad for t in wanted]
        x.grad = None
    return loss.detach(), found, list(flow.buffers())


def test_the_inverse_undoes_it(flow):
    flow.eval()
    x = batch()
    z, _ = flow(x)
    assert z.shape == x.shape
    torch.testing.assert_close(flow.inverse(z), x, rtol=0, atol=1e-10)
    single = flow.float()
    x = batch(dtype=torch.float32)
    # Measured at most 5e-5, in multi_scale, whose drawn weights are far from rotations.
    torch.testing.assert_close(single.inverse(single(x)[0]), x, rtol=0, atol=2e-4)


def test_log_det_is_the_dense_jacobians(flow):
    flow.eval()
    x = batch(2)
    dense = torch.stack([torch.linalg.slogdet(torch.autograd.functional.jacobian(
        lambda one: flow(one[None])[0].flatten(), one).flatten(1))[1] for one in x])
    torch.testing.assert_close(flow.log_det(x), dense, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("needs", [True, False])
def test_gradients_are_plain_autograds(flow, needs):
    stored = deepcopy(flow)
    stored.stored = True
    x = batch().requires_grad_(needs)
    expected, wanted, buffers = gradients(stored, x)
    for by_hand in (False, True):
        loss, found, left = gradients(flow, x, by_hand=by_hand)
        torch.testing.assert_close(loss, expected)
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
        for mine, theirs in zip(left, buffers, strict=True):  # batch norm counted the batch once
            torch.testing.assert_close(mine, theirs)


def test_the_input_keeps_its_values_and_the_flow_its_state(flow):
    x = batch()
    before = x.clone()
    (-flow.log_prob(x).mean()).backward() if any(True for _ in flow.parameters()) else None
    assert torch.equal(x, before)
    again = deepcopy(flow)
    again.load_state_dict(flow.state_dict())
    flow.eval(), again.eval()
    assert torch.equal(again(x)[0], flow(x)[0])
    assert flow.sample(3).shape == (3, *SIZE)


def test_an_empty_batch_passes(flow):
    flow.eval()
    assert flow(batch(0))[0].shape == (0, *SIZE)


@pytest.mark.parametrize("make", [InvertibleConv3x3, InvConv2d, ActNorm,
                                  lambda channels: QuadCoupling(channels, 8)])
def test_stored_bytes_do_not_grow_with_depth(make):
    def saved(depth, stored=False):
        flow = Flow([make(4) for _ in range(depth)], (4, 16, 16), stored=stored)
        x = torch.randn(4, 4, 16, 16)
        return cost(flow, (x, x), loss=lambda out, _: out[0].square().sum() - out[1].sum(),
                    repeats=1, warmup=1).saved_bytes
    assert saved(8) <= 1.05 * saved(2)
    assert saved(8, stored=True) > 2 * saved(2)


def test_a_linear_density_integrates_to_one_on_a_grid():
    torch.manual_seed(0)
    flow = Flow([ActNorm(1), InvConv2d(1, 2), InvertibleConv3x3(1, "bottom-right"), ActNorm(1)],
                (1, 1, 2)).double()
    flow(1 + 0.7 * torch.randn(50, 1, 1, 2).double())
    for parameter in flow.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    side = torch.linspace(-8, 10, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side).view(-1, 1, 1, 2)
    with torch.no_grad():
        total = flow.log_prob(grid).exp().sum() * (side[1] - side[0]) ** 2
    torch.testing.assert_close(total.item(), 1.0, rtol=0, atol=1e-6)


def test_frozen_weights_get_no_gradient_and_the_others_theirs():
    torch.manual_seed(0)
    flow = Flow([InvConv2d(4), InvertibleConv3x3(4), QuadCoupling(4, 4)], SIZE)
    flow.transforms[1].weight.requires_grad_(False)
    (-flow.log_prob(batch(dtype=torch.float32)).mean()).backward()
    assert flow.transforms[1].weight.grad is None
    assert flow.transforms[0].weight.grad.abs().sum() > 0


def test_autocast_leaves_the_convolutions_precise():
    torch.manual_seed(0)
    flow = Flow([InvConv2d(4), InvertibleConv3x3(4), QuadCoupling(4, 4)], SIZE)
    x = batch(dtype=torch.float32)
    plain = flow.log_prob(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = flow.log_prob(x)
    (-mixed.mean()).backward()
    torch.testing.assert_close(mixed, plain, rtol=1e-2, atol=0.1)
    assert flow.transforms[0].weight.grad.isfinite().all()


def test_bfloat16():
    torch.manual_seed(0)
    flow = Flow([ActNorm(4), InvConv2d(4), InvertibleConv3x3(4), QuadCoupling(4, 4)],
                SIZE).bfloat16()
    x = batch(dtype=torch.bfloat16)
    z, log_det = flow(x)
    assert z.dtype == log_det.dtype == torch.bfloat16
    (z.square().sum() - log_det.sum()).backward()
    torch.testing.assert_close(flow.inverse(z), x, rtol=0.1, atol=0.15)
