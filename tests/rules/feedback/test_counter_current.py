from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, elu, interpolate, mse_loss, normalize

import netwright as nw
from netwright.data import Batches
from netwright.measure import cost
from netwright.models import mlp
from netwright.rules import CounterCurrent
from netwright.rules.feedback.counter_current import Mirror

CLASSES = torch.tensor([0, 1, 2, 0])
Gradients = dict[str, Tensor]


def by_hand(rule: CounterCurrent, x: Tensor, y: Tensor) -> Gradients:
    """Every gradient of a multilayer perceptron of three layers, each by autograd on its own."""
    network: Any = rule.network
    V = {2: rule.feedback[0].weight, 3: rule.feedback[1].weight}  # V_l reads b_l
    target = y if y.is_floating_point() else torch.eye(3, dtype=x.dtype)
    with torch.no_grad():
        a1 = network[:2](x)
        a2 = network[2:4](a1)
        b2 = elu(target @ V[3].T)

    def meet(a: Tensor, b: Tensor) -> Tensor:
        similarity = normalize(a) @ normalize(b).T
        meant = torch.eye(len(b), dtype=x.dtype)
        meant = meant if y.is_floating_point() else meant[y]
        return (similarity - meant).square().sum(1).mean()

    losses = [meet(network[:2](x), elu(b2 @ V[2].T)),
              meet(network[2:4](a1), elu(target @ V[3].T)), rule.loss(network[4](a2), y)]
    named = dict(rule.named_parameters())
    found = [torch.autograd.grad(loss, list(named.values()), allow_unused=True)
             for loss in losses]
    return {name: torch.stack([g for g in each if g is not None]).sum(0)
            for name, each in zip(named, zip(*found, strict=True), strict=True)}


def gradients(rule: CounterCurrent, x: Any, y: Tensor) -> Gradients:
    rule.zero_grad()
    rule(x, y)
    return {name: p.grad for name, p in rule.named_parameters() if p.grad is not None}


def assert_same(ours: Gradients, theirs: Gradients) -> None:
    assert ours.keys() == theirs.keys()
    for name, update in theirs.items():
        torch.testing.assert_close(ours[name], update, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("activation", [nn.ELU, nn.ReLU])
def test_gradients_are_those_of_each_layer_alone(
        activation: type[nn.Module], make_chain: Callable[..., nn.Sequential]) -> None:
    x = torch.randn(4, 5).double()
    rule = CounterCurrent(make_chain(5, 7, 6, 3, activation=activation).double(), x)
    assert_same(gradients(rule, x, CLASSES), by_hand(rule, x, CLASSES))


def test_a_target_like_the_output_meets_its_own_sample(
        make_chain: Callable[..., nn.Sequential]) -> None:
    x = torch.randn(4, 5).double()
    rule = CounterCurrent(make_chain(5, 7, 6, 5, activation=nn.ELU).double(), x, loss=mse_loss)
    assert_same(gradients(rule, x, x), by_hand(rule, x, x))


def test_one_linear_stage_in_closed_form() -> None:
    network = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 3)).double()
    x = torch.randn(1, 5).double()
    rule = CounterCurrent(network, x)
    a, b = network[0](x)[0], elu(rule.feedback[0].weight.T)
    B, length = b / b.norm(dim=1, keepdim=True), a.norm()
    s = B @ a / length
    error = 2 * (s - torch.tensor([0.0, 1.0, 0.0]).double())
    da = (B.T @ error - (error @ s) * a / length) / length
    found = gradients(rule, x, torch.tensor([1]))
    torch.testing.assert_close(found["network.0.weight"], (da[:, None] * x).detach())


@pytest.mark.parametrize("layer", range(3))
def test_no_gradient_crosses_a_layer_in_either_network(
        layer: int, make_chain: Callable[..., nn.Sequential]) -> None:
    x = torch.randn(4, 5)
    network = make_chain(5, 7, 6, 6, 3)
    rule = CounterCurrent(network, x)
    frozen = [p for i, p in enumerate(rule.feedback.parameters()) if i != layer]
    frozen += [p for i in range(4) if i != layer for p in network[2 * i].parameters()]
    before = gradients(rule, x, CLASSES)
    for p in frozen:
        p.requires_grad_(False)
    rule.zero_grad(set_to_none=True)
    rule(x, CLASSES)  # its gradient is the same where nothing else has one
    alone = {name: p.grad for name, p in rule.named_parameters() if p.grad is not None}
    assert set(alone) == {f"network.{2 * layer}.weight", f"network.{2 * layer}.bias",
                          f"feedback.{layer}.weight"}
    assert_same(alone, {name: before[name] for name in alone})


