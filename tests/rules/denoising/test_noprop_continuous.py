from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

import netwright as nw
from netwright.data import Batches, digits
from netwright.errors import UnknownName
from netwright.measure import cost
from netwright.rules import NoPropContinuous
from netwright.rules.denoising.noprop_continuous import CosineSchedule, LearnedSchedule
from netwright.runtime.modes import training


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(7, 6), torch.randint(3, (7,))


def seeded() -> Generator:
    return Generator().manual_seed(3)


def shaken() -> LearnedSchedule:
    schedule = LearnedSchedule().double()
    with torch.no_grad():
        for p in schedule.parameters():
            p.add_(torch.randn_like(p))
    return schedule


@pytest.mark.parametrize("schedule", [LearnedSchedule().double(), CosineSchedule(0.05), shaken()])
def test_the_derivative_of_the_signal_to_noise_ratio_is_autograds(schedule):
    t = torch.linspace(0, 1, 9).double().requires_grad_()
    rho, slope = schedule(t)
    (expected,) = torch.autograd.grad(rho.square().sum(), t)
    torch.testing.assert_close(2 * rho * slope, expected)
    assert (rho.diff() > 0).all()


def test_the_ends_of_the_learned_schedule_are_its_parameters():
    schedule = shaken()
    rho, _ = schedule(torch.tensor([0.0, 1.0]).double())
    span = nn.functional.softplus(schedule.span)
    torch.testing.assert_close(rho.square().log(), torch.stack([schedule.low,
                                                                schedule.low + span]))


def test_the_cosine_schedule_is_that_of_the_discrete_blocks():
    from netwright.rules.denoising.noprop import cosine_schedule
    rho, _ = CosineSchedule(0.05)(torch.linspace(0, 1, 6).double())
    torch.testing.assert_close(rho.square() / (1 + rho.square()), cosine_schedule(5, 0.05))


def silence(rule: NoPropContinuous, sure_of: int | None = None) -> None:
    """Make the block answer the same whatever it reads."""
    nn.init.zeros_(rule.block.head[-1].weight)
    nn.init.zeros_(rule.block.head[-1].bias)
    if sure_of is not None:
        rule.block.head[-1].bias.data[sure_of] = 50
    nn.init.zeros_(rule.classifier.weight)
    nn.init.zeros_(rule.classifier.bias)


def test_the_loss_of_a_block_that_knows_nothing_in_closed_form():
    """|mean of the one-hots - one-hot|^2 = 2/3 of 3 classes, and SNR' integrates to SNR."""
    x, y = torch.randn(20000, 6).double(), torch.randint(3, (20000,))
    rule = NoPropContinuous(mlp().double(), x[:2], embedding="one-hot", eta=0.3)
    silence(rule)
    low, high = rule.schedule(torch.tensor([0.0, 1.0]).double())[0].square().detach()
    kept = low / (1 + low)
    kl = (kept - 3 * kept - 3 * torch.log1p(-kept)) / 2
    expected = torch.tensor(3.0).double().log() + kl + 0.3 / 2 * (high - low) * 2 / 3
    torch.testing.assert_close(rule(x, y), expected, rtol=1e-3, atol=0)


