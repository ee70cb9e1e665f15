from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn
from torch.nn import functional

import netwright as nw
from netwright.data import Batches, digits
from netwright.errors import UnknownName
from netwright.models.boosting import RandomFeatureBoostingClassifier
from netwright.numerics.closed_form import linear_readout, loss
from netwright.rules import RandomFeatureBoosting

X = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)).double()
Y = (X[:, 0] * X[:, 1] > 0).long() + (X[:, 2] > 0.5)
HOT = functional.one_hot(Y, 3).double()
TARGETS = {"squared": HOT, "cross_entropy": Y}


class Block(nn.Module):
    def __init__(self, width, features, bias=True):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, features), nn.Linear(features, width, bias=bias)

    def random_features(self, h):
        return self.inner(h).tanh()

    def forward(self, h):
        return h + self.outer(self.random_features(h))


def residual(blocks=3, inputs=5, width=8, features=16, classes=3, bias=True):
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(),
                         *(Block(width, features, bias) for _ in range(blocks)),
                         nn.Linear(width, classes)).double()


def plain():
    return nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 8), nn.ReLU(),
                         nn.Linear(8, 3)).double()


def ridge_by_lstsq(f, g, ridge):
    f, g = f.numpy(), g.numpy()
    p = f.shape[1]
    A = np.concatenate([f, np.sqrt(len(f) * ridge) * np.eye(p)])
    b = np.concatenate([g, np.zeros((p, g.shape[1]))])
    return torch.from_numpy(np.linalg.lstsq(A, b, rcond=None)[0])


def changed(rule, x, y):
    before = {name: p.detach().clone() for name, p in rule.network.named_parameters()}
    rule(x, y)
    return [name for name, p in rule.network.named_parameters()
            if not torch.equal(p, before[name])]


@pytest.mark.parametrize(("features", "bias"), [(16, True), (90, True), (16, False)])
@torch.no_grad()
def test_each_layer_is_what_least_squares_gives(features, bias):
    network = residual(2, features=features, bias=bias)
    rule = RandomFeatureBoosting(network, ridge=0.3, ridge_readout=0.02, shrinkage=0.7,
                                 output_loss="squared")
    rule(X, HOT)
    phi = network[1](network[0](X))
    for block in network[2:4]:
        mean = phi.mean(0)
        W = ridge_by_lstsq(phi - mean, HOT, 0.02)
        missing = HOT - HOT.mean(0) - (phi - mean) @ W
        G = missing @ W.T
        f = block.random_features(phi)
        f_mean = f.mean(0) if bias else torch.zeros_like(f[0])
        D = ridge_by_lstsq(f - f_mean, G / G.square().sum(1).mean().sqrt(), 0.3)
        along = ((f - f_mean) @ D @ W).flatten()
        step = np.linalg.lstsq(along.numpy()[:, None], missing.flatten().numpy(), rcond=None)[0]
        D = 0.7 * float(step[0]) * D
        torch.testing.assert_close(block.outer.weight, D.T)
        if bias:
            torch.testing.assert_close(block.outer.bias, -f_mean @ D)
        phi = block(phi)
    W = ridge_by_lstsq(phi - phi.mean(0), HOT, 0.02)
    torch.testing.assert_close(network[4].weight, W.T)
    torch.testing.assert_close(network[4](phi.mean(0)), HOT.mean(0))


@torch.no_grad()
def test_blocks_and_readout_are_those_of_the_estimator():
    network = residual(3)
    RandomFeatureBoosting(network, ridge=0.2, ridge_readout=0.02)(X, Y)
    estimator = RandomFeatureBoostingClassifier(ridge=0.2, ridge_readout=0.02)
    phi = network[1](network[0](X))
    readout = estimator._readout(phi, HOT, None)
    for block in network[2:5]:
        grown = SimpleNamespace(delta=nn.Linear(16, 8).double())
        estimator._fit_delta(grown, block.random_features(phi), readout, phi, HOT)
        torch.testing.assert_close(block.outer.weight, grown.delta.weight)
        torch.testing.assert_close(block.outer.bias, grown.delta.bias)
        phi = block(phi)
        readout = estimator._readout(phi, HOT, readout)
    torch.testing.assert_close(network[5].weight, readout.weight)


