from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from netwright.data import digits
from netwright.measure import cost
from netwright.objectives.losses import cross_entropy
from netwright.rules import Backprop, LikelihoodRatio
from netwright.runtime.modes import evaluating


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def seeded() -> Generator:
    return Generator().manual_seed(3)


def classes(*shape: int) -> Tensor:
    return torch.randint(3, shape)


def flat(network: nn.Module) -> Tensor:
    """Return the gradients that the network has, and take them away."""
    found = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                       for p in network.parameters() if p.requires_grad])
    network.zero_grad(set_to_none=True)
    return found


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a, b, dim=0))


def smoothed(network: nn.Sequential, x: Tensor, y: Tensor, noise: float, draws: int) -> Tensor:
    """Return the mean gradient of the network with noise, differentiated through all of it."""
    hidden = network[1](network[0](x.repeat(draws, 1)))
    logits = network[2](hidden + noise * torch.randn_like(hidden))
    cross_entropy(logits + noise * torch.randn_like(logits), y.repeat(draws)).backward()
    return flat(network)


@pytest.mark.parametrize("control", ["baseline", "antithetic", None])
def test_the_update_is_noise_times_loss_through_each_stage(control):
    network, x, y = mlp().double(), torch.randn(5, 6).double(), classes(5)
    rule = LikelihoodRatio(network, copies=4, noise=0.3, control=control, generator=seeded())
    seeds = torch.randint(2**62, (2 if control == "antithetic" else 4,), generator=seeded())
    loss = rule(x, y)
    update = flat(network)

    runs = []
    for seed in seeds.tolist():
        for sign in (1, -1) if control == "antithetic" else (1,):
            generator = Generator().manual_seed(seed)
            hidden = network[1](network[0](x))
            e = sign * torch.randn(5, 8, generator=generator, dtype=torch.float64)
            logits = network[2](hidden.detach() + 0.3 * e)
            f = sign * torch.randn(5, 3, generator=generator, dtype=torch.float64)
            losses = nn.functional.cross_entropy(logits.detach() + 0.3 * f, y, reduction="none")
            runs.append((hidden, e, logits, f, losses / 5))
    total = sum(losses for *_, losses in runs)
    for i, (hidden, e, logits, f, losses) in enumerate(runs):
        b = (total - losses) / 3 if control == "baseline" else 0.0
        if control == "antithetic":  # of the other pair
            b = (total - losses - runs[i ^ 1][-1]) / 2
        teaching = ((losses - b) / 0.3 / 4).unsqueeze(1)
        hidden.backward(teaching * e)
        logits.backward(teaching * f)
    torch.testing.assert_close(update, flat(network))
    torch.testing.assert_close(loss, total.sum() / 4)


@pytest.mark.parametrize("control", ["baseline", "antithetic"])
def test_the_mean_converges_to_the_gradient_of_the_smoothed_loss(control):
    network, x, y = mlp(), torch.randn(4, 6), classes(4)
    network[2].weight.data *= 6  # so that the loss bends within the noise
    smooth = smoothed(network, x, y, 1.0, 20000)
    Backprop(network)(x, y)
    exact = flat(network)
    errors = []
    for copies in (32, 512):
        rule = LikelihoodRatio(network, copies=copies, noise=1.0, control=control)
        found = []
        for _ in range(4):
            rule(x, y)
            found.append(flat(network))
        errors.append(float((torch.stack(found) - smooth).square().sum(1).mean().sqrt()))
    assert errors[1] < 0.4 * errors[0]  # a quarter in theory
    mean = torch.stack(found).mean(0)
    assert (mean - smooth).norm() < 0.5 * (mean - exact).norm()


def test_both_controls_lower_the_noise():
    network, x, y = mlp(), torch.randn(16, 6), classes(16)
    variance = {}
    for control in ("baseline", "antithetic", None):
        rule = LikelihoodRatio(network, copies=8, control=control)
        found = []
        for _ in range(30):
            rule(x, y)
            found.append(flat(network))
        variance[control] = float(torch.stack(found).var(0).sum())
    assert variance["antithetic"] < 0.1 * variance[None]
    assert variance["baseline"] < 0.1 * variance[None]


