from copy import deepcopy

import pytest
import torch
from torch import nn

from netwright.blocks.reversible import AdditiveCoupling, AffineCoupling, ReversibleSequential


def test_additive_formula():
    f, g = nn.Linear(3, 2), nn.Linear(2, 3)
    x = torch.randn(5, 5)
    y1 = x[:, :2] + f(x[:, 2:])
    expected = torch.cat([y1, x[:, 2:] + g(y1)], 1)
    block = AdditiveCoupling(f, g, sizes=(2, 3))
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(block.inverse(expected), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clamp", [2.0, 0.5, None])
def test_affine_formula(clamp):
    f, g = nn.Linear(3, 6), nn.Linear(3, 6)
    x = torch.randn(5, 6)

    def scaled(x, made):
        s, t = made.chunk(2, 1)
        s = s if clamp is None else clamp * torch.tanh(s / clamp)
        return x * s.exp() + t
    y1 = scaled(x[:, :3], f(x[:, 3:]))
    expected = torch.cat([y1, scaled(x[:, 3:], g(y1))], 1)
    torch.testing.assert_close(AffineCoupling(f, g, clamp=clamp)(x), expected)
    one = AffineCoupling(f, clamp=clamp)
    torch.testing.assert_close(one(x), torch.cat([y1, x[:, 3:]], 1))
    torch.testing.assert_close(one.inverse(one(x)), x, rtol=1e-5, atol=1e-5)


def test_volumes():
    x = torch.randn(6, dtype=torch.float64)
    for block, kept in ((AdditiveCoupling(nn.Linear(3, 3), nn.Linear(3, 3)), True),
                        (AffineCoupling(nn.Linear(3, 6), nn.Linear(3, 6)), False)):
        block = block.double()
        jacobian = torch.autograd.functional.jacobian(lambda x, b=block: b(x[None])[0], x)
        log_det = torch.linalg.slogdet(jacobian)[1]
        assert (log_det.abs() < 1e-10) == kept


def test_clamp_must_be_positive():
    with pytest.raises(ValueError, match="clamp must be above 0, got 0"):
        AffineCoupling(nn.Linear(3, 6), clamp=0)


@pytest.mark.parametrize(("make", "numbers"), [(AdditiveCoupling, 1), (AffineCoupling, 2)])
def test_under_autocast_couplings_are_undone_in_their_own_dtype(make, numbers):
    torch.manual_seed(0)
    network = ReversibleSequential(*[
        make(*[nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8 * numbers))
               for _ in range(2)]) for _ in range(4)])
    plain = nn.Sequential(*deepcopy(list(network)))
    x = torch.randn(32, 16)
    for each in (network, plain):
        with torch.autocast("cpu", torch.bfloat16):
            y = each(x)
        assert y.dtype == torch.float32
        y.square().sum().backward()
    largest = max(float(p.grad.abs().max()) for p in plain.parameters())
    for got, true in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, true.grad, rtol=0, atol=0.02 * largest)
