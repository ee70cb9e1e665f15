from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from netwright.data import digits
from netwright.errors import UnknownName
from netwright.measure import cost
from netwright.models import cnn
from netwright.rules import Backprop, LocalLosses

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


def test_gradients_are_those_of_each_block_alone():
    network = mlp(5, 8, 7, 6, 3).double()
    rule = LocalLosses(network, blocks=2)
    rule(X.double(), Y)
    a = network[:4](X.double())
    first = cross_entropy(rule.heads[0](a), Y)
    second = cross_entropy(network[4:](a.detach()), Y)
    for loss, parameters in ((first, [*network[:4].parameters(), *rule.heads.parameters()]),
                             (second, list(network[4:].parameters()))):
        for p, expected in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            torch.testing.assert_close(p.grad, expected)


def test_a_convolutional_network_with_batch_norm_block_by_block():
    network = cnn(1, (12, 12), 3, widths=(4, 5), norm=True)
    rule = LocalLosses(network, width=7)
    assert rule.stages.names == ["0", "4", "9"]
    before = network[1].running_mean.clone()
    rule(IMAGES, Y)
    assert not torch.equal(network[1].running_mean, before)
    h = IMAGES
    for part, head in zip([network[:4], network[4:9], network[9:]], [*rule.heads, None],
                          strict=True):
        h = part(h.detach())
        parameters = [*part.parameters(), *(head.parameters() if head else [])]
        loss = cross_entropy(head(h) if head else h, Y)
        for p, expected in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            torch.testing.assert_close(p.grad, expected)


def test_one_block_is_backpropagation():
    network = mlp(5, 8, 7, 3)
    rule = LocalLosses(network, blocks=1)
    assert not rule.heads
    loss, mine = rule(X, Y), gradients(rule)
    rule.zero_grad()
    assert torch.equal(Backprop(network)(X, Y), loss)
    assert all(torch.equal(p.grad, mine[f"network.{name}"])
               for name, p in network.named_parameters())


def test_loss_is_the_mean_over_blocks():
    network = mlp(5, 8, 7, 3)
    rule = LocalLosses(network, blocks=["0", "4"])
    expected = (cross_entropy(rule.heads[0](network[:4](X)), Y)
                + cross_entropy(network(X), Y)) / 2
    torch.testing.assert_close(rule(X, Y), expected.detach())


def test_no_gradient_crosses_a_boundary_and_some_crosses_inside():
    network = mlp(5, 8, 8, 8, 8, 3)
    rule = LocalLosses(network, blocks=["0", "4"])
    rule(X, Y)
    before = gradients(rule)
    rule.zero_grad()
    with torch.no_grad():
        network[6].weight.mul_(3)
    rule(X, Y)
    after = gradients(rule)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith(("network.0", "network.2", "heads"))} == same


def test_without_an_example_where_the_next_layer_tells_the_width():
    network = cnn(1, (12, 12), 3, widths=(4, 5))
    rule = LocalLosses(network, width=7)
    assert [head.axes for head in rule.heads] == [2, 0]
    assert rule(IMAGES, Y).isfinite()
    shapes = [p.shape for p in LocalLosses(network, IMAGES, width=7).parameters()]
    assert [p.shape for p in rule.parameters()] == shapes


def test_state_goes_into_a_fresh_rule():
    torch.manual_seed(0)
    rule, other = (LocalLosses(cnn(1, (12, 12), 3, widths=(4, 5))) for _ in range(2))
    other.load_state_dict(rule.state_dict())
    assert torch.equal(rule(IMAGES, Y), other(IMAGES, Y))


def test_the_generator_draws_the_heads():
    def drawn(seed):
        rule = LocalLosses(mlp(5, 8, 3), generator=torch.Generator().manual_seed(seed))
        return rule.heads[0].hidden.weight
    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_transformers_leave_padding_out():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=4,
                                     num_attention_heads=2, intermediate_size=16, num_labels=3)
    ids, mask = torch.randint(1, 20, (6, 5)), torch.ones(6, 5, dtype=torch.long)
    model = transformers.BertForSequenceClassification(config).eval()
    rule = LocalLosses(model, {"input_ids": ids, "attention_mask": mask}, blocks=2).eval()
    padded = {"input_ids": torch.cat([ids, torch.randint(20, (6, 2))], 1),
              "attention_mask": torch.cat([mask, torch.zeros(6, 2, dtype=torch.long)], 1)}
    plain = rule({"input_ids": ids, "attention_mask": mask}, Y)
    torch.testing.assert_close(rule(padded, Y), plain)
    assert model.bert.embeddings.word_embeddings.weight.grad is not None


