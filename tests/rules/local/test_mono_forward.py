from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from netwright.data import digits
from netwright.errors import UnknownName
from netwright.measure import cost
from netwright.rules import MonoForward

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def mlp(*sizes, activation=nn.ReLU):
    layers = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def by_hand(network, projections, x, y):
    """Each layer's gradients by autograd on that layer alone, the last two classes by logits."""
    gradients, h = [], x
    for layer, projection in zip([network[:2], network[2:4], network[4:]], [*projections, None],
                                 strict=True):
        a = layer(h.detach())
        scores = a if projection is None else a @ projection.weight.T
        parameters = [*layer.parameters(), *([] if projection is None else [projection.weight])]
        gradients.append(torch.autograd.grad(cross_entropy(scores, y), parameters))
        h = a
    return gradients


def test_gradients_are_those_of_each_layer_alone():
    rule = MonoForward(mlp(5, 8, 7, 3).double())
    x = X.double()
    rule(x, Y)
    for layer, projection, expected in zip([rule.network[0], rule.network[2], rule.network[4]],
                                           [*rule.projections, None],
                                           by_hand(rule.network, rule.projections, x, Y),
                                           strict=True):
        got = [layer.weight.grad, layer.bias.grad]
        got += [] if projection is None else [projection.weight.grad]
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_one_linear_stage_in_closed_form():
    rule = MonoForward(nn.Sequential(nn.Linear(5, 8, bias=False), nn.Linear(8, 3)))
    M, W = rule.projections[0].weight.detach(), rule.network[0].weight
    error = (torch.softmax(X @ W.T @ M.T, 1) - torch.eye(3)[Y]) / len(X)
    rule(X, Y)
    torch.testing.assert_close(W.grad, M.T @ error.T @ X)
    torch.testing.assert_close(rule.projections[0].weight.grad, error.T @ (X @ W.T))


def test_loss_is_the_mean_over_stages():
    network = mlp(5, 8, 3)
    rule = MonoForward(network)
    a = network[:2](X)
    expected = (cross_entropy(a @ rule.projections[0].weight.T, Y)
                + cross_entropy(network(X), Y)) / 2
    torch.testing.assert_close(rule(X, Y), expected.detach())


def test_no_gradient_crosses_a_boundary():
    network = mlp(5, 8, 8, 3)
    rule = MonoForward(network)
    rule(X, Y)
    before = network[0].weight.grad.clone()
    rule.zero_grad()
    with torch.no_grad():
        for later in (network[2], network[4], rule.projections[1]):
            later.weight.mul_(3)
    rule(X, Y)
    assert torch.equal(network[0].weight.grad, before)


def test_both_ways_of_predicting():
    network = mlp(5, 8, 7, 3)
    rule = MonoForward(network, predict_by="sum")
    a = network[:2](X)
    b = network[2:4](a)
    expected = sum([a @ rule.projections[0].weight.T, b @ rule.projections[1].weight.T,
                    network(X)])
    torch.testing.assert_close(rule.predict(X), expected.detach())
    rule.predict_by = "last"
    assert torch.equal(rule.predict(X), network(X).detach())


def test_widths_are_known_without_an_example_where_they_can_be():
    cnn = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(),
                        nn.Linear(48, 10))
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 3, 9, 1])
    rule = MonoForward(cnn, num_classes=10)
    optimizer = torch.optim.Adam(rule.parameters())  # before the first matrix has its shape
    rule(x, y)
    optimizer.step()
    assert [p.weight.shape[1] for p in rule.projections] == [2 * 6 * 6, 48]
    assert set(optimizer.state) == set(rule.parameters())
    other = MonoForward(cnn, num_classes=10)
    other.load_state_dict(rule.state_dict())
    assert torch.equal(other.projections[0].weight, rule.projections[0].weight)
    assert MonoForward(cnn, x).projections[0].weight.shape == (10, 72)


def test_the_generator_draws_the_matrices():
    def drawn(seed, example):
        rule = MonoForward(mlp(5, 8, 3), example, generator=torch.Generator().manual_seed(seed))
        return rule.projections[0].weight
    assert torch.equal(drawn(1, None), drawn(1, X))
    assert not torch.equal(drawn(1, None), drawn(2, None))


def test_signals_of_one_dimension_over_channels_are_flattened():
    cnn = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
    rule = MonoForward(cnn, X[:, None].repeat(1, 1, 2)[..., :8])
    assert rule.projections[0].weight.shape == (3, 24)


class Pooled(nn.Module):
    """Mean of tokens, padding included, then a linear layer."""

    def __init__(self, width, classes):
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, h):
        return self.linear(h.mean(1))


