from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from netwright.data import digits
from netwright.measure import cost
from netwright.models import cnn
from netwright.rules import Backprop, MomentumAuxiliary

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])
IMAGES = torch.randn(6, 1, 12, 12, generator=torch.Generator().manual_seed(1))


def mlp(*sizes):
    layers = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def gradients(rule):
    return {name: p.grad.clone() for name, p in rule.named_parameters() if p.grad is not None}


def scrambled(rule):
    """The rule with averages and corrections that differ from the weights they started as."""
    for part in [*rule.averages, *rule.corrections]:
        for value in [*part.parameters(), *part.buffers()]:
            if value.is_floating_point():
                value.data.add_(0.3 * torch.rand_like(value))
    return rule


def expect(loss, parameters):
    for p, expected in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(p.grad, expected)


def test_averages_are_those_of_the_following_weights_by_hand():
    torch.manual_seed(0)
    rule = MomentumAuxiliary(mlp(5, 8, 7, 3), momentum=0.9)
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.1)
    expected = [rule.network[i].weight.detach().clone() for i in (2, 4)]
    for step in range(5):
        if step:
            expected = [0.9 * a + 0.1 * rule.network[i].weight.detach()
                        for a, i in zip(expected, (2, 4), strict=True)]
        optimizer.zero_grad()
        rule(X, Y)
        for average, value in zip(rule.averages, expected, strict=True):
            torch.testing.assert_close(average[0].weight, value)
        optimizer.step()
    assert not torch.allclose(rule.averages[0][0].weight, rule.network[2].weight, atol=0.01)


def test_gradients_are_those_of_each_block_alone_through_average_and_correction():
    torch.manual_seed(0)
    network = mlp(5, 8, 7, 6, 3).double()
    rule = scrambled(MomentumAuxiliary(network, blocks=["0", "2", "6"]))
    rule(X.double(), Y)
    (mid, out), (mid_more, out_more), (head,) = rule.averages, rule.corrections, rule.heads
    a = network[:2](X.double())
    b = (torch.tanh(nn.functional.linear(a, mid[0].weight, mid[0].bias))
         + torch.tanh(nn.functional.linear(a, mid_more[0].weight, mid_more[0].bias)))
    expect(cross_entropy(head(b), Y),
           [*network[:2].parameters(), *mid_more.parameters(), *head.parameters()])
    a = network[2:6](a.detach())
    scores = (nn.functional.linear(a, out[0].weight, out[0].bias)
              + nn.functional.linear(a, out_more[0].weight, out_more[0].bias))
    expect(cross_entropy(scores, Y), [*network[2:6].parameters(), *out_more.parameters()])
    expect(cross_entropy(network[6:](a.detach()), Y), list(network[6:].parameters()))


def test_convolutions_with_batch_norm_keep_their_own_statistics():
    torch.manual_seed(0)
    network = cnn(1, (12, 12), 3, widths=(4, 5), norm=True).double()
    rule = scrambled(MomentumAuxiliary(network, width=7, momentum=1))
    plain = deepcopy(rule)
    x = IMAGES.double()
    rule(x, Y)

    h = plain.network[:4](x)
    both = []
    for part, mine in ((plain.averages[0], rule.averages[0]),
                       (plain.corrections[0], rule.corrections[0])):
        # the layers of the copies, which a call takes only the weights of
        z = nn.functional.conv2d(h, part[0].weight, part[0].bias, padding=1)
        both.append(nn.functional.max_pool2d(torch.relu(nn.functional.batch_norm(
            z, None, None, part[1].weight, part[1].bias, training=True)), 2).flatten(1))
        torch.testing.assert_close(mine[1].running_mean,
                                   0.9 * part[1].running_mean + 0.1 * z.mean((0, 2, 3)))
        assert mine[1].num_batches_tracked == 1
    loss = cross_entropy(plain.heads[0](sum(both)), Y)
    for p, expected in zip(rule.network[:4].parameters(),
                           torch.autograd.grad(loss, list(plain.network[:4].parameters())),
                           strict=True):
        torch.testing.assert_close(p.grad, expected)
    plain.network[4:9](h.detach())  # once, by itself
    torch.testing.assert_close(rule.network[5].running_mean, plain.network[5].running_mean)
    assert rule.network[5].num_batches_tracked == 1


