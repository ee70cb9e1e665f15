import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from netwright.rules import Backprop, DirectFeedbackAlignment
from netwright.stages import stages

Gradients = Callable[..., dict[str, Tensor]]
CLASSES = torch.tensor([0, 2, 1, 0])


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], *, tolerance: float = 1e-12) -> None:
    assert a.keys() == b.keys()
    for name, gradient in a.items():
        torch.testing.assert_close(gradient, b[name], rtol=tolerance, atol=tolerance)


def tanh_chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(),
                         nn.Linear(6, 3)).double()


class Joined(nn.Linear):
    """Makes one sample of two."""

    def __init__(self) -> None:
        super().__init__(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(1, 16))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16))


def words(length: int) -> dict[str, Any]:
    return {"input_ids": torch.arange(2 * length).view(2, length) % 11,
            "attention_mask": torch.ones(2, length, dtype=torch.long), "use_cache": False}


@pytest.mark.parametrize("ternary", [None, 0.3])
@pytest.mark.parametrize("feedback", ["random", "sign_symmetric", "kolen_pollack"])
def test_the_update_of_a_multilayer_perceptron_is_the_closed_form(
        feedback: Any, ternary: float | None, gradients: Gradients) -> None:
    network, x, y = tanh_chain(), torch.randn(4, 4).double(), CLASSES
    rule = DirectFeedbackAlignment(network, x, feedback=feedback, ternary=ternary)
    B1, B2 = rule.feedback["0"].detach(), rule.feedback["2"].detach()
    with torch.no_grad():
        h1 = network[0](x).tanh()
        h2 = network[2](h1).tanh()
        error = (network[4](h2).softmax(1) - functional.one_hot(y, 3)) / 4
        if feedback == "sign_symmetric":
            W2, W3 = network[2].weight, network[4].weight
            B1, B2 = B1.abs() * (W3 @ W2).sign(), B2.abs() * W3.sign()
        sent = error
        if ternary is not None:  # one label's error, which is 4 times that of the mean of 4
            sent = torch.where(4 * error > ternary, 1., torch.where(4 * error < -ternary, -1., 0.))
            assert set(sent.unique().tolist()) == {-1.0, 0.0, 1.0}
            sent = sent.double() / 4
        at_1, at_2 = sent @ B1 * (1 - h1 ** 2), sent @ B2 * (1 - h2 ** 2)
        expected = {"0.weight": at_1.T @ x, "0.bias": at_1.sum(0), "2.weight": at_2.T @ h1,
                    "2.bias": at_2.sum(0), "4.weight": error.T @ h2, "4.bias": error.sum(0)}
    assert_same(gradients(rule, x, y), expected)
    if feedback == "kolen_pollack":
        rule(x, y)
        torch.testing.assert_close(rule.feedback["0"].grad, error.T @ h1)
        torch.testing.assert_close(rule.feedback["2"].grad, error.T @ h2)


def test_the_update_of_a_convolution_is_what_is_worked_out_by_hand() -> None:
    # One image of 3 pixels, a kernel of 2, no bias: h = (a x0 + b x1, a x1 + b x2).
    network = nn.Sequential(nn.Conv1d(1, 1, 2, bias=False), nn.Flatten(),
                            nn.Linear(2, 1, bias=False))
    rule = DirectFeedbackAlignment(network, torch.zeros(1, 1, 3), loss=lambda z, y: (z * y).sum())
    with torch.no_grad():
        rule.feedback["0"].copy_(torch.tensor([[5.0, 7.0]]))
    rule(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[10.0]]))
    # e = 10, so dL/dh = (50, 70): dL/da = 50 * 1 + 70 * 2, dL/db = 50 * 2 + 70 * 3.
    assert network[0].weight.grad.flatten().tolist() == [190.0, 310.0]


