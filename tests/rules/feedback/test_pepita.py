from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

import netwright as nw
from netwright.errors import UnknownName
from netwright.rules import DirectFeedbackAlignment, Pepita

Gradients = Callable[..., dict[str, Tensor]]
CLASSES = torch.tensor([0, 1, 2, 0])
ACTIVATIONS = {nn.ReLU: lambda a: np.maximum(a, 0), nn.Tanh: np.tanh,
               nn.Sigmoid: lambda a: 1 / (1 + np.exp(-a))}


def by_hand(network: nn.Sequential, F: Tensor, x: Tensor, y: Tensor,
            presynaptic: str) -> dict[str, Tensor]:
    """The updates of a multilayer perceptron as the paper writes them, in NumPy."""
    layers = [(i, m.weight.detach().numpy(), m.bias.detach().numpy())
              for i, m in enumerate(network) if isinstance(m, nn.Linear)]
    activation = ACTIVATIONS[type(network[1])]

    def run(a: np.ndarray) -> list[np.ndarray]:
        outputs = [a]
        for i, W, b in layers:
            a = a @ W.T + b
            a = a if i == len(network) - 1 else activation(a)
            outputs.append(a)
        return outputs

    h, updates = run(x.numpy()), {}
    p = np.exp(h[-1] - h[-1].max(1, keepdims=True))
    e = p / p.sum(1, keepdims=True) - np.eye(3)[y.numpy()]
    g = run(x.numpy() + e @ F.numpy())
    for k, (i, *_) in enumerate(layers):
        if i == len(network) - 1:
            pairs = [(e, g[k] if presynaptic == "modulated" else h[k])]
        elif presynaptic == "own":
            pairs = [(h[k + 1], h[k]), (-g[k + 1], g[k])]
        else:
            pairs = [(h[k + 1] - g[k + 1], g[k] if presynaptic == "modulated" else h[k])]
        updates[f"{i}.weight"] = torch.tensor(sum(post.T @ pre for post, pre in pairs) / len(y))
        updates[f"{i}.bias"] = torch.tensor(sum(post.sum(0) for post, _ in pairs) / len(y))
    return updates


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, update in theirs.items():
        torch.testing.assert_close(ours[name], update, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize(("presynaptic", "activation"),
                         product(["modulated", "clean", "own"], ACTIVATIONS))
def test_the_update_of_a_multilayer_perceptron_is_the_papers(
        presynaptic: Any, activation: type[nn.Module], make_chain: Callable[..., nn.Sequential],
        gradients: Gradients) -> None:
    network = make_chain(5, 7, 6, 3, activation=activation).double()
    x = torch.randn(4, 5).double()
    rule = Pepita(network, x, presynaptic=presynaptic, scale=1.0)
    assert_same(gradients(rule, x, CLASSES),
                by_hand(network, rule.feedback["F"], x, CLASSES, presynaptic))


def test_an_activation_in_place_is_the_same(gradients: Gradients) -> None:
    network = nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)).double()
    x = torch.randn(4, 5).double()
    rule = Pepita(network, x, scale=1.0)
    found = gradients(rule, x, CLASSES)
    assert_same(found, by_hand(network, rule.feedback["F"], x, CLASSES, "modulated"))
    assert "forward" not in network[1].__dict__


def test_in_a_linear_network_it_is_adaptive_feedback_alignment(gradients: Gradients) -> None:
    network = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 3)).double()
    x = torch.randn(4, 5).double()
    rule = Pepita(network, x, presynaptic="clean")
    other = DirectFeedbackAlignment(network, x)
    W1, W2, F = network[0].weight, network[1].weight, rule.feedback["F"]
    with torch.no_grad():
        other.feedback["0"].copy_(-F @ W1.T)
        other.feedback["1"].copy_(-F @ W1.T @ W2.T)
    assert_same(gradients(rule, x, CLASSES), gradients(other, x, CLASSES))


