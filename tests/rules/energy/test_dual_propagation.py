from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cosine_similarity, mse_loss
from torch.utils.checkpoint import checkpoint

from netwright.data import digits
from netwright.errors import UnknownName
from netwright.objectives.losses import cross_entropy
from netwright.rules import Backprop, DualPropagation

LABELS = torch.tensor([0, 2, 1, 1, 0, 2])
both = pytest.mark.parametrize("means", ["forward", "dyads"])


def mlp(*, seed: int = 0, depth: int = 3, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(seed)
    widths = [5, *[7] * (depth - 1), 3]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1]).double()


def inputs(samples: int = 6) -> Tensor:
    return torch.randn(samples, 5, generator=torch.Generator().manual_seed(1)).double()


def gradients(network: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in network.parameters()]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def update(network: nn.Module, x: Any, y: Tensor, seed: int = 3, **options: Any) -> list[Tensor]:
    network.zero_grad()
    torch.manual_seed(seed)
    DualPropagation(network, **options)(x, y)
    return gradients(network)


def exact(network: nn.Module, x: Any, y: Tensor, seed: int = 3) -> list[Tensor]:
    network.zero_grad()
    torch.manual_seed(seed)
    Backprop(network)(x, y)
    return gradients(network)


def off(found: list[Tensor], expected: list[Tensor]) -> float:
    return float((flat(found) - flat(expected)).norm() / flat(expected).norm())


def states(network: nn.Sequential, x: Tensor, y: Tensor, alpha: float,
           beta: float) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The paper's inference in an MLP, in matrices: s+, s- and the forward pass of each layer."""
    layers, activation = list(network[::2]), network[1]
    with torch.no_grad():
        a, forward = [], [x]
        for layer in layers:
            a.append(forward[-1] @ layer.weight.T + layer.bias)
            forward.append(activation(a[-1]))
        nudge = beta * (torch.eye(3).double()[y] - a[-1].softmax(1))
        plus, minus = [a[-1] + alpha * nudge], [a[-1] - (1 - alpha) * nudge]
        for k in reversed(range(len(layers) - 1)):
            d = (plus[0] - minus[0]) @ layers[k + 1].weight
            plus.insert(0, activation(a[k] + alpha * d))
            minus.insert(0, activation(a[k] - (1 - alpha) * d))
    return plus, minus, forward


@both
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 1.0), (0.5, 0.1), (1.0, 1.0), (0.0, 0.4),
                                             (0.3, 2.0)])
def test_an_mlp_learns_by_the_papers_closed_form(means: str, activation: type[nn.Module],
                                                 depth: int, alpha: float, beta: float) -> None:
    network, x = mlp(depth=depth, activation=activation), inputs()
    if depth == 1:
        network.append(nn.Identity())  # so that the reference has a network[1]
    plus, minus, forward = states(network, x, LABELS, alpha, beta)
    expected = []
    for k in range(depth):
        error = (minus[k] - plus[k]) / (beta * len(x))
        read = forward[k]
        if means == "dyads" and k > 0:
            read = alpha * plus[k - 1] + (1 - alpha) * minus[k - 1]
        expected += [error.T @ read, error.sum(0)]

    found = update(network, x, LABELS, alpha=alpha, beta=beta, means=means)

    torch.testing.assert_close(found, expected)


def test_two_layers_written_out() -> None:
    network, x = mlp(depth=2, activation=nn.ReLU), inputs()
    W, b, V, c = (p.detach() for p in network.parameters())
    a = x @ W.T + b
    e = (a.relu() @ V.T + c).softmax(1) - torch.eye(3).double()[LABELS]
    pull = (a + e @ V / 2).relu() - (a - e @ V / 2).relu()
    mean = ((a + e @ V / 2).relu() + (a - e @ V / 2).relu()) / 2

    found = update(network, x, LABELS)
    torch.testing.assert_close(found, [pull.T @ x / 6, pull.sum(0) / 6, e.T @ a.relu() / 6,
                                       e.sum(0) / 6])
    found = update(network, x, LABELS, means="dyads")
    torch.testing.assert_close(found[2], e.T @ mean / 6)


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 1.0), (0.2, 0.5)])
def test_dyads_descend_the_papers_contrastive_objective(alpha: float, beta: float) -> None:
    network, x = mlp(), inputs()
    plus, minus, _ = states(network, x, LABELS, alpha, beta)
    objective, read = torch.zeros(()).double(), x
    for layer, up, down in zip(network[::2], plus, minus, strict=True):
        a = layer(read)  # E(s) = G(s) - <s, W x + b>, of which G has no weights
        objective = objective + ((down * a).sum() - (up * a).sum()) / (beta * len(x))
        read = alpha * up + (1 - alpha) * down
    expected = torch.autograd.grad(objective, list(network.parameters()))

    found = update(network, x, LABELS, alpha=alpha, beta=beta, means="dyads")

    torch.testing.assert_close(found, list(expected))


