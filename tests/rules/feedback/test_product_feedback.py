import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

import netwright as nw
from netwright.rules import FeedbackAlignment, ProductFeedback

Gradients = Callable[..., dict[str, Tensor]]
CLASSES = torch.tensor([0, 2, 1, 0])


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, gradient in a.items():
        torch.testing.assert_close(gradient, b[name], msg=lambda text, name=name: name + text)


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 8, 3, groups=2, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(294, 3))


def gpt2() -> nn.Module:
    import transformers
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2))


def gcn() -> nn.Module:
    from torch_geometric.nn import GCN
    return GCN(5, 8, num_layers=3, out_channels=3)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any, Tensor]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6, bias=False),
                                  nn.ReLU(), nn.Linear(6, 3)), torch.randn(4, 4).double(), CLASSES),
    "tokens": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
               torch.randn(2, 4, 4).double(), torch.randint(3, (2, 4))),
    "cnn": (convolutions, torch.randn(4, 2, 6, 6).double(), CLASSES),
    "gpt2": (gpt2, {"input_ids": torch.arange(12).view(2, 6) % 11, "use_cache": False,
                    "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])},
             torch.randint(11, (2, 6))),
    "gcn": (gcn, (torch.randn(4, 5).double(), torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])),
            torch.tensor([0, -100, 1, -100])),
    "weight norm": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), weight_norm(
        nn.Linear(8, 3))), torch.randn(4, 4).double(), CLASSES),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_feedback_alignment_with_the_product_and_what_the_product_takes_passes_to_its_factor(
        name: str, gradients: Gradients) -> None:
    make, x, y = NETWORKS[name]
    network = make().double().eval()
    rule = ProductFeedback(network, expansion=3)
    other = FeedbackAlignment(network, feedback="kolen_pollack")
    with torch.no_grad():
        for key in rule.feedback.axes:
            assert rule.feedback[key].shape == other.feedback[key].shape
            other.feedback[key].copy_(rule.feedback[key])
    assert rule.exact == other.exact
    assert_same(gradients(rule, x, y), gradients(other, x, y))
    rule(x, y)
    network.zero_grad()
    other(x, y)
    for key, axis in rule.feedback.axes.items():
        R, B = rule.feedback.learned[key], other.feedback[key]
        assert (R.grad is None) == (B.grad is None)
        if B.grad is not None:
            expected = torch.tensordot(rule.feedback.fixed[key], B.grad, dims=([0], [axis]))
            torch.testing.assert_close(R.grad, expected.movedim(0, axis))


def test_the_update_of_a_multilayer_perceptron_is_the_closed_form(gradients: Gradients) -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    rule, x = ProductFeedback(network), torch.randn(4, 4).double()
    C, R = rule.feedback.fixed["2"], rule.feedback.learned["2"].detach()
    h = network[0](x).tanh().detach()
    error = ((network[2](h).softmax(1) - functional.one_hot(CLASSES, 3)) / 4).detach()
    found = gradients(rule, x, CLASSES)
    torch.testing.assert_close(found["0.weight"], (error @ C @ R * (1 - h ** 2)).T @ x)
    torch.testing.assert_close(found["2.weight"], error.T @ h)
    rule(x, CLASSES)
    torch.testing.assert_close(rule.feedback.learned["2"].grad, (error @ C).T @ h)


def test_what_is_drawn_has_the_size_of_the_weights_and_repeats_with_its_generator() -> None:
    network = nn.Sequential(nn.Linear(300, 200), nn.Conv2d(4, 16, 3), nn.ConvTranspose2d(16, 4, 3))
    first, again = (ProductFeedback(network, generator=Generator().manual_seed(0)).feedback
                    for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(),
                                                 again.state_dict().values(), strict=True))
    C = first.fixed["0"]
    assert C.shape == (200, 2000)
    assert float((C @ C.T - torch.eye(200)).abs().mean()) < 0.03  # C C^T is nearly 1
    for name, shape, most in (("0", (2000, 300), 1 / 200), ("1", (160, 4, 3, 3), 1 / 144),
                              ("2", (16, 40, 3, 3), 1 / 36)):
        assert first.learned[name].shape == shape
        size = min(float(network[int(name)].weight.detach().square().mean()), most)
        assert float(first.learned[name].detach().var()) == pytest.approx(size, rel=0.1)
        assert float(first[name].detach().square().mean()) == pytest.approx(size, rel=0.4)


def test_the_feedback_of_a_weight_that_is_zero_keeps_an_error_its_size() -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.Linear(300, 200))
    nn.init.zeros_(network[1].weight)
    R = ProductFeedback(network).feedback.learned["1"].detach()
    assert float(R.var()) == pytest.approx(1 / 200, rel=0.1)


