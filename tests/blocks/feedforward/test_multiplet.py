from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from netwright.blocks.feedforward import LehmerMultiplet
from netwright.errors import UnknownName

PAIRS = ((2.0, -1.0), (0.5, 0.5), (1.0, 0.0), (-3.0, 2.0))


def layer(mean="lehmer", seed=0, **options):
    torch.manual_seed(seed)
    exponents = (-2.0, 0.0, 0.5, 3.0) if mean == "lehmer" else PAIRS
    return LehmerMultiplet(4, 3, exponents, mean=mean, **options).double()


@pytest.mark.parametrize("mean", ["lehmer", "gini"])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4), (0, 4)])
def test_it_is_its_formula(mean, constant, shape):
    one = layer(mean, constant=constant)
    x = torch.rand(shape, dtype=torch.double) + 0.1
    inputs = torch.cat([x, torch.ones_like(x[..., :1])], -1) if constant else x
    columns = []
    for w in one.logits.softmax(1):
        for e in one.exponents:
            r, s = (e, e - 1) if mean == "lehmer" else e
            if r == s:
                powers = w * inputs ** r
                columns.append(((powers * inputs.log()).sum(-1) / powers.sum(-1)).exp())
            else:
                columns.append(((w * inputs ** r).sum(-1) / (w * inputs ** s).sum(-1))
                               ** (1 / (r - s)))
    torch.testing.assert_close(one(x), torch.stack(columns, -1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mean", ["lehmer", "gini"])
def test_gradcheck_of_the_analytic_derivatives(mean):
    one = layer(mean)
    x = (torch.rand(3, 4, dtype=torch.double) + 0.2).requires_grad_()

    def call(x, logits, exponents):
        return torch.func.functional_call(one, {"logits": logits, "exponents": exponents}, (x,))

    given = (x, one.logits, one.exponents)
    assert torch.autograd.gradcheck(call, given)
    if mean == "lehmer":
        assert torch.autograd.gradgradcheck(call, given)


def test_gini_means_are_smooth_where_exponents_meet():
    x = torch.rand(5, 4, dtype=torch.double) + 0.1
    one, values, slopes = layer("gini"), [], []
    for apart in (0.0, 1e-7, 1e-5, 3e-5):
        with torch.no_grad():
            one.exponents.copy_(torch.tensor(
                [[1 + apart / 2, 1 - apart / 2]] * 4, dtype=torch.double))
        values.append(one(x))
        slopes.append(torch.autograd.grad(one(x).sum(), one.exponents)[0])
    for value, slope in zip(values, slopes, strict=True):
        torch.testing.assert_close(value, values[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(slope, slopes[0], rtol=1e-4, atol=1e-4)


def test_outputs_are_means_at_every_exponent():
    x = torch.rand(50, 4)
    x[0], x[1, :2], x[2] = 0, 0, 1e6
    x.requires_grad_()
    for mean, exponents in (("lehmer", (-500.0, -1.0, 0.0, 1.0, 2.0, 500.0)),
                            ("gini", ((300.0, -300.0), (0.0, 0.0), (500.0, 499.0)))):
        one = LehmerMultiplet(4, 3, exponents, mean=mean)
        y = one(x)
        least, most = (f(x.detach().clamp(min=1e-6), 1, keepdim=True)
                       for f in (torch.amin, torch.amax))
        assert (y >= least * (1 - 1e-3)).all()
        assert (y <= most * (1 + 1e-3)).all()
        grads = torch.autograd.grad(y.log().sum(), [x, *one.parameters()])
        assert all(g.isfinite().all() for g in grads)
    extremes = LehmerMultiplet(4, 3, (-500.0, 500.0))(x[3:])
    torch.testing.assert_close(extremes[:, ::2], x[3:].amin(1, keepdim=True).expand(-1, 3),
                               rtol=0.02, atol=0)
    torch.testing.assert_close(extremes[:, 1::2], x[3:].amax(1, keepdim=True).expand(-1, 3),
                               rtol=0.02, atol=0)


def test_it_learns_a_maximum_where_fixed_exponents_do_not():
    x = torch.rand(200, 3) + 0.1
    y = x.amax(1, keepdim=True)

    def error(seed, fixed):
        torch.manual_seed(seed)
        one = LehmerMultiplet(3, 1, (1.0,))
        one.exponents.requires_grad_(not fixed)
        optimizer = torch.optim.Adam([p for p in one.parameters() if p.requires_grad], 0.3)
        for _ in range(60):
            optimizer.zero_grad()
            loss = mse_loss(one(x), y)
            loss.backward()
            optimizer.step()
        return loss.item()

    learnt, fixed = ([error(seed, f) for seed in range(2)] for f in (False, True))
    # Measured over six seeds: below 0.0013, and 0.067.
    assert max(learnt) < 0.1 * min(fixed)


def test_lower_precision_states_and_draws():
    one, other = (LehmerMultiplet(4, 3, generator=torch.Generator().manual_seed(s))
                  for s in (1, 2))
    x = torch.rand(5, 4)
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), deepcopy(other)(x))
    low = deepcopy(one).bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), one(x), rtol=0.05, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        network = nn.Sequential(one, nn.Linear(12, 1))
        network(x).float().sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_what_it_cannot_build_is_named():
    with pytest.raises(ValueError, match="units must be at least 1, got 0"):
        LehmerMultiplet(2, 0)
    with pytest.raises(ValueError, match="floor must be above 0"):
        LehmerMultiplet(2, 1, floor=0)
    with pytest.raises(UnknownName, match="lemer"):
        LehmerMultiplet(2, 1, mean="lemer")
    for mean, exponents in (("lehmer", ()), ("lehmer", ((1.0, 0.0),)), ("gini", (1.0,))):
        with pytest.raises(ValueError, match="exponents of mean"):
            LehmerMultiplet(2, 1, exponents, mean=mean)
    with pytest.raises(ValueError, match=r"x must be \(\*, 2\)"):
        LehmerMultiplet(2, 1)(torch.zeros(3, 4))