def test_the_gradient_is_autograds_of_the_loss_at_the_drawn_times():
    x, y = batch()
    rule = NoPropContinuous(mlp().double(), x.double())
    rule.generator = seeded()
    rule(x.double(), y)
    found = {name: p.grad for name, p in rule.named_parameters()}

    draw = seeded()
    W = rule.embedding
    u = W[y]
    t = (torch.rand((), generator=draw).double() + torch.arange(7).double() / 7) % 1
    t.requires_grad_()
    snr = rule.schedule(t)[0].square()
    (slope,) = torch.autograd.grad(snr.sum(), t, create_graph=True)
    kept = (snr / (1 + snr))[:, None]
    z = kept.sqrt() * u + (1 - kept).sqrt() * torch.randn(
        7, 20, generator=draw, dtype=torch.float64)
    guess = rule.block(rule.network(x.double()), z, t).softmax(1) @ W
    ends = rule.schedule(torch.tensor([0.0, 1.0]).double())[0].square()
    kept = ends / (1 + ends)
    q = torch.distributions.Normal(u * kept[0].sqrt(), (1 - kept[0]).sqrt())
    p = torch.distributions.Normal(torch.zeros_like(u), torch.ones_like(u))
    last = kept[1].sqrt() * u + (1 - kept[1]).sqrt() * torch.randn(
        7, 20, generator=draw, dtype=torch.float64)
    loss = ((slope * (guess - u).square().sum(1)).mean() / 2
            + cross_entropy(rule.classifier(last), y)
            + torch.distributions.kl_divergence(q, p).sum(1).mean())
    expected = torch.autograd.grad(loss, list(rule.parameters()))
    for (name, g), e in zip(found.items(), expected, strict=True):
        torch.testing.assert_close(g, e, msg=lambda text, name=name: f"{name}: {text}")


def test_training_does_not_run_the_flow():
    """Neither the update nor what is stored for it depends on the steps of the prediction."""
    x, y = batch()
    rules = [NoPropContinuous(mlp(), x, steps=steps, generator=seeded()) for steps in (1, 50)]
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


@pytest.mark.parametrize("schedule", ["learned", "cosine"])
def test_a_block_that_knows_the_answer_predicts_it_however_noisy_the_flow_ends(schedule):
    x = torch.randn(500, 6)
    rule = NoPropContinuous(mlp(), x, schedule=schedule, offset=1.0)
    y = rule.network(x).argmax(1)

    class Knows(nn.Module):
        def forward(self, features: Tensor, z: Tensor, t: Tensor) -> Tensor:
            return 100 * features

    rule.block = Knows()
    assert torch.equal(rule.predict(x).argmax(1), y)


@pytest.mark.parametrize("schedule", ["learned", "cosine"])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_flow_of_a_sure_block_is_exact_in_one_step(schedule, solver):
    """With u_hat = u the flow leads from noise e to (rho_1 u + e + ...) / sqrt(1 + rho_1^2)."""
    x, _ = batch()
    found = []
    for steps in (1, 7):
        rule = NoPropContinuous(mlp().double(), x.double(), steps=steps, solver=solver,
                                schedule=schedule, embedding="one-hot")
        silence(rule, sure_of=1)
        read: list[Tensor] = []
        rule.block.register_forward_pre_hook(lambda _, given, read=read: read.append(given[1]))
        assert (rule.predict(x.double()).argmax(1) == 1).all()
        found.append(read[-1][0])
    torch.testing.assert_close(*found)
    first, last = rule.schedule(torch.tensor([0.0, 1.0]).double())[0]
    z = torch.randn(1, 7, 3, generator=Generator().manual_seed(0))[0].double()
    u = torch.tensor([0.0, 1.0, 0.0]).double()
    exact = (z * (1 + first**2).sqrt() + (last - first) * u) / (1 + last**2).sqrt()
    torch.testing.assert_close(found[0], exact.detach())


def test_predictions_repeat_leave_the_random_state_alone_and_average_chains():
    x, _ = batch()
    rule = NoPropContinuous(mlp(), x, chains=3)
    state = torch.get_rng_state()
    scores = rule.predict(x)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(scores, rule.predict(x))
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(7))
    other = NoPropContinuous(mlp(), x, chains=3, seed=1)
    other.load_state_dict(rule.state_dict())
    assert not torch.equal(scores, other.predict(x))