@pytest.mark.parametrize("twice", [False, True])
def test_all_that_a_shared_weight_learns_is_followed(twice: bool) -> None:
    network = nn.Sequential(nn.Embedding(7, 7), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 7))
    network[3].weight = network[1 if twice else 0].weight
    network.double()
    rule, x = ProductFeedback(network), torch.arange(8).view(2, 4) % 7
    name = "1" if twice else "3"
    C, R = rule.feedback.fixed[name], rule.feedback.learned[name]
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.1, momentum=0.9)
    before = R.detach() - C.T @ network[3].weight.detach()
    for _ in range(5):
        optimizer.zero_grad()
        rule(x, (x + 1) % 7)
        rule(x, x)
        optimizer.step()
    torch.testing.assert_close(R.detach() - C.T @ network[3].weight.detach(), before)


def test_with_gradient_descent_the_difference_shrinks_by_the_weight_decay_alone(
        make_chain: Callable[..., nn.Sequential]) -> None:
    network = make_chain(4, 8, 8, 3).double()
    rule = ProductFeedback(network)
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.1, weight_decay=0.5)
    C, R = rule.feedback.fixed["2"], rule.feedback.learned["2"]
    before = R.detach() - C.T @ network[2].weight.detach()
    for _ in range(20):
        optimizer.zero_grad()
        rule(torch.randn(16, 4).double(), torch.randint(3, (16,)))
        optimizer.step()
    torch.testing.assert_close(R.detach() - C.T @ network[2].weight.detach(),
                               before * (1 - 0.1 * 0.5) ** 20)


def test_the_product_turns_to_the_weights_and_no_single_factor_does(
        make_chain: Callable[..., nn.Sequential], cosine: Callable[..., float]) -> None:
    network = make_chain(20, 32, 32, 5)
    rule = ProductFeedback(network)
    optimizer = torch.optim.AdamW(rule.parameters(), lr=1e-2, weight_decay=1.0)
    assert abs(cosine(network[2].weight, rule.feedback["2"])) < 0.15
    teacher = torch.randn(20, 5)
    for _ in range(300):
        x = torch.randn(64, 20)
        optimizer.zero_grad()
        rule(x, (x @ teacher).argmax(1))
        optimizer.step()
    assert cosine(network[2].weight, rule.feedback["2"]) > 0.85
    assert abs(cosine(network[2].weight, rule.feedback.learned["2"][:32])) < 0.3


def test_frozen_layers_pass_the_signal_on_and_their_feedback_waits(
        make_chain: Callable[..., nn.Sequential]) -> None:
    for network in (make_chain(4, 8, 8, 3),
                    nn.Sequential(nn.Conv1d(1, 4, 2), nn.ReLU(), nn.Conv1d(4, 4, 2), nn.Flatten(),
                                  nn.Linear(8, 3))):
        network[2].requires_grad_(False)
        x = torch.randn(4, 4)
        rule = ProductFeedback(network)
        rule(x if isinstance(network[0], nn.Linear) else x[:, None], CLASSES)
        assert network[2].weight.grad is None
        assert rule.feedback.learned["2"].grad is None
        assert network[0].weight.grad.any()


def test_layers_that_share_a_weight_share_their_product() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    network[2].weight = network[0].weight
    rule = ProductFeedback(network)
    assert list(rule.feedback.axes) == ["0", "3"]
    assert math.isfinite(rule(torch.randn(4, 4), CLASSES))
    assert rule.feedback.learned["0"].grad.any()


def test_it_comes_to_align_where_feedback_alignment_does_not(trained: Callable[..., Any]) -> None:
    x, y, *_ = nw.data.digits()
    batch = x[:500].flatten(1), y[:500]
    for seed in range(2):
        rule, learned = trained(ProductFeedback, seed)
        other, _ = trained(FeedbackAlignment, seed)
        frozen = trained(ProductFeedback, seed, frozen=True)[1]
        assert learned > frozen + 0.1
        ours, theirs = (nw.measure.alignment(each, batch) for each in (rule, other))
        assert ours["0"] > max(0.6, theirs["0"])


def test_shuffled_labels_teach_it_nothing(trained: Callable[..., Any]) -> None:
    assert trained(ProductFeedback, 0, shuffled=True)[1] < 0.3


def test_what_the_rule_cannot_do_is_refused(make_chain: Callable[..., nn.Sequential]) -> None:
    for expansion in (0, 1.5):
        with pytest.raises(ValueError, match=f"expansion must be .*, got {expansion}"):
            ProductFeedback(make_chain(4, 8, 3), expansion=expansion)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must hold a linear or convolutional layer"):
        ProductFeedback(nn.Sequential(nn.Embedding(4, 3), nn.Flatten()))
    with pytest.raises(ValueError, match="got none yet in '0'"):
        ProductFeedback(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3)))
    rule = ProductFeedback(make_chain(4, 8, 3))
    with pytest.raises(ValueError, match="between 0 and 2"):
        rule(torch.randn(4, 4), CLASSES + 1)
    assert all(p.grad is None for p in rule.parameters())
    assert all("forward" not in module.__dict__ for module in rule.network.modules())
