from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

import netwright as nw
from netwright.data import Batches, digits
from netwright.measure import cost
from netwright.models import cnn
from netwright.rules import CascadedForward, DirectFeedbackAlignment

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def mlp(*sizes):
    layers = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_each_guess_descends_its_own_loss_in_closed_form_and_hidden_stages_none():
    network = mlp(5, 8, 7, 6, 3).double()
    rule, x = CascadedForward(network), X.double()
    loss = rule(x, Y)
    with torch.no_grad():
        a1, a2, a3 = network[:2](x), network[:4](x), network[:6](x)
        guesses = [a1 @ rule.predictors[0].weight.T, a2 @ rule.predictors[1].weight.T, network(x)]
        errors = [(guess.softmax(1) - one_hot(Y, 3)) / 6 for guess in guesses]
    for matrix, error, a in zip([*(p.weight for p in rule.predictors), network[6].weight], errors,
                                (a1, a2, a3), strict=True):
        torch.testing.assert_close(matrix.grad, error.T @ a)
    torch.testing.assert_close(network[6].bias.grad, errors[-1].sum(0))
    assert all(p.grad is None for p in network[:6].parameters())
    torch.testing.assert_close(loss, torch.stack([cross_entropy(g, Y) for g in guesses]).mean())


def test_the_least_squares_of_the_paper_is_where_a_squared_loss_stands_still():
    network, x, y = mlp(5, 4, 4, 3).double(), torch.randn(40, 5).double(), torch.arange(40) % 3
    rule = CascadedForward(network, loss=lambda scores, y: (scores - one_hot(y, 3)).square().mean())
    a = network[:2](x).detach()
    rule(x, y)
    assert rule.predictors[0].weight.grad.abs().max() > 1e-3
    rule.zero_grad()
    with torch.no_grad():
        rule.predictors[0].weight.copy_(torch.linalg.lstsq(a, one_hot(y, 3).double()).solution.T)
    rule(x, y)
    assert rule.predictors[0].weight.grad.abs().max() < 1e-12


def test_predictions_are_the_mean_of_all_guesses():
    network = mlp(5, 8, 7, 3)
    rule = CascadedForward(network)
    guesses = [network[:2](X) @ rule.predictors[0].weight.T, network(X)]
    expected = torch.stack([guess.softmax(1) for guess in guesses]).mean(0)
    torch.testing.assert_close(rule.predict(X), expected.log().detach())
    torch.testing.assert_close(rule.predict(X).exp().sum(1), torch.ones(6))


def test_blocks_with_batch_norm_keep_their_weights_and_learn_their_statistics():
    network = cnn(1, (12, 12), 3, widths=(4, 5, 6), norm=True)
    rule = CascadedForward(network, torch.randn(2, 1, 12, 12))
    assert rule.stages.names == ["0", "4", "8", "13"]
    assert [p.stage for p in rule.predictors] == ["0", "4"]
    before, statistics = network[0].weight.clone(), network[1].running_mean.clone()
    optimizer = torch.optim.Adam(rule.parameters(), weight_decay=0.1)
    rule(torch.randn(6, 1, 12, 12), Y)
    optimizer.step()
    assert torch.equal(network[0].weight, before)
    assert not torch.equal(network[1].running_mean, statistics)
    assert network[13].weight.grad.any()


def test_tokens_give_the_mean_of_their_scores_or_one_each_without_padding():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=4,
                                     num_attention_heads=2, intermediate_size=16, num_labels=3)
    ids, mask = torch.randint(1, 20, (6, 5)), torch.ones(6, 5, dtype=torch.long)
    x = {"input_ids": ids, "attention_mask": mask}
    padded = {"input_ids": torch.cat([ids, torch.randint(20, (6, 2))], 1),
              "attention_mask": torch.cat([mask, torch.zeros(6, 2, dtype=torch.long)], 1)}
    rule = CascadedForward(transformers.BertForSequenceClassification(config), x).eval()
    torch.testing.assert_close(rule(padded, Y), rule(x, Y))
    torch.testing.assert_close(rule.predict(padded), rule.predict(x))
    each = CascadedForward(transformers.BertForTokenClassification(config), x).eval()
    y = torch.randint(3, (6, 7))
    y[:, 5:] = -100
    torch.testing.assert_close(each(padded, y), each(x, y[:, :5]))
    assert each.predict(padded).shape == (6, 7, 3)


