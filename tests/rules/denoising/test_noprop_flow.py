from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

import netwright as nw
from netwright.data import Batches, digits
from netwright.measure import cost
from netwright.rules import NoPropFlow
from netwright.runtime.modes import training


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(7, 6), torch.randint(3, (7,))


def seeded() -> Generator:
    return Generator().manual_seed(3)


@pytest.mark.parametrize("embedding", ["learned", "one-hot"])
def test_the_gradient_is_autograds_of_the_loss_at_the_drawn_times(embedding):
    x, y = batch()
    x = x.double()
    rule = NoPropFlow(mlp().double(), x, generator=seeded(), embedding=embedding)
    rule.generator = seeded()
    loss = rule(x, y)

    draw = seeded()
    u = rule.embedding[y]
    t = (torch.rand((), generator=draw).double() + torch.arange(7).double() / 7) % 1
    noise = torch.randn(u.shape, generator=draw, dtype=torch.float64)
    z = torch.lerp(noise, u, t[:, None])
    v = rule.block(rule.network(x), z, t)
    expected = (v + noise - u).square().sum() / 7
    if embedding == "learned":
        end = z + (1 - t[:, None]) * v
        expected = expected + cross_entropy(rule.classifier(end), y)
    torch.testing.assert_close(loss, expected.detach())
    learning = [p for p in rule.parameters() if p.requires_grad]
    for p, g in zip(learning, torch.autograd.grad(expected, learning), strict=True):
        torch.testing.assert_close(p.grad, g)


def test_a_block_that_knows_the_way_has_no_loss_and_reaches_the_label_in_any_steps():
    """v = u - z_0 = (u - z_t) / (1 - t), for one class, whose embedding the block then knows."""
    x, _ = batch()
    y = torch.full((7,), 2)
    rule = NoPropFlow(mlp().double(), x.double(), embedding="one-hot")
    u = rule.embedding[2]
    rule.block.forward = lambda features, z, t: (u - z) / (1 - t[..., None])
    assert rule(x.double(), y) < 1e-20
    for steps in (1, 3, 20):
        rule.steps = steps
        scores = rule.predict(x.double())
        torch.testing.assert_close(scores, rule.classifier(u).expand(7, 3))


def test_training_does_not_run_the_flow():
    """Neither the update nor what is stored for it depends on the steps of the prediction."""
    x, y = batch()
    rules = [NoPropFlow(mlp(), x, steps=steps) for steps in (1, 50)]
    rules[1].load_state_dict(rules[0].state_dict())
    saved = []
    for rule in rules:
        rule.generator = seeded()
        calls: list[int] = []
        handle = rule.block.head.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        rule(x, y)
        assert len(calls) == 1
        handle.remove()
        saved.append(cost(rule, (x, y), repeats=1, warmup=0).saved_bytes)
    for p, q in zip(*(rule.block.parameters() for rule in rules), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert saved[0] == saved[1] > 0


def test_predictions_repeat_leave_the_random_state_alone_and_average_chains():
    x, _ = batch()
    rule = NoPropFlow(mlp(), x, chains=3)
    state = torch.get_rng_state()
    scores = rule.predict(x)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(scores, rule.predict(x))
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(7))
    other = NoPropFlow(mlp(), x, chains=3, seed=1)
    other.load_state_dict(rule.state_dict())
    assert not torch.equal(scores, other.predict(x))


@pytest.mark.parametrize("embedding", ["learned", "one-hot"])
def test_what_learns(embedding):
    network, (x, y) = mlp(), batch()
    rule = NoPropFlow(network, x, embedding=embedding)
    rule(x, y)
    assert rule.block.features is rule.network is network
    assert all(p.grad is not None and p.grad.any() for p in rule.block.parameters())
    assert isinstance(rule.embedding, nn.Parameter) == (embedding == "learned")
    assert rule.classifier.weight.requires_grad == (embedding == "learned")
    rule.requires_grad_(False)
    assert rule(x, y).isfinite()