@pytest.mark.parametrize("output_loss", TARGETS)
@pytest.mark.parametrize("shrinkage", [1.0, 0.3])
@torch.no_grad()
def test_no_block_raises_the_loss(output_loss, shrinkage):
    squared = output_loss == "squared"
    network = residual(5)
    rule = RandomFeatureBoosting(network, ridge=0.01, output_loss=output_loss, shrinkage=shrinkage)
    rule(X, TARGETS[output_loss])
    phi, values = network[1](network[0](X)), []
    for block in network[2:]:
        readout = linear_readout(phi, HOT, squared, 0.01)
        penalty = (0.5 if squared else 1) * 0.01 * readout.weight.square().sum()
        values.append(float(loss(readout(phi), HOT, squared) + penalty))
        if isinstance(block, Block):
            phi = block(phi)
            values.append(float(loss(readout(phi), HOT, squared) + penalty))
    assert all(later <= before + 1e-6 for before, later in pairwise(values))
    assert values[-1] < (0.75 if shrinkage == 1 else 0.9) * values[0]


def test_without_residual_stages_it_is_the_regression_of_random_features():
    for output_loss in TARGETS:
        network = plain()
        rule = RandomFeatureBoosting(network, output_loss=output_loss, ridge_readout=0.01)
        assert changed(rule, X, TARGETS[output_loss]) == ["4.weight", "4.bias"]
        with torch.no_grad():
            f, scores = network[:4](X).numpy(), rule.predict(X)
        if output_loss == "squared":
            expected = Ridge(60 * 0.01).fit(f, HOT.numpy()).predict(f)
            np.testing.assert_allclose(scores.numpy(), expected, atol=1e-9)
        else:
            other = LogisticRegression(C=1 / (2 * 60 * 0.01), tol=1e-8, max_iter=1000).fit(f, Y)
            np.testing.assert_allclose(scores.softmax(1).numpy(), other.predict_proba(f),
                                       atol=1e-4)


def test_only_what_ends_a_residual_stage_changes():
    network = nn.Sequential(
        nn.Linear(5, 8), nn.Tanh(), Block(8, 6), nn.Linear(8, 8), nn.Tanh(),
        Block(8, 6), nn.Tanh(),  # followed by an activation, it is not residual
        Block(8, 6), Block(8, 6), nn.Linear(8, 3)).double()
    network[7].outer.bias.requires_grad_(False)
    assert changed(RandomFeatureBoosting(network), X, Y) == [
        "2.outer.weight", "2.outer.bias", "8.outer.weight", "8.outer.bias", "9.weight", "9.bias"]


def test_a_second_call_finds_the_same_and_labels_of_minus_100_do_not_count():
    first, second = residual(), residual()
    second.load_state_dict(first.state_dict())
    y = Y.clone()
    y[40:] = -100
    RandomFeatureBoosting(first)(X[:40], Y[:40])
    rule = RandomFeatureBoosting(second)
    rule(X, y)
    before = float(rule(X, y))
    with torch.no_grad():
        expected = float(functional.cross_entropy(first(X[:40]), Y[:40]))
    assert before == pytest.approx(expected)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)
    assert float(rule(X, torch.full_like(Y, -100))) == 0
    assert float(rule(X, y)) == pytest.approx(before)


def test_mini_batches_that_are_kept_are_the_whole_set():
    whole, batched, forgetful = residual(), residual(), residual()
    for network in (batched, forgetful):
        network.load_state_dict(whole.state_dict())
    RandomFeatureBoosting(whole)(X, Y)
    rule = RandomFeatureBoosting(batched, X[:4], keep=60)
    history = nw.fit(rule, Batches(X, Y, 16), epochs=2, validation=Batches(X, Y, 60))
    nw.fit(RandomFeatureBoosting(forgetful), Batches(X, Y, 16), epochs=2)
    torch.testing.assert_close(rule.predict(X), whole(X).detach(), atol=1e-4, rtol=1e-4)
    assert history.epochs[1].loss < history.epochs[0].loss
    assert not torch.allclose(forgetful(X), whole(X), atol=1e-1)


