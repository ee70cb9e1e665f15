from itertools import pairwise
from math import log

import pytest
import torch
from scipy import integrate, stats
from torch import Generator, Tensor, nn

import netwright as nw
from netwright.data import Batches
from netwright.errors import UnknownName
from netwright.measure import cost
from netwright.rules import DiffusionBlocks
from netwright.rules.denoising.diffusion_blocks import band_edges


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(),
                                   nn.Linear(2 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.inner(h)


def residual(depth: int = 4, *, size: int = 2, width: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, width), *[Residual(width) for _ in range(depth)],
                         nn.Linear(width, size))


def made(*, seed: int = 0, depth: int = 4, **options: object) -> DiffusionBlocks:
    torch.manual_seed(seed)
    rule = DiffusionBlocks(residual(depth), torch.zeros(2, 2), **options).double()
    with torch.no_grad():
        for p in rule.tell.parameters():  # so that the noise level is felt
            p.add_(torch.randn_like(p) / 4)
    return rule


def seeded() -> Generator:
    return Generator().manual_seed(3)


def points(n: int = 6) -> Tensor:
    return torch.randn(n, 2, generator=Generator().manual_seed(1)).double()


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.5, 2.0)])
@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_the_bands_have_equal_mass(mean, std, blocks):
    edges = band_edges(blocks, "equal_mass", mean, std, 0.002, 80.0)
    assert edges[0] == 80.0
    assert edges[-1] == 0.002
    assert edges == sorted(edges, reverse=True)
    cdf = [stats.norm.cdf(log(edge), mean, std) for edge in edges]
    masses = [high - low for high, low in pairwise(cdf)]
    for high, low, mass in zip(edges, edges[1:], masses, strict=False):
        assert mass == pytest.approx((cdf[0] - cdf[-1]) / blocks, rel=1e-9)
        # and by the density of sigma itself, without the cdf
        integral, _ = integrate.quad(lambda s: stats.norm.pdf(log(s), mean, std) / s, low, high)
        assert integral == pytest.approx(mass, rel=1e-6)


def test_uniform_bands_have_equal_width_in_log_sigma():
    edges = band_edges(4, "uniform", -1.2, 1.2, 0.002, 80.0)
    widths = torch.tensor(edges).log().diff()
    torch.testing.assert_close(widths, widths[:1].expand(4))


@pytest.mark.parametrize("partition", ["equal_mass", "uniform"])
def test_levels_are_drawn_from_the_log_normal_within_the_band_and_its_overlap(partition):
    rule = made(partition=partition, overlap=0.2, generator=seeded())
    for b in range(4):
        sigma = rule._drawn_levels(b, torch.zeros(5000, 2))
        high, low = rule.edges[b:b + 2]
        wider = (high / low) ** 0.2
        high, low = min(high * wider, 80.0), max(low / wider, 0.002)
        assert sigma.min() >= low * (1 - 1e-9)
        assert sigma.max() <= high * (1 + 1e-9)
        a, c = ((log(end) + 1.2) / 1.2 for end in (low, high))
        test = stats.kstest((sigma.log() + 1.2) / 1.2, stats.truncnorm(a, c).cdf)
        assert test.statistic < 2e-3  # they lie evenly, so it is much less than chance has it


def test_the_loss_is_edms_and_the_gradient_autograds():
    """The weighted error of the preconditioned denoiser, with F written out by hand."""
    rule, x = made(blocks=2), points()
    rule.generator = seeded()
    loss = rule(x, None, block=1)

    rule.generator = seeded()
    sigma = rule._drawn_levels(1, x)[:, None]
    z = x + sigma * torch.randn(6, 2, generator=rule.generator, dtype=torch.float64)
    s, entry, *inner, end = 0.5, *rule.network
    told = rule.level(torch.cat([f(a) for a in [(sigma.log() / 12 + 0.55)
                                                * (torch.pi / 2 * 2 ** torch.arange(8))]
                                 for f in (torch.sin, torch.cos)], 1))
    h = entry(z / (sigma**2 + s**2).sqrt())
    for layer, tell in zip(inner[2:], rule.tell[2:], strict=True):
        h = layer(h + tell(told))
    D = (s**2 * z + sigma * s * (sigma**2 + s**2).sqrt() * end(h)) / (sigma**2 + s**2)
    weight = (sigma**2 + s**2) / (sigma * s) ** 2
    expected = (weight * (D - x).square()).mean()
    torch.testing.assert_close(loss, expected.detach())
    used = [p for p in rule.parameters() if p.grad is not None]
    for p, g in zip(used, torch.autograd.grad(expected, used), strict=True):
        torch.testing.assert_close(p.grad, g)


