from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from netwright.data import digits
from netwright.errors import UnknownName
from netwright.measure import alignment
from netwright.models import gpt, mlp
from netwright.rules import Backprop, HighwayBackprop
from netwright.stages import stages

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Added(nn.Module):
    """h + f(h)."""

    def __init__(self, *layers):
        super().__init__()
        self.f = nn.Sequential(*layers)

    def forward(self, h):
        return h + self.f(h)


def residual_mlp(blocks=4, width=8, inputs=5, classes=3, scale=1.0):
    torch.manual_seed(0)
    inner = [Added(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh(),
                   nn.Linear(width, width)) for _ in range(blocks)]
    with torch.no_grad():
        for block in inner:
            block.f[3].weight.mul_(scale)
    return nn.Sequential(nn.Linear(inputs, width), *inner, nn.Linear(width, classes)).double()


def residual_cnn():
    def block(width):
        return Added(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), block(4), block(4), block(4),
                         nn.Conv2d(4, 6, 3, stride=2), block(6), block(6),
                         nn.Flatten(), nn.Linear(54, 3)).double()


def gradients(rule, x, y):
    rule.zero_grad()
    loss = rule(x, y)
    return loss, {name: p.grad for name, p in rule.network.named_parameters()}


def assert_close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda text, name=name: name + text)


def cosine(a, b):
    return torch.cosine_similarity(torch.cat([g.flatten() for g in a.values()]),
                                   torch.cat([g.flatten() for g in b.values()]), dim=0).item()


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=5,
        num_attention_heads=2, num_key_value_heads=2, num_labels=3, pad_token_id=0)).double()
    ids = torch.randint(1, 20, (6, 7))
    mask = torch.ones_like(ids)
    ids[:3, 5:], mask[:3, 5:] = 0, 0
    return model, {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(("make", "steps"), [
    (lambda: (residual_mlp(), X), 3),
    (lambda: (residual_cnn(), torch.randn(6, 1, 8, 8).double()), 6),
    (llama, 3)], ids=["mlp", "cnn", "llama"])
def test_as_many_iterations_as_blocks_give_the_exact_gradient(make, steps):
    model, x = make()
    rule = HighwayBackprop(model, x, iterations=5)
    loss, ours = gradients(rule, x, Y)
    expected_loss, exact = gradients(Backprop(model), x, Y)
    torch.testing.assert_close(loss, expected_loss)
    assert_close(ours, exact)
    assert rule.sequential_steps == len(rule.stages)
    rule.iterations = 1
    _, ours = gradients(rule, x, Y)
    assert cosine(ours, exact) < 1 - 1e-6
    assert rule.sequential_steps == steps  # the last block of a run that ends in a flatten passes


def test_no_iteration_is_the_residual_path_alone():
    network = residual_mlp()
    _, ours = gradients(HighwayBackprop(network, iterations=0), X, Y)
    with torch.no_grad():
        h = [network[0](X)]
        for block in network[1:-1]:
            h.append(block(h[-1]))
    top = h[-1].clone().requires_grad_()
    (signal,) = torch.autograd.grad(cross_entropy(network[-1](top), Y), top)
    for i, (before, _) in enumerate(pairwise(h), start=1):
        expected = torch.autograd.grad(network[i](before), list(network[i].parameters()), signal)
        for p, g in zip(network[i].parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, g)
    torch.testing.assert_close(ours["0.weight"], signal.T @ X)


def test_iterations_are_the_sum_over_paths_through_so_many_blocks():
    """In a linear network the gradient at the bottom is a polynomial in the blocks' matrices."""
    torch.manual_seed(0)
    A, B, C = (0.3 * torch.randn(4, 4).double() for _ in range(3))
    blocks = [Added(nn.Linear(4, 4, bias=False)).double() for _ in range(3)]
    with torch.no_grad():
        for block, weight in zip(blocks, (A, B, C), strict=True):
            block.f[0].weight.copy_(weight)
    network = nn.Sequential(nn.Linear(5, 4, bias=False).double(), *blocks, nn.Linear(4, 3).double())
    with torch.no_grad():
        h = network[:-1](X)
    h.requires_grad_()
    (top,) = torch.autograd.grad(cross_entropy(network[-1](h), Y), h)
    orders = [top, top @ (A + B + C), top @ (C @ B + C @ A + B @ A), top @ C @ B @ A]
    for k in range(5):
        _, ours = gradients(HighwayBackprop(network, iterations=k), X, Y)
        torch.testing.assert_close(ours["0.weight"], sum(orders[:k + 1]).T @ X)


def test_more_iterations_come_nearer():
    network = residual_mlp(blocks=10, scale=0.5)
    _, exact = gradients(Backprop(network), X, Y)
    found = [cosine(gradients(HighwayBackprop(network, iterations=k), X, Y)[1], exact)
             for k in range(11)]
    assert all(a < b or b > 1 - 1e-9 for a, b in pairwise(found[:6]))
    assert found[3] > 0.99 > found[0]
    assert found[10] == pytest.approx(1, abs=1e-12)


def test_the_upper_stages_are_exact_first():
    found = alignment(HighwayBackprop(residual_mlp(blocks=6), iterations=2), (X, Y))
    exact = [name for name, value in found.items() if value > 1 - 1e-9]
    assert exact == ["4", "5", "6", "7"]


def test_a_network_without_residual_stages_is_trained_by_backpropagation():
    network = mlp(5, 3, hidden=(7, 7, 7)).double()
    rule = HighwayBackprop(network, iterations=0)
    _, ours = gradients(rule, X, Y)
    _, exact = gradients(Backprop(network), X, Y)
    assert rule.sequential_steps == 4
    assert all(torch.equal(ours[name], exact[name]) for name in exact)


class Normed(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, h):
        return self.norm(h + self.linear(h).tanh())


def test_residual_stages_can_be_named():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 8), Normed(8), Normed(8), nn.Linear(8, 3)).double()
    seen = HighwayBackprop(network, X, iterations=1)
    named = HighwayBackprop(network, X, iterations=1, residual=["1", "2"])
    _, exact = gradients(Backprop(network), X, Y)
    assert_close(gradients(seen, X, Y)[1], exact)
    assert cosine(gradients(named, X, Y)[1], exact) < 1 - 1e-6
    named.iterations = 2
    assert_close(gradients(named, X, Y)[1], exact)
    assert (seen.sequential_steps, named.sequential_steps) == (4, 4)