def test_boosted_blocks_beat_the_same_blocks_left_random_on_digits():
    split = digits()
    x, x_test = split.x_train.flatten(1), split.x_test.flatten(1)
    margins = []
    for seed in range(3):
        torch.manual_seed(seed)
        network = residual(4, 64, 32, 128, 10).float()
        accuracy = []
        for free in (False, True):
            network[2:6].requires_grad_(free)
            rule = RandomFeatureBoosting(network)
            rule(x, split.y_train)
            accuracy.append(float((rule.predict(x_test).argmax(1) == split.y_test).double().mean()))
        margins.append(accuracy[1] - accuracy[0])
        assert accuracy[1] > 0.92
    assert min(margins) > 0.06  # 0.12 to 0.21 was measured


def test_a_vision_transformer_and_a_language_model():
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4,
            "num_attention_heads": 2}
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(
        **size, image_size=8, patch_size=4, num_channels=1, num_labels=3))
    x, y = torch.randn(30, 1, 8, 8), torch.arange(30) % 3
    rule = RandomFeatureBoosting(vit, x[:2])
    assert [name.rsplit(".", 1)[1] for name in changed(rule, x, y)] == ["weight", "bias"] * 3
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **size, vocab_size=11, tie_word_embeddings=False))
    batch = {"input_ids": torch.randint(11, (6, 5)), "attention_mask": torch.ones(6, 5).long()}
    batch["attention_mask"][3:, :2] = 0
    y = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    rule = RandomFeatureBoosting(llama, batch)
    first = float(rule(batch, y))
    names = changed(rule, {**batch, "input_ids": batch["input_ids"].flip(1)}, y.flip(1))
    assert names == ["model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight",
                     "lm_head.weight"]
    rule(batch, y)
    assert float(rule(batch, y)) < 0.9 * first


def test_errors_name_what_is_wrong():
    network = residual()
    with pytest.raises(UnknownName, match="hinge"):
        RandomFeatureBoosting(network, output_loss="hinge")
    for name, value in (("ridge", 0), ("ridge_readout", float("inf")), ("shrinkage", 1.5),
                        ("keep", -1)):
        with pytest.raises(ValueError, match=f"{name} must be .* got {value}"):
            RandomFeatureBoosting(network, **{name: value})
    with pytest.raises(ValueError, match=r"must end in a linear layer.* stage 2 does not"):
        RandomFeatureBoosting(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3),
                                            nn.Softmax(1)).double())(X, Y)
    tied = residual(2)
    tied[2].outer.weight = tied[3].outer.weight
    with pytest.raises(ValueError, match=r"weights of its own .* stage 2 is used twice"):
        RandomFeatureBoosting(tied)(X, Y)
    with pytest.raises(ValueError, match=r"a label for each of the 60 rows.*got \(60, 2\)"):
        RandomFeatureBoosting(network, output_loss="squared")(X, HOT[:, :2])


def test_errors_of_what_is_kept():
    with pytest.raises(ValueError, match=r"keep=9 needs example=, a tensor .* got NoneType"):
        RandomFeatureBoosting(residual(), keep=9)
    with pytest.raises(ValueError, match="keep=9 needs one label for each sample"):
        RandomFeatureBoosting(residual(), X.view(12, 5, 5), keep=9)
    with pytest.raises(ValueError, match="at least the 60 samples of the batch, got 9"):
        RandomFeatureBoosting(residual(), X[:2], keep=9)(X, Y)
    flat = nn.Sequential(nn.Flatten(), *residual())
    with pytest.raises(ValueError, match=r"x must be a tensor of samples \(5,\)"):
        RandomFeatureBoosting(flat, X[:2], keep=9)(X[:4, None], Y[:4])


def test_a_loss_that_is_no_number_changes_nothing():
    x = X.clone()
    x[0] = float("nan")
    network = residual()
    rule = RandomFeatureBoosting(network)
    assert changed(rule, x, Y) == []
    assert torch.isnan(rule(x, Y))
