import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn
from torch.nn import functional

import netwright as nw
from netwright.data import Batches
from netwright.numerics.closed_form import best_step
from netwright.rules import Backprop, BoostedUnits

X = torch.randn(12, 5, generator=Generator().manual_seed(0))
Y = torch.randint(3, (12,), generator=Generator().manual_seed(1))
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.5),
    "momentum": lambda p: torch.optim.SGD(p, 0.5, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.5),
}


def mlp(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, width), nn.Tanh(),
                         nn.Linear(width, 3))


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                         nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 3))


def taught(network: nn.Module, calls: int, x: Any = X, y: Tensor = Y, *, optimizer: str = "sgd",
           known: bool = True, **options: Any) -> BoostedUnits:
    rule = BoostedUnits(network, x, **{"units": 3, "steps": 4, **options})
    goes_on(rule, calls, OPTIMIZERS[optimizer](rule.parameters()), x, y, known=known)
    return rule


def goes_on(rule: BoostedUnits, calls: int, optimizer: torch.optim.Optimizer, x: Any = X,
            y: Tensor = Y, *, known: bool = True) -> None:
    rule.optimizer = optimizer if known else None
    for _ in range(calls):
        optimizer.zero_grad()
        rule(x, y)
        optimizer.step()


@pytest.mark.parametrize(("calls", "group"), [(3, 0), (10, 2)])
def test_the_gradient_is_that_of_the_papers_objective(calls: int, group: int) -> None:
    network = mlp()
    rule = taught(network, calls)
    y = Y.clone()
    y[[2, 7]] = -100
    rule.zero_grad()
    loss = rule(X, y)
    assert int(rule.group) == group
    counted = y != -100
    other = deepcopy(network)
    h = other[:4](X[counted])
    before = rule.biases[group]
    F = h[:, :3 * group].detach() @ other[4].weight[:, :3 * group].T.detach() + before
    r = functional.one_hot(y[counted], 3) - F.softmax(1)
    end = min(3 * group + 3, 8)
    g = h[:, 3 * group:end] @ other[4].weight[:, 3 * group:end].T + other[4].bias - before
    ((r - g).square().sum() / (2 * counted.sum())).backward()
    for i, (p, q) in enumerate(zip(network.parameters(), other.parameters(), strict=True)):
        if group and i < 2:  # below the last hidden layer
            assert p.grad is None
        else:
            assert q.grad.any()
            torch.testing.assert_close(p.grad, q.grad)
    torch.testing.assert_close(loss, functional.cross_entropy(network(X[counted]), y[counted]))
    assert torch.equal(network[2].weight.grad[end:], torch.zeros(8 - end, 6))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_units_whose_turn_has_not_come_say_nothing(optimizer: str) -> None:
    network = mlp()
    drawn = network[4].weight.detach().clone()
    rule = taught(network, 6, optimizer=optimizer, known=False)
    assert int(rule.group) == 1
    assert torch.equal(network[4].weight[:, 6:], torch.zeros(3, 2))
    loud = deepcopy(network)
    with torch.no_grad():
        loud[2].weight[6:] = 100
    assert torch.equal(loud(X), network(X))
    assert torch.equal(rule.predict(X), network(X))
    # When it comes, they begin as they were drawn.
    goes_on(rule, 3, torch.optim.SGD(rule.parameters(), 0.0))
    assert int(rule.group) == 2
    assert torch.equal(network[4].weight[:, 6:], drawn[:, 6:])


@pytest.mark.parametrize("more", [0, 7])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_has_had_its_turn_stays(optimizer: str, known: bool, more: int) -> None:
    """With momentum too; it decays for one step at most, and is then put back."""
    network = mlp()
    rule = BoostedUnits(network, X, units=3, steps=4)
    stepped = OPTIMIZERS[optimizer](rule.parameters())
    goes_on(rule, 4, stepped, known=known)
    stepped.zero_grad()
    rule(X, Y)  # the first group is done
    lower = [p.detach().clone() for p in network[0].parameters()]
    units = [network[2].weight[:3].clone(), network[2].bias[:3].clone(),
             network[4].weight[:, :3].clone()]
    learning = network[2].weight[3:6].clone()
    stepped.step()  # where momentum would move it most
    goes_on(rule, more, stepped, known=known)
    if optimizer == "adamw" or not (known or optimizer == "sgd"):
        rule.predict(X)  # puts back what the last step moved; without it there is nothing to do
    assert all(torch.equal(a, b) for a, b in zip(network[0].parameters(), lower, strict=True))
    assert torch.equal(network[2].weight[:3], units[0])
    assert torch.equal(network[2].bias[:3], units[1])
    assert torch.equal(network[4].weight[:, :3], units[2])
    assert not torch.equal(network[2].weight[3:6], learning)


