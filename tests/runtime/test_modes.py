import pytest
import torch
from torch import nn

from netwright.runtime.modes import evaluating, rehearsing, same_buffers, training
from netwright.runtime.random_state import random_state, same_random_state, set_random_state


@pytest.mark.parametrize(("guard", "inside"), [(evaluating, False), (training, True)])
def test_every_module_gets_its_own_mode_back(guard: type, inside: bool) -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    network[1][1].eval()
    before = [m.training for m in network.modules()]
    seen = []

    def fail() -> None:
        with guard(network):
            seen.extend(m.training for m in network.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [inside] * 5
    assert [m.training for m in network.modules()] == before


def test_random_state() -> None:
    state = random_state()
    first = torch.rand(3)
    set_random_state(state)
    assert torch.equal(torch.rand(3), first)
    with same_random_state():
        second = torch.rand(3)
    assert torch.equal(torch.rand(3), second)
    assert not torch.equal(first, second)


def test_buffers_are_put_back_and_graphs_that_saved_them_stay_valid() -> None:
    norm = nn.BatchNorm1d(2)
    output = norm.eval()(torch.randn(4, 2))
    running, mean = norm.running_mean, norm.running_mean.clone()
    with same_buffers(norm):
        norm.train()(torch.randn(4, 2) + 3)
        norm.running_var = torch.zeros(2)
        assert not torch.equal(norm.running_mean, mean)
    assert norm.running_mean is running
    assert torch.equal(norm.running_mean, mean)
    assert torch.equal(norm.running_var, torch.ones(2))
    assert norm.num_batches_tracked == 0
    output.sum().backward()


def test_rehearsal_leaves_no_trace() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    state, mean = torch.get_rng_state(), network[1].running_mean.clone()
    x = torch.randn(4, 2, generator=torch.Generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with rehearsing(network):
            assert not network(x).requires_grad
        network(x).sum().backward()  # weights cast without a graph were not kept
    assert network[0].weight.grad is not None
    assert not torch.equal(network[1].running_mean, mean)  # by the real run
    with rehearsing(network):
        network(x)
        torch.manual_seed(9)
    torch.set_rng_state(state)
    with rehearsing(network):
        network(x)
    assert torch.equal(torch.get_rng_state(), state)
