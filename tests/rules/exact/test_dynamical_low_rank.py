from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn

import netwright as nw
from netwright.errors import UnknownName
from netwright.objectives.losses import cross_entropy
from netwright.rules import Backprop, DynamicalLowRank

X = torch.randn(12, 10, dtype=torch.float64, generator=Generator().manual_seed(0))
Y = torch.randint(3, (12,), generator=Generator().manual_seed(1))
IMAGES = torch.randn(12, 2, 6, 6, dtype=torch.float64, generator=Generator().manual_seed(2))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 9), nn.Tanh(),
                         nn.Linear(9, 3)).double()


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1, padding_mode="circular"),
                         nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, stride=2, dilation=2),
                         nn.ReLU(), nn.Flatten(), nn.Linear(5, 7), nn.Tanh(),
                         nn.Linear(7, 3)).double()


def gradient(network: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    cross_entropy(network(x), y).backward()
    return {name: p.grad for name, p in network.named_parameters()}


@pytest.mark.parametrize(("make", "x"), [(mlp, X), (cnn, IMAGES)], ids=["mlp", "cnn"])
def test_at_full_rank_it_is_the_same_function(make: Any, x: Tensor) -> None:
    network = make()
    rule = DynamicalLowRank(network, x)
    assert all(type(module).__name__ == "LowRank" for module in rule.layers.values())
    assert torch.allclose(rule.predict(x), network.eval()(x), atol=1e-12)
    assert list(rule.ranks.values()) == ([8, 8] if make is mlp else [6, 5, 5])


@pytest.mark.parametrize(("make", "x"), [(mlp, X), (cnn, IMAGES)], ids=["mlp", "cnn"])
@pytest.mark.parametrize("tolerance", [None, 0.0, 0.1])
def test_a_step_is_the_papers_in_closed_form(make: Any, x: Tensor, tolerance: float | None) -> None:
    """From the dense gradient and dense algebra, with the network's own dense weights."""
    rule = DynamicalLowRank(make(), x, rank=3, rate=0.2, tolerance=tolerance)
    dense = make()
    for name, module in rule.network.named_modules():
        if name in rule.layers:
            dense.get_submodule(name).weight.data = module.weight.detach().clone()
    factors = {name: [layer.left.data, layer.core.data, layer.right.data]
               for name, layer in rule.layers.items()}
    first = gradient(dense, x, Y)
    bases = {}
    for name, (u, s, v) in factors.items():
        g = first[f"{name}.weight"].flatten(1)
        k, n = u @ s - 0.2 * g @ v, v @ s.T - 0.2 * g.T @ u
        if tolerance is not None:
            k, n = torch.cat([k, u], 1), torch.cat([n, v], 1)
        u1, v1 = torch.linalg.qr(k)[0], torch.linalg.qr(n)[0]
        bases[name] = u1, u1.T @ u @ s @ v.T @ v1, v1
        weight = dense.get_submodule(name).weight
        weight.data = (u1 @ bases[name][1] @ v1.T).view_as(weight)
    second = gradient(dense, x, Y)
    rule(x, Y)
    for name, (u1, core, v1) in bases.items():
        s1 = core - 0.2 * u1.T @ second[f"{name}.weight"].flatten(1) @ v1
        p, d, q = torch.linalg.svd(s1)
        kept = len(d)
        while tolerance is not None and kept > 2 and \
                d[kept - 1:].norm() <= tolerance * d.norm():
            kept -= 1
        whole = u1 @ p[:, :kept] @ d[:kept].diag() @ q[:kept] @ v1.T
        layer = rule.layers[name]
        assert layer.rank == kept
        assert torch.allclose(layer.weight.flatten(1), whole, atol=1e-12)
    for name, p in rule.network.named_parameters():
        if name.endswith("bias"):
            before = dense.get_parameter(name)
            assert torch.allclose(p, before - 0.2 * second[name], atol=1e-12)


def test_without_cutting_at_full_rank_it_is_gradient_descent_twice_projected() -> None:
    """With bases that span everything, a step of the core is a step of the dense weight."""
    network = mlp()
    rule = DynamicalLowRank(network, X, rate=0.1, tolerance=0.0)
    before = gradient(network, X, Y)
    rule(X, Y)
    for name, layer in rule.layers.items():
        expected = network.get_submodule(name).weight - 0.1 * before[f"{name}.weight"]
        assert torch.allclose(layer.weight, expected, atol=1e-12)


@pytest.mark.parametrize("tolerance", [None, 0.05, 0.3])
def test_factors_stay_orthonormal(tolerance: float | None) -> None:
    rule = DynamicalLowRank(cnn(), IMAGES, rate=0.2, rank=3, tolerance=tolerance)
    for _ in range(20):
        rule(IMAGES, Y)
    for layer in rule.layers.values():
        for factor in (layer.left, layer.right):
            eye = torch.eye(layer.rank, dtype=torch.float64)
            assert torch.allclose(factor.T @ factor, eye, atol=1e-10)
        assert tolerance is not None or layer.rank == 3


def test_what_is_cut_is_within_the_tolerance_and_no_more_could_go() -> None:
    rule = DynamicalLowRank(mlp(), X, tolerance=0.3, least_rank=1)
    layer = rule.layers["0"]
    torch.manual_seed(0)
    layer.core.data = torch.randn(8, 8, dtype=torch.float64)
    before = layer.weight.detach()
    values = torch.linalg.svdvals(layer.core)
    with torch.no_grad():
        rule._cut(layer)
    assert 1 < layer.rank < 8
    assert (layer.weight - before).norm() <= 0.3 * before.norm() + 1e-12
    assert values[layer.rank - 1:].norm() > 0.3 * values.norm()


def test_tiny_singular_values_do_no_harm() -> None:
    """The factors' own gradients would divide by them: one step is no worse than at full size."""
    def after(scale: float) -> float:
        rule = DynamicalLowRank(mlp(), X, rank=4, rate=0.2, tolerance=None)
        for layer in rule.layers.values():
            layer.core.data[1:] *= scale
        losses = [float(rule(X, Y)) for _ in range(30)]
        assert all(b <= a + 1e-6 for a, b in pairwise(losses))
        return losses[-1]
    assert after(1e-12) == pytest.approx(after(1e-3), abs=0.05)


def test_ranks_fall_and_the_digits_are_still_learned() -> None:
    """Beside a network whose low-rank layers stay as they were drawn."""
    digits, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(digits / 16, dtype=torch.float32), torch.tensor(labels)

    def accuracy(frozen: bool) -> tuple[float, list[int]]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                                nn.Linear(64, 10))
        rule = DynamicalLowRank(network, rate=0.5, tolerance=0.1)
        if frozen:
            for layer in rule.layers.values():
                layer.requires_grad_(False)
        for _ in range(8):
            for part in torch.randperm(1400).split(100):
                rule(x[part], y[part])
        right = rule.predict(x[1400:]).argmax(1) == y[1400:]
        return float(right.float().mean()), list(rule.ranks.values())

    learned, ranks = accuracy(frozen=False)
    assert max(ranks) < 40  # of 64
    assert learned > 0.8
    assert learned > accuracy(frozen=True)[0] + 0.2