def test_momentum_moves_nothing_below_where_gradients_are_set_to_zero() -> None:
    network = mlp()
    rule = BoostedUnits(network, X, units=4, steps=2)
    optimizer = torch.optim.Adam(rule.parameters(), 0.1)
    for step in range(4):
        optimizer.zero_grad(set_to_none=False)
        rule(X, Y)
        if step == 2:
            lower = network[0].weight.detach().clone()
        optimizer.step()
    assert torch.equal(network[0].weight, lower)


def test_the_step_at_a_groups_end_is_the_papers() -> None:
    """In closed form for squared error; for the cross-entropy one Newton step, never upwards."""
    y = torch.randn(12, 3, generator=Generator().manual_seed(2))
    network = mlp()
    rule = taught(network, 4, y=y, loss=functional.mse_loss)
    constant = rule.biases[0].expand(12, 3)
    g = (network(X) - constant).detach()
    step = best_step(constant, g, y, squared=True)
    weight = network[4].weight[:, :3].detach().clone()
    rule.zero_grad()
    rule(X, y)
    torch.testing.assert_close(network[4].weight[:, :3], step * weight)
    torch.testing.assert_close(rule.truncate(1)(X), constant + step * g)

    network = mlp()
    rule = taught(network, 4)
    constant = rule.biases[0].expand(12, 3)
    g = (network(X) - constant).detach()
    p = constant.softmax(1)
    slope = ((p - functional.one_hot(Y, 3)) * g).sum(1).mean()
    bend = ((p * g.square()).sum(1) - (p * g).sum(1).square()).mean()
    rule.zero_grad()
    rule(X, Y)
    torch.testing.assert_close(rule.truncate(1)(X), constant - slope / bend * g)


def test_a_step_that_would_lead_upwards_is_halved() -> None:
    """Two samples of opposite labels, where the slope is steep and hardly bends."""
    rule = BoostedUnits(mlp(), X)
    y = torch.tensor([1, 0])
    before = torch.tensor([[8.0, 0, -20]]).repeat(2, 1)
    own = torch.tensor([[0.0, 1, 0]]).repeat(2, 1)
    p = before.softmax(1)[:, 1]
    newton = float((0.5 - p.mean()) / (p * (1 - p)).mean())
    step = rule._best_step(before, own, y)
    at = [float(functional.cross_entropy(before + s * own, y)) for s in (0, step, newton)]
    assert at[1] <= at[0] < at[2]
    assert newton / step == pytest.approx(2 ** round(math.log2(newton / step)), rel=1e-3)
    rule.loss = lambda z, y: z[:, 0].mean()  # no curvature, then no way down at all
    assert rule._best_step(before, -torch.ones(2, 3), y) == 1
    assert abs(rule._best_step(before, torch.ones(2, 3), y)) < 1e-5


@pytest.mark.parametrize("make", [mlp, cnn])
def test_truncation_gives_back_what_each_group_ended_with(make: Any) -> None:
    """So the network is the sum of its parts."""
    network = make()
    x = X if make is mlp else torch.randn(12, 1, 4, 4, generator=Generator().manual_seed(5))
    rule = BoostedUnits(network, x, units=3, steps=3)
    optimizer = torch.optim.Adam(rule.parameters(), 0.05)
    rule.optimizer = optimizer
    bias = network[-1].bias.detach().clone()
    ends: list[nn.Module] = []
    for _ in range(14):
        optimizer.zero_grad()
        group = int(rule.group)
        rule(x, Y)
        if int(rule.group) > group:
            ends.append(rule.truncate(group + 1))
        optimizer.step()
    assert int(rule.group) == len(ends) == 3
    names = [f"{len(network) - 1}.weight", f"{len(network) - 1}.bias"]
    assert torch.equal(rule.truncate(0)[-1].bias, bias)
    assert not rule.truncate(0)[-1].weight.any()
    for t, end in enumerate(ends[:2], start=1):  # the last group goes on
        now = rule.truncate(t)
        assert all(torch.equal(now.state_dict()[name], end.state_dict()[name]) for name in names)
    assert all(torch.equal(a, b) for a, b in zip(rule.truncate(3).state_dict().values(),
                                                 network.state_dict().values(), strict=True))
    network.eval()
    h = network[:-1](x)
    places = h.shape[1] // 8
    parts = bias + sum(
        h[:, a * places:b * places] @ network[-1].weight[:, a * places:b * places].T
        + later[-1].bias - earlier[-1].bias
        for a, b, earlier, later in zip((0, 3, 6), (3, 6, 8), map(rule.truncate, range(3)),
                                        map(rule.truncate, range(1, 4)), strict=True))
    torch.testing.assert_close(network(x), parts)