@both
@pytest.mark.parametrize("beta", [0.1, 1.0, 30.0])
def test_straight_activations_give_the_exact_gradient(means: str, beta: float) -> None:
    network, x = mlp(activation=lambda: nn.LeakyReLU(1.0)), inputs()
    found = update(network, x, LABELS, beta=beta, means=means)
    torch.testing.assert_close(found, exact(network, x, LABELS))


@both
@pytest.mark.parametrize(("alpha", "order"), [(0.5, 2), (1.0, 1), (0.0, 1)])
def test_a_small_beta_brings_the_exact_gradient_at_the_order_of_alpha(
        means: str, alpha: float, order: int) -> None:
    network, x = mlp(depth=4), inputs()
    expected = exact(network, x, LABELS)
    apart = [off(update(network, x, LABELS, alpha=alpha, beta=beta, means=means), expected)
             for beta in (1.0, 0.1, 0.01)]
    assert apart[0] > 1e-3  # a rule of its own where beta is not small
    assert apart[1] / apart[2] == pytest.approx(10 ** order, rel=0.1)


@both
def test_relu_units_far_from_their_kink_learn_exactly(means: str) -> None:
    network, x = mlp(depth=2, activation=nn.ReLU), inputs()
    with torch.no_grad():
        network[0].bias.copy_(torch.tensor([50.0, -50, 50, -50, 50, -50, 50]))
    torch.testing.assert_close(update(network, x, LABELS, means=means), exact(network, x, LABELS))
    with torch.no_grad():
        network[0].bias.zero_()
    assert off(update(network, x, LABELS, beta=4.0), exact(network, x, LABELS)) > 0.01


