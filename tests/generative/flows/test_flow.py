import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Uniform

import netwright as nw
from netwright.errors import CannotReverse
from netwright.generative.flows import (
    AdditiveCouplingTransform,
    AffineCouplingTransform,
    Flow,
    Permute,
    SplineCouplingTransform,
    Transform,
)

COUPLINGS = {"additive": (AdditiveCouplingTransform, 1), "affine": (AffineCouplingTransform, 2),
             "spline": (SplineCouplingTransform, 23)}
KINDS = list(COUPLINGS)


class Conditional(nn.Module):
    def __init__(self, size: int, outputs: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(size + 4, 16), nn.Tanh(), nn.Linear(16, outputs))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.net(torch.cat([x, condition], 1))


def coupling(kind, changed=3, passed=2, *, flip=False, dropout=0.0, condition=False):
    make, numbers = COUPLINGS[kind]
    net = nn.Sequential(nn.Linear(passed, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(dropout),
                        nn.Linear(16, numbers * changed))
    if condition:
        net = Conditional(passed, numbers * changed)
    return make(net, (passed, changed) if flip else (changed, passed), flip=flip)


def flow(kind, depth=3, *, seed=0, **options):
    torch.manual_seed(seed)
    parts = []
    for i in range(depth):
        flip = bool(i % 2)
        parts += [coupling(kind, *((2, 3) if flip else (3, 2)), flip=flip, **options),
                  Permute([4, 2, 0, 1, 3])]
    return Flow(parts, 5).double()


def samples(n=32, seed=1):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("kind", KINDS)
def test_inverse_undoes_the_flow(kind):
    density, x = flow(kind).eval(), samples()
    torch.testing.assert_close(density.inverse(density(x)[0]), x, rtol=0, atol=1e-10)
    torch.testing.assert_close(density(density.inverse(x))[0], x, rtol=0, atol=1e-10)
    single = density.float()
    torch.testing.assert_close(single.inverse(single(x.float())[0]), x.float(), rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_log_det_is_the_dense_jacobians(kind):
    density, x = flow(kind).eval(), samples(4)
    found = density.log_det(x)
    for row, log_det in zip(x, found, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v: density(v[None])[0][0], row)
        assert abs(float(torch.linalg.slogdet(jacobian)[1] - log_det.detach())) < 1e-10
    if kind == "additive":
        assert not found.any()
    else:
        assert found.abs().min() > 1e-3


@pytest.mark.parametrize("needs", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_stored_activations(kind, needs):
    reconstructed = flow(kind, dropout=0.3)
    stored = copy.deepcopy(reconstructed)
    stored.stored = True
    x = samples()
    before = x.clone()
    found = []
    for density in (reconstructed, stored):
        given = x.clone().requires_grad_(needs)
        torch.manual_seed(3)
        loss = -density.log_prob(given).mean()
        wanted = [*density.parameters(), *([given] if needs else [])]
        found.append((loss.detach(), torch.autograd.grad(loss, wanted), torch.rand(1)))
    (loss, gradients, drawn), (true_loss, true_gradients, true_drawn) = found
    torch.testing.assert_close(loss, true_loss, rtol=0, atol=1e-12)
    for got, true in zip(gradients, true_gradients, strict=True):
        torch.testing.assert_close(got, true, rtol=0, atol=1e-10)
    assert torch.equal(drawn, true_drawn)
    for got, true in zip(reconstructed.buffers(), stored.buffers(), strict=True):
        assert torch.equal(got, true)
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", KINDS)
def test_exact_gradients_are_bit_for_bit_in_float32(kind):
    exact = flow(kind, depth=12).float()
    exact.exact = True
    stored = copy.deepcopy(exact)
    stored.stored = True
    x = samples().float()
    for density in (exact, stored):
        (-density.log_prob(x).mean()).backward()
    for got, true in zip(exact.parameters(), stored.parameters(), strict=True):
        assert torch.equal(got.grad, true.grad)


class LogProb(nn.Module):
    def __init__(self, density: Flow) -> None:
        super().__init__()
        self.density = density

    def forward(self, x: Tensor) -> Tensor:
        return self.density.log_prob(x)


@pytest.mark.parametrize("kind", KINDS)
def test_stored_bytes_do_not_grow_with_depth(kind):
    def saved(depth, *, stored):
        density = flow(kind, depth)
        density.stored = stored
        x = samples(256)
        return nw.measure.cost(LogProb(density), (x, x), repeats=1, warmup=0,
                               loss=lambda out, _: -out.mean()).saved_bytes

    assert saved(16, stored=False) <= 1.05 * saved(2, stored=False)
    assert saved(16, stored=True) > 4 * saved(2, stored=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_density_integrates_to_one(kind):
    torch.manual_seed(0)
    make, numbers = COUPLINGS[kind]
    density = Flow([make(nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, numbers)), (1, 1),
                         flip=bool(i % 2)) for i in range(4)], 2).double()
    axis = torch.linspace(-12, 12, 481, dtype=torch.float64)
    with torch.no_grad():
        total = density.log_prob(torch.cartesian_prod(axis, axis)).exp().sum() * 0.05 ** 2
    assert abs(float(total) - 1) < 1e-3


def test_conditions_reach_the_nets_and_get_gradients():
    density = Flow([coupling("affine", condition=True), coupling("spline", condition=True)],
                   5).double()
    x, condition = samples(), torch.randn(32, 4).double().requires_grad_()
    (gradient,) = torch.autograd.grad(density.log_prob(x, condition).sum(), condition)
    stored = copy.deepcopy(density)
    stored.stored = True
    (true,) = torch.autograd.grad(stored.log_prob(x, condition).sum(), condition)
    torch.testing.assert_close(gradient, true, rtol=0, atol=1e-10)
    assert gradient.abs().max() > 1e-4
    z, _ = density(x, condition)
    torch.testing.assert_close(density.inverse(z, condition), x, rtol=0, atol=1e-10)


def test_samples_follow_the_density():
    density = flow("affine", 4).eval()
    drawn = density.sample(4000, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (4000, 5)
    assert not drawn.requires_grad
    with torch.no_grad():
        z, _ = density(drawn)
    assert abs(float(z.mean())) < 0.05
    assert abs(float(z.std()) - 1) < 0.05
    assert torch.equal(drawn, density.sample(4000, generator=torch.Generator().manual_seed(0)))


def test_training_finds_a_bent_density_that_one_gaussian_does_not():
    for seed in range(2):
        torch.manual_seed(seed)
        u = torch.randn(512, 2)
        x = torch.stack([u[:, 0], u[:, 0].square() - 1 + 0.3 * u[:, 1]], 1)
        density = Flow([AffineCouplingTransform(
            nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2)), (1, 1), flip=bool(i % 2))
            for i in range(4)], 2)
        optimizer = torch.optim.Adam(density.parameters(), 1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            loss = -density.log_prob(x).mean()
            loss.backward()
            optimizer.step()
        gaussian = torch.distributions.MultivariateNormal(x.mean(0), x.T.cov())
        assert float(loss.detach()) < float(-gaussian.log_prob(x).mean()) - 0.5


def test_another_base_is_sampled_and_summed():
    density = Flow([Permute([1, 0])], 2, Uniform(torch.zeros(2), torch.ones(2)))
    assert density.sample(7).shape == (7, 2)
    torch.testing.assert_close(density.log_prob(torch.full((3, 2), 0.5)), torch.zeros(3))


def test_without_transforms_the_log_prob_is_the_standard_normals():
    x = samples()
    torch.testing.assert_close(Flow([], 5).log_prob(x),
                               -0.5 * x.square().sum(1) - 2.5 * math.log(2 * math.pi))


def test_images_flow_through_couplings_of_channels():
    torch.manual_seed(0)
    for kind, (make, numbers) in COUPLINGS.items():
        net = nn.Conv2d(2, 2 * numbers, 3, padding=1)
        density = Flow([make(net, (2, 2)), Permute([3, 1, 0, 2])], (4, 6, 5)).double()
        x = torch.randn(3, 4, 6, 5).double()
        z, log_det = density(x)
        assert z.shape == x.shape
        assert log_det.shape == (3,)
        torch.testing.assert_close(density.inverse(z), x, rtol=0, atol=1e-10, msg=kind)
        density.log_prob(x).sum().backward()
        assert net.weight.grad.abs().max() > 0


def test_a_map_and_its_inverse_make_a_transform():
    class Sinh(Transform):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.7))

        def map(self, x, condition=None):
            return torch.sinh(x) * self.scale, (torch.cosh(x).log() + self.scale.log()).sum(1)

        def inverse(self, z, condition=None):
            return torch.asinh(z / self.scale)

    density = Flow([Sinh(), Sinh()], 3).double()
    stored = copy.deepcopy(density)
    stored.stored = True
    x = 0.3 * samples()[:, :3]
    for each in (density, stored):
        each.log_prob(x).mean().backward()
    for got, true in zip(density.parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(got.grad, true.grad, rtol=0, atol=1e-12)


def test_a_map_that_its_inverse_does_not_undo_is_refused():
    class Wrong(Transform):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def map(self, x, condition=None):
            return self.scale * x, 3 * self.scale.log().expand(len(x))

        def inverse(self, z, condition=None):
            return z / 3

    with pytest.raises(CannotReverse, match="Wrong of transform 0 is not invertible here"):
        Flow([Wrong()], 3).log_prob(torch.randn(4, 3))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"x must be \(batch, 5\)"):
        flow("affine").log_prob(torch.randn(3, 4).double())
    with pytest.raises(TypeError, match=r"Transform must define map\(x, condition\)"):
        Transform()(torch.randn(3, 2))
    net = nn.Linear(2, 3)
    for make, _ in COUPLINGS.values():
        wrong = make(net, (2, 2))
        with pytest.raises(ValueError, match="net must return"):
            wrong(torch.randn(3, 4))
        with pytest.raises(ValueError, match=r"x must have 4 entries .* sizes=\(2, 2\)"):
            wrong(torch.randn(3, 5))
        with pytest.raises(ValueError, match="sizes must be two numbers"):
            make(net, (2, 0))
    with pytest.raises(ValueError, match="clamp must be above 0, got 0"):
        AffineCouplingTransform(net, (1, 1), clamp=0)
    with pytest.raises(ValueError, match="bins must be between 2 and 500, got 1"):
        SplineCouplingTransform(net, (1, 1), bins=1)
    with pytest.raises(ValueError, match="bound must be above 0, got -1"):
        SplineCouplingTransform(net, (1, 1), bound=-1)
    with pytest.raises(ValueError, match=r"order must name each .* got \[0, 2\]"):
        Permute([0, 2])
    with pytest.raises(ValueError, match="x must have 2 entries in dimension 1"):
        Permute([1, 0])(torch.randn(3, 4))


