from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, normalize, one_hot

from netwright.data import digits
from netwright.errors import UnknownName
from netwright.measure import cost
from netwright.rules import LLS
from netwright.rules.local.lls import waves

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def mlp(*sizes, activation=nn.ReLU):
    layers = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize(("count", "features"), [(2, 3), (3, 8), (10, 11), (10, 64), (64, 65),
                                                 (100, 512), (10, 257)])
def test_cosines_are_orthogonal_and_of_one_length(count, features):
    C = waves(count, features)
    assert C.shape == (count, features)
    torch.testing.assert_close(C @ C.T, features / 2 * torch.eye(count, dtype=C.dtype))
    torch.testing.assert_close(C.sum(1), torch.zeros(count, dtype=C.dtype))  # no class is a level


def test_cosines_are_those_of_whole_frequencies_evenly_spread():
    t = torch.arange(16, dtype=torch.float64) + 0.5
    expected = torch.stack([torch.cos(torch.pi * f * t / 16) for f in (3, 9, 15)])
    torch.testing.assert_close(waves(3, 16), expected)


def test_square_waves_are_the_signs_and_nearly_orthogonal():
    C, S = waves(10, 512), waves(10, 512, square=True)
    assert torch.equal(S.abs(), torch.ones_like(S))
    assert torch.equal(S[C.abs() > 1e-6], C[C.abs() > 1e-6].sign())
    cosines = S @ S.T / 512 - torch.eye(10, dtype=S.dtype)
    assert cosines.abs().max() < 0.35  # a wave and its third harmonic overlap by a third
    assert cosines.abs().mean() < 0.02


def test_more_classes_than_waves_still_differ():
    C = waves(30, 12)
    overlap = C @ C.T / (C.norm(dim=1)[:, None] * C.norm(dim=1))
    assert (overlap - torch.eye(30, dtype=C.dtype)).abs().max() < 0.999


def scores_by_hand(a, variant="base", modulation=None, temperature=0.5):
    p = normalize(a, dim=1) @ waves(3, a.shape[1]).to(a.dtype).T
    p = {"base": lambda: p, "M": lambda: p * modulation, "MxM": lambda: p @ modulation}[variant]()
    return p / temperature


@pytest.mark.parametrize("variant", ["base", "M", "MxM"])
def test_gradients_are_those_of_each_layer_alone(variant):
    rule = LLS(mlp(5, 8, 7, 3, activation=nn.Tanh).double(), variant=variant)
    x, network, h = X.double(), rule.network, X.double()
    rule(x, Y)
    modulations = list(rule.modulations) or [None, None]
    assert len(rule.modulations) == (0 if variant == "base" else 2)
    for layer, modulation in zip([network[:2], network[2:4], network[4:]], [*modulations, "last"],
                                 strict=True):
        a = layer(h.detach())
        learned = [*layer.parameters(), *([modulation] if torch.is_tensor(modulation) else [])]
        scores = a if modulation == "last" else scores_by_hand(a, variant, modulation)
        expected = torch.autograd.grad(cross_entropy(scores, Y), learned)
        for parameter, gradient in zip(learned, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        h = a


def test_one_linear_stage_in_closed_form():
    rule = LLS(nn.Sequential(nn.Linear(5, 8, bias=False), nn.Linear(8, 3)).double())
    x, W, C = X.double(), rule.network[0].weight.detach(), waves(3, 8)
    h = x @ W.T
    length = h.norm(dim=1, keepdim=True)
    a = h / length
    error = (torch.softmax(2 * a @ C.T, 1) - one_hot(Y, 3)) / len(X)
    signal = 2 * error @ C
    across = (signal - a * (a * signal).sum(1, keepdim=True)) / length  # along a nothing changes
    rule(x, Y)
    torch.testing.assert_close(rule.network[0].weight.grad, across.T @ x)


def test_loss_is_the_mean_over_stages():
    network = mlp(5, 8, 3)
    a = network[:2](X)
    expected = (cross_entropy(scores_by_hand(a), Y) + cross_entropy(network(X), Y)) / 2
    torch.testing.assert_close(LLS(network)(X, Y), expected.detach())


def test_no_gradient_crosses_a_boundary():
    network = mlp(5, 8, 8, 3)
    rule = LLS(network)
    rule(X, Y)
    before = network[0].weight.grad.clone()
    rule.zero_grad()
    with torch.no_grad():
        network[2].weight.mul_(3)
        network[4].weight.mul_(3)
    rule(X, Y)
    assert torch.equal(network[0].weight.grad, before)


def test_waves_are_kept_once_for_each_width_and_outside_the_state():
    network = mlp(5, 8, 8, 7, 3)
    rule = LLS(network)
    rule(X, Y)
    assert {name: tuple(b.shape) for name, b in rule.named_buffers()} == {
        "waves_8": (3, 8), "waves_7": (3, 7)}
    assert all(name.startswith("network.") for name in rule.state_dict())
    assert list(rule.parameters()) == list(network.parameters())
    kept = rule.waves_8.clone()
    torch.optim.SGD(rule.parameters(), lr=1.0).step()
    rule(X, Y)
    assert torch.equal(rule.waves_8, kept)


@pytest.mark.parametrize("pool", [1, 2, 4])
def test_channels_are_averaged_to_a_few_positions(pool):
    cnn = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3),
                        nn.Flatten(), nn.Linear(96, 3))
    x = torch.randn(6, 1, 10, 8)
    rule = LLS(cnn, x, pool=pool)
    first = adaptive_avg_pool2d(cnn[:3](x), pool).flatten(1)
    expected = sum([cross_entropy(scores_by_hand(first), Y),
                    cross_entropy(scores_by_hand(cnn[:5](x)), Y),  # a stage's own flatten stays
                    cross_entropy(cnn(x), Y)]) / 3
    torch.testing.assert_close(rule(x, Y), expected.detach())
    assert sorted(dict(rule.named_buffers(recurse=False))) == sorted(
        ["waves_96", f"waves_{3 * pool * pool}"])


