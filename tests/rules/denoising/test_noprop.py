from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from netwright.data import digits
from netwright.measure import cost
from netwright.rules import NoProp
from netwright.rules.denoising.noprop import cosine_schedule, denoising_steps, prototypes
from netwright.runtime.modes import training


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(7, 6), torch.randint(3, (7,))


def seeded() -> Generator:
    return Generator().manual_seed(3)


@pytest.mark.parametrize("blocks", [1, 2, 10, 50])
def test_the_schedule_rises_from_noise_to_signal(blocks):
    alpha_bar = cosine_schedule(blocks, offset=0.05)
    assert alpha_bar.shape == (blocks + 1,)
    assert alpha_bar[0] < 1e-30
    assert 0.99 < alpha_bar[-1] < 1
    assert (alpha_bar.diff() > 0).all()


@pytest.mark.parametrize("alpha_bar", [cosine_schedule(10, 0.05), cosine_schedule(3, 0.008),
                                       torch.tensor([0.1, 0.2, 0.7, 0.9]).double()])
def test_the_chain_of_a_block_that_knows_the_label_keeps_the_marginals(alpha_bar):
    """With u_hat = u the mean is sqrt(abar_t) u and the variance 1 - abar_t at every t."""
    mean, variance = alpha_bar[0].sqrt(), 1 - alpha_bar[0]
    for t, (a, b, c) in enumerate(denoising_steps(alpha_bar), start=1):
        assert min(a, b, c) >= 0
        mean, variance = a + b * mean, b**2 * variance + c
        torch.testing.assert_close(mean, alpha_bar[t].sqrt())
        torch.testing.assert_close(variance, 1 - alpha_bar[t])


def test_the_steps_are_the_posterior_of_the_noising_process():
    """z_{t-1} = sqrt(alpha) z_t + sqrt(1 - alpha) noise, conditioned by Gaussian algebra."""
    alpha_bar = torch.tensor([0.1, 0.2, 0.7, 0.9]).double()
    for t, (a, b, c) in enumerate(denoising_steps(alpha_bar), start=1):
        alpha, prior = alpha_bar[t - 1] / alpha_bar[t], 1 - alpha_bar[t]
        precision = 1 / prior + alpha / (1 - alpha)
        torch.testing.assert_close(c, 1 / precision)
        torch.testing.assert_close(b, alpha.sqrt() / (1 - alpha) / precision)
        torch.testing.assert_close(a, alpha_bar[t].sqrt() / prior / precision)


def silence(rule: NoProp) -> None:
    """Make every block answer with equal probabilities whatever it reads."""
    for block in rule.blocks:
        nn.init.zeros_(block.head[-1].weight)
        nn.init.zeros_(block.head[-1].bias)
    nn.init.zeros_(rule.classifier.weight)
    nn.init.zeros_(rule.classifier.bias)


def test_the_loss_of_blocks_that_know_nothing_in_closed_form():
    """|mean of the one-hots - one-hot|^2 = 2/3 of 3 classes, CE = log 3, KL of no signal = 0."""
    x, y = batch()
    rule = NoProp(mlp().double(), x.double(), blocks=4, embedding="one-hot", eta=0.3)
    silence(rule)
    snr = rule.alpha_bar / (1 - rule.alpha_bar)
    log3 = torch.tensor(3.0).double().log()
    torch.testing.assert_close(rule(x.double(), y), log3 + 0.3 / 2 * (snr[-1] - snr[0]) * 2 / 3)
    for t in range(4):
        expected = log3 + 4 * 0.3 / 2 * (snr[t + 1] - snr[t]) * 2 / 3
        torch.testing.assert_close(rule(x.double(), y, block=t), expected)


def test_the_divergence_from_noise_in_closed_form():
    x, y = batch()
    rule = NoProp(mlp().double(), x.double(), embedding=torch.randn(3, 5).double(), blocks=2)
    silence(rule)
    rule.gain.zero_()
    rule.alpha_bar[0] = 0.4
    u = rule.embedding.detach()[y]
    q = torch.distributions.Normal(u * 0.4**0.5, 0.6**0.5)
    p = torch.distributions.Normal(torch.zeros_like(u), torch.ones_like(u))
    kl = torch.distributions.kl_divergence(q, p).sum(1).mean()
    torch.testing.assert_close(rule(x.double(), y), kl + torch.tensor(3.0).double().log())


def test_all_blocks_at_once_give_the_mean_of_one_after_the_other():
    x, y = batch()
    rule = NoProp(mlp(), x, blocks=3)
    rule.generator = seeded()
    rule(x, y)
    together = rule.blocks[0].head[-1].bias.grad.clone()
    rule.zero_grad()
    rule.generator = seeded()
    rule(x, y, block=0)
    torch.testing.assert_close(rule.blocks[0].head[-1].bias.grad / 3, together)