def test_antithetic_noise_is_calmed_in_the_last_layer_too():
    network, x, y = mlp(), torch.randn(16, 6), classes(16)
    variance = {}
    for control in ("antithetic", None):
        rule = LikelihoodRatio(network, copies=8, control=control)
        found = []
        for _ in range(30):
            rule(x, y)
            found.append(network[2].weight.grad.clone())
            network.zero_grad()
        variance[control] = float(torch.stack(found).var(0).sum())
    assert variance["antithetic"] < 0.02 * variance[None]


def test_what_one_mode_has_shown_of_mixing_says_nothing_of_another():
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8),
                            nn.Tanh(), nn.Linear(8, 3)).eval()
    rule = LikelihoodRatio(network, copies=2)
    rule(torch.randn(6, 6), classes(6))
    assert rule._mixing.known is False
    network.train()
    rule(torch.randn(6, 6), classes(6))
    assert rule._mixing.known
    network.eval()
    assert rule._mixing.known is False


def test_separate_samples_are_taught_by_their_own_loss():
    rule = LikelihoodRatio(mlp(), copies=2)
    rule(torch.randn(6, 6), classes(6))
    assert rule._mixing.known is False


class Neighbour(nn.Linear):
    """Computes for every sample with the signal of another."""

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h.flip(0))


def test_samples_that_mix_keep_the_mean():
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Neighbour(8, 3))
    x, y = torch.randn(6, 6), classes(6)
    Backprop(network)(x, y)
    gradient = flat(network)[:56]  # of the first stage

    def found(rule: LikelihoodRatio) -> float:
        rule(x, y)
        return cosine(flat(network)[:56], gradient)

    rule = LikelihoodRatio(network, copies=1000, noise=0.05)
    assert found(rule) > 0.7
    assert rule._mixing.known
    rule._mixing.found = lambda *_, **__: False
    assert found(rule) < 0.4  # each sample would be taught by the loss of another


@pytest.mark.parametrize("kind", ["batch norm", "graph"])
def test_batch_norm_and_graphs_are_found_to_mix(kind):
    network: nn.Module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8),
                                       nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    x: Any = torch.randn(6, 6)
    y = classes(6)
    if kind == "graph":
        geometric = pytest.importorskip("torch_geometric.nn")
        network, y[0] = geometric.GCN(6, 8, 2, 3), -100
        x = (x, torch.tensor([[0, 1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 0, 3]]))
    rule = LikelihoodRatio(network, x, copies=2)
    rule(x, y)
    assert rule._mixing.known
    assert flat(network).abs().sum() > 0


def test_batch_norm_dropout_and_the_random_state_are_left_as_one_pass_leaves_them():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3),
                            nn.Flatten(), nn.Linear(144, 3))
    x, y = torch.randn(7, 1, 8, 8), classes(7)
    rule = LikelihoodRatio(network, copies=4, generator=seeded())
    torch.manual_seed(1)
    rule(x, y)
    state = torch.get_rng_state()
    assert network[1].num_batches_tracked == 1
    mean = network[1].running_mean.clone()
    network[1].reset_running_stats()
    torch.manual_seed(1)
    Backprop(network)(x, y)
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(mean, network[1].running_mean)  # nothing before it has noise


