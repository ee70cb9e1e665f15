import copy
import math

import pytest
import torch

from netwright.generative.flows import (
    GaugeTransform,
    U1Action,
    autocorrelation_time,
    field_loss,
    flow_hmc,
    gauge_flow,
    hmc,
    plaquettes,
    smooth_charge,
    topological_charge,
)


def links(batch=3, size=(4, 6), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, 2, *size, generator=generator).double() * 2 - 1) * math.pi


def drawn_flow(size=(4, 6), depth=2, seed=0):
    flow = gauge_flow(size, depth).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in flow.parameters():
            p.normal_(0, 0.5, generator=generator)
    return flow


def turned(x, angles):
    """Return links `x` after a gauge transformation by `angles` at every site."""
    return torch.stack([x[:, 0] + angles - angles.roll(-1, 1),
                        x[:, 1] + angles - angles.roll(-1, 2)], 1)


def test_plaquettes_are_those_of_a_loop_over_sites():
    x = links()
    _, _, rows, columns = x.shape
    found = plaquettes(x)
    for a in range(rows):
        for b in range(columns):
            loop = (x[:, 0, a, b] + x[:, 1, (a + 1) % rows, b]
                    - x[:, 0, a, (b + 1) % columns] - x[:, 1, a, b])
            torch.testing.assert_close(found[:, a, b], loop)


def test_the_action_and_the_charge_do_not_see_gauge():
    x, angles = links(), 7 * links()[:, 0]
    action = U1Action(3.0)
    torch.testing.assert_close(action(turned(x, angles)), action(x))
    torch.testing.assert_close(topological_charge(turned(x, angles)), topological_charge(x))
    torch.testing.assert_close(smooth_charge(turned(x, angles)), smooth_charge(x))


def test_a_configuration_of_charge_one():
    size = 6
    x = torch.zeros(1, 2, size, size, dtype=torch.float64)
    field = 2 * math.pi / size**2
    x[0, 1] = field * torch.arange(size)[:, None]
    x[0, 0, -1] = -field * size * torch.arange(size)
    torch.testing.assert_close(plaquettes(x).cos(), torch.full((1, size, size),
                                                              math.cos(field)).double())
    assert float(topological_charge(x)) == 1
    assert float(topological_charge(-x)) == -1


@pytest.mark.parametrize("direction", [0, 1])
@pytest.mark.parametrize("parity", [0, 1])
def test_a_gauge_transform_moves_a_quarter_and_can_be_undone(direction, parity):
    torch.manual_seed(0)
    move = GaugeTransform(direction, parity).double()
    torch.nn.init.normal_(move.net[-1].weight, 0, 0.5)
    x = links(size=(6, 4))
    y, log_det = move(x)
    changed = y != x
    assert int(changed[0].sum()) == 12
    assert not changed[:, 1 - direction].any()
    torch.testing.assert_close(move.inverse(y), x, rtol=0, atol=1e-10)
    jacobian = torch.autograd.functional.jacobian(lambda v: move(v[None])[0][0].flatten(), x[0])
    _, dense = torch.linalg.slogdet(jacobian.flatten(1))
    torch.testing.assert_close(log_det[0], dense, rtol=0, atol=1e-10)


def test_a_gauge_flow_is_reversible_exact_and_equivariant():
    flow, x = drawn_flow(), links()
    y, log_det = flow(x)
    torch.testing.assert_close(flow.inverse(y), x, rtol=0, atol=1e-10)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0].flatten(), x[0])
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian.flatten(1))[1],
                               rtol=0, atol=1e-10)
    angles = links(seed=5)[:, 0]
    torch.testing.assert_close(flow(turned(x, angles))[0], turned(y, angles), rtol=0, atol=1e-10)
    torch.testing.assert_close(flow(turned(x, angles))[1], log_det, rtol=0, atol=1e-10)
    single = drawn_flow().float()
    torch.testing.assert_close(single.inverse(single(x.float())[0]), x.float(), rtol=0, atol=1e-4)


def test_gradients_of_the_field_loss_are_those_of_stored_activations():
    flow, x = drawn_flow(), links()
    stored = copy.deepcopy(flow)
    stored.stored = True
    for each in (flow, stored):
        field_loss(each, U1Action(2.0), x).backward()
    for got, true in zip(flow.parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(got.grad, true.grad, rtol=0, atol=1e-10)


def test_the_inverse_has_the_gradient_of_the_inverse_function():
    flow, y = drawn_flow(size=(2, 2), depth=1), links(1, (2, 2)).requires_grad_()
    def back(v):
        return flow.inverse(v[None])[0].flatten()
    found = torch.autograd.functional.jacobian(back, y[0]).flatten(1)
    x = flow.inverse(y)[0].detach()
    there = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0].flatten(), x)
    torch.testing.assert_close(found, there.flatten(1).inverse(), rtol=0, atol=1e-9)