def test_no_gradient_crosses_a_boundary():
    network = mlp(5, 8, 8, 8, 3)
    rule = MomentumAuxiliary(network, momentum=1)  # so that no average follows the change below
    rule(X, Y)
    before = gradients(rule)
    assert not any(name.startswith("averages") for name in before)
    rule.zero_grad()
    with torch.no_grad():
        for later in (network[2], network[4], rule.corrections[1][0]):
            later.weight.mul_(3)
    rule(X, Y)
    after = gradients(rule)
    mine = [name for name in before
            if name.startswith(("network.0", "corrections.0", "heads.0"))]
    assert len(mine) == 8
    assert all(torch.equal(before[name], after[name]) for name in mine)
    assert not torch.equal(before["network.2.weight"], after["network.2.weight"])


def test_accumulating_advances_once_a_step():
    torch.manual_seed(0)
    rule = MomentumAuxiliary(mlp(5, 8, 3), momentum=0.9)
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.5)
    rule(X, Y)
    optimizer.step()
    optimizer.zero_grad()
    start, weight = rule.averages[0][0].weight.clone(), rule.network[2].weight.detach().clone()
    rule(X[:3], Y[:3])
    rule(X[3:], Y[3:])
    parts = gradients(rule)
    torch.testing.assert_close(rule.averages[0][0].weight, 0.9 * start + 0.1 * weight)
    rule.zero_grad()
    rule.momentum = 1  # the averages stay
    rule(X, Y)
    for name, whole in gradients(rule).items():
        torch.testing.assert_close(parts[name], 2 * whole)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_every_step_is_noticed(set_to_none, fused):
    rule = MomentumAuxiliary(mlp(5, 8, 3), momentum=0.9)
    optimizer = torch.optim.AdamW(rule.parameters(), lr=0.1, fused=fused)
    expected = rule.averages[0][0].weight.clone()
    for _ in range(3):
        expected = 0.9 * expected + 0.1 * rule.network[2].weight.detach()
        optimizer.zero_grad(set_to_none=set_to_none)
        rule(X, Y)
        torch.testing.assert_close(rule.averages[0][0].weight, expected)
        optimizer.step()


def test_predicting_and_failing_leave_the_averages():
    rule = MomentumAuxiliary(mlp(5, 8, 3))
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.5)
    rule(X, Y)
    optimizer.step()
    optimizer.zero_grad()
    before = rule.averages[0][0].weight.clone()
    assert torch.equal(rule.predict(X), rule.network(X).detach())
    with pytest.raises(ValueError, match="between 0 and 2"):
        rule(X, Y + 1)
    assert torch.equal(rule.averages[0][0].weight, before)
    rule(X, Y)
    assert not torch.equal(rule.averages[0][0].weight, before)