def test_the_given_network_is_left_alone_and_the_copy_trains_on() -> None:
    network = mlp()
    before = deepcopy(network.state_dict())
    rule = DynamicalLowRank(network, X, rank=4)
    for _ in range(3):
        rule(X, Y)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    exact = Backprop(rule.network)
    optimizer = torch.optim.SGD(exact.parameters(), 0.1)
    first = float(exact(X, Y))
    optimizer.step()
    assert float(exact(X, Y)) < first


def test_a_state_of_other_ranks_is_loaded() -> None:
    rule, fresh = DynamicalLowRank(mlp(), X, tolerance=0.3), DynamicalLowRank(mlp(), X, rank=2)
    for _ in range(5):
        rule(X, Y)
    fresh.load_state_dict(rule.state_dict())
    assert fresh.ranks == rule.ranks
    assert torch.equal(fresh.predict(X), rule.predict(X))


def test_a_failed_call_leaves_everything_as_it_was() -> None:
    calls = []

    def loss(scores: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no second time")
        return cross_entropy(scores, y)

    rule = DynamicalLowRank(mlp(), X, loss=loss)
    before = {name: value.clone() for name, value in rule.state_dict().items()}
    with pytest.raises(RuntimeError, match="no second time"):
        rule(X, Y)
    assert all(torch.equal(value, before[name]) for name, value in rule.state_dict().items())


def test_named_tied_and_frozen_layers_stay_dense() -> None:
    assert list(DynamicalLowRank(mlp(), X, dense=["0"]).ranks) == ["2"]
    frozen = mlp()
    frozen[2].requires_grad_(False)
    assert list(DynamicalLowRank(frozen, X).ranks) == ["0"]
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    tied[1].weight = tied[0].weight
    assert list(DynamicalLowRank(tied).ranks) == ["2"]


def test_a_transformer_with_dropout_learns() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
        image_size=8, patch_size=4, num_labels=3, hidden_dropout_prob=0.1))
    rule = DynamicalLowRank(model, rank=4, rate=0.1)
    x = {"pixel_values": torch.randn(8, 3, 8, 8)}
    losses = [float(rule(x, Y[:8])) for _ in range(30)]
    assert losses[-1] < losses[0] - 0.1
    assert len(rule.ranks) > 8


def test_measuring_leaves_the_ranks_as_they_were() -> None:
    rule = DynamicalLowRank(mlp(), X, tolerance=0.5, rate=0.5)
    before = {name: value.clone() for name, value in rule.state_dict().items()}
    nw.measure.cost(rule, (X, Y), repeats=2)
    assert rule.ranks == {"0": 8, "2": 8}
    assert all(torch.equal(value, before[name]) for name, value in rule.state_dict().items())
    rule(X, Y)
    assert max(rule.ranks.values()) < 8  # a step does change them


def test_fit_trains_it_without_an_optimizer() -> None:
    rule = DynamicalLowRank(mlp(), X, rate=0.3)
    history = nw.fit(rule, [(X, Y)], epochs=20, progress=False)
    assert history.epochs[-1].loss < history.epochs[0].loss


@pytest.mark.parametrize(("options", "said"), [
    ({"rate": 0.0}, "rate must be above 0, got 0.0"),
    ({"tolerance": 1.0}, "tolerance must be at least 0 and below 1"),
    ({"rank": 0}, "rank must be at least 1, got 0"),
    ({"least_rank": 0}, "least_rank must be at least 1, got 0"),
])
def test_options_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DynamicalLowRank(mlp(), X, **options)


def test_a_network_without_layers_to_factorize() -> None:
    with pytest.raises(ValueError, match="network has no layer to factorize"):
        DynamicalLowRank(nn.Linear(4, 3))
    with pytest.raises(UnknownName, match="nothing"):
        DynamicalLowRank(mlp(), dense=["nothing"])