def test_tokens_give_the_mean_of_their_scores_or_one_each():
    x = torch.randn(6, 4, 5)
    rule = MonoForward(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), Pooled(8, 3)), x,
                       predict_by="sum")
    a = rule.network[:2](x)
    M = rule.projections[0].weight
    expected = (cross_entropy(a.mean(1) @ M.T, Y) + cross_entropy(rule.network(x), Y)) / 2
    torch.testing.assert_close(rule(x, Y), expected.detach())
    torch.testing.assert_close(rule.predict(x), (a.mean(1) @ M.T + rule.network(x)).detach())

    each = MonoForward(mlp(5, 8, 3), x, predict_by="sum")
    y = torch.randint(3, (6, 4))
    y[0] = -100
    assert each(x, y).isfinite()
    assert each.predict(x).shape == (6, 4, 3)


def test_padding_is_left_out_of_the_mean():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=3,
                                     num_attention_heads=2, intermediate_size=16, num_labels=3)
    ids, mask = torch.randint(1, 20, (6, 5)), torch.ones(6, 5, dtype=torch.long)
    model = transformers.BertForSequenceClassification(config).eval()
    rule = MonoForward(model, {"input_ids": ids, "attention_mask": mask}, predict_by="sum")
    padded = {"input_ids": torch.cat([ids, torch.randint(20, (6, 2))], 1),
              "attention_mask": torch.cat([mask, torch.zeros(6, 2, dtype=torch.long)], 1)}
    rule.eval()
    plain = rule({"input_ids": ids, "attention_mask": mask}, Y)
    torch.testing.assert_close(rule(padded, Y), plain)
    torch.testing.assert_close(rule.predict(padded),
                               rule.predict({"input_ids": ids, "attention_mask": mask}))


def test_frozen_stages_stay_and_the_others_learn():
    network = mlp(5, 8, 7, 3)
    network[2].requires_grad_(False)
    network[4].requires_grad_(False)
    MonoForward(network)(X, Y)
    assert network[0].weight.grad is not None
    assert network[2].weight.grad is None
    assert network[4].weight.grad is None


def test_autocast_and_any_loss():
    rule = MonoForward(mlp(5, 8, 3), loss=lambda scores, y: (scores - y).square().mean())
    with torch.autocast("cpu", torch.bfloat16):
        assert rule(X, torch.randn(6, 3)).isfinite()
    assert rule.network[0].weight.grad.dtype == torch.float32


def test_memory_does_not_grow_with_depth():
    def working_bytes(depth):
        rule = MonoForward(mlp(64, *[64] * depth, 10))
        return cost(rule, (torch.randn(512, 64), torch.randint(10, (512,))), repeats=1,
                    warmup=0).working_bytes
    assert working_bytes(32) < 1.15 * working_bytes(8)


def train(rule, split, *, epochs=8, shuffled=False):
    x, y = split.x_train.flatten(1), split.y_train
    y = y[torch.randperm(len(y))] if shuffled else y
    optimizer = torch.optim.Adam([p for p in rule.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            rule(x[batch], y[batch])
            optimizer.step()
    return (rule.predict(split.x_test.flatten(1)).argmax(1) == split.y_test).float().mean().item()


def test_learns_what_a_last_layer_on_random_features_does_not():
    split = digits()
    for seed in range(3):
        torch.manual_seed(seed)
        learned = train(MonoForward(mlp(64, 128, 32, 10)), split)
        frozen = mlp(64, 128, 32, 10)
        frozen[:4].requires_grad_(False)
        control = train(MonoForward(frozen), split)
        assert learned > 0.9
        assert learned > control + 0.1
    assert train(MonoForward(mlp(64, 128, 32, 10)), split, shuffled=True) < 0.3


def test_errors():
    with pytest.raises(ValueError, match="num_classes=4 must be the number of outputs"):
        MonoForward(mlp(5, 8, 3), num_classes=4)
    with pytest.raises(ValueError, match="num_classes is needed"):
        MonoForward(nn.Sequential(nn.Linear(5, 8), Pooled(8, 3)))
    with pytest.raises(UnknownName, match="did you mean last"):
        MonoForward(mlp(5, 8, 3), predict_by="lst")
    rule = MonoForward(mlp(5, 8, 3))
    with pytest.raises(ValueError, match="between 0 and 2"):
        rule(X, Y + 1)
    assert all(p.grad is None for p in rule.parameters())
    cnn = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    wrong = MonoForward(nn.Sequential(nn.Conv2d(1, 2, 3), cnn[0].__class__(2, 2, 1), *cnn[1:]))
    wrong(torch.randn(6, 1, 8, 8), Y)
    with pytest.raises(ValueError, match="was made for 72"):
        wrong(torch.randn(6, 1, 9, 9), Y)
