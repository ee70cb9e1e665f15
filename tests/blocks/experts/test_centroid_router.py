from copy import deepcopy

import pytest
import torch
from torch import nn

from netwright.blocks.experts import CentroidRouter, MixtureOfExperts
from netwright.blocks.feedforward import FeedForward

DIM = 4


def clusters(n=3, each=20):
    torch.manual_seed(0)
    middles = 10 * torch.randn(n, DIM)
    return middles, (middles[:, None] + 0.1 * torch.randn(n, each, DIM)).flatten(0, 1)


def test_the_nearest_is_chosen():
    torch.manual_seed(0)
    router, x = CentroidRouter(torch.randn(5, DIM)), torch.randn(30, DIM)
    nearest = [min(range(5), key=lambda e: float((row - router.centroids[e]).norm())) for row in x]
    routing = router(x)
    assert routing.experts.flatten().tolist() == nearest
    assert torch.equal(routing.weights, torch.ones(30, 1))
    assert not list(router.parameters())


def test_means_are_found():
    middles, x = clusters()
    router = CentroidRouter.of(x, 3, generator=torch.Generator().manual_seed(0))
    found = torch.cdist(middles, router.centroids)
    assert sorted(found.argmin(1).tolist()) == [0, 1, 2]
    assert found.amin(1).max() < 0.2
    # Each is the mean of what is nearest to it.
    nearest = router(x).experts.flatten()
    for e in range(3):
        torch.testing.assert_close(router.centroids[e], x[nearest == e].mean(0))
    # More experts than places
    assert CentroidRouter.of(torch.ones(5, DIM), 4).centroids.isfinite().all()


def test_means_are_drawn_from_their_generator():
    x, state = torch.randn(50, DIM), torch.get_rng_state()
    one, same, other = (CentroidRouter.of(
        x, 6, iterations=1, generator=torch.Generator().manual_seed(seed)).centroids
        for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_mixture_of_operators():
    _, x = clusters()
    router = CentroidRouter.of(x, 3)
    moe = MixtureOfExperts(DIM, lambda: FeedForward(DIM, 5, out=7), router, n_experts=3)
    y = moe(x)
    assert y.shape == (60, 7)
    assert moe.usage.load.tolist() == [20, 20, 20]
    for e, expert in enumerate(moe.experts):
        mine = router(x).experts.flatten() == e
        torch.testing.assert_close(y[mine], expert(x[mine]))
    given = x.clone().requires_grad_()
    moe(given).sum().backward()
    assert given.grad.any()
    copy = deepcopy(moe)
    copy.load_state_dict(moe.state_dict())
    assert torch.equal(copy(x), y)
    with pytest.raises(ValueError, match="must be finite"):
        moe(x * float("nan"))


def test_what_cannot_be():
    with pytest.raises(ValueError, match=r"centroids must be \(n_experts, dim\)"):
        CentroidRouter(torch.zeros(3))
    with pytest.raises(ValueError, match="centroids must be finite"):
        CentroidRouter(torch.full((2, 3), float("inf")))
    with pytest.raises(ValueError, match="n_experts must be between 1 and"):
        CentroidRouter.of(torch.zeros(3, 2), 4)
    with pytest.raises(ValueError, match=r"x must be \(tokens, 3\)"):
        CentroidRouter(torch.zeros(2, 3))(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="among the 2 experts"):
        MixtureOfExperts(2, [nn.Identity(), nn.Identity()], CentroidRouter(torch.zeros(3, 2)))


def test_an_offset_misroutes_none():
    """Distances by products lose what is small beside 300: 3 % went astray."""
    torch.manual_seed(0)
    centroids, x = 300 + torch.randn(8, 6), 300 + torch.randn(3000, 6)
    router = CentroidRouter(centroids)
    exact = (x.double()[:, None] - centroids.double()).square().sum(2).argmin(1)
    assert torch.equal(router(x).experts[:, 0], exact)
    found = CentroidRouter.of(x, 8, generator=torch.Generator().manual_seed(0))
    moved = CentroidRouter.of(x.double(), 8, generator=torch.Generator().manual_seed(0))
    spread = [float(torch.cdist(x.double(), c.centroids.double()).amin(1).square().mean())
              for c in (found, moved)]
    assert spread[0] == pytest.approx(spread[1], rel=1e-3)