def test_no_gradient_passes_between_blocks():
    rule = made(generator=seeded())
    x = points()
    for b in range(4):
        rule.zero_grad()
        rule(x, None, block=b)
        for i in range(4):
            parts = [*rule.network[1 + i].parameters(), *rule.tell[i].parameters()]
            assert all((p.grad is not None) == (i == b) for p in parts)
    rule.zero_grad()
    rule.generator = seeded()
    rule(x)
    before = [p.grad.clone() for p in rule.network[3].parameters()]
    with torch.no_grad():
        for other in (rule.network[1], rule.network[2], rule.network[4]):
            for p in other.parameters():
                p.add_(1)
    rule.zero_grad()
    rule.generator = seeded()
    rule(x)
    for p, g in zip(rule.network[3].parameters(), before, strict=True):
        assert torch.equal(p.grad, g)


def test_all_blocks_together_are_the_mean_of_each_alone():
    rule, x = made(), points()
    rule.generator = seeded()
    together = rule(x)
    found = {name: p.grad / 1 for name, p in rule.named_parameters() if p.grad is not None}
    rule.zero_grad()
    rule.generator = seeded()
    alone = torch.stack([rule(x, None, block=b) for b in range(4)])
    torch.testing.assert_close(together, alone.mean())
    for name, p in rule.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad / 4)


def test_what_is_stored_is_that_of_one_block():
    x = torch.randn(256, 2)
    saved = {blocks: cost(DiffusionBlocks(residual(16, width=32), x, blocks=blocks), (x, x),
                          repeats=1, warmup=0).saved_bytes for blocks in (1, 4, 16)}
    assert saved[4] < 0.33 * saved[1]
    assert saved[16] < 0.5 * saved[4]


def normal_data(rule: DiffusionBlocks, spread: float) -> None:
    """Let the rule know the best denoiser of N(0, spread^2)."""
    def best(z: Tensor, sigma: float, labels: Tensor | None = None,
             block: int | None = None) -> Tensor:
        return z * spread**2 / (spread**2 + sigma**2)
    rule.denoise = best


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_sampling_solves_the_flow_of_a_known_denoiser_at_the_order_of_the_solver(solver, order):
    """For N(0, s^2) the flow is dz/dsigma = z sigma / (s^2 + sigma^2), which is solved exactly."""
    rule = made(sigma_min=0.002, sigma_max=3.0)
    normal_data(rule, 0.5)
    z = torch.randn(4000, 2, generator=seeded(), dtype=torch.float64) * 3
    exact = z * 0.5 / (0.5**2 + 3.0**2) ** 0.5
    off = [(rule.sample(4000, steps, solver=solver, generator=seeded()) - exact).norm()
           for steps in (40, 80)]
    assert off[0] / off[1] == pytest.approx(2**order, rel=0.2)
    assert rule.sample(4000, 80, generator=seeded()).std() == pytest.approx(0.5, rel=0.03)


def test_sampling_takes_the_block_of_each_level():
    rule, called = made(), []
    for i, layer in enumerate(rule.network[1:5]):
        layer.register_forward_hook(lambda *_, i=i: called.append(i))
    rule.sample(3, 40, solver="euler")
    assert called == sorted(called)
    assert set(called) == {0, 1, 2, 3}
    z = points()
    for b, (high, low) in enumerate(zip(rule.edges, rule.edges[1:], strict=False)):
        sigma = (high * low) ** 0.5
        assert torch.equal(rule.denoise(z, sigma), rule.denoise(z, sigma, block=b))
        assert not torch.equal(rule.denoise(z, sigma), rule.denoise(z, sigma, block=(b + 1) % 4))


def ring(n: int) -> tuple[Tensor, Tensor]:
    """Two classes: a small ring left, a small ring right."""
    angle, y = torch.rand(n) * 2 * torch.pi, torch.randint(2, (n,))
    return torch.stack([angle.cos() / 10 + 1.2 * y - 0.6, angle.sin() / 10], 1), y


def trained(*, steps: int = 250, seed: int = 0, **options: object) -> DiffusionBlocks:
    torch.manual_seed(seed)
    rule = DiffusionBlocks(residual(width=32), torch.zeros(2, 2), blocks=2, **options)
    optimizer = torch.optim.Adam(rule.parameters(), lr=5e-3)
    for _ in range(steps):
        x, y = ring(128)
        optimizer.zero_grad()
        rule(x, y)
        optimizer.step()
    return rule