def test_training_goes_on_from_a_saved_state_as_if_never_stopped():
    torch.manual_seed(0)
    def steps(rule, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            rule(IMAGES, Y)
            optimizer.step()
    def make():
        rule = MomentumAuxiliary(cnn(1, (12, 12), 3, widths=(4, 5), norm=True), momentum=0.8)
        return rule, torch.optim.Adam(rule.parameters(), lr=0.01)
    rule, optimizer = make()
    steps(rule, optimizer, 3)
    other, other_optimizer = make()
    other.load_state_dict(rule.state_dict())
    other_optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
    steps(rule, optimizer, 3)
    steps(other, other_optimizer, 3)
    mine, theirs = rule.state_dict(), other.state_dict()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert any(name.startswith("averages") for name in mine)


def test_one_block_is_backpropagation():
    network = mlp(5, 8, 7, 3)
    rule = MomentumAuxiliary(network, blocks=1)
    loss, mine = rule(X, Y), gradients(rule)
    rule.zero_grad()
    assert torch.equal(Backprop(network)(X, Y), loss)
    assert all(torch.equal(p.grad, mine[f"network.{name}"])
               for name, p in network.named_parameters())


def test_momentum_zero_follows_and_one_stays():
    for momentum, follows in ((0, True), (1, False)):
        rule = MomentumAuxiliary(mlp(5, 8, 3), momentum=momentum)
        start = rule.network[2].weight.detach().clone()
        optimizer = torch.optim.SGD(rule.parameters(), lr=0.5)
        rule(X, Y)
        optimizer.step()
        optimizer.zero_grad()
        rule(X, Y)
        average = rule.averages[0][0].weight
        torch.testing.assert_close(average, rule.network[2].weight.detach() if follows else start)


def test_transformers_run_the_next_layer_with_its_mask():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=3,
                                     num_attention_heads=2, intermediate_size=16, num_labels=3)
    ids, mask = torch.randint(1, 20, (6, 5)), torch.ones(6, 5, dtype=torch.long)
    model = transformers.BertForSequenceClassification(config).eval()
    rule = scrambled(MomentumAuxiliary(model, {"input_ids": ids, "attention_mask": mask})).eval()
    padded = {"input_ids": torch.cat([ids, torch.randint(20, (6, 2))], 1),
              "attention_mask": torch.cat([mask, torch.zeros(6, 2, dtype=torch.long)], 1)}
    plain = rule({"input_ids": ids, "attention_mask": mask}, Y)
    torch.testing.assert_close(rule(padded, Y), plain)
    with torch.no_grad():
        layers = model.bert.encoder.layer
        h = layers[0](model.bert.embeddings(ids))
        both = sum(_with(layers[1], part, h) for part in (rule.averages[0], rule.corrections[0]))
        first = cross_entropy(rule.heads[0](both.mean(1)), Y)
    losses = []
    rule.loss = lambda scores, y: losses.append(cross_entropy(scores, y)) or losses[-1]
    rule({"input_ids": ids, "attention_mask": mask}, Y)
    torch.testing.assert_close(losses[0].detach(), first)
    assert len(rule.heads) == 1  # the last layer's stage ends in class scores


def _with(layer, parts, h):
    state = dict(zip(dict(layer.named_parameters()),
                     [*parts.parameters()] or [*parts.buffers()], strict=True))
    return torch.func.functional_call(layer, state, (h,))


def test_graphs_with_labels_on_some_nodes():
    pyg = pytest.importorskip("torch_geometric.nn")
    edges = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])
    labels = torch.tensor([0, 1, 2, -100, -100, -100])
    for options in ({}, {"jk": "cat"}):
        model = pyg.GCN(5, 8, 3, out_channels=3, norm="batch_norm", **options)
        rule = MomentumAuxiliary(model, (X, edges))
        assert rule((X, edges), labels).isfinite()
        assert all(p.grad is not None for p in rule.corrections.parameters())
        assert model.norms[1].module.num_batches_tracked == 1


