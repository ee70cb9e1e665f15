import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from netwright.rules import Backprop, FeedbackAlignment
from netwright.stages import stages

Gradients = Callable[..., dict[str, Tensor]]


def served(rule: FeedbackAlignment) -> list[str]:
    return [key.removeprefix("/").replace("/", ".") for key in rule.feedback.state_dict()]


@torch.no_grad()
def give_weights(rule: FeedbackAlignment) -> None:
    """Let every B be W, with which feedback alignment is backpropagation."""
    for name, module in rule.network.named_modules():
        if name in served(rule):
            rule.feedback[name].copy_(module.weight)


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 8, 3, groups=2, dilation=2, padding=2), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular", bias=False), nn.ReLU(),
        nn.Conv2d(8, 8, (2, 4), padding="same"), nn.ReLU(),
        nn.Conv2d(8, 8, 2, padding="valid"), nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, groups=2), nn.ReLU(),
        nn.Flatten(), nn.LazyLinear(3))


def sequences() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 6, 3, stride=2), nn.Tanh(),
        nn.ConvTranspose1d(6, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


def volumes() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv3d(3, 4, 3, stride=2), nn.Tanh(),
        nn.ConvTranspose3d(4, 2, 2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


def transformer() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification
    return ViTForImageClassification(ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, num_channels=1, num_labels=3))


def language_model(kind: str) -> nn.Module:
    import transformers
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=11, n_positions=8, n_embd=16, n_layer=2, n_head=2))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=8))


def graph_network(kind: str) -> nn.Module:
    import torch_geometric.nn
    return getattr(torch_geometric.nn, kind)(5, 8, num_layers=3, out_channels=3)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = nn.Linear(4, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.rest, self.first(x), use_reentrant=False)


CLASSES = torch.tensor([0, 2, 1, 0])
TOKENS = {"input_ids": torch.arange(12).view(2, 6) % 11,
          "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]), "use_cache": False}
EDGES = torch.tensor([[0, 1, 2, 3, 1, 2], [1, 0, 3, 2, 2, 1]])
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any, Tensor]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6, bias=False),
                                  nn.ReLU(), nn.Linear(6, 3)), torch.randn(4, 4), CLASSES),
    "cnn": (convolutions, torch.randn(4, 2, 12, 12), CLASSES),
    "cnn 1d": (sequences, torch.randn(4, 2, 9), CLASSES),
    "cnn 3d": (volumes, torch.randn(4, 1, 5, 5, 5), CLASSES),
    "vit": (transformer, torch.randn(4, 1, 8, 8), CLASSES),
    "gpt2": (lambda: language_model("gpt2"), TOKENS, torch.randint(11, (2, 6))),
    "llama": (lambda: language_model("llama"), TOKENS, torch.randint(11, (2, 6))),
    "gcn": (lambda: graph_network("GCN"), (torch.randn(4, 5), EDGES), CLASSES),
    "gat": (lambda: graph_network("GAT"), (torch.randn(4, 5), EDGES), CLASSES),
    "checkpointed": (Checkpointed, torch.randn(4, 4), CLASSES),
    "weight norm": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), weight_norm(
        nn.Linear(8, 3))), torch.randn(4, 4), CLASSES),
}