def accuracy(*, shuffled: bool = False, frozen: bool = False, seed: int = 0,
             **options: Any) -> float:
    torch.manual_seed(seed)
    data = digits()
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    rule = NoPropFlow(network, data.x_train[:2], width=64, chains=8, steps=8, **options)
    y = data.y_train[torch.randperm(len(data.y_train))] if shuffled else data.y_train
    if frozen:  # the head would learn from random features well, so it must do without any
        nn.init.zeros_(network[-1].weight)
        network.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in rule.parameters() if p.requires_grad], lr=3e-3)
    with training(rule):
        for _ in range(12):
            for chosen in torch.randperm(len(y)).split(64):
                optimizer.zero_grad()
                rule(data.x_train[chosen], y[chosen])
                optimizer.step()
    return float((rule.predict(data.x_test).argmax(1) == data.y_test).float().mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_digits_are_learned(seed):
    assert accuracy(seed=seed) > 0.85
    assert accuracy(seed=seed, shuffled=True) < 0.3
    assert accuracy(seed=seed, frozen=True) < 0.3


def test_digits_are_learned_with_their_embeddings():
    assert accuracy(embedding="learned") > 0.5


def test_it_runs_in_fit():
    x, y = torch.randn(40, 6), torch.randint(3, (40,))
    rule = NoPropFlow(mlp(), x[:2])
    history = nw.fit(rule, Batches(x, y, 10), epochs=2, progress=False)
    assert len(history.epochs) == 2
    assert rule.predict(x).shape == (40, 3)


def test_convolutions_transformers_graphs_and_tokens():
    transformers = pytest.importorskip("transformers")
    geometric = pytest.importorskip("torch_geometric.nn")
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                            nn.Linear(144, 3))
    x: Any = torch.randn(5, 1, 8, 8)
    rule = NoPropFlow(network, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert rule(x, torch.randint(3, (5,))).isfinite()
        assert rule.predict(x).shape == (5, 3)
    assert network[1].num_batches_tracked == 1

    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=3)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 5:] = 0
    x = {"input_ids": torch.randint(1, 30, (3, 7)), "attention_mask": mask}
    rule = NoPropFlow(transformers.BertForSequenceClassification(config), x)
    assert rule(x, torch.tensor([0, 1, 2])).isfinite()
    assert rule.predict(x).shape == (3, 3)

    x = (torch.randn(9, 5), torch.randint(0, 9, (2, 20)))
    y = torch.randint(3, (9,))
    y[4:] = -100
    rule = NoPropFlow(geometric.GCN(5, 8, 2, 3), x, generator=seeded())
    assert rule(x, y).isfinite()
    assert rule.predict(x).shape == (9, 3)

    x = torch.randint(11, (2, 5))
    rule = NoPropFlow(nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11)), x)
    assert rule(x, x).isfinite()
    assert rule.predict(x).shape == (2, 5, 11)


@pytest.mark.parametrize(("options", "words"), [
    ({"steps": 0}, "steps must be at least 1, got 0"),
    ({"width": -1}, "width must be at least 1"),
    ({"chains": 0}, "chains must be at least 1"),
    ({"embedding": "random"}, "embedding must be 'learned', 'one-hot' or"),
])
def test_options_that_do_not_exist(options, words):
    with pytest.raises(ValueError, match=words):
        NoPropFlow(mlp(), batch()[0], **options)


@pytest.mark.parametrize(("y", "words"), [
    (torch.tensor([0, 3]), "between 0 and 2"),
    (torch.tensor([0.0, 1.0]), "int64"),
    (torch.tensor([-100, -100]), "at least one label"),
    (torch.tensor([[0], [1]]), r"y must be \(2,\)"),
])
def test_bad_batches_change_nothing(y, words):
    rule = NoPropFlow(mlp())
    with pytest.raises(ValueError, match=words):
        rule(torch.randn(2, 6), y)
    assert all(p.grad is None for p in rule.parameters())