def test_the_last_stages_gradient_is_exact_and_the_others_are_not(gradients: Gradients) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
                            nn.MaxPool2d(2), nn.Conv2d(4, 4, 2), nn.ReLU(), nn.Flatten(),
                            nn.Linear(16, 3)).double()
    x = torch.randn(4, 1, 8, 8).double()
    ours = gradients(DirectFeedbackAlignment(network, x), x, CLASSES)
    exact = gradients(Backprop(network), x, CLASSES)
    for name in exact:
        same = torch.allclose(ours[name], exact[name], rtol=1e-12)
        # a bias before batch normalisation has a gradient of 0 under either rule
        assert same == (name.startswith("7") or name == "0.bias")


def test_each_token_receives_the_projection_of_its_own_error(gradients: Gradients) -> None:
    network = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(2, 4, 5).double(), torch.randint(3, (2, 4))
    rule = DirectFeedbackAlignment(network, x)
    assert rule.feedback["0"].shape == (3, 6)
    samples = DirectFeedbackAlignment(network, x.flatten(0, 1))  # each token one of its own
    samples.load_state_dict(rule.state_dict())
    assert_same(gradients(rule, x, y), gradients(samples, x.flatten(0, 1), y.flatten()))
    longer = torch.randn(3, 9, 5).double()
    assert math.isfinite(rule(longer, torch.randint(3, (3, 9))))


@pytest.mark.parametrize("share", [False, True])
def test_a_language_model_takes_texts_of_any_length(share: bool) -> None:
    network = llama()
    rule = DirectFeedbackAlignment(network, words(6), share=share)
    rule(words(9), torch.randint(11, (2, 9)))
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=16, n_embd=16, n_layer=3, n_head=2,
                                      resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForTokenClassification
    return BertForTokenClassification(BertConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=5, hidden_dropout_prob=0,
        attention_probs_dropout_prob=0))


def graph_network() -> nn.Module:
    from torch_geometric.nn import GCN
    return GCN(5, 8, num_layers=3, out_channels=5)


def padded(**more: Any) -> dict[str, Any]:
    return {"input_ids": torch.randint(11, (2, 7)),
            "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]), **more}


def graph() -> tuple[Tensor, Tensor]:
    return torch.randn(14, 5).double(), torch.randint(14, (2, 40))


@pytest.mark.parametrize("ternary", [None, 0.2])
@pytest.mark.parametrize(("make", "inputs", "shape"), [
    (gpt2, lambda: padded(use_cache=False), (2, 7)),
    (llama, lambda: padded(use_cache=False), (2, 7)), (bert, padded, (2, 7)),
    (graph_network, graph, (14,))], ids=["GPT-2", "Llama", "BERT", "GCN"])
def test_transformers_and_graphs_get_each_positions_own_projected_error(
        make: Callable[[], nn.Module], inputs: Callable[[], Any], shape: tuple[int, ...],
        ternary: float | None, gradients: Gradients) -> None:
    network, x = make().double(), inputs()
    y = torch.randint(5, shape)
    y.view(-1)[-3:] = -100  # the padding, or nodes outside the training set
    rule = DirectFeedbackAlignment(network, x, ternary=ternary)
    net, h, expected = rule.stages, x, dict[str, Tensor]()
    names = {id(p): name for name, p in network.named_parameters()}
    logits = net(x).detach()
    labelled, n = y != -100, int((y != -100).sum())
    error = torch.zeros_like(logits)
    error[labelled] = logits[labelled].softmax(-1) - functional.one_hot(
        y[labelled], logits.shape[-1]) * 1.0
    sent = error if ternary is None else error.sign() * (error.abs() > ternary)
    context = net.context(x)
    for i, stage in enumerate(net):
        out = stage(h, context)
        to_it = error if i == len(net) - 1 else sent @ rule.feedback[stage.name]
        found = torch.autograd.grad(out, stage.parameters(), to_it / n, allow_unused=True)
        for p, gradient in zip(stage.parameters(), found, strict=True):
            if gradient is not None:  # a table may belong to the first and to the last stage
                expected[names[id(p)]] = expected.get(names[id(p)], 0) + gradient
        h = out.detach()
    assert_same(gradients(rule, x, y), expected, tolerance=1e-9)


def test_each_node_of_a_graph_receives_the_projection_of_its_own_error() -> None:
    from torch_geometric.nn import GCN
    network = GCN(5, 8, num_layers=3, out_channels=3)
    x = torch.randn(4, 5), torch.tensor([[0, 1, 2, 3, 1, 2], [1, 0, 3, 2, 2, 1]])
    rule = DirectFeedbackAlignment(network, x)
    assert [tuple(B.shape) for B in rule.feedback.buffers()] == [(3, 8), (3, 8)]
    rule(x, torch.tensor([0, -100, 1, -100]))
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


def test_padded_words_and_a_shorter_text_take_their_part_of_the_feedback() -> None:
    from transformers import BertConfig, BertForSequenceClassification
    network = BertForSequenceClassification(BertConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=3))

    def texts(length: int) -> dict[str, Tensor]:
        return {name: value for name, value in words(length).items() if name != "use_cache"}

    for feedback in ("random", "kolen_pollack"):
        rule = DirectFeedbackAlignment(network, texts(8), feedback=feedback)  # type: ignore[arg-type]
        rule(texts(5), torch.tensor([0, 2]))
        with pytest.raises(ValueError, match=r"at most \(8, 16\), as the example did, got \(2, 9"):
            rule(texts(9), torch.tensor([0, 2]))
    first = next(iter(rule.feedback.parameters()))
    assert first.shape == (3, 8, 16)
    assert first.grad is not None
    assert first.grad[:, :5].any()
    assert not first.grad[:, 5:].any()