def test_in_the_end_the_last_group_descends_the_loss_itself() -> None:
    network = mlp()
    rule = taught(network, 13)
    assert int(rule.group) == 3
    exact = Backprop(deepcopy(network))
    exact.zero_grad()
    exact(X, Y)
    rule.zero_grad()
    rule(X, Y)
    for i, unit in ((2, slice(6, 8)), (4, (slice(None), slice(6, 8)))):
        gradient = network[i].weight.grad
        torch.testing.assert_close(gradient[unit], exact.network[i].weight.grad[unit])
        assert gradient[unit].any()
        assert not gradient[2, 2]
    assert network[0].weight.grad is None


def test_accumulated_batches_count_as_one_step() -> None:
    whole, parts = mlp(), mlp()
    one, two = (BoostedUnits(network, X, units=3, steps=4) for network in (whole, parts))
    for rule, batches in ((one, [slice(0, 12)]), (two, [slice(0, 6), slice(6, 12)])):
        for _ in range(4):
            rule.zero_grad()
            for part in batches:
                rule(X[part], Y[part])
    assert int(one.calls) == int(two.calls) == 4
    assert int(one.group) == int(two.group) == 0
    torch.testing.assert_close(parts[2].weight.grad, 2 * whole[2].weight.grad)


def test_tokens_without_labels_do_not_count() -> None:
    x = torch.randn(4, 7, 5)
    y = torch.randint(3, (4, 7))
    y[:, 5:] = -100
    full, cut = mlp(), mlp()
    taught(full, 6, x, y)
    taught(cut, 6, x[:, :5], y[:, :5])
    for a, b in zip(full.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_network_without_biases() -> None:
    network = nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    rule = taught(network, 10)
    assert int(rule.group) == 2
    assert not rule.truncate(0)(X).any()
    assert rule.truncate(2)(X).any()


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=Generator().manual_seed(seed))
    x, y = torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    return x[:500], y[:500], x[500:1000], y[500:1000]


def learned(seed: int, *, frozen: bool = False, shuffled: bool = False) -> list[float]:
    """Return the accuracy on unseen digits with the units of 0, 1, .. groups."""
    x, y, x_test, y_test = digits(seed)
    if shuffled:
        y = y[torch.randperm(500, generator=Generator().manual_seed(seed))]
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    network[0].requires_grad_(not frozen)
    rule = BoostedUnits(network, x[:2], units=4, steps=40)
    nw.fit(rule, Batches(x, y, 100, seed=seed), epochs=33, progress=False,
           optimizer=lambda p: torch.optim.Adam(p, 0.03))
    assert int(rule.group) == rule.groups == 4
    return [float((rule.truncate(t)(x_test).argmax(1) == y_test).float().mean())
            for t in range(5)]


def test_it_learns_digits_and_each_group_adds_to_it() -> None:
    """Hidden units that learn do better than drawn ones; with wrong labels nothing is learned."""
    for seed in range(3):
        by_groups = learned(seed)
        assert by_groups[4] > learned(seed, frozen=True)[4] + 0.05
        assert by_groups[4] > by_groups[1] + 0.1 > by_groups[0] + 0.3
        assert by_groups[4] > 0.85
        assert learned(seed, shuffled=True)[4] < 0.3


def test_fit_takes_it() -> None:
    rule = BoostedUnits(mlp(), X, units=4, steps=2)
    nw.fit(rule, [(X, Y)], epochs=6, progress=False)
    assert isinstance(rule.optimizer, torch.optim.Adam)
    assert int(rule.group) == 2
    assert rule.predict(X).shape == (12, 3)


@pytest.mark.parametrize(("options", "said"), [
    ({"units": 0}, "units must be between 1 and 8, got 0; the last hidden layer, '2', has 8 units"),
    ({"units": 9}, "units must be between 1 and 8, got 9"),
    ({"steps": 0}, "steps must be at least 1, got 0; .* each group"),
])
def test_options_out_of_range(options: dict[str, Any], said: str) -> None:
    network = mlp()
    before = network[4].weight.detach().clone()
    with pytest.raises(ValueError, match=said):
        BoostedUnits(network, X, **options)
    assert torch.equal(network[4].weight, before)


class Scaled(nn.Sequential):
    """An output that no layer makes alone."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("network", [
    nn.Linear(5, 3), Scaled(*mlp()), nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4),
                                                   nn.Linear(4, 3))],
    ids=["no hidden layer", "scaled afterwards", "mixed by a norm"])
def test_networks_without_such_units(network: nn.Module) -> None:
    with pytest.raises(ValueError, match="network must end in a linear layer that reads hidden"):
        BoostedUnits(network, X)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="example must be an input of the network"):
        BoostedUnits(mlp())
    network = mlp()
    network[4].requires_grad_(False)
    with pytest.raises(ValueError, match="network has an output layer that is frozen"):
        BoostedUnits(network, X)
    rule = BoostedUnits(mlp(), X)
    with pytest.raises(ValueError, match="t must be between 0 and 2, got 3; there are 2 groups"):
        rule.truncate(3)