def test_axes_shorter_than_the_pool_stay_and_signals_of_one_axis_do():
    small = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 1), nn.Flatten(),
                          nn.Linear(6, 3))
    rule = LLS(small, num_classes=3)
    rule(torch.randn(6, 1, 3, 5), Y)  # 3 channels of 1 by 3 positions: 1 by 2 of them
    assert rule.waves_6.shape == (3, 6)
    signal = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 3), nn.Flatten(),
                           nn.Linear(8, 3))
    rule = LLS(signal, torch.randn(2, 1, 8), pool=4)
    rule(torch.randn(6, 1, 8), Y)
    assert rule.waves_16.shape == (3, 16)


class Pooled(nn.Module):
    """Mean of tokens, padding included, then a linear layer."""

    def __init__(self, width, classes):
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, h):
        return self.linear(h.mean(1))


def test_tokens_are_read_by_their_mean_or_one_by_one():
    x = torch.randn(6, 4, 5)
    rule = LLS(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), Pooled(8, 3)), x)
    a = rule.network[:2](x)
    expected = (cross_entropy(scores_by_hand(a.mean(1)), Y)
                + cross_entropy(rule.network(x), Y)) / 2
    torch.testing.assert_close(rule(x, Y), expected.detach())

    each = LLS(mlp(5, 8, 3), x)
    y = torch.randint(3, (6, 4))
    y[0] = -100
    a, labelled = each.network[:2](x).flatten(0, 1), y.flatten()
    expected = (cross_entropy(scores_by_hand(a), labelled)
                + cross_entropy(each.network(x).flatten(0, 1), labelled)) / 2
    torch.testing.assert_close(each(x, y), expected.detach())


def test_padding_is_left_out_of_the_mean():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=3,
                                     num_attention_heads=2, intermediate_size=16, num_labels=3)
    ids, mask = torch.randint(1, 20, (6, 5)), torch.ones(6, 5, dtype=torch.long)
    model = transformers.BertForSequenceClassification(config).eval()
    rule = LLS(model, {"input_ids": ids, "attention_mask": mask}, variant="MxM").eval()
    padded = {"input_ids": torch.cat([ids, torch.randint(20, (6, 2))], 1),
              "attention_mask": torch.cat([mask, torch.zeros(6, 2, dtype=torch.long)], 1)}
    plain = rule({"input_ids": ids, "attention_mask": mask}, Y)
    torch.testing.assert_close(rule(padded, Y), plain)