def test_no_gradient_passes_between_blocks():
    x, y = batch()
    rule = NoProp(mlp(), x, blocks=3)
    for t in range(3):
        rule.zero_grad()
        rule(x, y, block=t)
        for s, block in enumerate(rule.blocks):
            assert all((p.grad is not None) == (s == t) for p in block.parameters())
    # What a block learns does not depend on what another block does.
    rule.zero_grad()
    rule.generator = seeded()
    rule(x, y)
    before = [p.grad.clone() for p in rule.blocks[2].parameters()]
    with torch.no_grad():
        for p in rule.blocks[1].parameters():
            p.add_(1)
    rule.zero_grad()
    rule.generator = seeded()
    rule(x, y)
    for p, g in zip(rule.blocks[2].parameters(), before, strict=True):
        assert torch.equal(p.grad, g)


def test_each_block_frees_its_activations_before_the_next():
    x, y = torch.randn(64, 6), torch.randint(3, (64,))
    saved = {n: cost(NoProp(mlp(), x, blocks=n), (x, y), repeats=1).saved_bytes for n in (2, 8)}
    assert saved[2] > 0
    assert saved[8] <= saved[2] * 1.01

    count: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        count.append(1)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        NoProp(mlp(), x, blocks=8)(x, y)
    assert len(count) > 8  # the hooks do see what is stored


def test_the_network_is_the_first_block_and_the_others_own_copies():
    network, (x, y) = mlp(), batch()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network[0].weight.grad = torch.ones_like(network[0].weight)
    rule = NoProp(network, x, blocks=3)
    assert rule.blocks[0].features is rule.network is network
    assert rule.blocks[1].features is not rule.blocks[2].features
    for block in rule.blocks[1:]:
        for name, value in block.features.state_dict().items():
            assert torch.equal(value, before[name])
        assert block.features[0].weight.grad is None
    rule.zero_grad()
    rule(x, y)
    assert all(p.grad is not None for p in rule.parameters())


def test_predictions_repeat_and_leave_the_random_state_alone():
    x, _ = batch()
    rule = NoProp(mlp(), x, blocks=3)
    state = torch.get_rng_state()
    scores = rule.predict(x)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(scores, rule.predict(x))
    assert rule.training
    other = NoProp(mlp(), x, blocks=3, seed=1)
    other.load_state_dict(rule.state_dict())
    assert not torch.equal(scores, other.predict(x))


def test_the_chain_reaches_the_label_when_the_blocks_know_it():
    """u_hat is the first class's embedding always, so z_T is close to it and so is its score."""
    x, _ = batch()
    rule = NoProp(mlp(), x, blocks=5, embedding="one-hot", chains=4)
    silence(rule)
    for block in rule.blocks:
        block.head[-1].bias.data[0] = 50
    nn.init.eye_(rule.classifier.weight)
    probabilities = rule.predict(x).exp()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(7))
    kept = rule.alpha_bar[-1].sqrt() * torch.tensor([1.0, 0, 0])
    torch.testing.assert_close(probabilities, kept.softmax(0).expand(7, 3), atol=0.1, rtol=0)


def train(rule: NoProp, x: Tensor, y: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(rule.parameters(), lr=3e-3)
    with training(rule):
        for _ in range(epochs):
            for chosen in torch.randperm(len(y)).split(64):
                optimizer.zero_grad()
                rule(x[chosen], y[chosen])
                optimizer.step()


def accuracy(*, shuffled: bool = False, **options: Any) -> float:
    data = digits()
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    rule = NoProp(network, data.x_train[:2], blocks=3, width=64, **options)
    y = data.y_train[torch.randperm(len(data.y_train))] if shuffled else data.y_train
    train(rule, data.x_train, y, 6)
    return float((rule.predict(data.x_test).argmax(1) == data.y_test).float().mean())


def test_digits_are_learned():
    assert accuracy() > 0.85
    assert accuracy(shuffled=True) < 0.3


def test_digits_are_learned_from_prototypes():
    data = digits()
    start = prototypes(data.x_train, data.y_train)
    assert start.shape == (10, 64)
    assert (data.x_train.flatten(1).unsqueeze(1) == start).all(2).any(0).all()  # real samples
    assert accuracy(embedding=start) > 0.8


def test_convolutions_with_batch_norm_under_autocast():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                            nn.Linear(144, 3))
    x, y = torch.randn(5, 1, 8, 8), torch.randint(3, (5,))
    rule = NoProp(network, x, blocks=2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = rule(x, y)
        assert rule.predict(x).shape == (5, 3)
    assert loss.isfinite()
    assert all(p.grad.dtype == torch.float32 for p in rule.parameters())
    assert network[1].num_batches_tracked == 1


def test_transformers_and_graphs():
    transformers = pytest.importorskip("transformers")
    geometric = pytest.importorskip("torch_geometric.nn")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=3)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 5:] = 0
    x: Any = {"input_ids": torch.randint(1, 30, (3, 7)), "attention_mask": mask}
    rule = NoProp(transformers.BertForSequenceClassification(config), x, blocks=2)
    assert rule(x, torch.tensor([0, 1, 2])).isfinite()
    assert rule.predict(x).shape == (3, 3)

    x = (torch.randn(9, 5), torch.randint(0, 9, (2, 20)))
    y = torch.randint(3, (9,))
    y[4:] = -100
    rule = NoProp(geometric.GCN(5, 8, 2, 3), x, blocks=2, generator=seeded())
    assert rule(x, y).isfinite()
    assert rule.predict(x).shape == (9, 3)