class Scaled(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, h):
        return torch.add(self.linear(h), h, alpha=0.5)


def test_an_addition_that_scales_the_signal_is_no_identity():
    network = nn.Sequential(nn.Linear(5, 8), Scaled(8), nn.Linear(8, 3)).double()
    rule = HighwayBackprop(network, X, iterations=0)
    _, ours = gradients(rule, X, Y)
    assert rule.sequential_steps == 3
    assert_close(ours, gradients(Backprop(network), X, Y)[1])


def test_dropout_and_running_statistics_are_drawn_and_moved_once():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), *[
            Added(nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 8)) for _ in range(3)],
            nn.Linear(8, 3)).double()
    ours, plain = make(), make()
    torch.manual_seed(1)
    loss, found = gradients(HighwayBackprop(ours, iterations=3), X, Y)
    torch.manual_seed(1)
    expected_loss, exact = gradients(Backprop(plain), X, Y)
    assert torch.equal(loss, expected_loss)
    assert_close(found, exact)
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), plain.buffers(), strict=True))


def test_shared_parameters_get_the_sum():
    network = residual_mlp()
    network[2] = network[1]
    _, exact = gradients(Backprop(network), X, Y)
    assert_close(gradients(HighwayBackprop(network, iterations=4), X, Y)[1], exact)


def test_parameters_beside_the_signal_learn_too():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=4, num_heads=2)).double().eval()
    x = {"input_ids": torch.randint(1, 20, (6, 5))}
    y = torch.randint(8, (6, 5))
    rule = HighwayBackprop(model, x, iterations=4)
    ours = gradients(rule, x, y)[1]
    (bias,) = [name for name in ours if "relative_attention_bias" in name]
    assert ours[bias].abs().sum() > 0
    assert_close(ours, gradients(Backprop(model), x, y)[1])


