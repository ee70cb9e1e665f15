from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from netwright.data import digits
from netwright.objectives.losses import cross_entropy
from netwright.rules import Backprop, EquilibriumPropagation

LABELS = torch.tensor([0, 2, 1, 1, 0, 2])
LONG = {"steps": 200, "nudged_steps": 200}


def mlp(*, seed: int = 0, depth: int = 3, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(seed)
    widths = [5, *[7, 6, 8][:depth - 1], 3]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    network = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for layer in network[::2]:
            layer.weight.mul_(0.8)  # so that it settles soon
    return network


def inputs(samples: int = 6) -> Tensor:
    return torch.randn(samples, 5, generator=torch.Generator().manual_seed(1)).double()


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def update(rule: EquilibriumPropagation, y: Tensor = LABELS) -> Tensor:
    rule.zero_grad()
    rule(inputs(len(y)), y)
    return flat([p.grad for p in rule.parameters()])


def settled(rule: EquilibriumPropagation, x: Tensor, *, steps: int = 300) -> list[Tensor]:
    """The free states, written layer by layer and in one graph."""
    layers, activation = list(rule.network[::2]), rule.network[1]
    states = [x.new_zeros(len(x), layer.out_features) for layer in layers[:-1]]
    for _ in range(steps):
        new = []
        for i in range(len(states)):
            a = layers[i]([x, *states][i])
            if i + 1 < len(states):
                B = rule.feedback[i] if len(rule.feedback) else layers[i + 1].weight.T
                a = a + states[i + 1] @ B.T
            new.append(activation(a))
        states = new
    return states


def exact(rule: EquilibriumPropagation, y: Tensor = LABELS) -> Tensor:
    """The gradient of the loss at equilibrium, through every step of settling."""
    loss = cross_entropy(rule.network[-1](settled(rule, inputs(len(y)))[-1]), y)
    return flat(list(torch.autograd.grad(loss, list(rule.parameters()))))


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.SiLU])
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_a_contour_of_finite_nudges_gives_the_exact_gradient_at_equilibrium(
        depth: int, activation: type[nn.Module]) -> None:
    rule = EquilibriumPropagation(mlp(depth=depth, activation=activation), radius=0.1, points=12,
                                  **LONG)
    torch.testing.assert_close(update(rule), exact(rule), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("points", [2, 4, 6])
def test_what_is_off_shrinks_with_the_radius_to_the_power_of_the_points(points: int) -> None:
    network = mlp()
    expected = exact(EquilibriumPropagation(network))
    apart = [off(update(EquilibriumPropagation(network, radius=radius, points=points, **LONG)),
                 expected) for radius in (0.1, 0.05)]
    assert apart[0] / apart[1] == pytest.approx(2 ** points, rel=0.25)


def test_one_nudge_alone_is_the_classical_one_sided_estimate() -> None:
    network = mlp()
    expected = exact(EquilibriumPropagation(network))
    apart = [off(update(EquilibriumPropagation(network, radius=radius, points=1, **LONG)), expected)
             for radius in (0.02, 0.01)]
    assert apart[0] / apart[1] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("points", [3, 4, 5])
def test_half_of_the_contour_tells_all_of_it(points: int) -> None:
    rule, x = EquilibriumPropagation(mlp(), points=points), inputs()
    free = [s.detach() for s in rule.settle(x)]
    V, c = rule.network[4].weight.detach(), rule.network[4].bias.detach()
    W, B = rule.network[2].weight.detach(), rule.network[2].weight.detach().T
    total = [torch.zeros_like(s).to(torch.complex128) for s in free]
    for j in range(points):
        beta = 0.5 * torch.exp(torch.tensor(2j * torch.pi * j / points, dtype=torch.complex128))
        first, second = (s.to(torch.complex128) for s in free)
        for _ in range(20):
            raised = (second @ V.T.to(beta) + c).exp()
            error = raised / raised.sum(1, keepdim=True) - torch.eye(3).to(beta)[LABELS]
            below = (x @ rule.network[0].weight.T + rule.network[0].bias).detach()
            a = first @ W.T.to(beta) + rule.network[2].bias.detach()
            first, second = ((below + second @ B.T.to(beta)).tanh(),
                             (a + beta * (error @ V.to(beta))).tanh())
        total = [t + s / beta / points for t, s in zip(total, (first, second), strict=True)]
    for found, expected in zip(rule._moved(x, free, LABELS), total, strict=True):
        torch.testing.assert_close(found, expected.real)
        assert expected.imag.abs().max() < 1e-12


def test_one_hidden_layer_is_backpropagation_and_none_a_linear_classifier() -> None:
    for depth in (1, 2):
        network = mlp(depth=depth)
        found = update(EquilibriumPropagation(network, radius=0.1, points=12, **LONG))
        network.zero_grad()
        Backprop(network)(inputs(), LABELS)
        expected = flat([p.grad for p in network.parameters()])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_without_symmetry_the_nudges_are_exact_and_the_gradient_is_not() -> None:
    rule = EquilibriumPropagation(mlp(), symmetric=False, radius=0.1, points=12, **LONG)
    x = inputs()
    free = [s.detach() for s in rule.settle(x)]
    first, second = free
    W, V = rule.network[2].weight.detach(), rule.network[4].weight.detach()
    pull = ((rule.network[4](second).softmax(1) - torch.eye(3).double()[LABELS]) @ V).detach()
    moved = rule._moved(x, free, LABELS)
    for n in range(len(x)):  # ds/dbeta = (1/phi' - J)^-1 dl/ds
        J = torch.zeros(13, 13).double()
        J[:7, 7:], J[7:, :7] = rule.feedback[0].detach(), W
        slope = torch.cat([1 - first[n] ** 2, 1 - second[n] ** 2])
        expected = torch.linalg.solve(torch.diag(1 / slope) - J,
                                      torch.cat([torch.zeros(7).double(), pull[n]]))
        torch.testing.assert_close(torch.cat([m[n] for m in moved]), expected, rtol=1e-6, atol=1e-9)
    assert off(update(rule), exact(rule)) > 0.05


def test_feedback_that_is_the_transpose_gives_each_its_share_of_the_gradient() -> None:
    rule = EquilibriumPropagation(mlp(), symmetric=False, radius=0.1, points=12, **LONG)
    with torch.no_grad():
        rule.feedback[0].copy_(rule.network[2].weight.T)
    torch.testing.assert_close(update(rule), exact(rule), rtol=1e-6, atol=1e-9)
    assert rule.asymmetry() == 0


def test_homeostasis_is_the_asymmetry_of_the_jacobian_that_the_paper_samples() -> None:
    rule = EquilibriumPropagation(mlp(depth=4), symmetric=False)
    widths, J = [0, 7, 13, 21], torch.zeros(21, 21).double()
    for i, B in enumerate(rule.feedback):
        a, b, c = widths[i:i + 3]
        J[b:c, a:b], J[a:b, b:c] = rule.network[2 * i + 2].weight.detach(), B.detach()
    noise = torch.randn(200_000, 21, generator=torch.Generator().manual_seed(0)).double()
    sampled = ((noise @ J.T).square().sum(1) - ((noise @ J.T @ J.T) * noise).sum(1)) / 21
    assert rule.asymmetry().item() == pytest.approx(sampled.mean().item(), rel=0.02)
    assert rule.asymmetry().item() == pytest.approx((J - J.T).square().sum().item() / 42)


def test_homeostasis_adds_its_gradient_and_alone_makes_the_network_symmetric() -> None:
    network = mlp()
    plain = EquilibriumPropagation(network, symmetric=False)
    pulled = EquilibriumPropagation(network, symmetric=False, homeostasis=0.7)
    pulled.load_state_dict(plain.state_dict())
    expected = torch.autograd.grad(0.7 * pulled.asymmetry(), list(pulled.parameters()),
                                   allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(update(pulled) - update(plain), flat(list(expected)))

    optimizer = torch.optim.SGD(pulled.parameters(), lr=1.0)
    before = cosine_similarity(update(pulled), exact(pulled), dim=0)
    for _ in range(100):
        optimizer.zero_grad()
        pulled.asymmetry().backward()
        optimizer.step()
    pulled.homeostasis = 0.0
    assert cosine_similarity(update(pulled), exact(pulled), dim=0) > max(0.999, before)


def test_a_batch_gives_the_mean_of_its_samples_that_have_labels() -> None:
    rule = EquilibriumPropagation(mlp())
    whole = update(rule)
    alone = []
    for x, y in zip(inputs().split(1), LABELS.split(1), strict=True):
        rule.zero_grad()
        rule(x, y)
        alone.append(flat([p.grad for p in rule.parameters()]))
    torch.testing.assert_close(whole, torch.stack(alone).mean(0))
    rule.zero_grad()
    rule(inputs(), torch.cat([LABELS[:4], torch.tensor([-100, -100])]))
    torch.testing.assert_close(flat([p.grad for p in rule.parameters()]),
                               torch.stack(alone[:4]).mean(0))


def test_predictions_are_the_readout_at_equilibrium() -> None:
    rule, x = EquilibriumPropagation(mlp(), symmetric=False), inputs()
    states = settled(rule, x)
    for found, expected in zip(rule.settle(x), states, strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(rule.predict(x), rule.network[4](states[-1]).detach())
    assert not torch.allclose(rule.predict(x), rule.network(x))
    assert rule(x, LABELS) == pytest.approx(float(cross_entropy(rule.predict(x), LABELS)))


def test_images_are_flattened_and_half_precision_settles_in_float32() -> None:
    network = nn.Sequential(nn.Flatten(), *mlp().float())
    rule = EquilibriumPropagation(network)
    x = inputs().float().view(6, 1, 5)
    rule(x, LABELS)
    expected = flat([p.grad for p in rule.parameters()])
    rule.zero_grad()
    rule.bfloat16()
    rule(x.bfloat16(), LABELS)
    found = flat([p.grad for p in rule.parameters()])
    assert found.dtype == rule.predict(x.bfloat16()).dtype == torch.bfloat16
    assert off(found.float(), expected) < 0.05


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_digits_are_learned_and_controls_are_not(symmetric: bool, seed: int) -> None:
    data = digits()

    def accuracy(prepare: Callable[[nn.Sequential], object] = lambda network: None,
                 y: Tensor = data.y_train) -> float:
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 12),
                                nn.Tanh(), nn.Linear(12, 10))
        prepare(network)
        rule = EquilibriumPropagation(network, steps=15, nudged_steps=6, points=2,
                                      symmetric=symmetric, homeostasis=0.0 if symmetric else 1.0)
        optimizer = torch.optim.Adam([p for p in rule.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(10):
            for index in torch.randperm(len(data.x_train)).split(64):
                optimizer.zero_grad()
                rule(data.x_train[index], y[index])
                optimizer.step()
        return float((rule.predict(data.x_test).argmax(1) == data.y_test).float().mean())

    learned = accuracy()
    frozen = accuracy(lambda network: network[1:5].requires_grad_(False))
    shuffled = accuracy(y=data.y_train[torch.randperm(len(data.y_train))])
    assert learned > 0.85
    assert learned > frozen + 0.1
    assert shuffled < 0.3


@pytest.mark.parametrize(("options", "match"), [
    ({"radius": 0.0}, "radius must be above 0, got 0.0"),
    ({"points": 0}, "points must be at least 1, got 0"),
    ({"steps": 0}, "steps must be at least 1, got 0"),
    ({"nudged_steps": 0}, "nudged_steps must be at least 1, got 0"),
    ({"homeostasis": -1.0, "symmetric": False}, "homeostasis must be at least 0, got -1.0"),
    ({"homeostasis": 1.0}, "homeostasis=1.0 pulls B .* give symmetric=False"),
])
def test_settings_that_cannot_work(options: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        EquilibriumPropagation(mlp(), **options)


@pytest.mark.parametrize(("network", "match"), [
    (nn.Linear(5, 3), "nn.Sequential of linear layers .* got Linear; try DualPropagation"),
    (nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), "got ReLU in place 1"),
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Linear(7, 3)), "got Conv2d in place 0"),
    (nn.Sequential(nn.Linear(5, 7), nn.Tanh()), "got no linear layer at its end"),
    (nn.Sequential(), "got no linear layer at its end"),
])
def test_networks_that_have_no_energy_here(network: nn.Module, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        EquilibriumPropagation(network)


def test_an_input_that_is_no_tensor() -> None:
    with pytest.raises(ValueError, match="x must be a tensor, got dict"):
        EquilibriumPropagation(mlp())({"x": inputs()}, LABELS)