def test_a_shared_matrix_gives_each_stage_its_first_columns(gradients: Gradients) -> None:
    network, x = tanh_chain(), torch.randn(4, 4).double()
    shared = DirectFeedbackAlignment(network, x, share=True)
    B = shared.feedback["3"]
    assert B.shape == (3, 8)
    apart = DirectFeedbackAlignment(network, x)
    apart.feedback["0"].copy_(B)
    apart.feedback["2"].copy_(B[:, :6])
    assert_same(gradients(shared, x, CLASSES), gradients(apart, x, CLASSES))


def test_feedback_has_the_size_of_the_last_weights_and_repeats_with_its_generator() -> None:
    network, x = nn.Sequential(nn.Linear(4, 4000), nn.ReLU(), nn.Linear(4000, 4)), torch.ones(1, 4)
    own, again = (DirectFeedbackAlignment(network, x, generator=torch.Generator().manual_seed(1))
                  for _ in range(2))
    assert torch.equal(own.feedback["0"], again.feedback["0"])
    size = network[2].weight.square().mean().sqrt().item()
    assert own.feedback["0"].std().item() == pytest.approx(size, rel=0.03)
    shared = DirectFeedbackAlignment(network, x, share=True)
    assert shared.feedback["4"].std().item() == pytest.approx(size, rel=0.03)
    nn.init.zeros_(network[2].weight)
    without = DirectFeedbackAlignment(network, x)
    assert without.feedback["0"].std().item() == pytest.approx(4 ** -0.5, rel=0.03)


def test_a_tied_last_layer_is_followed_in_all_that_its_weight_learns() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 6)
            self.hidden = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
            self.head = nn.Sequential(nn.Linear(6, 7, bias=False))
            self.head[0].weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.head(self.hidden(self.embedding(x)))
            return scores

    network, x = Tied().double(), torch.arange(8).view(2, 4) % 7
    net = stages(network, x, cuts=["embedding", "hidden", "head"])
    rule = DirectFeedbackAlignment(net, x, feedback="kolen_pollack")
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.1, weight_decay=0.5)
    W, B = network.embedding.weight, rule.feedback["hidden"]
    before = (W - B).detach()
    for step in range(10):
        if step % 3 == 0:  # gradients of some calls are added up
            optimizer.zero_grad()
        rule(x, (x + 1) % 7)
    assert_same({"": W.grad}, {"": B.grad})
    optimizer.step()
    torch.testing.assert_close((W - B).detach(), before * (1 - 0.1 * 0.5))


