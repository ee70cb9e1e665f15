from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian, jacobian

from netwright.errors import CannotReverse
from netwright.generative.flows import (
    AffineCouplingTransform,
    EBFlow,
    Flow,
    LinearTransform,
    SmoothLeakyReLU,
    score_matching_loss,
)


def layers(dim=3):
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2 * (dim - 1)))
    return [LinearTransform(dim, torch.randn(dim, dim)), SmoothLeakyReLU(),
            AffineCouplingTransform(net, (dim - 1, 1)), LinearTransform(dim), SmoothLeakyReLU(0.6)]


def flow(dim=3, **options):
    torch.manual_seed(0)
    return EBFlow(layers(dim), size=dim, **options).double()


X = torch.randn(6, 3, dtype=torch.double, generator=torch.Generator().manual_seed(0))


def by_hand(model, x):
    """The score and the trace of its Jacobian, sample by sample, from the true log-density."""
    def log_prob(one):
        return plain.log_prob(one[None])[0]
    plain = deepcopy(model)
    plain.stored = True
    scores = torch.stack([jacobian(log_prob, one) for one in x])
    return scores, torch.stack([hessian(log_prob, one).trace() for one in x])


def test_the_energy_is_the_density_up_to_the_normalizer():
    model = flow()
    density = Flow(model.transforms, size=3)
    torch.testing.assert_close(-model.energy(X) - model.log_normalizer(), density.log_prob(X),
                               rtol=1e-10, atol=1e-10)
    assert model.log_normalizer().abs() > 0.1
    side = torch.linspace(-60, 60, 801, dtype=torch.double)
    plane = flow(2)
    with torch.no_grad():
        mass = (-plane.energy(torch.cartesian_prod(side, side))).exp().sum() * 0.15 ** 2
    # The mass under exp(-E) is the normalizer.
    torch.testing.assert_close(mass.log(), plane.log_normalizer().detach(), rtol=0, atol=2e-3)


def test_inverse_log_determinant_and_gradients_are_a_flows():
    model, stored = flow(), flow(stored=True)
    z, log_det = model(X)
    assert (model.inverse(z) - X).abs().max() < 1e-10
    dense = [torch.linalg.slogdet(jacobian(lambda one: model(one[None])[0][0], x))[1] for x in X]
    torch.testing.assert_close(log_det, torch.stack(dense), rtol=1e-10, atol=1e-10)
    for part in (model, stored):
        for _ in range(2):
            part.log_prob(X).sum().backward()
    for mine, theirs in zip(model.parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-10)
    single = deepcopy(model).float()
    # Measured: 1e-6.
    assert (single.inverse(single(X.float())[0]) - X.float()).abs().max() < 1e-4


@pytest.mark.parametrize("slope", [0.01, 0.3, 0.9])
def test_the_leaky_relu_is_undone_far_out(slope):
    bend = SmoothLeakyReLU(slope)
    x = torch.cat([torch.linspace(-300, 300, 601), torch.linspace(-2, 2, 99)]).double()[None]
    assert ((bend.inverse(bend(x)[0]) - x).abs() / x.abs().clamp(min=1)).max() < 1e-10


def test_the_exact_loss_is_hyvarinens():
    model = flow()
    scores, traces = by_hand(model, X)
    expected = (0.5 * scores.square().sum(1) + traces).mean()
    torch.testing.assert_close(score_matching_loss(model, X, "exact"), expected, rtol=1e-9,
                               atol=1e-9)


def test_the_sliced_loss_is_right_on_average():
    model, draw = flow(), torch.Generator().manual_seed(0)
    true = score_matching_loss(model, X, "exact").detach()
    found = torch.stack([score_matching_loss(model, X.repeat(100, 1), "sliced",
                                             generator=draw).detach() for _ in range(40)])
    assert abs(found.mean() - true) < 3 * found.std() / 40 ** 0.5
    assert found.std() > 0


def test_the_finite_difference_is_the_sliced_loss_of_one_direction():
    model = flow()
    draws = [torch.Generator().manual_seed(7) for _ in range(2)]
    v = 2 * torch.randint(2, X.shape, generator=draws[0]).double() - 1
    at = X.clone().requires_grad_()
    (score,) = torch.autograd.grad(-model.energy(at).sum(), at, create_graph=True)
    (turned,) = torch.autograd.grad((score * v).sum(), at)
    expected = (0.5 * (score * v).sum(1).square() + (turned * v).sum(1)).mean()
    found = score_matching_loss(model, X, "finite-difference", noise=1e-3, generator=draws[1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_denoising_loss_is_its_formula():
    model = flow()
    drift = 0.2 * torch.randn(X.shape, generator=torch.Generator().manual_seed(3),
                              dtype=torch.double)
    scores, _ = by_hand(model, X + drift)
    expected = 0.5 * (scores + drift / 0.2 ** 2).square().sum(1).mean()
    found = score_matching_loss(model, X, "denoising", noise=0.2,
                                generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["exact", "sliced", "finite-difference", "denoising"])
def test_no_determinant_of_a_linear_layer_is_computed_in_training(kind, monkeypatch):
    model = flow()

    def refuse(*args):
        raise AssertionError("a determinant")

    with monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "slogdet", refuse)
        score_matching_loss(model, X, kind).backward()
        with pytest.raises(AssertionError, match="a determinant"):
            model.log_prob(X)
    # The last bias is a shift of the mean, which the score knows: all have gradients.
    assert all(p.grad is not None for p in model.transforms[0].parameters())


@pytest.mark.parametrize("kind", ["exact", "sliced", "denoising"])
def test_training_moves_towards_the_data(kind):
    torch.manual_seed(0)
    x = torch.randn(500, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]]) + 1
    torch.manual_seed(1)
    model = EBFlow([LinearTransform(2), SmoothLeakyReLU(), LinearTransform(2)], size=2)
    before = float(model.log_prob(x).mean().detach())
    true = float(torch.distributions.MultivariateNormal(x.mean(0), x.T.cov()).log_prob(x).mean())
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    for _ in range(120):
        optimizer.zero_grad()
        score_matching_loss(model, x, kind).backward()
        optimizer.step()
    # Measured: from 1.6 nats to less than 0.05 nats below the Gaussian.
    assert float(model.log_prob(x).mean().detach()) > true - 0.2 > before


def test_states_round_trip_and_lower_precision_trains():
    model, other = flow(), flow()
    nn.init.zeros_(other.transforms[0].bias)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.energy(X), other.energy(X))
    assert model.sample(5).shape == (5, 3)
    for dtype in (torch.float32, torch.bfloat16):
        low = deepcopy(model).to(dtype)
        score_matching_loss(low, X.to(dtype)).backward()
        low.log_prob(X.to(dtype)).mean().backward()
        assert all(p.grad.isfinite().all() for p in low.parameters())


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="no kind is called"):
        score_matching_loss(flow(), X, "guess")
    with pytest.raises(ValueError, match="noise must be above 0"):
        score_matching_loss(flow(), X, "denoising", noise=0)
    with pytest.raises(ValueError, match="slope must be above 0 and below 1"):
        SmoothLeakyReLU(1.0)
    with pytest.raises(ValueError, match="x must be"):
        flow().energy(torch.randn(4, 2))
    with pytest.raises(CannotReverse, match="not finite"):
        SmoothLeakyReLU().inverse(torch.tensor([[float("nan")]]))
