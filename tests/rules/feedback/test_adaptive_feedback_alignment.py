from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.autograd import Function

import netwright as nw
from netwright.data import Batches
from netwright.rules import AdaptiveFeedbackAlignment, DirectFeedbackAlignment, Pepita

Gradients = Callable[..., dict[str, Tensor]]
CLASSES = torch.tensor([0, 1, 2, 0])


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], **how: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, update in theirs.items():
        torch.testing.assert_close(ours[name], update, msg=lambda text, name=name: name + text,
                                   **how)


def test_of_two_layers_it_is_feedback_alignment_through_the_first_layers_weight(
        gradients: Gradients, make_chain: Callable[..., nn.Sequential]) -> None:
    network, x = make_chain(5, 7, 3, activation=nn.Tanh).double(), torch.randn(4, 5).double()
    rule, other = AdaptiveFeedbackAlignment(network, x), DirectFeedbackAlignment(network, x)
    for _ in range(2):  # it follows the weight
        with torch.no_grad():
            other.feedback["0"].copy_(-rule.feedback["F"] @ network[0].weight.T)
        assert_same(gradients(rule, x, CLASSES), gradients(other, x, CLASSES))
        with torch.no_grad():
            network[0].weight.normal_()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_of_deeper_networks_the_error_goes_through_all_weights_below(
        activation: type[nn.Module], gradients: Gradients,
        make_chain: Callable[..., nn.Sequential]) -> None:
    network, x = make_chain(5, 7, 6, 3, activation=activation).double(), torch.randn(4, 5).double()
    rule = AdaptiveFeedbackAlignment(network, x, scale=1.0)
    found = gradients(rule, x, CLASSES)
    with torch.no_grad():
        h1, h2, logits = network[:2](x), network[:4](x), network(x)
    slope = (lambda h: 1 - h ** 2) if activation is nn.Tanh else (lambda h: (h > 0).double())
    e = torch.softmax(logits, 1) - torch.eye(3)[CLASSES]
    W1, W2 = network[0].weight.detach(), network[2].weight.detach()
    v1 = slope(h1) * (e @ rule.feedback["F"] @ W1.T)
    v2 = slope(h2) * (v1 @ W2.T)
    expected = {"0.weight": -v1.T @ x, "0.bias": -v1.sum(0), "2.weight": -v2.T @ h1,
                "2.bias": -v2.sum(0), "4.weight": e.T @ h2, "4.bias": e.sum(0)}
    assert_same(found, {name: update / 4 for name, update in expected.items()})


@pytest.mark.parametrize("presynaptic", ["clean", "modulated"])
def test_it_is_what_pepita_comes_to_as_its_shift_goes_to_nothing(
        presynaptic: Any, gradients: Gradients) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.AvgPool2d(2),
                            nn.Flatten(), nn.Linear(36, 6), nn.Sigmoid(), nn.Dropout(0.2),
                            nn.Linear(6, 3)).double()
    x = torch.randn(4, 1, 8, 8).double()
    rule = AdaptiveFeedbackAlignment(network, x, scale=1.0)

    def of(made: nw.rules.Rule) -> dict[str, Tensor]:
        torch.manual_seed(1)  # the same units are dropped
        return gradients(made, x, CLASSES)
    exact, gaps = of(rule), []
    for size in (1e-2, 1e-3, 1e-4):
        other = Pepita(network, x, presynaptic=presynaptic)
        other.feedback["F"].copy_(size * rule.feedback["F"])
        near = of(other)
        near = {name: g / (1 if name.startswith("8") else size) for name, g in near.items()}
        gaps.append(max(float((near[name] - g).norm() / g.norm())
                        for name, g in exact.items() if g.norm() > 1e-9))
    assert gaps[2] < 1e-3
    assert gaps[1] < 0.2 * gaps[0]  # the error is of the first order in the shift
    assert gaps[2] < 0.2 * gaps[1]


def test_in_a_linear_network_it_is_pepita_with_the_clean_input(gradients: Gradients) -> None:
    network = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 3)).double()
    x = torch.randn(4, 5).double()
    rule, other = AdaptiveFeedbackAlignment(network, x), Pepita(network, x, presynaptic="clean")
    other.load_state_dict(rule.state_dict())
    assert_same(gradients(rule, x, CLASSES), gradients(other, x, CLASSES))


def test_the_network_runs_once_as_far_as_it_can_see(gradients: Gradients) -> None:
    network = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(inplace=True),
                            nn.Dropout(), nn.Linear(7, 3))
    x = torch.randn(4, 5)
    rule = AdaptiveFeedbackAlignment(network, x)
    torch.manual_seed(3)
    rule(x, CLASSES)
    after = torch.rand(2)
    assert network[1].num_batches_tracked == 1
    torch.manual_seed(3)
    network(x)
    assert torch.equal(after, torch.rand(2))
    assert "forward" not in network[2].__dict__


def test_each_token_has_its_own_error_and_missing_labels_none(gradients: Gradients) -> None:
    network = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(2, 4, 5).double(), torch.randint(3, (2, 4))
    rule = AdaptiveFeedbackAlignment(network, x, scale=1.0)
    assert rule.feedback["F"].shape == (3, 5)
    flat = AdaptiveFeedbackAlignment(network, x.flatten(0, 1))
    flat.load_state_dict(rule.state_dict())
    assert_same(gradients(rule, x, y), gradients(flat, x.flatten(0, 1), y.flatten()))
    some = torch.tensor([0, -100, 1, 2, -100, 0, 1, -100])
    assert_same(gradients(flat, x.flatten(0, 1), some),
                gradients(flat, x.flatten(0, 1)[some >= 0], some[some >= 0]))