def test_the_learned_feedback_of_the_last_hidden_stage_turns_to_the_weights(
        cosine: Callable[..., float]) -> None:
    network = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                            nn.Linear(64, 5))
    rule = DirectFeedbackAlignment(network, torch.ones(1, 20), feedback="kolen_pollack")
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.1, weight_decay=0.1)
    difference = (network[4].weight - rule.feedback["2"]).detach()
    assert abs(cosine(network[4].weight, rule.feedback["2"])) < 0.2
    teacher = torch.randn(20, 5)
    for _ in range(400):
        x = torch.randn(64, 20)
        optimizer.zero_grad()
        rule(x, (x @ teacher).argmax(1))
        optimizer.step()
    assert cosine(network[4].weight, rule.feedback["2"]) > 0.99
    torch.testing.assert_close((network[4].weight - rule.feedback["2"]).detach(),
                               difference * (1 - 0.1 * 0.1) ** 400, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("share", [False, True])
def test_a_projector_is_as_noisy_as_it_says_and_right_on_average(share: bool) -> None:
    network = nn.Sequential(nn.Linear(4, 1000, bias=False), nn.Linear(1000, 800),
                            nn.Linear(800, 3))
    x, y = torch.ones(1, 4), torch.tensor([1])
    exact = DirectFeedbackAlignment(network, x, share=share,
                                    generator=torch.Generator().manual_seed(0))
    noisy = DirectFeedbackAlignment(network, x, share=share, noise=0.5,
                                    generator=torch.Generator().manual_seed(0))

    def signal(rule: DirectFeedbackAlignment, layer: int) -> Tensor:
        rule.zero_grad()
        rule(x, y)
        weight = network[layer].weight.grad
        return weight[:, 0].clone() if layer == 0 else network[1].bias.grad.clone()

    for layer in (0, 1):
        clean, first = signal(exact, layer), signal(noisy, layer)
        assert (first - clean).std() / clean.square().mean().sqrt() == pytest.approx(0.5, rel=0.1)
        mean = torch.stack([signal(noisy, layer) for _ in range(100)]).mean(0)
        assert (mean - clean).std() < 0.15 * (first - clean).std()
    torch.testing.assert_close(network[2].bias.grad,
                               network(x).softmax(1)[0].detach() - torch.tensor([0., 1., 0.]))


def test_a_shared_projection_is_read_with_its_noise() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3))
    rule = DirectFeedbackAlignment(network, torch.ones(1, 4), share=True, noise=1.0)
    rule(torch.ones(1, 4), torch.tensor([1]))
    torch.testing.assert_close(network[1].bias.grad, network[0].bias.grad[:6])


def test_an_error_of_zero_is_not_sent_and_gets_no_noise() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    rule = DirectFeedbackAlignment(network, torch.ones(1, 4), noise=1.0)
    rule(torch.eye(4), torch.tensor([0, 1, -100, -100]))
    assert network[0].weight.grad[:, :2].all()
    assert not network[0].weight.grad[:, 2:].any()
    sure = DirectFeedbackAlignment(network, torch.ones(1, 4), ternary=1.0, noise=1.0)
    sure.zero_grad()
    sure(torch.eye(4), torch.tensor([0, 1, 2, 0]))
    assert not network[0].weight.grad.any()  # no label's error is above 1
    assert network[1].weight.grad.any()


@pytest.mark.parametrize("feedback", ["random", "kolen_pollack"])
def test_frozen_stages_get_no_gradient(feedback: Any) -> None:
    network = tanh_chain()
    network[2].requires_grad_(False)
    rule = DirectFeedbackAlignment(network, torch.ones(1, 4).double(), feedback=feedback)
    rule(torch.randn(4, 4).double(), CLASSES)
    assert network[2].weight.grad is None
    assert rule.feedback["2"].grad is None
    assert network[0].weight.grad.any()
    network.requires_grad_(False)
    assert math.isfinite(rule(torch.randn(4, 4).double(), CLASSES))