def test_a_graph_network_passes_exactly():
    geometric = pytest.importorskip("torch_geometric.nn")
    edges = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])
    model = geometric.GCN(5, 8, num_layers=3, out_channels=3).double()
    y = torch.where(torch.arange(6) < 4, Y, -100)
    exact = gradients(Backprop(model), (X, edges), y)[1]
    assert_close(gradients(HighwayBackprop(model, (X, edges)), (X, edges), y)[1], exact)


@pytest.mark.parametrize("frozen", [[0], [0, 1, 2], [2], [3, 4, 5], [5]])
def test_frozen_stages_stay_and_the_others_learn_alike(frozen):
    network = residual_mlp()
    for i in frozen:
        network[i].requires_grad_(False)
    rule = HighwayBackprop(network, iterations=4)
    rule(X, Y)
    ours = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    assert all(p.grad is None for i in frozen for p in network[i].parameters())
    rule.zero_grad()
    Backprop(network)(X, Y)
    assert_close(ours, {name: p.grad for name, p in network.named_parameters() if p.requires_grad})


def test_autocast_comes_near():
    network = residual_mlp().float()
    x = X.float()
    exact = gradients(Backprop(network), x, Y)[1]
    rule = HighwayBackprop(network, iterations=4)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(rule, x, Y)[1]
    assert rule.sequential_steps == 6
    assert all(g.dtype == torch.float32 for g in found.values())
    assert cosine(found, exact) > 0.99
    rule.iterations = 0
    with torch.autocast("cpu", torch.bfloat16):
        rule(x, Y)
    assert rule.sequential_steps == 2


def train(rule, split, *, steps=80, shuffled=False):
    x, y = split.x_train.flatten(1), split.y_train
    y = y[torch.randperm(len(y))] if shuffled else y
    optimizer = torch.optim.Adam([p for p in rule.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        rule(x[batch], y[batch])
        optimizer.step()
    return (rule.predict(split.x_test.flatten(1)).argmax(1) == split.y_test).float().mean().item()


def test_learns_with_few_iterations_what_frozen_blocks_do_not():
    split = digits()
    for seed in range(3):
        def make(seed=seed):
            network = residual_mlp(blocks=5, width=16, inputs=64, classes=10).float()
            torch.manual_seed(seed)
            return network
        learned = train(HighwayBackprop(make(), iterations=2), split)
        frozen = make()
        frozen[:-1].requires_grad_(False)
        assert learned > 0.85
        assert learned > train(HighwayBackprop(frozen), split) + 0.1
    assert train(HighwayBackprop(make(), iterations=2), split, shuffled=True) < 0.3


def test_errors():
    with pytest.raises(ValueError, match="iterations must be at least 0, got -1"):
        HighwayBackprop(residual_mlp(), iterations=-1)
    with pytest.raises(UnknownName, match="stage"):
        HighwayBackprop(residual_mlp(), residual=["7"])
    rule = HighwayBackprop(residual_mlp(), residual=["0", "1", "2"])
    rule(X, Y)  # nothing passes before the first stage, so that its name does nothing
    rule = HighwayBackprop(mlp(5, 3, hidden=(7, 8)).double(), residual=["3"])
    with pytest.raises(ValueError, match=r"residual names stage '3'.*\(6, 8\).*leave it out"):
        rule(X, Y)
    assert all(p.grad is None for p in rule.parameters())
    rule.requires_grad_(False)
    rule.residual = None
    with pytest.raises(ValueError, match="no trainable parameters"):
        rule(X, Y)


def test_stages_are_cut_as_the_caller_says():
    network = gpt(20, 8, width=16, depth=4).double()
    x = torch.randint(20, (3, 8))
    rule = HighwayBackprop(stages(network, x, cuts=["1", "2", "3", "4", "5"]), iterations=1)
    rule(x, x)
    assert len(rule.stages) == 5
    assert rule.sequential_steps == 3