def build(name: str) -> tuple[nn.Module, Any, Tensor]:
    make, x, y = NETWORKS[name]
    network = make().eval()
    if isinstance(x, Tensor):
        network(x)
        x = x.double()
    elif isinstance(x, tuple):
        x = (x[0].double(), x[1])
    return network.double(), x, y


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], *, tolerance: float = 1e-12) -> None:
    assert a.keys() == b.keys()
    for name, gradient in a.items():
        torch.testing.assert_close(gradient, b[name], rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("feedback", ["random", "sign_symmetric", "kolen_pollack"])
def test_with_the_weights_as_feedback_the_update_is_the_exact_gradient(
        name: str, feedback: Any, gradients: Gradients) -> None:
    network, x, y = build(name)
    rule = FeedbackAlignment(network, feedback=feedback)
    exact = gradients(Backprop(network), x, y)
    drawn = gradients(rule, x, y)
    assert not all(torch.allclose(exact[key], drawn[key]) for key in exact)  # B does matter
    give_weights(rule)
    assert_same(gradients(rule, x, y), exact)


@pytest.mark.parametrize("feedback", ["random", "sign_symmetric"])
def test_the_update_of_a_multilayer_perceptron_is_the_closed_form(
        feedback: Any, gradients: Gradients) -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(),
                            nn.Linear(6, 3)).double()
    rule = FeedbackAlignment(network, feedback=feedback)
    x, y = torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 2, 1])
    with torch.no_grad():
        B = {i: rule.feedback[i].abs() * network[int(i)].weight.sign()
             if feedback == "sign_symmetric" else rule.feedback[i] for i in ("2", "4")}
        h1 = network[0](x).tanh()
        h2 = network[2](h1).tanh()
        error = (network[4](h2).softmax(1) - functional.one_hot(y, 3)) / 5
        at_2 = error @ B["4"] * (1 - h2 ** 2)
        at_1 = at_2 @ B["2"] * (1 - h1 ** 2)
        expected = {"0.weight": at_1.T @ x, "0.bias": at_1.sum(0), "2.weight": at_2.T @ h1,
                    "2.bias": at_2.sum(0), "4.weight": error.T @ h2, "4.bias": error.sum(0)}
    assert_same(gradients(rule, x, y), expected)


def test_one_sample_without_a_batch_axis_goes_through_convolutions(gradients: Gradients) -> None:
    network = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Conv1d(3, 3, 3), nn.Tanh(),
                            nn.ConvTranspose1d(3, 4, 2)).double()
    x, y = torch.randn(2, 8).double(), torch.zeros(4, 5).double()
    rule = FeedbackAlignment(network, loss=functional.mse_loss)
    give_weights(rule)
    assert_same(gradients(rule, x, y),
                gradients(Backprop(network, loss=functional.mse_loss), x, y))


def test_one_sample_without_a_batch_axis_goes_through_linear_layers(gradients: Gradients) -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(4).double(), torch.zeros(3).double()
    rule = FeedbackAlignment(network, loss=functional.mse_loss)
    give_weights(rule)
    assert_same(gradients(rule, x, y),
                gradients(Backprop(network, loss=functional.mse_loss), x, y))


def test_a_transposed_convolution_takes_the_output_size_it_is_called_with() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv1d(1, 2, 2, stride=2), nn.ConvTranspose1d(2, 1, 2, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x), output_size=[x.shape[-1]])

    rule = FeedbackAlignment(Up(), loss=functional.mse_loss)
    x = torch.randn(3, 1, 7)
    assert math.isfinite(rule(x, x))


def test_under_autocast_the_weights_as_feedback_give_autocasts_gradient(
        gradients: Gradients) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(),
                            nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    rule = FeedbackAlignment(network)
    give_weights(rule)
    x = torch.randn(4, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(gradients(rule, x, CLASSES), gradients(Backprop(network), x, CLASSES),
                    tolerance=2e-2)


def test_kolen_pollack_differences_shrink_by_the_weight_decay_alone(
        make_chain: Callable[..., nn.Sequential]) -> None:
    network = make_chain(4, 8, 8, 3).double()
    rule = FeedbackAlignment(network, feedback="kolen_pollack")
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.1, weight_decay=0.5)
    before = network[2].weight.detach() - rule.feedback["2"].detach()
    for _ in range(20):
        optimizer.zero_grad()
        rule(torch.randn(16, 4).double(), torch.randint(3, (16,)))
        optimizer.step()
    after = network[2].weight.detach() - rule.feedback["2"].detach()
    torch.testing.assert_close(after, before * (1 - 0.1 * 0.5) ** 20)


@pytest.mark.parametrize("shared", ["embedding", "layer"])
def test_kolen_pollack_follows_all_that_a_shared_weight_learns(shared: str) -> None:
    network = nn.Sequential(nn.Embedding(7, 7), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 7))
    network[3].weight = network[0 if shared == "embedding" else 1].weight
    network.double()
    rule, x = FeedbackAlignment(network, feedback="kolen_pollack"), torch.arange(8).view(2, 4) % 7
    name = "3" if shared == "embedding" else "1"
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.1, weight_decay=0.5)
    before = network[3].weight.detach() - rule.feedback[name].detach()
    for _ in range(20):
        optimizer.zero_grad()
        rule(x, (x + 1) % 7)
        rule(x, x)
        optimizer.step()
    after = network[3].weight.detach() - rule.feedback[name].detach()
    torch.testing.assert_close(after, before * (1 - 0.1 * 0.5) ** 20)


