from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cosine_similarity, mse_loss

import netwright as nw
from netwright.data import Batches, digits
from netwright.objectives.losses import cross_entropy
from netwright.rules import Backprop, InferenceLearning

LABELS = torch.tensor([0, 2, 1, 1, 0, 2])


def mlp(*, seed: int = 0, activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), activation(), nn.Linear(7, 6), activation(),
                         nn.Linear(6, 3)).double()


def cut(network: nn.Sequential) -> nw.Stages:
    """Stages that begin with their activation, as in the paper."""
    return nw.stages(network, cuts=["0", "1", "3"])


def inputs(samples: int = 6) -> Tensor:
    return torch.randn(samples, 5, generator=Generator().manual_seed(1)).double()


def flat(network: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def solved(network: nn.Module, loss: Callable[..., Tensor], x: Tensor, y: Tensor,
           rate: float) -> tuple[Tensor, float]:
    """The proximal step, argmin_d L(w + d) + |d|^2 / (2 rate), and that minimum."""
    names = [name for name, _ in network.named_parameters()]
    start = [p.detach() for p in network.parameters()]
    shifts = [torch.zeros_like(p, requires_grad=True) for p in start]
    optimizer = torch.optim.LBFGS(shifts, max_iter=500, tolerance_grad=1e-10,
                                  tolerance_change=1e-15, line_search_fn="strong_wolfe")

    def problem() -> Tensor:
        optimizer.zero_grad()
        moved = dict(zip(names, map(torch.add, start, shifts), strict=True))
        value = loss(functional_call(network, moved, x), y) + sum(
            d.square().sum() for d in shifts) / (2 * rate)
        value.backward()
        return value
    optimizer.step(problem)
    return torch.cat([d.detach().flatten() for d in shifts]), float(problem().detach())


@pytest.mark.parametrize("activation", [nn.Identity, nn.Tanh])
@pytest.mark.parametrize("rate", [0.05, 0.5, 5.0])
def test_the_step_is_the_solved_proximal_step_of_one_sample(activation, rate):
    network, x = mlp(activation=activation), inputs(1)
    step, least = solved(network, cross_entropy, x, LABELS[:1], rate)
    rule = InferenceLearning(cut(network), rate=rate, steps=400)
    rule(x, LABELS[:1])
    assert (-rate * flat(network) - step).norm() < 5e-3 * step.norm()
    assert rule.energies(x, LABELS[:1])[-1] == pytest.approx(least, rel=1e-5)


def test_one_linear_stage_with_squared_error_in_closed_form():
    """The proximal step of |W a - y|^2 / 2 moves the output rate n / (1 + rate n) of the way."""
    network, x, y = nn.Sequential(nn.Linear(5, 3)).double(), inputs(1), torch.randn(1, 3).double()
    rule = InferenceLearning(network, rate=0.7, steps=200,
                             loss=lambda out, y: (out - y).square().sum() / 2)
    before = network(x).detach()
    rule(x, y)
    n = 1 + x.square().sum()
    error = (y - before) * 0.7 * n / (1 + 0.7 * n)
    torch.testing.assert_close(-0.7 * network[0].weight.grad, error.T @ x / n)
    torch.testing.assert_close(-0.7 * network[0].bias.grad, error[0] / n)


def test_the_forward_pass_after_the_step_returns_the_settled_states():
    network, x = mlp(), inputs(1)
    rule = InferenceLearning(cut(network), rate=2.0, steps=60)
    rule(x, LABELS[:1])
    from netwright.rules.energy.inference_learning import _Batch
    batch = _Batch(rule, x, LABELS[:1])
    with batch.undone():
        for _ in range(60):
            batch.step()
    torch.optim.SGD(network.parameters(), lr=2.0).step()
    torch.testing.assert_close(network(x), batch.states[-1])
    torch.testing.assert_close(network[:3](x), batch.states[1])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("rate", [0.5, 5.0])
def test_a_batch_steps_nearer_to_its_proximal_step_than_backprop_does(seed, rate):
    network, x = mlp(seed=seed), inputs(2)
    step, _ = solved(network, cross_entropy, x, LABELS[:2], rate)
    InferenceLearning(cut(network), rate=rate, steps=100)(x, LABELS[:2])
    mine = -rate * flat(network)
    network.zero_grad()
    Backprop(network)(x, LABELS[:2])
    exact = -rate * flat(network)
    assert (mine - step).norm() < (exact - step).norm()
    assert mine.norm() < exact.norm()


def test_as_the_rate_falls_the_gradient_becomes_backprops_at_first_order():
    network, x = mlp(), inputs()
    Backprop(network)(x, LABELS)
    exact, off = flat(network), []
    for rate in (1e-2, 1e-3, 1e-4):
        network.zero_grad()
        InferenceLearning(network, rate=rate, steps=400)(x, LABELS)
        off.append(float((flat(network) - exact).norm() / exact.norm()))
    assert off[2] < 2e-3
    assert off[0] / off[1] == pytest.approx(10, rel=0.3)
    assert off[1] / off[2] == pytest.approx(10, rel=0.1)


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3),
        nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(24, 3))