def test_it_starts_as_the_identity():
    x = links()
    y, log_det = gauge_flow((4, 6)).double()(x)
    torch.testing.assert_close(y, x)
    assert not log_det.any()


def bessel_ratio(beta):
    angle = torch.linspace(0, math.pi, 2001, dtype=torch.float64)
    weight = (beta * angle.cos()).exp()
    return float((weight * angle.cos()).sum() / weight.sum())


def test_hmc_draws_plaquettes_as_the_theory_has_them():
    generator = torch.Generator().manual_seed(0)
    chain = hmc(U1Action(2.0), torch.zeros(64, 2, 6, 6), draws=120, steps=6, step_size=0.25,
                generator=generator)
    found = float(plaquettes(chain.samples[20:].flatten(0, 1)).cos().mean())
    assert abs(found - bessel_ratio(2.0)) < 0.01  # 36 plaquettes are nearly independent
    assert 0.5 < float(chain.accepted.float().mean()) < 0.99


def test_hmc_through_any_flow_draws_the_same_and_leaves_it_as_it_was():
    flow = drawn_flow(size=(4, 4), depth=1).float()
    with torch.no_grad():
        for p in flow.parameters():
            p *= 0.3
    frozen = next(flow.parameters()).requires_grad_(False)
    before = copy.deepcopy(flow.state_dict())
    generator = torch.Generator().manual_seed(0)
    plain = hmc(U1Action(2.0), torch.zeros(96, 2, 4, 4), draws=120, steps=4, step_size=0.3,
                generator=generator)
    chain = flow_hmc(flow, U1Action(2.0), plain.samples[-1], draws=30, steps=4, step_size=0.3,
                     generator=generator)
    assert 0.1 < float(chain.accepted.float().mean()) < 0.95
    found, wanted = (float(plaquettes(c.samples[10:].flatten(0, 1)).cos().mean())
                     for c in (chain, plain))
    assert abs(found - wanted) < 0.02
    assert [p.requires_grad for p in flow.parameters()] == [
        p is not frozen for p in flow.parameters()]
    assert all(p.grad is None for p in flow.parameters())
    for name, value in flow.state_dict().items():
        assert torch.equal(value, before[name])


def test_small_steps_conserve_the_energy():
    generator = torch.Generator().manual_seed(0)
    x = links(64).float()
    fine = hmc(U1Action(2.0), x, draws=1, steps=50, step_size=0.002, generator=generator)
    coarse = hmc(U1Action(2.0), x, draws=1, steps=5, step_size=1.5, generator=generator)
    assert bool(fine.accepted.all())
    assert not bool(coarse.accepted.any())


def test_the_autocorrelation_time_of_an_autoregression_is_known():
    generator = torch.Generator().manual_seed(0)
    keep = 0.8
    x, rows = torch.zeros(20), []
    for _ in range(4000):
        x = keep * x + torch.randn(20, generator=generator)
        rows.append(x)
    found = autocorrelation_time(torch.stack(rows))
    assert abs(found - (0.5 + keep / (1 - keep))) < 0.4
    assert abs(autocorrelation_time(torch.randn(4000, 20, generator=generator)) - 0.5) < 0.1


def test_what_does_not_fit_is_refused():
    x = torch.zeros(2, 2, 4, 4)
    with pytest.raises(ValueError, match=r"x must be \(batch, 2, A, B\)"):
        plaquettes(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="direction must be between 0 and 1, got 2"):
        GaugeTransform(2, 0)
    with pytest.raises(ValueError, match="even number of rows across direction 0"):
        GaugeTransform(0, 0)(torch.zeros(2, 2, 4, 5))
    for wrong, match in (({"draws": 0}, "draws must be at least 1, got 0"),
                         ({"steps": 0}, "steps must be at least 1, got 0"),
                         ({"step_size": 0.0}, "step_size must be above 0, got 0.0")):
        with pytest.raises(ValueError, match=match):
            hmc(U1Action(1.0), x, **{"draws": 1, "steps": 1, "step_size": 0.1, **wrong})
    with pytest.raises(ValueError, match="action of x must be finite, got 2 rows"):
        hmc(U1Action(1.0), x * math.nan, draws=1, steps=1, step_size=0.1)
    with pytest.raises(ValueError, match=r"series must be \(draws, chains\)"):
        autocorrelation_time(torch.zeros(5))
