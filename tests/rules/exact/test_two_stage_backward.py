import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from netwright.data import digits
from netwright.errors import UnknownName
from netwright.models import gpt, mlp
from netwright.rules import Backprop, TwoStageBackward
from netwright.rules.exact.two_stage_backward import backward_signal, backward_weights, schedule

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def gradients(rule, x, y):
    rule.zero_grad()
    torch.manual_seed(3)
    loss = rule(x, y)
    return loss, {name: p.grad for name, p in rule.network.named_parameters()
                  if p.grad is not None}


def assert_as_backprop(model, x, y):
    rule = TwoStageBackward(model, x)
    loss, ours = gradients(rule, x, y)
    exact_loss, exact = gradients(Backprop(model), x, y)
    torch.testing.assert_close(loss, exact_loss)
    assert ours.keys() == exact.keys() != set()
    for name, gradient in exact.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-10, atol=1e-12,
                                   msg=lambda text, name=name: name + text)
    return rule


class Reused(nn.Module):
    """Uses one weight twice, one bias as a vector, and one parameter of its own."""

    def __init__(self, width):
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, h):
        h = h + self.linear(self.norm(h).tanh())
        return self.norm(h * self.scale + h @ self.linear.weight) + self.linear.bias


def hugging_face(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3,
             "num_attention_heads": 2, "num_labels": 3, "pad_token_id": 0}
    ids = torch.randint(1, 20, (6, 7))
    mask = torch.ones_like(ids)
    ids[:3, 5:], mask[:3, 5:] = 0, 0
    config = getattr(transformers, f"{name}Config")(**small)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    return model.double(), {"input_ids": ids, "attention_mask": mask}, Y


def t5():
    transformers = pytest.importorskip("transformers")
    model = transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=3, num_heads=2))
    return (model.double(), {"input_ids": torch.randint(1, 20, (6, 5))},
            torch.randint(8, (6, 5)))


def graph():
    geometric = pytest.importorskip("torch_geometric.nn")
    edges = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])
    return (geometric.GCN(5, 8, num_layers=3, out_channels=3).double(), (X, edges),
            torch.where(torch.arange(6) < 4, Y, -100))


def images():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
                            nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
                            nn.Flatten(), nn.Linear(6, 3)).double()
    return network, torch.randn(6, 1, 8, 8).double(), Y


@pytest.mark.parametrize("make", [
    lambda: (mlp(5, 3, hidden=(8, 7)).double(), X, Y),
    images,
    lambda: (nn.Sequential(nn.Linear(5, 8, bias=False), nn.Dropout(), Reused(8), nn.Dropout(),
                           nn.Linear(8, 3)).double(), X, Y),
    lambda: (gpt(20, 8, width=16).double(), torch.randint(20, (3, 8)), torch.randint(20, (3, 8))),
    lambda: hugging_face("Llama"), lambda: hugging_face("Bert"), t5, graph,
], ids=["mlp", "cnn", "reused", "gpt", "llama", "bert", "t5", "graph"])
def test_gradients_are_those_of_backward(make):
    torch.manual_seed(0)
    assert_as_backprop(*make())


def test_one_module_in_two_stages_gets_the_sum():
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    assert_as_backprop(nn.Sequential(nn.Linear(5, 8), shared, nn.Tanh(), shared,
                                     nn.Linear(8, 3)).double(), X, Y)


@pytest.mark.parametrize("frozen", [[0], [0, 2], [2], [4], [0, 4]])
def test_frozen_layers_stay_and_the_others_learn_alike(frozen):
    network = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(),
                            nn.Linear(8, 3)).double()
    for i in frozen:
        network[i].requires_grad_(False)
    assert_as_backprop(network, X, Y)
    assert all(network[i].weight.grad is None for i in frozen)


def test_a_delayed_part_waits_for_any_number_of_batches():
    network = gpt(20, 8, width=16).double()
    rule, batches = TwoStageBackward(network), torch.randint(20, (3, 2, 8))
    for x in batches:
        rule(x, x, delay=True)
    assert all(p.grad is None for p in network.parameters())
    rule.backward_weights()
    ours = [p.grad for p in network.parameters()]
    rule.zero_grad()
    for x in batches:
        Backprop(network)(x, x)
    for a, p in zip(ours, network.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-10, atol=1e-12)
    rule.zero_grad()
    rule.backward_weights()
    assert all(p.grad is None for p in network.parameters())


def test_weights_that_have_changed_in_between_are_noticed():
    network = nn.Sequential(nn.Linear(5, 8), nn.Sigmoid(), Reused(8), nn.Linear(8, 3)).double()
    rule = TwoStageBackward(network)
    rule(X, Y, delay=True)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rule.backward_weights()