def off_ring(x: Tensor) -> float:
    radius = torch.stack([x[:, 0].abs() - 0.6, x[:, 1]], 1).norm(dim=1)
    return float((radius - 0.1).abs().mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_samples_lie_where_the_data_lie(seed):
    """Nearer to the rings than a normal distribution of the data's mean and spread does."""
    learned = off_ring(trained(seed=seed).sample(500, generator=seeded()))
    x, _ = ring(500)
    control = off_ring(x.mean(0) + torch.randn(500, 2) * x.std(0))
    assert learned < control / 2


def test_classes_are_drawn_and_predicted():
    rule = trained(num_classes=2)
    y = torch.arange(200) % 2
    drawn = rule.sample(200, labels=y, generator=seeded())
    assert ((drawn[:, 0] > 0) == (y == 1)).float().mean() > 0.9
    x, y = ring(300)
    assert (rule.predict(x).argmax(1) == y).float().mean() > 0.9
    assert rule(x, torch.full_like(y, -100)).isfinite()


def test_it_runs_in_fit():
    x, y = ring(60)
    rule = DiffusionBlocks(residual(), x[:2], blocks=2, num_classes=2)
    assert len(nw.fit(rule, Batches(x, y, 20), epochs=2, progress=False).epochs) == 2
    assert rule.predict(x).shape == (60, 2)


def test_images_and_sequences():
    cnn = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4),
                        nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(),
                        nn.Conv2d(4, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1))
    x = torch.randn(3, 1, 8, 8)
    rule = DiffusionBlocks(cnn, x, blocks=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert rule(x).isfinite()
        assert rule.sample(2, 4).shape == (2, 1, 8, 8)
    assert all(p.grad.dtype == torch.float32 for p in cnn.parameters())

    layers = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
              for _ in range(2)]
    x = torch.randn(3, 5, 4)
    rule = DiffusionBlocks(nn.Sequential(nn.Linear(4, 16), *layers, nn.Linear(16, 4)), x, blocks=2)
    assert rule(x).isfinite()
    assert rule.sample(2, 4).shape == (2, 5, 4)


@pytest.mark.parametrize(("options", "words"), [
    ({"blocks": 0}, "blocks must be at least 1, got 0"),
    ({"blocks": 5}, "blocks must be at most the 4 stages"),
    ({"overlap": -1}, "overlap must be at least 0"),
    ({"sigma_data": 0.0}, "sigma_data must be above 0"),
    ({"sigma_max": 0.001}, "sigma_max must be above 0.002, got 0.001; sigma_min=0.002"),
    ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
])
def test_options_that_do_not_exist(options, words):
    with pytest.raises(ValueError, match=words):
        DiffusionBlocks(residual(), torch.zeros(2, 2), **options)


def test_networks_and_names_that_do_not_fit():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"must return what it takes, \(2, 4\), got \(2, 3\)"):
        DiffusionBlocks(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), x)
    with pytest.raises(ValueError, match=r"must keep the shape \(2, 8\) .* got \(2, 6\)"):
        DiffusionBlocks(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(),
                                      nn.Linear(6, 4)), x)
    with pytest.raises(ValueError, match="example must be a tensor"):
        DiffusionBlocks(residual())
    with pytest.raises(UnknownName, match="did you mean uniform"):
        DiffusionBlocks(residual(), x[:, :2], partition="uniforms")
    rule = DiffusionBlocks(residual(), x[:, :2])
    with pytest.raises(UnknownName, match="did you mean euler"):
        rule.sample(2, solver="eula")
    with pytest.raises(ValueError, match="num_classes was None"):
        rule.predict(x[:, :2])
    with pytest.raises(ValueError, match="labels must be None or"):
        rule.sample(2, labels=torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(("y", "block", "words"), [
    (torch.tensor([0, 3]), None, "between 0 and 2"),
    (torch.tensor([0.0, 1.0]), None, "int64"),
    (torch.tensor([0]), None, r"y must be \(2,\)"),
    (None, None, r"y must be \(2,\), a class for each sample, got None"),
    (torch.tensor([0, 1]), 4, "block must be between 0 and 3, got 4"),
])
def test_bad_batches_change_nothing(y, block, words):
    rule = DiffusionBlocks(residual(), torch.zeros(2, 2), num_classes=3)
    with pytest.raises(ValueError, match=words):
        rule(torch.zeros(2, 2), y, block=block)
    assert all(p.grad is None for p in rule.parameters())
    with pytest.raises(ValueError, match="x must be a tensor"):
        rule((torch.zeros(2, 2),), torch.tensor([0, 1]))