@pytest.mark.parametrize("rate", [1e-3, 0.1, 100.0])
@pytest.mark.parametrize("state_rate", [0.5, 50.0])
def test_energy_never_rises_and_starts_at_the_loss(rate, state_rate):
    for network, x in ((mlp().float(), inputs().float()),
                       (convolutional(), torch.randn(6, 1, 8, 8))):
        rule = InferenceLearning(network, rate=rate, state_rate=state_rate)
        torch.manual_seed(2)
        energies = rule.energies(x, LABELS)
        torch.manual_seed(2)
        with torch.no_grad():
            loss = float(cross_entropy(network(x), LABELS))
        assert energies[0] == pytest.approx(loss, rel=1e-5)
        assert energies == sorted(energies, reverse=True)
        assert energies[-1] < energies[0]


def test_a_batch_takes_the_mean_of_its_samples_steps():
    network, x = mlp(), inputs()
    rule = InferenceLearning(network, rate=0.5, steps=300)
    rule(x, LABELS)
    whole = flat(network)
    network.zero_grad()
    for i in range(6):
        rule(x[i:i + 1], LABELS[i:i + 1])
    torch.testing.assert_close(whole, flat(network) / 6, rtol=1e-4, atol=1e-6)


def test_targets_left_out_change_nothing_but_the_mean():
    network, x = mlp(), inputs()
    rule = InferenceLearning(network, steps=300)
    rule(x[:4], LABELS[:4])
    expected = flat(network)
    network.zero_grad()
    rule(x, torch.cat([LABELS[:4], torch.tensor([-100, -100])]))
    torch.testing.assert_close(flat(network), expected, rtol=1e-4, atol=1e-6)


def test_the_size_of_a_step_is_bounded_whatever_the_rate():
    """No more than takes the loss to 0: its square over 2 rate is at most the loss's fall."""
    network, x = mlp(), inputs()
    sizes = []
    for rate in (1.0, 100.0, 1e4):
        network.zero_grad()
        loss = InferenceLearning(network, rate=rate)(x, LABELS)
        size = rate * flat(network).norm()
        assert size**2 / (2 * rate) <= loss
        sizes.append(float(size))
    assert sizes[2] < 100 * sizes[0]


def test_convolutions_count_the_mean_patch():
    conv, x = nn.Conv2d(2, 3, 3, padding=1), torch.randn(4, 2, 40, 40)
    from netwright.rules.energy.inference_learning import _Batch
    network = nn.Sequential(conv, nn.Flatten(), nn.Linear(4800, 3))
    batch = _Batch(InferenceLearning(network), x, LABELS[:4])
    with batch.undone():
        _, (norm, _) = batch.energy(batch.states)
    patches = nn.functional.unfold(x, 3, padding=1).square().sum(1).mean(1)
    torch.testing.assert_close(norm, patches + 1, rtol=0.06, atol=0)  # but for the edges


def test_statistics_random_state_and_modes_are_those_of_one_forward_pass():
    network, x = convolutional(), torch.randn(6, 1, 8, 8)
    twin = deepcopy(network)
    torch.manual_seed(3)
    loss = cross_entropy(twin(x), LABELS)
    after = torch.rand(3)
    torch.manual_seed(3)
    found = InferenceLearning(network)(x, LABELS)
    assert torch.equal(torch.rand(3), after)
    assert torch.equal(found, loss)
    for key, value in twin.state_dict().items():
        assert torch.equal(network.state_dict()[key], value), key
    assert not any(m._forward_pre_hooks for m in network.modules())