def test_the_feedback_of_a_frozen_weight_stays_as_it_is(
        make_chain: Callable[..., nn.Sequential]) -> None:
    network = make_chain(4, 8, 8, 3)
    network[2].weight.requires_grad_(False)
    rule = FeedbackAlignment(network, feedback="kolen_pollack")
    rule(torch.randn(4, 4), CLASSES)
    assert rule.feedback["2"].grad is None
    assert rule.feedback["4"].grad is not None


@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_feedback_is_as_large_as_the_weights_and_lets_no_error_grow(scale: float) -> None:
    network = nn.Sequential(nn.Linear(50, 40), nn.Conv2d(4, 30, 3), nn.Linear(40, 60))
    for p in network.parameters():
        nn.init.normal_(p, std=scale)
    nn.init.zeros_(network[2].weight)
    rule = FeedbackAlignment(network)
    assert float(rule.feedback["0"].std()) == pytest.approx(min(scale, 40 ** -0.5), rel=0.1)
    assert float(rule.feedback["1"].std()) == pytest.approx(min(scale, 270 ** -0.5), rel=0.1)
    assert float(rule.feedback["2"].std()) == pytest.approx(60 ** -0.5, rel=0.1)


def test_a_deep_network_receives_errors_of_the_size_that_backpropagation_has(
        make_chain: Callable[..., nn.Sequential], gradients: Gradients) -> None:
    torch.manual_seed(0)
    network = make_chain(20, *[24] * 15, 3, activation=nn.Tanh)
    x, y = torch.randn(32, 20), torch.randint(3, (32,))
    ours, exact = gradients(FeedbackAlignment(network), x, y), gradients(Backprop(network), x, y)
    ratios = torch.stack([ours[name].norm() / exact[name].norm() for name in ours])
    assert ratios.max() < 30 * ratios.median()
    assert ratios.min() > ratios.median() / 30


def test_kolen_pollack_feedback_turns_to_the_weights_and_fixed_feedback_does_not(
        make_chain: Callable[..., nn.Sequential], cosine: Callable[..., float]) -> None:
    angles = {}
    for feedback in ("kolen_pollack", "random"):
        network = make_chain(20, 64, 64, 5)
        rule = FeedbackAlignment(network, feedback=feedback)  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(rule.parameters(), lr=1e-2, weight_decay=1.0)
        start = cosine(network[2].weight, rule.feedback["2"])
        assert abs(start) < 0.1  # 90 degrees, give or take
        teacher = torch.randn(20, 5)
        for _ in range(400):
            x = torch.randn(64, 20)
            optimizer.zero_grad()
            rule(x, (x @ teacher).argmax(1))
            optimizer.step()
        angles[feedback] = math.degrees(math.acos(cosine(network[2].weight, rule.feedback["2"])))
    assert angles["kolen_pollack"] < 5
    assert angles["random"] > 60


def test_a_learned_matrix_takes_the_weights_gradient_and_does_not_share_its_memory() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    rule = FeedbackAlignment(network, feedback="kolen_pollack")
    rule(torch.randn(4, 4), CLASSES)
    B = rule.feedback["2"]
    assert B.grad is not None
    assert torch.equal(B.grad, network[2].weight.grad)
    assert B.grad.data_ptr() != network[2].weight.grad.data_ptr()
    assert rule.feedback["0"].grad is None  # nothing flows out of the first layer


@pytest.mark.parametrize("feedback", ["random", "kolen_pollack"])
def test_frozen_layers_get_no_gradient_and_pass_the_signal_on(feedback: Any) -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(),
                            nn.Linear(8, 3))
    network[2].requires_grad_(False)
    rule = FeedbackAlignment(network, feedback=feedback)
    rule(torch.randn(4, 4), CLASSES)
    assert network[2].weight.grad is None
    assert rule.feedback["2"].grad is None or not rule.feedback["2"].grad.any()
    assert network[0].weight.grad.any()
    network.requires_grad_(False)
    assert math.isfinite(rule(torch.randn(4, 4), CLASSES))