def test_what_has_no_label_does_not_count(make_chain: Callable[..., nn.Sequential]) -> None:
    x = torch.randn(6, 5).double()
    rule = CounterCurrent(make_chain(5, 7, 6, 3).double(), x)
    y = torch.tensor([0, -100, 1, 2, -100, 0])
    assert_same(gradients(rule, x, y), gradients(rule, x[y >= 0], y[y >= 0]))
    rule.zero_grad()
    rule(x, torch.full((6,), -100))
    hidden = [p.grad for p in [*rule.feedback.parameters(), *rule.network[:4].parameters()]]
    assert not any(g.any() for g in hidden if g is not None)


def test_each_token_has_its_own_target_and_a_sample_the_mean_of_its_tokens() -> None:
    network = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(2, 4, 5).double(), torch.randint(3, (2, 4))
    rule, flat = CounterCurrent(network, x), CounterCurrent(network, x.flatten(0, 1))
    flat.load_state_dict(rule.state_dict())
    assert_same(gradients(rule, x, y), gradients(flat, x.flatten(0, 1), y.flatten()))

    class Mean(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h.mean(1)

    pooled = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Sequential(Mean(), nn.Linear(6, 3)))
    rule = CounterCurrent(pooled.double(), x)
    found = gradients(rule, x, CLASSES[:2])
    a, b = pooled[:2](x).mean(1), elu(rule.feedback[0].weight.T)
    loss = (normalize(a) @ normalize(b).T - torch.eye(3)[CLASSES[:2]]).square().sum(1).mean()
    torch.testing.assert_close(found["network.0.weight"],
                               torch.autograd.grad(loss, pooled[0].weight)[0])


def test_the_mirror_of_a_convolutional_network_follows_its_maps() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ELU(), nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6),
        nn.ELU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3), nn.ELU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(5, 3))
    x = torch.randn(4, 1, 8, 8)
    rule = CounterCurrent(network, x)
    assert [tuple(m.weight.shape) for m in rule.feedback] == [(4, 6, 3, 3), (6, 5, 3, 3), (5, 3)]
    assert [tuple(b.shape) for b in rule.signals(torch.eye(3))] == [
        (3, 5, 1, 1), (3, 6, 4, 4), (3, 4, 8, 8)]
    found = gradients(rule, x, CLASSES)
    b = elu(nn.functional.conv2d(interpolate(rule.signals(torch.eye(3))[1], (8, 8)).detach(),
                                 rule.feedback[0].weight, padding=1)).flatten(1)
    a = network[:2](x).flatten(1)
    loss = (normalize(a) @ normalize(b).T - torch.eye(3)[CLASSES]).square().sum(1).mean()
    torch.testing.assert_close(found["feedback.0.weight"],
                               torch.autograd.grad(loss, rule.feedback[0].weight)[0])


@pytest.mark.parametrize(("above", "below"), [
    ((3,), (5,)), ((3,), (2, 4, 4)), ((2, 4, 4), (6,)), ((2, 4, 4), (3, 7, 9)), ((4, 6), (3, 11)),
    ((2, 9, 8), (3, 4, 4)), ((2, 4, 4, 2), (3, 4, 8, 2))])
def test_a_mirror_gives_the_size_below(above: tuple[int, ...], below: tuple[int, ...]) -> None:
    made = Mirror(torch.Size(above), torch.Size(below))(torch.randn(5, *above))
    assert made.shape == (5, *below)


def test_convolutional_autoencoders_and_one_dimension_do() -> None:
    conv = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ELU(), nn.Conv2d(4, 2, 3, 2, 1), nn.ELU(),
                         nn.ConvTranspose2d(2, 4, 2, 2), nn.ELU(), nn.ConvTranspose2d(4, 1, 2, 2))
    x = torch.rand(4, 1, 8, 8)
    rule = CounterCurrent(conv, x, loss=mse_loss)
    assert rule(x, x).isfinite()
    assert all(p.grad is not None for p in rule.parameters())
    line = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ELU(), nn.Flatten(), nn.Linear(24, 3))
    rule = CounterCurrent(line, x[:, 0, :1])
    assert rule.signals(torch.eye(3))[0].shape == (3, 4, 6)
    assert rule(x[:, 0, :1], CLASSES).isfinite()


