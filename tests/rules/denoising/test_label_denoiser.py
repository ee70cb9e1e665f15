import pytest
import torch
from torch import Generator

from netwright.rules.denoising.label_denoiser import (
    divergence_from_noise,
    integrate,
    nearest_embedding,
    spread_times,
)


@pytest.mark.parametrize(("heun", "order"), [(False, 1), (True, 2)])
def test_a_linear_equation_is_integrated_at_the_order_of_the_method(heun, order):
    """dw/dk = A w + b has the solution exp(A k) (w + A^-1 b) - A^-1 b."""
    generator = Generator().manual_seed(0)
    A = torch.randn(3, 3, generator=generator).double()
    b, w = torch.randn(2, 3, generator=generator).double()
    shift = torch.linalg.solve(A, b)
    exact = torch.linalg.matrix_exp(A * 1.5) @ (w + shift) - shift
    off = []
    for steps in (50, 100, 200):
        knots = 1.5 * torch.linspace(0, 1, steps + 1).double() ** 2  # unequal steps
        off.append((integrate(lambda w, _: A @ w + b, w, knots, heun=heun) - exact).norm())
    assert off[0] / off[1] == pytest.approx(2**order, rel=0.1)
    assert off[1] / off[2] == pytest.approx(2**order, rel=0.05)


def test_constant_slopes_are_integrated_exactly_and_linear_ones_by_heun():
    w, knots = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.0, 0.1, 0.7, 2.0]).double()
    torch.testing.assert_close(integrate(lambda w, _: torch.full_like(w, 3), w, knots, heun=False),
                               w + 6)
    torch.testing.assert_close(integrate(lambda w, k: knots[k].expand(2), w, knots, heun=True),
                               w + 2)


def test_the_divergence_is_that_of_two_normal_distributions():
    u, kept = torch.randn(7, 5).double(), torch.tensor(0.4).double()
    q = torch.distributions.Normal(u * kept.sqrt(), (1 - kept).sqrt())
    p = torch.distributions.Normal(torch.zeros_like(u), torch.ones_like(u))
    kl = torch.distributions.kl_divergence(q, p).sum(1).mean()
    torch.testing.assert_close(divergence_from_noise(u, kept), kl)


def test_the_nearest_embedding_wins():
    embedding, z = torch.randn(6, 4), torch.randn(50, 4)
    won = nearest_embedding(embedding)(z).argmax(1)
    assert torch.equal(won, torch.cdist(z, embedding).argmin(1))


def test_times_lie_evenly_and_start_anywhere():
    t = spread_times(8, torch.zeros(1), Generator().manual_seed(1))
    assert ((t >= 0) & (t < 1)).all()
    torch.testing.assert_close(t.sort().values.diff(), torch.full((7,), 1 / 8))
    starts = torch.stack([spread_times(1, torch.zeros(1), None)[0] for _ in range(2000)])
    assert starts.mean() == pytest.approx(0.5, abs=0.03)