def test_nodes_without_a_label_do_not_count():
    models = pytest.importorskip("torch_geometric.nn.models")
    x, edges = torch.randn(6, 5), torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])
    rule = LLS(models.GCN(5, 8, 2, 3), (x, edges))
    y = torch.tensor([0, 1, -100, -100, -100, -100])
    loss = rule((x, edges), y)
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in rule.parameters())


def test_a_sample_without_activity_teaches_nothing():
    network = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    nn.init.zeros_(network[0].bias)
    rule = LLS(network)
    rule(torch.zeros(6, 5), Y)
    assert not network[0].bias.grad.any()
    rule.zero_grad()
    rule(torch.cat([X, torch.zeros(1, 5)]), torch.cat([Y, Y[:1]]))
    alone = network[0].weight.grad * 7 / 6  # the mean is over one sample more
    rule.zero_grad()
    rule(X, Y)
    torch.testing.assert_close(alone, network[0].weight.grad)


def test_frozen_stages_stay_and_the_others_learn():
    network = mlp(5, 8, 7, 3)
    network[2].requires_grad_(False)
    network[4].requires_grad_(False)
    LLS(network)(X, Y)
    assert network[0].weight.grad is not None
    assert network[2].weight.grad is None
    assert network[4].weight.grad is None


def test_the_generator_draws_the_modulations():
    def drawn(seed):
        rule = LLS(mlp(5, 8, 3), variant="MxM", generator=torch.Generator().manual_seed(seed))
        return rule.modulations[0]
    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert drawn(1).abs().max() < 0.05


def test_autocast_and_any_loss():
    rule = LLS(mlp(5, 8, 3), loss=lambda scores, y: (scores - y).square().mean())
    with torch.autocast("cpu", torch.bfloat16):
        assert rule(X, torch.randn(6, 3)).isfinite()
    assert rule.network[0].weight.grad.dtype == torch.float32
    assert rule.waves_8.dtype == torch.float32


def test_memory_does_not_grow_with_depth():
    def working_bytes(depth):
        rule = LLS(mlp(64, *[64] * depth, 10))
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


@pytest.mark.parametrize("options", [{}, {"basis": "square"}, {"variant": "M"},
                                     {"variant": "MxM"}], ids=str)
def test_learns_what_a_last_layer_on_random_features_does_not(options):
    split = digits()
    for seed in range(2):
        torch.manual_seed(seed)
        learned = train(LLS(mlp(64, 128, 32, 10), **options), split)
        frozen = mlp(64, 128, 32, 10)
        frozen[:4].requires_grad_(False)
        control = train(LLS(frozen), split)
        assert learned > 0.9
        assert learned > control + 0.1
    assert train(LLS(mlp(64, 128, 32, 10), **options), split, shuffled=True) < 0.3


def test_errors():
    with pytest.raises(ValueError, match="num_classes=4 must be the number of outputs"):
        LLS(mlp(5, 8, 3), num_classes=4)
    with pytest.raises(ValueError, match="num_classes is needed"):
        LLS(nn.Sequential(nn.Linear(5, 8), Pooled(8, 3)))
    with pytest.raises(UnknownName, match="did you mean MxM"):
        LLS(mlp(5, 8, 3), variant="MxN")
    with pytest.raises(UnknownName, match="did you mean cosine"):
        LLS(mlp(5, 8, 3), basis="cosin")
    with pytest.raises(ValueError, match=r"temperature must be above 0, got 0\.0; try 0\.5"):
        LLS(mlp(5, 8, 3), temperature=0.0)
    with pytest.raises(ValueError, match=r"pool must be at least 1, got 0; .* positions an axis"):
        LLS(mlp(5, 8, 3), pool=0)
    with pytest.raises(ValueError, match="stage 0 must give at least 2 features"):
        LLS(mlp(5, 1, 3))
    cnn = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3))
    with pytest.raises(ValueError, match="got 1; widen it, raise pool="):
        LLS(cnn, num_classes=3, pool=1)(torch.randn(6, 1, 8, 8), Y)
    rule = LLS(mlp(5, 8, 3))
    with pytest.raises(ValueError, match="between 0 and 2"):
        rule(X, Y + 1)
    assert all(p.grad is None for p in rule.parameters())
