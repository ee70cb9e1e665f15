from copy import deepcopy

import pytest
import torch

from netwright.generative.flows import ActNorm, Flow


def batch():
    return 5 + 3 * torch.randn(20, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("stored", [True, False])
def test_the_first_batch_comes_out_normalised_and_the_second_does_not(stored):
    flow = Flow([ActNorm(3)], (3, 4, 4), stored=stored).double()
    z, _ = flow(batch())
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.ones(3).double())
    z, _ = flow(batch() + 1)
    assert z.mean() > 0.2


def test_it_starts_once_though_its_step_runs_again_on_the_way_back():
    torch.manual_seed(0)
    flow = Flow([ActNorm(3), ActNorm(3)], (3, 4, 4)).double()
    z, log_det = flow(batch())
    started = [p.detach().clone() for p in flow.parameters()]
    (0.5 * z.square().sum() - log_det.sum()).backward()
    for parameter, at_first in zip(flow.parameters(), started, strict=True):
        assert torch.equal(parameter, at_first)
    # With z of mean 0 and deviation 1, both losses' parts cancel in the scale's gradient.
    torch.testing.assert_close(flow.transforms[1].log_scale.grad, torch.zeros(3).double(),
                               rtol=0, atol=1e-9)


def test_the_gradient_of_the_first_batch_is_plain_autograds():
    found = []
    for stored in (True, False):
        flow = Flow([ActNorm(3), ActNorm(3)], (3, 4, 4), stored=stored).double()
        z, log_det = flow(batch())
        ((z ** 3).sum() - log_det.sum()).backward()
        found.append([p.grad for p in flow.parameters()])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-8)


def test_what_is_loaded_copied_or_not_in_training_does_not_start():
    layer = ActNorm(3).double()
    layer(batch())
    for other in (deepcopy(layer), ActNorm(3).double()):
        other.load_state_dict(layer.state_dict())
        other(batch() + 7)
        assert torch.equal(other.bias, layer.bias)
    assert not ActNorm(3).eval().ready
    quiet = ActNorm(3).double().eval()
    assert torch.equal(quiet(batch())[0], batch())
    assert not quiet.ready


def test_a_constant_channel_is_shifted_and_not_scaled():
    layer = ActNorm(2)
    z, _ = layer(torch.full((4, 2, 3, 3), 1.1))
    assert torch.equal(layer.log_scale, torch.zeros(2))
    torch.testing.assert_close(z, torch.zeros(4, 2, 3, 3))


def test_vectors_and_sequences_are_normalised_too():
    for shape in ((50, 3), (50, 3, 7)):
        z, log_det = ActNorm(3)(4 + 2 * torch.randn(shape))
        torch.testing.assert_close(z.transpose(0, 1).flatten(1).std(1, correction=0),
                                   torch.ones(3))
        assert log_det.shape == (50,)


def test_it_trains_in_place_of_a_fixed_scale():
    torch.manual_seed(0)
    flow = Flow([ActNorm(1)], (1, 1, 1))
    optimizer = torch.optim.Adam(flow.parameters(), 0.05)
    flow(torch.randn(64, 1, 1, 1))
    for _ in range(200):
        optimizer.zero_grad()
        (-flow.log_prob(3 + 2 * torch.randn(64, 1, 1, 1)).mean()).backward()
        optimizer.step()
    assert abs(flow.sample(4000).mean() - 3) < 0.3
    assert abs(flow.sample(4000).std() - 2) < 0.3


def test_errors():
    with pytest.raises(ValueError, match=r"x must be \(batch, 3, \*\)"):
        ActNorm(3)(torch.randn(2, 4, 5))
    with pytest.raises(ValueError, match="must hold a sample"):
        ActNorm(3)(torch.randn(0, 3, 5))