class Functional(nn.Module):
    """The functional and method forms, a residual path, a shared layer and no stages."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared, self.last = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        h = self.function(self.first(x))
        h = h + self.function(self.shared(h))
        h = h + self.function(self.shared(h))
        return self.last(h)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.tanh": torch.tanh, "method": lambda a: a.tanh(), "F.tanh": functional.tanh,
    "keyword": lambda a: functional.softplus(input=a), "gelu": functional.gelu,
    "silu": functional.silu, "written out": lambda a: a * torch.sigmoid(a)}


@both
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_any_network_and_any_way_of_calling_an_activation(
        means: str, function: Callable[[Tensor], Tensor]) -> None:
    network, x = Functional(function).double(), inputs()
    expected = exact(network, x, LABELS)
    assert off(update(network, x, LABELS, beta=1e-3, means=means), expected) < 1e-6
    assert off(update(network, x, LABELS, beta=2.0, means=means), expected) > 1e-4


@pytest.mark.parametrize("activation", [
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh,
    nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid,
    nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink,
    lambda: nn.Threshold(0.1, 0.0)])
def test_every_activation_module_is_made_of_dyads(activation: Callable[[], nn.Module]) -> None:
    network, x = nn.Sequential(nn.Linear(5, 40), activation(), nn.Linear(40, 3)).double(), inputs()
    with torch.no_grad():
        network[2].weight.mul_(20)
    W, b, V, c = (p.detach() for p in network.parameters())
    a = x @ W.T + b
    e = (network[1](a) @ V.T + c).softmax(1) - torch.eye(3).double()[LABELS]
    pull = network[1](a + e @ V / 2) - network[1](a - e @ V / 2)
    expected = exact(network, x, LABELS)[0]
    found = update(network, x, LABELS)[0]
    torch.testing.assert_close(found, pull.T @ x / 6)
    assert off([found], [expected]) > 1e-3


@both
def test_an_activation_in_place_counts_too(means: str) -> None:
    network, x = mlp(activation=nn.ReLU), inputs()
    expected = update(network, x, LABELS, means=means)
    for module in network[1::2]:
        module.inplace = True
    torch.testing.assert_close(update(network, x, LABELS, means=means), expected)


@both
def test_what_has_weights_or_mixes_units_is_differentiated_exactly(means: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.PReLU(), nn.LayerNorm(7), nn.Linear(7, 6),
                            nn.Softmax(1), nn.Linear(6, 3)).double()
    x = inputs()
    torch.testing.assert_close(update(network, x, LABELS, means=means), exact(network, x, LABELS))


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.Dropout(0.3),
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(24, 3))


@both
def test_norms_dropout_and_pooling_stand_between_units(means: str) -> None:
    network = convolutional().double()
    x = torch.randn(6, 1, 8, 8).double()
    # Only with the forward pass's own masks and statistics is the second run near the first.
    expected = exact(network, x, LABELS)
    assert off(update(network, x, LABELS, beta=1e-2, means=means), expected) < 1e-6
    assert off(update(network, x, LABELS, beta=10.0, means=means), expected) > 1e-3


@both
def test_statistics_and_random_state_are_those_of_one_forward_pass(means: str) -> None:
    network, x = convolutional(), torch.randn(6, 1, 8, 8)
    twin = deepcopy(network)
    torch.manual_seed(3)
    loss = cross_entropy(twin(x), LABELS)
    after = torch.rand(3)

    torch.manual_seed(3)
    found = DualPropagation(network, means=means)(x, LABELS)

    assert torch.equal(torch.rand(3), after)
    assert torch.equal(found, loss)
    for key, value in twin.state_dict().items():
        assert torch.equal(network.state_dict()[key], value), key


@both
def test_a_batch_gives_the_mean_of_its_samples(means: str) -> None:
    network, x = mlp(), inputs()
    whole = update(network, x, LABELS, means=means)
    alone = [update(network, x[i:i + 1], LABELS[i:i + 1], means=means) for i in range(len(x))]
    torch.testing.assert_close(whole, [sum(g) / len(x) for g in zip(*alone, strict=True)])


@both
def test_targets_left_out_change_nothing_but_the_mean(means: str) -> None:
    network, x = mlp(), inputs()
    expected = update(network, x[:4], LABELS[:4], means=means)
    found = update(network, x, torch.cat([LABELS[:4], torch.tensor([-100, -100])]), means=means)
    torch.testing.assert_close(found, expected)


def test_squared_error_on_real_targets_weighs_samples_alike() -> None:
    network, x, y = mlp(), inputs(), torch.randn(6, 3).double()
    whole = update(network, x, y, loss=mse_loss)
    alone = [update(network, x[i:i + 1], y[i:i + 1], loss=mse_loss) for i in range(6)]
    torch.testing.assert_close(whole, [sum(g) / 6 for g in zip(*alone, strict=True)])


@both
@pytest.mark.parametrize("frozen", [0, 2])
def test_frozen_weights_get_nothing_and_the_others_what_they_got_before(means: str,
                                                                        frozen: int) -> None:
    network, x = mlp(), inputs()
    update(network, x, LABELS, means=means)
    expected = {key: p.grad.clone() for key, p in network.named_parameters()
                if not key.startswith(f"{frozen}.")}
    network.zero_grad()
    network[frozen].requires_grad_(False)
    DualPropagation(network, means=means)(x, LABELS)
    found = {key: p.grad for key, p in network.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, expected)


@both
def test_a_unit_that_the_loss_does_not_see_changes_nothing(means: str) -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain, self.aside = mlp(), nn.Linear(5, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            self.aside(x).tanh()
            return self.chain(x)

    network = Aside()
    expected = update(network.chain, inputs(), LABELS, means=means)
    network.zero_grad()
    DualPropagation(network, means=means)(inputs(), LABELS)
    torch.testing.assert_close(gradients(network.chain), expected)
    assert all(p.grad is None for p in network.aside.parameters())


@both
def test_one_input_of_two_activations_hears_both(means: str) -> None:
    network, x = Functional(lambda a: torch.tanh(a) * torch.sigmoid(a)).double(), inputs()
    expected = exact(network, x, LABELS)
    assert off(update(network, x, LABELS, beta=1e-3, means=means), expected) < 1e-6


@both
def test_autocast_gives_nearly_the_same_gradient(means: str) -> None:
    network, x = mlp().float(), inputs().float()
    rule = DualPropagation(network, means=means, beta=0.1)
    rule(x, LABELS)
    expected = gradients(network)
    network.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rule(x, LABELS)
    assert all(g.dtype == torch.float32 for g in gradients(network))
    assert off(gradients(network), expected) < 0.02


class Checkpointed(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.network, x, use_reentrant=False)


@both
def test_checkpoints_keep_their_activations_and_learn_the_same(means: str) -> None:
    network = mlp(activation=nn.ReLU)
    DualPropagation(network, means=means)(inputs(), LABELS)
    expected = gradients(network)
    network.zero_grad()
    DualPropagation(Checkpointed(network), means=means)(inputs(), LABELS)
    assert all(map(torch.equal, gradients(network), expected))


def near_backprop(network: nn.Module, x: Any, y: Tensor) -> None:
    for means in ("forward", "dyads"):
        network.zero_grad()
        torch.manual_seed(3)
        Backprop(network)(x, y)
        expected = {key: p.grad.clone() for key, p in network.named_parameters()
                    if p.grad is not None}
        network.zero_grad()
        torch.manual_seed(3)
        DualPropagation(network, beta=1e-2, means=means)(x, y)
        found = {key: p.grad for key, p in network.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys()
        assert off(list(found.values()), list(expected.values())) < 1e-3


def test_vision_transformer() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                    intermediate_size=32, image_size=8, patch_size=4,
                                    num_channels=1, num_labels=3)
    near_backprop(transformers.ViTForImageClassification(config).double(),
                  torch.randn(6, 1, 8, 8).double(), LABELS)


def test_padded_text_does_not_see_its_padding() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2,
                                     num_attention_heads=2, intermediate_size=32, num_labels=3)
    network = transformers.BertForSequenceClassification(config).double()
    mask = torch.ones(6, 7, dtype=torch.long)
    mask[:, 5:] = 0
    x = {"input_ids": torch.randint(1, 20, (6, 7)), "attention_mask": mask}
    near_backprop(network, x, LABELS)

    network.eval().zero_grad()
    rule = DualPropagation(network)
    rule(x, LABELS)
    weight = network.bert.encoder.layer[0].output.dense.weight
    padded = weight.grad.clone()
    network.zero_grad()
    rule({key: value[:, :5] for key, value in x.items()}, LABELS)
    torch.testing.assert_close(weight.grad, padded)


def test_language_model_with_a_label_for_each_token() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2,
                                      num_attention_heads=2, intermediate_size=32)
    x = {"input_ids": torch.randint(1, 20, (3, 7))}
    near_backprop(transformers.LlamaForCausalLM(config).double(), x, torch.randint(20, (3, 7)))


def test_graph_network_with_labels_on_some_nodes() -> None:
    graphs = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    network = graphs.GCN(in_channels=5, hidden_channels=8, num_layers=3, out_channels=3,
                         dropout=0.2, act="tanh").double()
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 0, 3]])
    y = torch.tensor([0, -100, 1, -100, 2, -100])
    near_backprop(network, (torch.randn(6, 5).double(), edges), y)


@both
@pytest.mark.parametrize("seed", [0, 1])
def test_digits_are_learned_and_controls_are_not(means: str, seed: int) -> None:
    data = digits()

    def accuracy(prepare: Callable[[nn.Sequential], object] = lambda network: None,
                 y: Tensor = data.y_train) -> float:
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 12),
                                nn.ReLU(), nn.Linear(12, 10))
        prepare(network)
        rule = DualPropagation(network, means=means)
        optimizer = torch.optim.Adam([p for p in rule.parameters() if p.requires_grad], lr=5e-3)
        for _ in range(15):
            for index in torch.randperm(len(data.x_train)).split(64):
                optimizer.zero_grad()
                rule(data.x_train[index], y[index])
                optimizer.step()
        return float((rule.predict(data.x_test).argmax(1) == data.y_test).float().mean())

    learned = accuracy()
    frozen = accuracy(lambda network: network[1:5].requires_grad_(False))
    shuffled = accuracy(y=data.y_train[torch.randperm(len(data.y_train))])
    assert learned > 0.88
    assert learned > frozen + 0.3
    assert shuffled < 0.3


@both
def test_dyads_stay_near_the_exact_direction_at_the_default_beta(means: str) -> None:
    network, x = mlp(depth=4, activation=nn.ReLU), inputs()
    found = flat(update(network, x, LABELS, means=means))
    assert cosine_similarity(found, flat(exact(network, x, LABELS)), dim=0) > 0.95


@pytest.mark.parametrize(("options", "match"), [
    ({"alpha": 1.5}, r"alpha must be between 0 and 1, got 1.5"),
    ({"alpha": float("nan")}, r"alpha must be between 0 and 1, got nan"),
    ({"beta": 0.0}, r"beta must be above 0, got 0.0"),
    ({"beta": float("nan")}, r"beta must be above 0, got nan"),
])
def test_settings_that_cannot_work(options: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        DualPropagation(mlp(), **options)


def test_unknown_means() -> None:
    with pytest.raises(UnknownName, match="dyads"):
        DualPropagation(mlp(), means="dyad")
