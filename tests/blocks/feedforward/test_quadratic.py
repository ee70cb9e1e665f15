from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear

from netwright.blocks.feedforward import QuadraticFeedForward, QuadraticLinear, relinear_groups
from netwright.errors import NothingToReshape, UnknownName
from netwright.models import gpt


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4), (0, 4)])
def test_it_is_its_formula(shape):
    torch.manual_seed(0)
    layer = QuadraticLinear(4, 3, start="random").double()
    nn.init.normal_(layer.shift)
    x = torch.randn(shape, dtype=torch.double)
    wanted = torch.stack([
        (x @ layer.weight[j] + layer.bias[j]) * (x @ layer.gate[j] + layer.gate_bias[j])
        + x.square() @ layer.square[j] + layer.shift[j] for j in range(3)], -1)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)


def test_one_neuron_holds_any_quadratic_form_of_rank_two():
    layer = QuadraticLinear(2, 1).double()
    with torch.no_grad():  # x^2 + y^2 - 1
        for p, to in ((layer.weight, 0), (layer.bias, 0), (layer.square, 1), (layer.shift, -1)):
            p.fill_(to)
    x = torch.randn(9, 2, dtype=torch.double)
    torch.testing.assert_close(layer(x)[:, 0], x.square().sum(1) - 1)


def test_it_begins_as_the_linear_layer_and_stays_one_where_gamma_is_nothing():
    torch.manual_seed(0)
    x = torch.randn(20, 4)
    network = nn.Sequential(QuadraticLinear(4, 8), nn.ReLU(), QuadraticLinear(8, 2))
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        for i in (0, 2):
            plain[i].weight.copy_(network[i].weight)
            plain[i].bias.copy_(network[i].bias)
    slow = torch.optim.SGD(relinear_groups(network, 0.1, gamma=0.0))
    usual = torch.optim.SGD(plain.parameters(), 0.1)
    for _ in range(3):
        for one, optimizer in ((network, slow), (plain, usual)):
            optimizer.zero_grad()
            one(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(network(x), plain(x), rtol=0, atol=0)
    assert network[0].gate.grad.abs().sum() > 0


def test_the_groups_hold_every_parameter_once():
    model = nn.Sequential(QuadraticLinear(4, 8), nn.LayerNorm(8), QuadraticLinear(8, 2))
    model.append(model[2])  # shared
    groups = relinear_groups(model, 0.5, gamma=(0.1, 0.01))
    assert [group["lr"] for group in groups] == [0.5, 0.05, 0.005]
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len({*listed}) == len(list(model.parameters()))
    torch.optim.Adam(groups)


def test_it_separates_rings_where_a_linear_neuron_does_not():
    def wrong(make, seed):
        torch.manual_seed(seed)
        x = torch.randn(200, 2)
        x = x / x.norm(dim=1, keepdim=True) * (1 + torch.arange(200) % 2)[:, None]
        y = (torch.arange(200) % 2)[:, None].float()
        neuron = make()
        optimizer = torch.optim.Adam(neuron.parameters(), 0.1)
        for _ in range(60):
            optimizer.zero_grad()
            binary_cross_entropy_with_logits(neuron(x), y).backward()
            optimizer.step()
        return ((neuron(x) > 0) != (y > 0)).float().mean().item()

    for seed in range(2):
        # Measured over ten seeds: 0, and 0.42 to 0.51.
        assert wrong(lambda: QuadraticLinear(2, 1), seed) == 0
        assert wrong(lambda: nn.Linear(2, 1), seed) > 0.25


def test_the_feed_forward_block():
    block, plain = QuadraticFeedForward(48), nn.Sequential(nn.Linear(48, 192), nn.Linear(192, 48))
    sizes = [sum(p.numel() for p in b.parameters()) for b in (block, plain)]
    assert abs(sizes[0] / sizes[1] - 1) < 0.02
    x = torch.randn(2, 5, 48)
    wanted = linear(linear(x, block[0].weight, block[0].bias).relu(), block[2].weight,
                    block[2].bias)
    torch.testing.assert_close(block(x), wanted)
    assert gpt(20, context=8, width=16, feedforward=QuadraticFeedForward)(
        torch.zeros(2, 8, dtype=torch.long)).shape == (2, 8, 20)


def test_lower_precision_states_and_draws():
    one, other = (QuadraticLinear(4, 3, start="random",
                                  generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    x = torch.randn(5, 4)
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), deepcopy(other)(x))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = one(x)
    low = deepcopy(one).bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    for found in (mixed, low):
        torch.testing.assert_close(found.float(), one(x), rtol=0.05, atol=0.1)


def test_what_it_cannot_build_is_named():
    with pytest.raises(ValueError, match="outputs must be at least 1, got 0"):
        QuadraticLinear(2, 0)
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        QuadraticFeedForward(2, 0)
    with pytest.raises(UnknownName, match="zero"):
        QuadraticLinear(2, 2, start="zero")
    with pytest.raises(NothingToReshape, match="must hold a QuadraticLinear layer"):
        relinear_groups(nn.Linear(2, 2), 0.1, 0.1)
    with pytest.raises(ValueError, match="gamma must be between 0 and 1, got -1"):
        relinear_groups(QuadraticLinear(2, 2), 0.1, -1)