def test_other_losses_autocast_and_half_precision():
    network, x, y = mlp(), inputs(), torch.randn(6, 3).double()
    assert InferenceLearning(network, loss=mse_loss)(x, y).isfinite()
    small, x = mlp().float(), inputs().float()
    rule = InferenceLearning(small)
    rule(x, LABELS)
    expected = flat(small)
    small.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        rule(x, LABELS)
    assert cosine_similarity(flat(small), expected, dim=0) > 0.9
    half = mlp().bfloat16()
    assert InferenceLearning(half)(x.bfloat16(), LABELS).isfinite()
    assert all(p.grad.isfinite().all() for p in half.parameters())


def test_transformers_and_graphs():
    transformers = pytest.importorskip("transformers")
    geometric = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2,
                                     num_attention_heads=2, intermediate_size=32, num_labels=3)
    mask = torch.ones(6, 7, dtype=torch.long)
    mask[:, 5:] = 0
    x: Any = {"input_ids": torch.randint(1, 20, (6, 7)), "attention_mask": mask}
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 0, 3]])
    graph = (torch.randn(6, 5), edges)
    some = torch.tensor([0, -100, 1, -100, 2, -100])
    for network, given, y in ((transformers.BertForSequenceClassification(config), x, LABELS),
                              (geometric.GCN(5, 8, 3, 3, dropout=0.2), graph, some)):
        rule = InferenceLearning(network, given)
        energies = rule.energies(given, y)
        assert energies == sorted(energies, reverse=True)
        rule(given, y)
        for stage in rule.stages:
            assert any(p.grad is not None and p.grad.any() for p in stage.parameters())


def accuracy(seed: int, *, freeze: bool = False, shuffled: bool = False) -> float:
    torch.manual_seed(seed)
    data = digits()
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 12),
                            nn.Tanh(), nn.Linear(12, 10))
    if freeze:
        network[1:5].requires_grad_(False)
    rule = InferenceLearning(network, steps=6)
    y = data.y_train[torch.randperm(len(data.y_train))] if shuffled else data.y_train
    optimizer = torch.optim.Adam([p for p in rule.parameters() if p.requires_grad], lr=2e-2)
    nw.fit(rule, Batches(data.x_train, y, 64, seed=seed), epochs=6, optimizer=lambda _: optimizer,
           progress=False)
    return float((rule.predict(data.x_test).argmax(1) == data.y_test).float().mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_digits_are_learned_and_controls_are_not(seed):
    learned = accuracy(seed)
    assert learned > 0.7
    assert learned > accuracy(seed, freeze=True) + 0.1
    assert accuracy(seed, shuffled=True) < 0.3


@pytest.mark.parametrize(("options", "match"), [
    ({"steps": 2}, r"steps must be at least 3, got 2; .* 3 stages"),
    ({"rate": 0.0}, r"rate must be above 0, got 0.0"),
    ({"state_rate": float("nan")}, r"state_rate must be above 0, got nan"),
])
def test_settings_that_cannot_work(options, match):
    with pytest.raises(ValueError, match=match):
        InferenceLearning(mlp(), **options)


def test_labels_out_of_range():
    network = mlp()
    with pytest.raises(ValueError, match="y must be between 0 and 2"):
        InferenceLearning(network)(inputs(), LABELS + 1)
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("depth", [8, 16])
def test_all_stages_of_a_deep_network_learn_alike(depth):
    torch.manual_seed(0)
    layers = [part for _ in range(depth) for part in (nn.Linear(16, 16), nn.Tanh())]
    for layer in layers[::2]:
        nn.init.orthogonal_(layer.weight, 1.2)
    network, x, y = nn.Sequential(*layers[:-1]), torch.randn(16, 16), torch.arange(16) % 3
    Backprop(network)(x, y)
    exact = [layer.weight.grad.norm() for layer in layers[::2]]
    network.zero_grad()
    InferenceLearning(network)(x, y)
    ratios = torch.stack([layer.weight.grad.norm() / e
                          for layer, e in zip(layers[::2], exact, strict=True)])
    assert ratios.max() < 10 * ratios.median()
    assert ratios.min() > ratios.median() / 10


def test_tokens_count_by_their_mean():
    network = nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Linear(24, 3))
    x = torch.randn(6, 6, 4)
    from netwright.rules.energy.inference_learning import _Batch
    batch = _Batch(InferenceLearning(network), x, LABELS)
    with batch.undone():
        _, (norm, _) = batch.energy(batch.states)
    torch.testing.assert_close(norm, 1 + x.square().sum(2).mean(1))
