from copy import deepcopy
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn

import netwright as nw
from netwright.rules import Backprop, ContinualBackprop

X = torch.randn(12, 5, generator=Generator().manual_seed(0))
Y = torch.randint(3, (12,), generator=Generator().manual_seed(1))


def mlp(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                         nn.Linear(width, 3))


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 6), nn.Tanh(),
                         nn.Linear(6, 3))


def taught(network: nn.Module, x: Any = X, y: Tensor = Y, *, steps: int, rate: float = 0.0,
           optimizer: type = torch.optim.SGD, **options: Any) -> ContinualBackprop:
    rule = ContinualBackprop(network, x, generator=Generator().manual_seed(3), **options)
    rule.optimizer = optimizer(rule.parameters(), lr=rate)
    for _ in range(steps):
        rule.optimizer.zero_grad()
        rule(x, y)
        rule.optimizer.step()
    return rule


def test_without_renewal_it_is_backpropagation() -> None:
    network, plain = mlp(), mlp()
    rule = ContinualBackprop(network, X, replacement_rate=0)
    exact = Backprop(plain)
    for made, given in ((rule, network), (exact, plain)):
        optimizer = torch.optim.Adam(given.parameters())
        for _ in range(5):
            optimizer.zero_grad()
            made(X, Y)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), plain.parameters(),
                                                 strict=True))


def test_utility_is_the_moving_average_of_what_the_units_contribute() -> None:
    network = mlp()
    rule = taught(network, steps=4, decay=0.9)  # with a rate of 0 the weights stay
    h = network[:2](X)
    contribution = h.abs().mean(0) * network[2].weight.abs().sum(0)
    # The last step's is still to come.
    assert torch.allclose(rule.utility[:8], contribution * (1 - 0.9**3), rtol=1e-5)
    assert torch.allclose(rule.activity[:8], h.mean(0) * (1 - 0.9**3), rtol=1e-5)
    assert rule.age.tolist() == [3] * 16


def test_a_channels_utility_is_over_its_places() -> None:
    network, x = cnn().eval(), torch.randn(6, 1, 4, 4)
    rule = taught(network, x, Y[:6], steps=2, decay=0.5)
    h = network[:4](x)
    weight = network[5].weight.view(6, 4, 4)
    expected = 0.5 * h.abs().mean((0, 2, 3)) * weight.abs().sum((0, 2))
    assert torch.allclose(rule.utility[:4], expected, rtol=1e-4)


def test_the_least_useful_of_the_mature_units_are_renewed() -> None:
    network = mlp()
    network[1] = network[3] = nn.Tanh()
    with torch.no_grad():
        network[2].weight[:, [1, 6]] *= 1e-3  # units 1 and 6 of the first layer matter least
        network[4].weight[:, 4] = 0
    before = deepcopy(network)
    rule = taught(network, steps=5, replacement_rate=0.1, maturity=2)  # two steps: 1.6 of 8
    changed = (network[0].weight != before[0].weight).any(1)
    assert changed.nonzero().flatten().tolist() in ([1], [6])
    rows = (network[2].weight != before[2].weight).sum(1)  # one column went with the unit before
    assert (rows > 1).nonzero().flatten().tolist() == [4]
    assert int(rule.renewed) == 2
    assert rule.age.sort().values.tolist() == [0, 0] + [4] * 14


def test_young_units_are_left_alone() -> None:
    rule = taught(mlp(), steps=12, replacement_rate=1.0, maturity=10)
    assert int(rule.renewed) == 16  # in the eleventh update, and nobody since
    rule = taught(mlp(), steps=11, replacement_rate=1.0, maturity=10)
    assert int(rule.renewed) == 0


@pytest.mark.parametrize(("make", "x"), [(mlp, X), (cnn, torch.randn(12, 1, 4, 4))],
                         ids=["mlp", "cnn"])
def test_renewing_a_unit_that_says_the_same_for_all_keeps_the_function(make, x) -> None:
    """Dead units, and those that are constant, whose constant moves on into the next bias."""
    network = make().eval()
    with torch.no_grad():
        network[0].weight[2] = 0
        network[0].bias[2] = 3.0
    before = network(x)
    rule = taught(network, x, steps=3)
    rule._renew(torch.tensor([2]))
    assert int(rule.renewed) == 1
    assert network[0].weight[2].abs().sum() > 0
    assert network[0].bias[2] == 0
    assert torch.allclose(network(x), before, atol=1e-5)
    rule._renew(torch.tensor([0]))  # one that says something
    assert not torch.allclose(network(x), before, atol=1e-3)