def hugging_face(name: str) -> tuple[nn.Module, Any, Tensor]:
    transformers = pytest.importorskip("transformers")
    if name == "vit":
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            image_size=8, patch_size=4, num_channels=1, num_labels=3)
        return transformers.ViTForImageClassification(config), torch.randn(4, 1, 8, 8), classes(4)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 5:] = 0
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=32, max_position_embeddings=16, use_cache=False)
    y = torch.randint(3, 30, (3, 7))
    x = {"input_ids": y.clone(), "attention_mask": mask}
    y[0, 5:] = -100
    return transformers.LlamaForCausalLM(config), x, y


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_transformers(name):
    network, x, y = hugging_face(name)
    with evaluating(network):
        rule = LikelihoodRatio(network, x, copies=100, noise=0.02)
        rule(x, y)
        estimate = flat(network)
        Backprop(network)(x, y)
    assert [*rule._mixing.by_mode.values()] == [False]
    assert cosine(estimate, flat(network)) > 0.4


def test_a_loss_without_a_derivative_teaches():
    def wrong(output: Tensor, target: Tensor) -> Tensor:
        return (output.argmax(1) != target).float()

    network, x = nn.Sequential(nn.Linear(6, 2)), torch.randn(128, 6)
    y = (x[:, 0] + x[:, 1] > 0).long()
    rule = LikelihoodRatio(network, copies=8, noise=0.3, loss=wrong)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    for _ in range(60):
        optimizer.zero_grad()
        loss = rule(x, y)
        optimizer.step()
    assert 0 < loss < 0.2
    assert wrong(rule.predict(x), y).mean() < 0.1
    whole = LikelihoodRatio(network, copies=8, noise=0.3, loss=lambda h, t: wrong(h, t).mean())
    assert 0 < whole(x, y) < 0.2


def test_frozen_stages_get_no_noise():
    network, x, y = mlp(), torch.randn(7, 6), classes(7)
    network[2].requires_grad_(False)
    network[0].requires_grad_(False)
    network[2].bias.requires_grad_(True)
    rule = LikelihoodRatio(network, copies=4, generator=seeded())
    rule(x, y)
    assert network[0].weight.grad is None
    assert network[2].weight.grad is None
    assert network[2].bias.grad.abs().sum() > 0


def test_no_more_than_one_stage_is_kept():
    def kept(depth: int, copies: int) -> int:
        layers = [layer for _ in range(depth) for layer in (nn.Linear(32, 32), nn.Tanh())]
        rule = LikelihoodRatio(nn.Sequential(*layers), copies=copies)
        batch = torch.randn(64, 32), torch.randint(32, (64,))
        return cost(rule, batch, repeats=1, warmup=0).saved_bytes

    assert kept(2, 2) == kept(8, 2) == kept(2, 8) > 0


def accuracy(*, shuffled: bool = False, frozen: bool = False) -> float:
    data = digits()
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 16),
                            nn.Tanh(), nn.Linear(16, 10))
    network[1].requires_grad_(not frozen)
    network[3].requires_grad_(not frozen)
    rule = LikelihoodRatio(network, copies=8)
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.02)
    y = data.y_train[torch.randperm(len(data.y_train))] if shuffled else data.y_train
    for _ in range(5):
        for batch in torch.randperm(len(y)).split(64):
            optimizer.zero_grad()
            rule(data.x_train[batch], y[batch])
            optimizer.step()
    return float((rule.predict(data.x_test).argmax(1) == data.y_test).float().mean())


def test_digits_are_learned_in_the_hidden_stages_too():
    trained = accuracy()
    assert trained > 0.6
    assert trained > accuracy(frozen=True) + 0.15
    assert accuracy(shuffled=True) < 0.3


@pytest.mark.parametrize(("options", "words"), [
    ({"noise": 0.0}, "noise must be above 0, got 0.0"),
    ({"control": "quasi"}, "no control is called 'quasi'; known are antithetic, baseline"),
    ({"copies": 0, "control": None}, "copies must be at least 1.* got copies=0"),
    ({"copies": 1}, "got copies=1 with control='baseline'"),
    ({"copies": 3, "control": "antithetic"}, "even with control='antithetic', got copies=3"),
])
def test_options_that_do_not_exist(options, words):
    with pytest.raises(ValueError, match=words):
        LikelihoodRatio(mlp(), **options)