def test_every_token_may_have_a_label():
    y = torch.randint(3, (6, 4))
    y[0] = -100
    assert LocalLosses(mlp(5, 8, 3), torch.randn(6, 4, 5))(torch.randn(6, 4, 5), y).isfinite()


def test_graphs_with_labels_on_some_nodes():
    pyg = pytest.importorskip("torch_geometric.nn")
    edges = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])
    labels = torch.tensor([0, 1, 2, -100, -100, -100])
    model = pyg.GCN(5, 8, 3, out_channels=3)
    rule = LocalLosses(model, (X, edges), blocks=2)
    loss = rule((X, edges), labels)
    labels[3:] = torch.tensor([0, 1, 2])
    assert loss.isfinite()
    assert not torch.equal(rule((X, edges), labels), loss)
    joined = pyg.GCN(5, 8, 3, out_channels=3, jk="cat")
    whole = LocalLosses(joined, (X, edges), blocks=1)
    whole((X, edges), labels)
    mine = gradients(whole)
    whole.zero_grad()
    Backprop(joined, (X, edges))((X, edges), labels)
    assert all(torch.equal(p.grad, mine[name]) for name, p in whole.named_parameters())


def test_frozen_stages_stay_and_the_others_learn():
    network = mlp(5, 8, 7, 3)
    network[2].requires_grad_(False)
    network[4].requires_grad_(False)
    rule = LocalLosses(network, blocks=["0", "4"])
    rule(X, Y)
    assert network[0].weight.grad is not None
    assert network[2].weight.grad is None
    assert network[4].weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_convolutions_in_other_precisions(dtype):
    network = cnn(1, (12, 12), 3, widths=(4, 5), norm=True).to(dtype)
    rule = LocalLosses(network)
    assert rule(IMAGES.to(dtype), Y).isfinite()
    assert all(p.dtype == p.grad.dtype == dtype for p in rule.parameters())


def test_autocast_and_any_loss():
    rule = LocalLosses(cnn(1, (12, 12), 3, widths=(4, 5)),
                       loss=lambda scores, y: (scores - y).square().mean())
    with torch.autocast("cpu", torch.bfloat16):
        assert rule(IMAGES, torch.randn(6, 3)).isfinite()
    assert all(p.grad.dtype == torch.float32 for p in rule.parameters())


def test_memory_is_that_of_the_largest_block():
    def working_bytes(depth, blocks):
        rule = LocalLosses(mlp(64, *[64] * (depth - 1), 10), blocks=blocks)
        return cost(rule, (torch.randn(512, 64), torch.randint(10, (512,))), repeats=1,
                    warmup=0).working_bytes
    assert working_bytes(32, 16) < 1.15 * working_bytes(8, 4)
    assert working_bytes(32, 2) > 2 * working_bytes(32, 16)


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
        learned = train(LocalLosses(cnn(1, (8, 8), 10, widths=(12, 12)), width=32), split)
        frozen = cnn(1, (8, 8), 10, widths=(12, 12))
        frozen[:-1].requires_grad_(False)
        control = train(LocalLosses(frozen, width=32), split)
        assert learned > 0.85
        assert learned > control + 0.1
    network = cnn(1, (8, 8), 10, widths=(12, 12))
    assert train(LocalLosses(network, width=32), split, shuffled=True, epochs=2) < 0.3


class Residual(nn.Module):
    """A linear layer beside its input."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, h):
        return h + self.linear(h)


def test_errors():
    with pytest.raises(ValueError, match="num_classes=4 must be the number of outputs"):
        LocalLosses(mlp(5, 8, 3), num_classes=4)
    with pytest.raises(ValueError, match="example is needed, since what stage 0 of Sequential"):
        LocalLosses(nn.Sequential(nn.Linear(5, 5), Residual(5), nn.Linear(5, 3)))
    with pytest.raises(ValueError, match=r"blocks must be between 1 and 2, .* 2 stages"):
        LocalLosses(mlp(5, 8, 3), blocks=3)
    with pytest.raises(UnknownName, match="stage to begin a block at"):
        LocalLosses(mlp(5, 8, 3), blocks=["0", "1"])
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        LocalLosses(mlp(5, 8, 3), width=0)
    rule = LocalLosses(mlp(5, 8, 3))
    with pytest.raises(ValueError, match="between 0 and 2"):
        rule(X, Y + 1)
    assert all(p.grad is None for p in rule.parameters())