def test_a_stage_is_differentiated_at_its_own_input_with_the_difference_as_signal(
        gradients: Gradients) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.AvgPool2d(2),
                            nn.Flatten(), nn.Linear(36, 3)).double()
    x = torch.randn(4, 1, 8, 8).double()
    rule = Pepita(network, x, scale=1.0)
    found = gradients(rule, x, CLASSES)
    stage = network[:4]
    h = stage(x)
    logits = network[4:](h)
    (error,) = torch.autograd.grad(nn.functional.cross_entropy(logits, CLASSES), logits)
    z = x + torch.einsum("nc,cijk->nijk", 4 * error, rule.feedback["F"])
    normed = network[:2](z)
    g = stage[2:](normed)
    # the pool has its derivative, the activation none
    at_tanh = torch.autograd.grad(network[3](h0 := torch.tanh(normed.detach()).requires_grad_()),
                                  h0, (h - g).detach() / 4)[0]
    parameters = [*network[0].parameters(), *network[1].parameters()]
    expected = dict(zip(["0.weight", "0.bias", "1.weight", "1.bias"],
                        torch.autograd.grad(normed, parameters, at_tanh), strict=True))
    expected["5.weight"], expected["5.bias"] = error.T @ g.flatten(1), error.sum(0)
    assert_same(found, {name: update.detach() for name, update in expected.items()})


def test_running_statistics_see_the_first_pass_alone() -> None:
    network = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))
    x = torch.randn(4, 5)
    plain = nn.BatchNorm1d(7)
    plain(network[0](x))
    Pepita(network, x)(x, CLASSES)
    assert network[1].num_batches_tracked == 1
    assert torch.equal(network[1].running_var, plain.running_var)


@pytest.mark.parametrize("presynaptic", ["modulated", "clean"])
def test_both_passes_drop_the_same_units(presynaptic: Any, gradients: Gradients) -> None:
    network = nn.Sequential(nn.Linear(5, 50), nn.ReLU(), nn.Dropout(), nn.Linear(50, 3))
    x = torch.randn(4, 5)
    rule = Pepita(network, x, presynaptic=presynaptic)
    rule.feedback["F"].zero_()
    found = gradients(rule, x, CLASSES)
    assert not found["0.weight"].any()  # the passes are one and the same
    assert found["3.weight"].any()


def test_what_has_no_label_does_not_count(gradients: Gradients,
                                          make_chain: Callable[..., nn.Sequential]) -> None:
    network = make_chain(5, 7, 3).double()
    x = torch.randn(6, 5).double()
    rule = Pepita(network, x, scale=1.0)
    y = torch.tensor([0, -100, 1, 2, -100, 0])
    assert_same(gradients(rule, x, y), gradients(rule, x[y >= 0], y[y >= 0]))
    assert not any(update.nan_to_num().any()
                   for update in gradients(rule, x, torch.full((6,), -100)).values())


def test_each_token_is_shifted_by_its_own_error(gradients: Gradients) -> None:
    network = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(2, 4, 5).double(), torch.randint(3, (2, 4))
    rule = Pepita(network, x, scale=1.0)
    assert rule.feedback["F"].shape == (3, 5)
    assert_same(gradients(rule, x, y), by_hand(network, rule.feedback["F"], x.flatten(0, 1),
                                               y.flatten(), "modulated"))


def test_where_the_input_is_whole_numbers_the_first_stages_output_is_shifted(
        gradients: Gradients) -> None:
    network = nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(),
                            nn.Linear(5, 3)).double()
    x = torch.randint(20, (4, 3))
    rule, other = Pepita(network, x, scale=1.0), DirectFeedbackAlignment(network, x)
    with torch.no_grad():
        other.feedback["0"].copy_(-rule.feedback["F"])
    ours, theirs = gradients(rule, x, CLASSES), gradients(other, x, CLASSES)
    torch.testing.assert_close(ours["0.weight"], theirs["0.weight"])
    embedded = network[:2](x).detach()
    expected = by_hand(network[2:], rule.feedback["F"], embedded, CLASSES, "modulated")
    torch.testing.assert_close(ours["2.weight"], expected["0.weight"])
    torch.testing.assert_close(ours["4.bias"], expected["2.bias"])