def test_a_network_that_ends_in_pooled_maps_does() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ELU(), nn.Conv2d(4, 3, 3),
                            nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.rand(4, 1, 8, 8)
    assert CounterCurrent(network, x)(x, CLASSES).isfinite()
    assert CounterCurrent(network, x, loss=mse_loss)(x, torch.rand(4, 3)).isfinite()


def test_transformers_and_graphs_do() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2,
                                     num_attention_heads=2, intermediate_size=16, num_labels=3)
    model = transformers.BertForSequenceClassification(config).eval()
    ids, mask = torch.randint(1, 20, (4, 5)), torch.ones(4, 5, dtype=torch.long)
    rule = CounterCurrent(model, {"input_ids": ids, "attention_mask": mask})
    plain = gradients(rule, {"input_ids": ids, "attention_mask": mask}, CLASSES)
    padded = {"input_ids": torch.cat([ids, ids[:, :2]], 1),
              "attention_mask": torch.cat([mask, torch.zeros_like(mask[:, :2])], 1)}
    found = gradients(rule, padded, CLASSES)
    torch.testing.assert_close(found["feedback.0.weight"], plain["feedback.0.weight"])
    assert all(layer.attention.self.value.weight.grad.any() for layer in model.bert.encoder.layer)

    geometric = pytest.importorskip("torch_geometric.nn")
    graph = geometric.GCN(5, 8, num_layers=3, out_channels=3)
    nodes = torch.randn(4, 5), torch.tensor([[0, 1, 2, 3, 0], [1, 0, 3, 2, 2]])
    rule = CounterCurrent(graph, nodes)
    assert rule(nodes, torch.tensor([0, -100, 2, -100])).isfinite()
    assert all(p.grad is not None for p in rule.parameters())


def test_memory_does_not_grow_with_depth() -> None:
    def working_bytes(depth: int) -> int:
        x = torch.randn(512, 64)
        rule = CounterCurrent(mlp(64, 10, hidden=(64,) * depth), x)
        return cost(rule, (x, torch.randint(10, (512,))), repeats=1, warmup=0).working_bytes
    assert working_bytes(32) < 1.3 * working_bytes(8)


def test_it_learns_what_a_last_layer_on_random_features_does_not(
        trained: Callable[..., Any]) -> None:
    make = partial(CounterCurrent, example=torch.zeros(2, 64))
    for seed in range(3):
        learned = trained(make, seed, epochs=4)[1]
        control = trained(make, seed, epochs=4, frozen=True)[1]
        assert learned > 0.75
        assert learned > control + 0.15
    assert trained(make, 0, epochs=4, shuffled=True)[1] < 0.3


def test_an_autoencoder_keeps_more_through_what_its_hidden_layers_learn() -> None:
    x, _, x_test, _ = nw.data.digits()
    x, x_test = x.flatten(1), x_test.flatten(1)

    def error(*, frozen: bool) -> float:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ELU(), nn.Linear(64, 16),
                                nn.BatchNorm1d(16), nn.ELU(), nn.Linear(16, 64))
        rule = CounterCurrent(network, x[:2], loss=mse_loss)
        if frozen:
            network[:-1].requires_grad_(False)
        nw.fit(rule, Batches(x, x, 64, seed=0), epochs=12, seed=0, progress=False,
               optimizer=lambda p: torch.optim.Adam(p, 1e-2))
        return float((rule.predict(x_test) - x_test).square().mean())
    assert error(frozen=False) < 0.9 * error(frozen=True)


def test_what_the_rule_cannot_do_is_refused(make_chain: Callable[..., nn.Sequential]) -> None:
    network, x = make_chain(5, 7, 3), torch.randn(4, 5)
    with pytest.raises(ValueError, match="example must be an input"):
        CounterCurrent(network)
    rule = CounterCurrent(network, x)
    cases: list[tuple[CounterCurrent, Tensor, Tensor, str]] = [
        (rule, x, CLASSES + 1, "between 0 and 2"),
        (rule, x, CLASSES[:1], "4 rows|of 1 rows"),
        (CounterCurrent(network, x, loss=mse_loss), x, torch.randn(4, 2), r"output \(batch, 3\)")]
    conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 3))
    deep = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), *conv[1:])
    cases.append((CounterCurrent(deep, torch.randn(4, 1, 8, 8)), torch.randn(4, 1, 9, 9), CLASSES,
                  "72 features, as the example did"))
    for made, bad, y, match in cases:
        with pytest.raises(ValueError, match=match):
            made(bad, y)
        assert all(p.grad is None for p in made.parameters())
    assert cross_entropy(network(x), CLASSES).isfinite()