def test_nodes_of_a_graph_give_one_guess_each():
    pytest.importorskip("torch_geometric")
    from torch_geometric.nn import GCN
    x = torch.randn(4, 5), torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])
    network = GCN(5, 8, num_layers=4, out_channels=3)
    rule = CascadedForward(network, x)
    rule(x, torch.tensor([0, -100, 1, -100]))
    assert all(p.weight.grad.any() for p in rule.predictors)
    assert all(p.grad is None for p in network.convs[:3].parameters())
    assert rule.predict(x).shape == (4, 3)


def test_frozen_last_stages_autocast_and_generators():
    network = mlp(5, 8, 7, 3)
    network[4].requires_grad_(False)
    rule = CascadedForward(network, generator=torch.Generator().manual_seed(1))
    again = CascadedForward(network, generator=torch.Generator().manual_seed(1))
    assert torch.equal(rule.predictors[0].weight, again.predictors[0].weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert rule(X, Y).isfinite()
        assert rule.predict(X).isfinite().all()
    assert rule.predictors[0].weight.grad.dtype == torch.float32
    assert network[4].weight.grad is None


def test_nothing_is_kept_for_a_backward_pass_but_what_one_matrix_reads():
    def saved(depth):
        rule = CascadedForward(mlp(64, *[64] * depth, 10))
        return cost(rule, (torch.randn(512, 64), torch.randint(10, (512,))), repeats=1,
                    warmup=0).saved_bytes
    assert saved(32) == saved(4)


def accuracy(rule, split, *, shuffled=False, epochs=8):
    x, y = split.x_train.flatten(1), split.y_train
    y = y[torch.randperm(len(y))] if shuffled else y
    nw.fit(rule, Batches(x, y, 64), epochs=epochs, progress=False,
           optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-2))
    return (rule.predict(split.x_test.flatten(1)).argmax(1) == split.y_test).float().mean().item()


def test_guesses_on_random_stages_learn_and_on_trained_ones_learn_more():
    split, gains = digits(), []
    for seed in range(2):
        torch.manual_seed(seed)
        network = mlp(64, 32, 32, 32, 32, 10)
        random = accuracy(CascadedForward(network), split)
        last = (network(split.x_test.flatten(1)).argmax(1) == split.y_test).float().mean().item()
        accuracy(DirectFeedbackAlignment(network, split.x_train[:1].flatten(1)), split, epochs=4)
        hidden = [p.clone() for p in network[:8].parameters()]
        gains.append(accuracy(CascadedForward(network), split) - random)
        for p, before in zip(network[:8].parameters(), hidden, strict=True):
            assert torch.equal(p, before)
        assert random > 0.6  # 0.67 to 0.83 over six seeds
        assert random > last + 0.2  # the deepest guess alone: 0.21 to 0.37
    assert sum(gains) / 2 > 0.02  # 0.02 to 0.20, and 0.08 on average
    assert accuracy(CascadedForward(mlp(64, 32, 32, 32, 32, 10)), split, shuffled=True) < 0.3


def test_errors():
    with pytest.raises(ValueError, match="network must have a hidden stage to read a guess off"):
        CascadedForward(nn.Sequential(nn.Linear(5, 3)))
    with pytest.raises(ValueError, match="num_classes=4 must be the number of outputs"):
        CascadedForward(mlp(5, 8, 8, 3), num_classes=4)
    rule = CascadedForward(mlp(5, 8, 8, 3))
    with pytest.raises(ValueError, match="between 0 and 2"):
        rule(X, Y + 1)
    assert all(p.grad is None for p in rule.parameters())