def test_a_renewed_unit_does_not_speak_until_it_has_learned() -> None:
    network = mlp()
    rule = taught(network, steps=3, replacement_rate=1.0, maturity=0)
    rule._test()
    assert torch.equal(network[4].weight, torch.zeros(3, 8))
    bound, weight = 3**0.5 * float(rule.spread[0]), network[0].weight.detach()
    assert 0 < weight.abs().max() <= bound
    assert float(weight.std(correction=0)) == pytest.approx(bound / 3**0.5, rel=0.25)


def test_accumulated_batches_count_as_one_step() -> None:
    whole, parts = mlp(), mlp()
    one = ContinualBackprop(whole, X, maturity=1)
    two = ContinualBackprop(parts, X, maturity=1)
    for rule, batches in ((one, [slice(0, 12)]), (two, [slice(0, 6), slice(6, 12)])):
        optimizer = torch.optim.SGD(rule.parameters(), 0.0)
        for _ in range(3):
            optimizer.zero_grad()
            for part in batches:
                rule(X[part], Y[part])
            optimizer.step()
    assert one.age.tolist() == two.age.tolist() == [2] * 16
    assert torch.allclose(one.utility, two.utility, rtol=1e-5)


def test_an_optimizers_averages_are_forgotten() -> None:
    network = mlp()
    network[1] = nn.Tanh()
    rule = taught(network, steps=3, rate=0.01, optimizer=torch.optim.Adam)
    state = rule.optimizer.state
    assert state[network[0].weight]["exp_avg"][3].abs().sum() > 0
    rule._renew(torch.tensor([3]))
    for name in ("exp_avg", "exp_avg_sq"):
        assert state[network[0].weight][name][3].abs().sum() == 0
        assert state[network[0].bias][name][3] == 0
        assert state[network[2].weight][name][:, 3].abs().sum() == 0
        assert state[network[0].weight][name].abs().sum() > 0
    assert state[network[0].weight]["step"] == 3


def test_fit_tells_it_of_its_optimizer() -> None:
    rule = ContinualBackprop(mlp(), X, replacement_rate=0.5, maturity=1)
    nw.fit(rule, [(X, Y)], epochs=4, progress=False)
    assert isinstance(rule.optimizer, torch.optim.Adam)
    assert int(rule.renewed) > 0


def test_it_keeps_what_backpropagation_loses() -> None:
    """Dead units are dead for good where nothing renews them."""
    digits, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(digits[:400] / 16, dtype=torch.float32), torch.tensor(labels[:400])

    def last_accuracy(make: Any) -> float:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(),
                                nn.Linear(32, 10))
        with torch.no_grad():  # what a long past can leave: most units dead
            network[0].bias[1:] = -100
        rule = make(network)
        rule.optimizer = torch.optim.Adam(rule.parameters(), lr=0.01)
        for step in range(300):
            part = slice(step * 40 % 400, step * 40 % 400 + 40)
            rule.optimizer.zero_grad()
            rule(x[part], y[part])
            rule.optimizer.step()
        return float((rule.predict(x).argmax(1) == y).float().mean())

    kept = last_accuracy(lambda network: ContinualBackprop(
        network, x[:4], replacement_rate=0.02, maturity=20, generator=Generator().manual_seed(0)))
    lost = last_accuracy(Backprop)
    assert kept > lost + 0.1


def test_a_frozen_layers_units_are_left_alone() -> None:
    network = mlp()
    network[0].requires_grad_(False)
    before = deepcopy(network)
    rule = taught(network, steps=5, replacement_rate=1.0, maturity=0)
    assert torch.equal(network[0].weight, before[0].weight)
    assert not torch.equal(network[2].weight, before[2].weight)
    assert (rule.age[:8] > 0).all()


@pytest.mark.parametrize(("options", "said"), [
    ({"replacement_rate": 1.5}, "replacement_rate must be between 0 and 1"),
    ({"maturity": -1}, "maturity must be at least 0, got -1; .* steps"),
    ({"decay": 1.0}, "decay must be at least 0 and below 1, got 1.0"),
])
def test_options_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ContinualBackprop(mlp(), X, **options)


def test_a_network_without_hidden_units() -> None:
    with pytest.raises(ValueError, match="network has no hidden units to renew"):
        ContinualBackprop(nn.Linear(5, 3), X)
    with pytest.raises(ValueError, match="example must be an input of the network"):
        ContinualBackprop(mlp())