@pytest.mark.parametrize("embedding", ["learned", "one-hot"])
def test_what_learns(embedding):
    network, (x, y) = mlp(), batch()
    rule = NoPropContinuous(network, x, embedding=embedding)
    rule(x, y)
    assert rule.block.features is rule.network is network
    assert all(p.grad is not None and p.grad.any() for p in rule.parameters())
    assert isinstance(rule.embedding, nn.Parameter) == (embedding == "learned")
    fixed = NoPropContinuous(network, x, schedule="cosine")
    assert not list(fixed.schedule.parameters())
    rule.requires_grad_(False)
    assert rule(x, y).isfinite()


def accuracy(*, shuffled: bool = False, frozen: bool = False, seed: int = 0,
             **options: Any) -> float:
    torch.manual_seed(seed)
    data = digits()
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    rule = NoPropContinuous(network, data.x_train[:2], width=64, chains=8, steps=8, **options)
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
    assert accuracy(seed=seed) > 0.7
    assert accuracy(seed=seed, shuffled=True) < 0.3
    assert accuracy(seed=seed, frozen=True) < 0.3


def test_digits_are_learned_on_the_fixed_schedule():
    assert accuracy(schedule="cosine", solver="euler") > 0.5


def test_it_runs_in_fit():
    x, y = torch.randn(40, 6), torch.randint(3, (40,))
    rule = NoPropContinuous(mlp(), x[:2])
    history = nw.fit(rule, Batches(x, y, 10), epochs=2, progress=False)
    assert len(history.epochs) == 2
    assert rule.predict(x).shape == (40, 3)


def test_convolutions_transformers_graphs_and_tokens():
    transformers = pytest.importorskip("transformers")
    geometric = pytest.importorskip("torch_geometric.nn")
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                            nn.Linear(144, 3))
    x: Any = torch.randn(5, 1, 8, 8)
    rule = NoPropContinuous(network, x)
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
    rule = NoPropContinuous(transformers.BertForSequenceClassification(config), x)
    assert rule(x, torch.tensor([0, 1, 2])).isfinite()
    assert rule.predict(x).shape == (3, 3)

    x = (torch.randn(9, 5), torch.randint(0, 9, (2, 20)))
    y = torch.randint(3, (9,))
    y[4:] = -100
    rule = NoPropContinuous(geometric.GCN(5, 8, 2, 3), x, generator=seeded())
    assert rule(x, y).isfinite()
    assert rule.predict(x).shape == (9, 3)

    x = torch.randint(11, (2, 5))
    rule = NoPropContinuous(nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11)), x)
    assert rule(x, x).isfinite()
    assert rule.predict(x).shape == (2, 5, 11)


@pytest.mark.parametrize(("options", "words"), [
    ({"steps": 0}, "steps must be at least 1, got 0"),
    ({"eta": 0.0}, "eta must be above 0"),
    ({"offset": 0.0}, "offset must be above 0"),
    ({"width": -1}, "width must be at least 1"),
    ({"chains": 0}, "chains must be at least 1"),
    ({"embedding": "random"}, "embedding must be 'learned', 'one-hot' or"),
])
def test_options_that_do_not_exist(options, words):
    with pytest.raises(ValueError, match=words):
        NoPropContinuous(mlp(), batch()[0], **options)


@pytest.mark.parametrize(("options", "words"), [
    ({"solver": "hoyn"}, "did you mean heun"),
    ({"schedule": "cosinus"}, "did you mean cosine"),
])
def test_names_that_do_not_exist(options, words):
    with pytest.raises(UnknownName, match=words):
        NoPropContinuous(mlp(), batch()[0], **options)


@pytest.mark.parametrize(("y", "words"), [
    (torch.tensor([0, 3]), "between 0 and 2"),
    (torch.tensor([0.0, 1.0]), "int64"),
    (torch.tensor([-100, -100]), "at least one label"),
    (torch.tensor([[0], [1]]), r"y must be \(2,\)"),
])
def test_bad_batches_change_nothing(y, words):
    rule = NoPropContinuous(mlp())
    with pytest.raises(ValueError, match=words):
        rule(torch.randn(2, 6), y)
    assert all(p.grad is None for p in rule.parameters())