def test_a_transformer_takes_shorter_texts_and_padding() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2,
                                     num_attention_heads=2, intermediate_size=16, num_labels=3)
    model = transformers.BertForSequenceClassification(config)
    ids = torch.randint(20, (4, 6))
    mask = (torch.arange(6) < torch.tensor([[6], [3], [4], [6]])).long()
    rule = Pepita(model, {"input_ids": ids, "attention_mask": mask})
    for size in (6, 4):
        rule.zero_grad()
        assert rule({"input_ids": ids[:, :size], "attention_mask": mask[:, :size]},
                    CLASSES).isfinite()
        assert all(p.grad.isfinite().all() for p in model.bert.encoder.parameters())
        assert all(layer.attention.self.value.weight.grad.any()
                   for layer in model.bert.encoder.layer)
    vision = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        image_size=8, patch_size=4, num_channels=1, num_labels=3))
    batch = {"pixel_values": torch.randn(4, 1, 8, 8)}
    rule = Pepita(vision, batch)
    assert rule.feedback["F"].shape == (3, 1, 8, 8)
    assert rule(batch, CLASSES).isfinite()


@pytest.mark.parametrize("options", [{}, {"presynaptic": "own"}, {"feedback": "mirror"}])
def test_each_node_of_a_graph_is_shifted_by_its_own_error(options: dict[str, Any]) -> None:
    geometric = pytest.importorskip("torch_geometric.nn")
    network = geometric.GCN(5, 8, num_layers=3, out_channels=3)
    x = torch.randn(4, 5), torch.tensor([[0, 1, 2, 3, 0], [1, 0, 3, 2, 2]])
    rule = Pepita(network, x, **options)
    assert rule(x, torch.tensor([0, -100, 2, -100])).isfinite()
    assert all(p.grad is not None for p in rule.parameters())
    if not options:
        assert rule.feedback["F"].shape == (3, 5)


def test_feedback_has_its_size_and_repeats_with_its_generator() -> None:
    network, x = nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10)), torch.rand(2, 784)
    F, G = (Pepita(network, x, generator=Generator().manual_seed(0)).feedback["F"] for _ in "FG")
    assert torch.equal(F, G)
    assert float(F.std()) == pytest.approx(0.05 * (2 / 784) ** 0.5, rel=0.03)
    mirrored = Pepita(network, x, feedback="mirror", generator=Generator().manual_seed(0))
    assert float(mirrored._matrix().std()) == pytest.approx(0.05 * (2 / 784) ** 0.5, rel=0.03)


@pytest.mark.parametrize("inside", [False, True])
def test_mirrors_turn_to_the_weights_and_the_feedback_to_minus_their_product(
        inside: bool, cosine: Callable[..., float]) -> None:
    first = [nn.Embedding(20, 3), nn.Flatten()] if inside else []
    network = nn.Sequential(*first, nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))
    x = torch.randint(20, (64, 4)) if inside else torch.randn(64, 12)
    rule = Pepita(network, x, feedback="mirror")
    y = torch.randint(3, (64,))
    optimizer = torch.optim.SGD(rule.feedback.parameters(), lr=0.03)
    for _ in range(300):
        optimizer.zero_grad()
        rule(x, y)
        optimizer.step()
    W1, W2 = network[-3].weight, network[-1].weight
    names = rule.stages.names[-2:]
    assert cosine(rule.feedback[names[0]], W1) > 0.97
    assert cosine(rule.feedback[names[1]], W2) > 0.97
    assert cosine(rule._matrix(), -W2 @ W1) > 0.95
    # of a linear stage the mirror becomes the weight itself, of a rectified one half of it
    torch.testing.assert_close(rule.feedback[names[1]].norm(), W2.norm(), rtol=0.1, atol=0)