def test_where_the_input_is_whole_numbers_the_first_stage_gets_the_error_directly(
        gradients: Gradients) -> None:
    network = nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(),
                            nn.Linear(5, 3)).double()
    x = torch.randint(20, (4, 3))
    rule, other = (AdaptiveFeedbackAlignment(network, x), DirectFeedbackAlignment(network, x))
    with torch.no_grad():
        other.feedback["0"].copy_(-rule.feedback["F"])
        other.feedback["2"].copy_(-rule.feedback["F"] @ network[2].weight.T)
    assert_same(gradients(rule, x, CLASSES), gradients(other, x, CLASSES))


def test_transformers_and_graphs_do() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2,
                                     num_attention_heads=2, intermediate_size=16, num_labels=3)
    model = transformers.BertForSequenceClassification(config)
    ids = torch.randint(20, (4, 6))
    mask = (torch.arange(6) < torch.tensor([[6], [3], [4], [6]])).long()
    rule = AdaptiveFeedbackAlignment(model, {"input_ids": ids, "attention_mask": mask})
    for size in (6, 4):
        rule.zero_grad()
        assert rule({"input_ids": ids[:, :size], "attention_mask": mask[:, :size]},
                    CLASSES).isfinite()
        assert all(layer.attention.self.value.weight.grad.any()
                   for layer in model.bert.encoder.layer)
    geometric = pytest.importorskip("torch_geometric.nn")
    network = geometric.GCN(5, 8, num_layers=3, out_channels=3)
    x = torch.randn(4, 5), torch.tensor([[0, 1, 2, 3, 0], [1, 0, 3, 2, 2]])
    rule = AdaptiveFeedbackAlignment(network, x)
    assert rule(x, torch.tensor([0, -100, 2, -100])).isfinite()
    assert all(p.grad is not None for p in rule.parameters())


def test_feedback_has_its_size_and_repeats_with_its_generator() -> None:
    network, x = nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10)), torch.rand(2, 784)
    F, G = (AdaptiveFeedbackAlignment(network, x, generator=Generator().manual_seed(0)
                                      ).feedback["F"] for _ in "FG")
    assert torch.equal(F, G)
    assert float(F.std()) == pytest.approx(0.05 * (2 / 784) ** 0.5, rel=0.03)


def test_it_learns_more_than_its_last_layer_and_comes_to_align(
        make_chain: Callable[..., nn.Sequential]) -> None:
    x, y, x_test, y_test = nw.data.digits()

    def trained(seed: int, *, frozen: bool = False, shuffled: bool = False) -> tuple[Any, float]:
        torch.manual_seed(seed)
        network = make_chain(64, 16, 16, 10, activation=nn.Tanh)
        if frozen:
            network[:-1].requires_grad_(False)
        rule = AdaptiveFeedbackAlignment(network, torch.zeros(2, 64))
        labels = y[torch.randperm(len(y))] if shuffled else y
        nw.fit(rule, Batches(x.flatten(1), labels, 32, seed=seed), epochs=6, progress=False,
               optimizer=lambda parameters: torch.optim.SGD(parameters, 0.3, momentum=0.9))
        hits = rule.predict(x_test.flatten(1)).argmax(1) == y_test
        return rule, float(hits.float().mean())

    for seed in range(3):
        rule, learned = trained(seed)
        assert learned > 0.75
        assert learned > trained(seed, frozen=True)[1] + 0.08
        assert nw.measure.alignment(rule, (x[:500].flatten(1), y[:500]))["0"] > 0.1
    assert trained(0, shuffled=True)[1] < 0.3


class Opaque(Function):
    """An operation without a forward-mode derivative."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Layer(nn.Linear):
    """A linear layer behind it."""

    def forward(self, h: Tensor) -> Tensor:
        return Opaque.apply(super().forward(h))


def test_what_the_rule_cannot_do_is_refused(make_chain: Callable[..., nn.Sequential]) -> None:
    network, x = make_chain(5, 7, 3), torch.randn(4, 5)
    with pytest.raises(ValueError, match="scale must be above 0, got 0"):
        AdaptiveFeedbackAlignment(network, x, scale=0)
    with pytest.raises(ValueError, match="example must be an input"):
        AdaptiveFeedbackAlignment(network)
    with pytest.raises(ValueError, match="keep the batch axis and a class axis"):
        AdaptiveFeedbackAlignment(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Flatten(0)), x)
    pooled = nn.Sequential(nn.Linear(5, 7), nn.Flatten(0), nn.Unflatten(0, (2, 14)),
                           nn.Linear(14, 3))
    with pytest.raises(ValueError, match="what F reaches must keep"):
        AdaptiveFeedbackAlignment(pooled, x)
    rule = AdaptiveFeedbackAlignment(network, x)
    opaque = AdaptiveFeedbackAlignment(nn.Sequential(Layer(5, 7), nn.ReLU(), nn.Linear(7, 3)), x)
    for made, bad, y, error, match in (
            (rule, x, CLASSES + 1, ValueError, "between 0 and 2"),
            (rule, torch.randn(4, 2, 5), CLASSES[:, None].repeat(1, 2), ValueError,
             "build the rule"),
            (opaque, x, CLASSES, TypeError, "forward-mode derivatives.*use Pepita")):
        with pytest.raises(error, match=match):
            made(bad, y)
        assert all(p.grad is None for p in made.parameters())