def test_a_spline_of_zeros_is_the_identity_and_what_is_outside_stays():
    net = nn.Linear(1, 23).double()
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    x = torch.linspace(-9, 9, 50).double().repeat(2, 1).T.contiguous()
    z, log_det = SplineCouplingTransform(net, (1, 1))(x)
    torch.testing.assert_close(z, x, rtol=0, atol=1e-4)
    assert log_det.abs().max() < 1e-3
    nn.init.normal_(net.bias)
    z, log_det = SplineCouplingTransform(net, (1, 1))(x)
    outside = x[:, 0].abs() >= 5
    assert torch.equal(z[outside], x[outside])
    assert not log_det[outside].any()
    assert bool((z[1:, 0] > z[:-1, 0]).all())


def test_state_and_copies_go_round():
    density = flow("spline")
    density.log_prob(samples())
    again = flow("spline", seed=5)
    again.load_state_dict(density.state_dict())
    for each in (density, again):
        each.eval()
    x = samples()
    assert torch.equal(density.log_prob(x), again.log_prob(x))
    assert torch.equal(density.log_prob(x), copy.deepcopy(density).log_prob(x))


def two_bases():
    whole = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2) * 2)
    parts = torch.distributions.Normal(torch.ones(2), torch.ones(2))
    mixed = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(3)),
        torch.distributions.Independent(torch.distributions.Normal(torch.randn(3, 2), 1.0), 1))
    seen = torch.distributions.TransformedDistribution(
        torch.distributions.Independent(parts, 1),
        [torch.distributions.AffineTransform(torch.zeros(2), torch.ones(2))])
    return [whole, torch.distributions.Independent(parts, 1), mixed, seen]


@pytest.mark.parametrize("number", range(4))
def test_a_given_generator_decides_what_a_base_of_ones_own_draws(number):
    base = two_bases()[number]
    flow = nw.flows.Flow([nw.flows.Permute([1, 0])], 2, base)
    draws = [flow.sample(4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    state = torch.get_rng_state()
    flow.sample(4, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("number", range(4))
def test_a_base_follows_the_flow_to_another_dtype_and_the_given_one_stays(number):
    base = two_bases()[number]
    flow = nw.flows.Flow([nw.flows.Permute([1, 0])], 2, base).double()
    x = torch.randn(4, 2, dtype=torch.float64)
    assert flow.sample(3).dtype == torch.float64
    assert flow.log_prob(x).dtype == torch.float64
    assert torch.allclose(flow.log_prob(x).float(), base.log_prob(x.float()[:, [1, 0]]), atol=1e-5)
    assert base.sample().dtype == torch.float32