@pytest.mark.parametrize("feedback", ["random", "sign_symmetric", "kolen_pollack"])
def test_it_runs_under_autocast(feedback: Any, gradients: Gradients) -> None:
    network = tanh_chain().float()
    rule = DirectFeedbackAlignment(network, torch.ones(1, 4), feedback=feedback)
    x = torch.randn(4, 4)
    whole = gradients(rule, x, CLASSES)
    with torch.autocast("cpu", torch.bfloat16):
        half = gradients(rule, x, CLASSES)
        rule(x, CLASSES)
    assert_same(whole, half, tolerance=3e-2)
    assert all(B.grad.dtype == torch.float32 for B in rule.feedback.parameters())


@pytest.mark.parametrize(("feedback", "share", "least"), [
    ("random", False, 0.85), ("random", True, 0.83), ("sign_symmetric", False, 0.87),
    ("kolen_pollack", False, 0.87)])
def test_it_learns_more_than_its_last_layer_and_comes_to_align(
        feedback: Any, share: bool, least: float, trained: Callable[..., Any],
        cosine: Callable[..., float], gradients: Gradients) -> None:
    def rule_of(network: nn.Module) -> DirectFeedbackAlignment:
        return DirectFeedbackAlignment(network, torch.ones(1, 64), feedback=feedback, share=share)

    for seed in range(2):
        rule, accuracy = trained(rule_of, seed)
        _, control = trained(Backprop, seed, frozen=True)
        assert accuracy > least  # the least of five seeds, less 0.05
        assert accuracy > control + 0.15  # 0.56 to 0.63
        x, y = torch.rand(256, 64), torch.randint(10, (256,))
        ours, exact = gradients(rule, x, y), gradients(Backprop(rule.network), x, y)
        assert cosine(ours["2.weight"], exact["2.weight"]) > 0.15  # below 81 degrees


def test_ternary_errors_through_a_noisy_projector_still_train_hidden_stages(
        trained: Callable[..., Any]) -> None:
    for seed in range(2):
        _, accuracy = trained(lambda network: DirectFeedbackAlignment(
            network, torch.ones(1, 64), share=True, ternary=0.2, noise=0.1), seed, width=64)
        _, control = trained(Backprop, seed, width=64, frozen=True)
        assert accuracy > 0.9  # 0.933 and more over five seeds
        assert accuracy > control + 0.04  # 0.856 to 0.867


def test_shuffled_labels_teach_it_nothing(trained: Callable[..., Any]) -> None:
    _, accuracy = trained(lambda network: DirectFeedbackAlignment(network, torch.ones(1, 64)), 0,
                          shuffled=True)
    assert accuracy < 0.25


def test_stages_are_taken_as_they_are() -> None:
    net = stages(tanh_chain())
    rule = DirectFeedbackAlignment(net, torch.ones(1, 4).double())
    assert rule.network is net.model
    assert rule.stages is net


def test_a_refused_batch_changes_no_gradient() -> None:
    network = nn.Sequential(nn.Conv1d(1, 2, 3), nn.AdaptiveAvgPool1d(4), nn.Conv1d(2, 2, 3),
                            nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 3))
    rule = DirectFeedbackAlignment(network, torch.ones(1, 1, 8))
    rule(torch.randn(4, 1, 8), CLASSES)
    before = [p.grad.clone() for p in network.parameters()]
    with pytest.raises(ValueError, match="y must be between 0 and 2"):
        rule(torch.randn(4, 1, 8), torch.tensor([0, 1, 2, 3]))
    rule.network[1].output_size = 6
    with pytest.raises(ValueError, match=r"stage '0' an output of \('batch',\) and at most "
                                         r"\(2, 4\), as the example did, got \(4, 2, 6\)"):
        rule(torch.randn(4, 1, 8), CLASSES)
    for p, grad in zip(network.parameters(), before, strict=True):
        assert torch.equal(p.grad, grad)