def test_layers_that_share_a_weight_share_their_feedback() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(),
                            nn.Linear(4, 3))
    network[2].weight = network[0].weight
    rule = FeedbackAlignment(network)
    assert sorted(rule.feedback.state_dict()) == ["/0", "/4"]
    rule(torch.randn(4, 4), CLASSES)


def test_modules_that_keep_their_own_derivative_are_named() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(9, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.memory, self.head = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.words(x)
            h = h + self.attention(h, h, h, need_weights=False)[0]
            return self.head(self.memory(h)[0][:, -1])

    network = Mixed()
    rule = FeedbackAlignment(network)
    assert rule.exact == ["attention", "attention.out_proj", "memory"]
    assert list(rule.feedback.state_dict()) == ["/head"]
    rule(torch.randint(9, (4, 5)), CLASSES)
    assert network.words.weight.grad.any()


def test_a_layer_with_a_forward_of_its_own_keeps_it() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    rule = FeedbackAlignment(nn.Sequential(nn.Linear(4, 8), Scaled(8, 3)))
    assert rule.exact == ["1"]


def test_the_networks_forward_is_its_own_again_even_after_an_error() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    own = network[2].forward
    network[2].forward = own  # as wrappers of other libraries do
    rule = FeedbackAlignment(network)
    rule(torch.randn(4, 4), CLASSES)
    with pytest.raises(ValueError, match="y must be between 0 and 2"):
        rule(torch.randn(4, 4), torch.tensor([0, 1, 2, 3]))
    assert "forward" not in network[0].__dict__
    assert network[2].forward is own


def test_stages_and_a_deep_copy_do_as_the_network_does(gradients: Gradients) -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    rule = FeedbackAlignment(stages(network))
    x = torch.randn(4, 4)
    copied = deepcopy(rule)
    assert_same(gradients(copied, x, CLASSES), gradients(rule, x, CLASSES))
    assert copied.network is not network


def test_feedback_repeats_with_its_generator() -> None:
    layer = nn.Linear(4, 3)
    first, second = (FeedbackAlignment(layer, generator=torch.Generator().manual_seed(1))
                     for _ in range(2))
    assert torch.equal(first.feedback[""], second.feedback[""])


def test_it_learns_more_than_its_last_layer_and_comes_to_align(
        trained: Callable[..., Any], cosine: Callable[..., float], gradients: Gradients) -> None:
    for seed in range(3):
        rule, accuracy = trained(FeedbackAlignment, seed)
        _, control = trained(Backprop, seed, frozen=True)
        assert accuracy > 0.85  # 0.89 to 0.93 over five seeds
        assert accuracy > control + 0.15  # 0.56 to 0.63
        x, y = torch.rand(256, 64), torch.randint(10, (256,))
        ours, exact = gradients(rule, x, y), gradients(Backprop(rule.network), x, y)
        assert cosine(ours["2.weight"], exact["2.weight"]) > 0.2  # below 78 degrees


def test_shuffled_labels_teach_it_nothing(trained: Callable[..., Any]) -> None:
    _, accuracy = trained(FeedbackAlignment, 0, shuffled=True)
    assert accuracy < 0.25


def test_a_network_without_a_layer_to_serve_is_refused() -> None:
    with pytest.raises(ValueError, match="network must hold a linear or convolutional layer"):
        FeedbackAlignment(nn.Sequential(nn.Embedding(4, 3), nn.ReLU()))


def test_weights_that_are_not_there_yet_are_refused() -> None:
    with pytest.raises(ValueError, match="got none yet in '1'; run it once on an example first"):
        FeedbackAlignment(nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(3)))


def test_an_unknown_feedback_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no feedback is called 'gaussian'; known are .* random"):
        FeedbackAlignment(nn.Linear(4, 3), feedback="gaussian")  # type: ignore[arg-type]


def test_weights_without_values_yet_have_feedback_of_the_same_shape() -> None:
    network = nn.Sequential(nn.Linear(4, 8, device="meta"), nn.Linear(8, 3, device="meta"))
    assert FeedbackAlignment(network).feedback["1"].shape == (3, 8)