def flops(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("make", [
    lambda: (mlp(64, 10), torch.randn(4, 64), torch.arange(4)),
    lambda: (gpt(20, 8, width=16), torch.randint(20, (3, 8)), torch.randint(20, (3, 8)))])
def test_no_work_is_done_twice_and_the_parts_are_of_equal_size(make):
    network, x, y = make()
    rule = TwoStageBackward(network, x)
    first = flops(lambda: rule(x, y, delay=True))
    second = flops(rule.backward_weights)
    assert first + second == flops(lambda: Backprop(network)(x, y))
    assert first > second > 0.25 * (first + second)


def test_one_stage_by_hand():
    torch.manual_seed(0)
    layer, start = nn.Linear(5, 4).double(), X.clone().requires_grad_()
    signal = torch.randn(6, 4).double()
    below, delayed = backward_signal(layer(start), signal, start, list(layer.parameters()))
    torch.testing.assert_close(below, signal @ layer.weight.detach())
    assert layer.weight.grad is None
    assert start.grad is None
    backward_weights(delayed)
    torch.testing.assert_close(layer.weight.grad, signal.T @ X)
    torch.testing.assert_close(layer.bias.grad, signal.sum(0))


def test_learns_what_frozen_hidden_layers_do_not():
    split = digits()
    x, y = split.x_train.flatten(1), split.y_train

    def train(network, labels):
        rule = TwoStageBackward(network)
        optimizer = torch.optim.Adam([p for p in rule.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(80):
            batch = torch.randint(len(x), (64,))
            optimizer.zero_grad()
            rule(x[batch], labels[batch])
            optimizer.step()
        scores = rule.predict(split.x_test.flatten(1))
        return (scores.argmax(1) == split.y_test).float().mean().item()

    for seed in range(3):
        torch.manual_seed(seed)
        frozen = mlp(64, 10, hidden=(64, 16))
        frozen[:-1].requires_grad_(False)
        learned = train(mlp(64, 10, hidden=(64, 16)), y)
        assert learned > 0.8
        assert learned > train(frozen, y) + 0.1
        assert train(mlp(64, 10, hidden=(64, 16)), y[torch.randperm(len(y))]) < 0.35


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 2), (4, 1), (4, 4), (4, 8), (3, 7), (8, 16)])
def test_makespans_with_equal_times_in_closed_form(n, m):
    ones = [1] * n
    for order in ("1f1b", "gpipe"):
        assert schedule(ones, ones, ones, m, order=order, two_stage=False) == 3 * (m + n - 1)
    assert schedule(ones, ones, ones, m, order="gpipe") == 3 * m + 2 * (n - 1)
    if m >= n:
        assert schedule(ones, ones, ones, m) == 3 * m + n - 1


def test_makespans_by_hand():
    # Two stages, one micro-batch: forward 1 + 2, then 3 and 4 backwards, then the weights' parts.
    assert schedule([1, 2], [4, 3], [10, 5], 1, two_stage=False) == 1 + 2 + 3 + 5 + 4 + 10
    assert schedule([1, 2], [4, 3], [10, 5], 1) == 1 + 2 + 3 + 4 + 10
    assert schedule([1, 2], [4, 3], [1, 50], 1) == 1 + 2 + 3 + 50
    # The first stage has two units idle before its last signal.
    assert schedule([1, 1], [1, 3], [2, 0], 2, order="gpipe") == 12
    assert schedule([1, 1], [1, 3], [3, 0], 2, order="gpipe") == 14


@pytest.mark.parametrize("order", ["1f1b", "gpipe"])
def test_two_stages_never_take_longer_and_never_less_than_the_busiest_device(order):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        n, m = torch.randint(1, 7, (2,), generator=generator).tolist()
        times = torch.rand(3, n, generator=generator).tolist()
        plain, split = (schedule(*times, m, order=order, two_stage=two) for two in (False, True))
        busiest = m * max(map(sum, zip(*times, strict=True)))
        assert busiest - 1e-9 <= split <= plain + 1e-9


def test_errors():
    ones = [1.0, 1.0]
    with pytest.raises(ValueError, match="a time for each stage, got 2, 1 and 2"):
        schedule(ones, [1.0], ones, 2)
    with pytest.raises(ValueError, match="micro_batches must be at least 1, got 0"):
        schedule(ones, ones, ones, 0)
    with pytest.raises(UnknownName, match="did you mean gpipe"):
        schedule(ones, ones, ones, 2, order="gpip")
    network = mlp(5, 3).double()
    rule = TwoStageBackward(network)
    with pytest.raises(ValueError, match="between 0 and 2"):
        rule(X, Y + 1, delay=True)
    rule.backward_weights()
    assert all(p.grad is None for p in network.parameters())
    network.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        rule(X, Y)