def test_what_the_rule_cannot_do_is_refused() -> None:
    network, x = tanh_chain(), torch.ones(1, 4).double()
    with pytest.raises(ValueError, match="example must be an input of the network, got None"):
        DirectFeedbackAlignment(network)
    with pytest.raises(ValueError, match=r"no feedback is called 'gaussian'; known are .* random"):
        DirectFeedbackAlignment(network, x, feedback="gaussian")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"share=True keeps one fixed .*feedback='kolen_pollack'"):
        DirectFeedbackAlignment(network, x, share=True, feedback="kolen_pollack")
    for ternary in (-0.1, math.nan):
        with pytest.raises(ValueError, match=r"ternary must be a threshold of at least 0 .* got"):
            DirectFeedbackAlignment(network, x, ternary=ternary)
    for noise in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"noise must be at least 0, got"):
            DirectFeedbackAlignment(network, x, noise=noise)
    with pytest.raises(ValueError, match=r"network must return \(batch, classes\)"):
        DirectFeedbackAlignment(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), x.float())
    with pytest.raises(ValueError, match=r"stage '0' must keep the batch axis of the logits"):
        DirectFeedbackAlignment(nn.Sequential(nn.Linear(4, 8), Joined()), torch.ones(2, 4))
    with pytest.raises(ValueError, match="needs one linear layer and no other weight"):
        DirectFeedbackAlignment(
            nn.Sequential(nn.Conv1d(1, 2, 3), nn.Conv1d(2, 2, 3), nn.Flatten(), nn.Linear(8, 3)),
            torch.ones(1, 1, 8), feedback="sign_symmetric")


class Twice(nn.Module):
    """A chain of stages of which two are one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.within, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.within(torch.tanh(self.into(x))))
        scores: Tensor = self.out(torch.tanh(self.within(h)))
        return scores


@torch.no_grad()
def test_a_layer_that_runs_twice_has_the_signs_of_each_place(gradients: Gradients) -> None:
    network, x = Twice().double(), torch.randn(4, 4).double()
    rule = DirectFeedbackAlignment(network, x, feedback="sign_symmetric")
    assert rule.stages.names == ["into", "within", "within (2)", "out"]
    for matrix in rule.feedback.buffers():
        matrix.fill_(1)
    found = gradients(rule, x, CLASSES)
    a = torch.tanh(network.into(x))
    b = torch.tanh(network.within(a))
    c = torch.tanh(network.within(b))
    e = (network.out(c).softmax(1) - functional.one_hot(CLASSES, 3)) / 4
    V, W = network.out.weight, network.within.weight
    first = e @ (V @ W @ W).sign() * (1 - a ** 2)
    second, third = e @ (V @ W).sign() * (1 - b ** 2), e @ V.sign() * (1 - c ** 2)
    torch.testing.assert_close(found["into.weight"], first.T @ x)
    torch.testing.assert_close(found["within.weight"], second.T @ a + third.T @ b)


def test_a_layer_that_runs_twice_has_a_learned_matrix_for_each_place() -> None:
    network, x = Twice().double(), torch.randn(4, 4).double()
    rule = DirectFeedbackAlignment(network, x, feedback="kolen_pollack")
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.1, weight_decay=0.5)
    before = (network.out.weight - rule.feedback["within (2)"]).detach()
    for _ in range(10):
        optimizer.zero_grad()
        rule(torch.randn(4, 4).double(), CLASSES)
        optimizer.step()
    assert not torch.equal(rule.feedback["within"], rule.feedback["within (2)"])
    torch.testing.assert_close((network.out.weight - rule.feedback["within (2)"]).detach(),
                               before * (1 - 0.1 * 0.5) ** 10)