def test_tokens_have_a_label_each():
    network = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11))
    x = torch.randint(11, (2, 5))
    rule = NoProp(network, x, blocks=2, generator=seeded())
    assert rule(x, x).isfinite()
    assert rule.predict(x).shape == (2, 5, 11)


def test_features_of_any_width():
    network, (x, y) = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), batch()
    rule = NoProp(network, x, num_classes=3, blocks=2)
    assert rule(x, y).isfinite()
    assert rule.predict(x).shape == (7, 3)
    assert NoProp(mlp(), blocks=2)(x, y).isfinite()  # the last layer tells the width


@pytest.mark.parametrize("embedding", ["one-hot", "learned"])
def test_gradients_accumulate_and_the_state_goes_round(embedding):
    x, y = batch()
    rule = NoProp(mlp(), x, blocks=2, embedding=embedding, generator=seeded())
    state = torch.get_rng_state()
    rule.generator.manual_seed(3)
    loss = rule(x, y)
    assert torch.equal(state, torch.get_rng_state())
    assert loss.shape == ()
    assert not loss.requires_grad
    once = {name: p.grad.clone() for name, p in rule.named_parameters()}
    rule.generator.manual_seed(3)
    rule(x, y)
    for name, p in rule.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once[name])
    assert isinstance(rule.embedding, nn.Parameter) == (embedding == "learned")
    other = NoProp(mlp(), x, blocks=2, embedding=embedding)
    other.load_state_dict(rule.state_dict())
    assert torch.equal(rule.predict(x), other.predict(x))


def test_frozen_features():
    network, (x, y) = mlp().requires_grad_(False), batch()
    rule = NoProp(network, x, blocks=2)
    rule(x, y)
    assert network[0].weight.grad is None
    assert not rule.blocks[1].features[0].weight.requires_grad
    assert rule.blocks[1].head[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("options", "words"), [
    ({"blocks": 0}, "blocks must be at least 1, got 0"),
    ({"width": -1}, "width must be at least 1"),
    ({"eta": 0.0}, "eta must be above 0"),
    ({"offset": 0.0}, "offset must be above 0"),
    ({"chains": 0}, "chains must be at least 1"),
    ({"embedding": "random"}, "embedding must be 'learned', 'one-hot' or"),
    ({"embedding": torch.zeros(4, 2)}, r"embedding must be \(3, size\)"),
])
def test_options_that_do_not_exist(options, words):
    with pytest.raises(ValueError, match=words):
        NoProp(mlp(), batch()[0], **options)


def test_a_network_whose_output_is_not_known_or_has_no_features():
    with pytest.raises(ValueError, match="give an input as example=x"):
        NoProp(nn.Sequential(nn.Linear(6, 3), nn.Tanh()))
    with pytest.raises(ValueError, match="keep the batch and the features apart"):
        NoProp(nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), batch()[0])


@pytest.mark.parametrize(("y", "block", "words"), [
    (torch.tensor([0, 3]), None, "between 0 and 2"),
    (torch.tensor([0.0, 1.0]), None, "int64"),
    (torch.tensor([-100, -100]), None, "at least one label"),
    (torch.tensor([[0], [1]]), None, r"y must be \(2,\)"),
    (torch.tensor([0, 1]), 2, "block must be between 0 and 1, got 2"),
])
def test_bad_batches_change_nothing(y, block, words):
    rule = NoProp(mlp(), blocks=2)
    with pytest.raises(ValueError, match=words):
        rule(torch.randn(2, 6), y, block=block)
    assert all(p.grad is None for p in rule.parameters())


def test_prototypes_need_a_sample_of_each_class():
    with pytest.raises(ValueError, match="none of class 1"):
        prototypes(torch.randn(3, 2), torch.tensor([0, 2, 2]))