class Shifted(nn.Module):
    """Linear layers with a parameter between them that belongs to none."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 8)
        self.third, self.shift = nn.Linear(8, 3), nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x))) + self.shift))


def test_a_loose_parameter_of_the_following_stage_learns_from_its_own_block_alone():
    network = Shifted()
    rule = scrambled(MomentumAuxiliary(network, X))
    assert rule.stages[1].loose
    rule(X, Y)
    a = torch.tanh(network.first(X)).detach()
    b = torch.tanh(network.second(a) + network.shift)
    scores = sum(nn.functional.linear(b, *part[1].state_dict().values())
                 for part in (rule.averages, rule.corrections))
    expected, = torch.autograd.grad(cross_entropy(scores, Y), network.shift)
    torch.testing.assert_close(network.shift.grad, expected)
    assert all(p.grad is not None for p in rule.parameters())


def test_frozen_stages_stay_and_their_corrections_learn():
    network = mlp(5, 8, 7, 3)
    network[2].requires_grad_(False)
    rule = MomentumAuxiliary(network)
    rule(X, Y)
    assert network[2].weight.grad is None
    assert rule.corrections[0][0].weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_convolutions_in_other_precisions(dtype):
    network = cnn(1, (12, 12), 3, widths=(4, 5), norm=True).to(dtype)
    rule = MomentumAuxiliary(network)
    assert rule(IMAGES.to(dtype), Y).isfinite()
    assert all(p.dtype == p.grad.dtype == dtype for p in rule.parameters())


def test_autocast_and_any_loss():
    rule = MomentumAuxiliary(cnn(1, (12, 12), 3, widths=(4, 5)),
                             loss=lambda scores, y: (scores - y).square().mean())
    with torch.autocast("cpu", torch.bfloat16):
        assert rule(IMAGES, torch.randn(6, 3)).isfinite()
    assert all(p.grad.dtype == torch.float32 for p in rule.parameters())


def test_memory_does_not_grow_with_depth():
    def working_bytes(depth):
        rule = MomentumAuxiliary(mlp(64, *[64] * (depth - 1), 10))
        return cost(rule, (torch.randn(512, 64), torch.randint(10, (512,))), repeats=1,
                    warmup=0).working_bytes
    assert working_bytes(16) < 1.15 * working_bytes(6)


def train(rule, split, *, epochs=4, shuffled=False):
    x, y = split.x_train, split.y_train
    y = y[torch.randperm(len(y))] if shuffled else y
    optimizer = torch.optim.Adam([p for p in rule.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            rule(x[batch], y[batch])
            optimizer.step()
    return (rule.predict(split.x_test).argmax(1) == split.y_test).float().mean().item()


def test_learns_what_a_last_layer_on_random_features_does_not():
    split = digits()
    for seed in range(3):
        torch.manual_seed(seed)
        learned = train(MomentumAuxiliary(cnn(1, (8, 8), 10, widths=(12, 12)), width=32), split)
        frozen = cnn(1, (8, 8), 10, widths=(12, 12))
        frozen[:-1].requires_grad_(False)
        control = train(MomentumAuxiliary(frozen, width=32), split)
        assert learned > 0.85
        assert learned > control + 0.1
    network = cnn(1, (8, 8), 10, widths=(12, 12))
    assert train(MomentumAuxiliary(network, width=32), split, shuffled=True, epochs=2) < 0.3


def test_errors():
    for momentum in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"momentum must be between 0 .* got {momentum}"):
            MomentumAuxiliary(mlp(5, 8, 3), momentum=momentum)
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        MomentumAuxiliary(mlp(5, 8, 3), width=0)
    with pytest.raises(ValueError, match=r"blocks must be between 1 and 2, .* 2 stages"):
        MomentumAuxiliary(mlp(5, 8, 3), blocks=3)
    with pytest.raises(ValueError, match="num_classes=4 must be the number of outputs"):
        MomentumAuxiliary(mlp(5, 8, 3), num_classes=4)
    with pytest.raises(ValueError, match="stage 1 must have weights to average, got lazy ones"):
        MomentumAuxiliary(nn.Sequential(nn.Linear(5, 8), nn.LazyLinear(3)), num_classes=3)
    bilinear = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 6), nn.LayerNorm(6),
                             nn.Embedding(3, 2))
    with pytest.raises(ValueError, match="example is needed, since what stage 1 of Sequential"):
        MomentumAuxiliary(bilinear, num_classes=3)
    rule = MomentumAuxiliary(mlp(5, 8, 3))
    with pytest.raises(ValueError, match="between 0 and 2"):
        rule(X, Y + 1)
    assert all(p.grad is None for p in rule.parameters())