def test_a_mirror_descends_its_distance_to_the_covariance(make_chain: Any) -> None:
    network = make_chain(5, 7, 3)
    x = torch.randn(4, 5)
    generator = Generator().manual_seed(0)
    rule = Pepita(network, x, feedback="mirror", generator=generator)
    rule(x, CLASSES)
    generator = Generator().manual_seed(0)
    Pepita(network, x, feedback="mirror", generator=generator)
    for name, stage, size in (("0", network[:2], 5), ("2", network[2:], 7)):
        noise = torch.randn(4, size, generator=generator)
        B = rule.feedback[name]
        torch.testing.assert_close(B.grad, (B - stage(noise).T @ noise / 4).detach())


def test_it_learns_more_than_its_last_layer_and_comes_to_align(
        trained: Callable[..., Any]) -> None:
    x, y, *_ = nw.data.digits()
    batch = x[:500].flatten(1), y[:500]

    def make(network: nn.Module) -> Pepita:
        return Pepita(network, torch.zeros(2, 64))

    learned, control = [], []
    for seed in range(3):
        rule, accuracy = trained(make, seed)
        learned.append(accuracy)
        control.append(trained(make, seed, frozen=True)[1])
        found = nw.measure.alignment(rule, batch)
        assert found["4"] > 0.9
        assert found["0"] > 0.1
    assert min(learned) > 0.75
    assert min(learned) > max(control) + 0.1


def test_shuffled_labels_teach_it_nothing(trained: Callable[..., Any]) -> None:
    assert trained(lambda network: Pepita(network, torch.zeros(2, 64)), 0, shuffled=True)[1] < 0.3


def test_a_refused_batch_changes_nothing(make_chain: Callable[..., nn.Sequential]) -> None:
    network = make_chain(5, 7, 3)
    rule = Pepita(network, torch.randn(4, 5))
    own = dict(network[1].__dict__)
    for x, y, match in ((torch.randn(4, 5), CLASSES + 1, "between 0 and 2"),
                        (torch.randn(4, 6), CLASSES, "shapes"),
                        (torch.randn(4, 2, 5), CLASSES[:, None].repeat(1, 2), "build the rule")):
        with pytest.raises((ValueError, RuntimeError), match=match):
            rule(x, y)
        assert all(p.grad is None for p in rule.parameters())
        assert network[1].__dict__ == own


def test_what_the_rule_cannot_do_is_refused(make_chain: Callable[..., nn.Sequential]) -> None:
    network, x = make_chain(5, 7, 3), torch.randn(4, 5)
    with pytest.raises(UnknownName, match="did you mean mirror"):
        Pepita(network, x, feedback="miror")  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="did you mean clean"):
        Pepita(network, x, presynaptic="cleen")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale must be above 0, got 0"):
        Pepita(network, x, scale=0)
    with pytest.raises(ValueError, match="example must be an input"):
        Pepita(network)
    with pytest.raises(ValueError, match="keep the batch axis and a class axis"):
        Pepita(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Flatten(0)), x)
    pooled = nn.Sequential(nn.Linear(5, 7), nn.Flatten(0), nn.Unflatten(0, (2, 14)),
                           nn.Linear(14, 3))
    with pytest.raises(ValueError, match="what F shifts must keep"):
        Pepita(pooled, x)
    grouped = nn.Sequential(nn.Linear(5, 7), nn.Flatten(0), nn.Unflatten(0, (2, 14)),
                            nn.Linear(14, 6), nn.Flatten(0), nn.Unflatten(0, (4, 3)),
                            nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"0 must keep .* or feedback='random'"):
        Pepita(grouped, x, feedback="mirror")
