import copy
import math

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.errors import CannotReverse
from netwright.generative.flows import LeapfrogLayer, LeapfrogSampler, U1Action, hmc


def quartic(x):
    return x.square().sum(1) / 2 + x.pow(4).sum(1) / 10


CASES = {"angles": (U1Action(2.0), (2, 2, 4), True), "numbers": (quartic, (5,), False)}


def sampler(case, layers=3, seed=0, scale=0.3):
    action, size, periodic = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    made = LeapfrogSampler(action, size, layers=layers, hidden=16, periodic=periodic,
                           generator=generator).double()
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim:
                p.normal_(0, scale, generator=generator)
    return made


def state(case, batch=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x, v = torch.randn(2, batch, *CASES[case][1], generator=generator).double()
    return 2 * x, v, torch.zeros(batch).double()


@pytest.mark.parametrize("case", CASES)
def test_layers_can_be_undone(case):
    layers, given = sampler(case).layers, state(case)
    made = layers(given)
    for got, true in zip(layers.inverse(made), given, strict=True):
        torch.testing.assert_close(got, true, rtol=0, atol=1e-10)
    single = tuple(t.float() for t in given)
    layers = layers.float()
    for got, true in zip(layers.inverse(layers(single)), single, strict=True):
        torch.testing.assert_close(got, true, rtol=0, atol=2e-3)


@pytest.mark.parametrize("case", CASES)
def test_log_det_is_the_dense_jacobians(case):
    (x, v, zero), layers = state(case, 1), nn.Sequential(*sampler(case).layers)
    entries = x.numel()

    def moved(both):
        new = layers((both[:entries].view_as(x), both[entries:].view_as(v), zero))
        return torch.cat([new[0].flatten(), new[1].flatten()])

    both = torch.cat([x.flatten(), v.flatten()])
    jacobian = torch.autograd.functional.jacobian(moved, both)
    log_det = layers((x, v, zero))[2][0].detach()
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_det, rtol=0, atol=1e-10)
    assert abs(float(log_det)) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_stored_activations(case):
    reconstructed = sampler(case, scale=0.1)
    stored = copy.deepcopy(reconstructed)
    stored.layers = nn.Sequential(*stored.layers)
    for each in (reconstructed, stored):
        x, v, log_det = each.layers(state(case))
        (x.sin().sum() + v.sin().sum() + log_det.sum()).backward()
    for got, true in zip(reconstructed.parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(got.grad, true.grad, rtol=1e-10, atol=1e-10)


def test_stored_bytes_do_not_grow_with_the_layers():
    class Moved(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = sampler("numbers", layers).layers

        def forward(self, x):
            return self.layers((x, x, x.new_zeros(len(x))))[0]

    def saved(layers):
        x = state("numbers", 256)[0]
        return nw.measure.cost(Moved(layers), (x, x), repeats=1, warmup=0,
                               loss=lambda out, _: out.sum()).saved_bytes

    assert saved(12) <= 1.05 * saved(3)


def test_at_the_start_it_is_hybrid_monte_carlos_leapfrog():
    for case, (action, size, periodic) in CASES.items():
        layer = LeapfrogLayer(action, size, step_size=0.2, periodic=periodic).double()
        x, v, zero = state(case)
        got = layer((x, v, zero))
        force = layer.force(x)
        half = v - 0.1 * force
        new = x + 0.2 * half
        torch.testing.assert_close(got[0], new)
        torch.testing.assert_close(got[1], half - 0.1 * layer.force(new))
        assert got[2].abs().max() < 1e-14


def test_draws_are_from_the_target_whatever_the_networks_are():
    made = sampler("numbers", scale=0.15).float()
    with torch.no_grad():
        for layer in made.layers:
            layer.log_step.fill_(math.log(0.4))
    generator = torch.Generator().manual_seed(0)
    start = torch.zeros(256, 5)
    drawn = made.sample(start, 80, generator=generator)
    true = hmc(quartic, start, draws=80, steps=5, step_size=0.4, generator=generator)
    assert 0.2 < float(drawn.accepted.float().mean()) < 0.99
    spread, wanted = (float(c.samples[20:].square().mean()) for c in (drawn, true))
    assert abs(spread - wanted) < 0.02
    assert abs(float(drawn.samples[20:].mean())) < 0.02


def test_training_makes_a_slow_statistic_move_more():
    """A narrow direction keeps steps short, so that the wide one is slow until it is learned."""
    widths = torch.tensor([0.1, 1.0])

    def action(x):
        return (x / widths).square().sum(1) / 2

    def slow(x):
        return x[:, 1]

    def mean_move(made, x):
        torch.manual_seed(5)
        with torch.no_grad():
            return -float(made.loss(x, slow)[0])

    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.randn(256, 2) * widths
        made = LeapfrogSampler(action, 2, layers=3, hidden=16, step_size=0.1)
        before = mean_move(made, x)
        optimizer = torch.optim.Adam(made.parameters(), 1e-2)
        for _ in range(40):
            optimizer.zero_grad()
            loss, after = made.loss(x, slow)
            loss.backward()
            optimizer.step()
            x = after
        assert mean_move(made, torch.randn(256, 2) * widths) > 2.5 * before
        drawn = made.sample(x, 60).samples[10:].flatten(0, 1)
        torch.testing.assert_close(drawn.std(0) / widths, torch.ones(2), rtol=0, atol=0.1)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="step_size must be above 0, got 0"):
        LeapfrogLayer(quartic, 4, step_size=0)
    with pytest.raises(ValueError, match=r"size must have at least 2 entries.*got \(1,\)"):
        LeapfrogLayer(quartic, 1)
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        LeapfrogSampler(quartic, 4, layers=0)
    made = LeapfrogSampler(quartic, 4, layers=2)
    with pytest.raises(ValueError, match=r"x and v must be \(batch, 4\)"):
        made.sample(torch.zeros(3, 5), 1)
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        made.sample(torch.zeros(3, 4), 0)
    made.layers[1].log_step.data.fill_(200.0)
    with pytest.raises(CannotReverse, match="is not invertible here"):
        made.layers((torch.randn(3, 4), torch.randn(3, 4), torch.zeros(3)))
