import pytest
import torch
from torch import Generator, nn
from torch.nn.functional import cross_entropy, mse_loss

import netwright as nw
from netwright.data import Batches, digits
from netwright.errors import UnknownName
from netwright.measure import cost
from netwright.models import mlp
from netwright.rules import TargetProjection

X = torch.randn(6, 5, generator=Generator().manual_seed(0)).double()
Y = torch.tensor([0, 1, 2, 0, 1, 2])
DISTANCES = {"squared": lambda a, t: (a - t).square(), "absolute": lambda a, t: (a - t).abs(),
             "direct": lambda a, t: -a * t, "of one's own": lambda a, t: (a - t) ** 4}


def small(activation=nn.ReLU):
    return nn.Sequential(nn.Linear(5, 8), activation(), nn.Linear(8, 7), activation(),
                         nn.Linear(7, 3)).double()


def gradients(rule, x, y):
    rule.zero_grad()
    rule(x, y)
    return {name: p.grad for name, p in rule.named_parameters() if p.grad is not None}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, update in theirs.items():
        torch.testing.assert_close(ours[name], update, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("distance", list(DISTANCES))
def test_gradients_are_those_of_each_layer_alone(distance, activation):
    network = small(activation)
    named = distance in ("squared", "absolute", "direct")
    rule = TargetProjection(network, X, distance=distance if named else DISTANCES[distance])
    found, expected, h = gradients(rule, X, Y), {}, X
    for i in (0, 2, 4):
        layer = network[i:i + 2]
        out = layer(h.detach())
        if i == 4:
            loss = cross_entropy(out, Y)
        else:
            t = rule.projections[str(i)][Y]
            t = t if distance == "direct" else activation()(t)
            each = DISTANCES[distance](out, t)
            loss = each.sum(-1).mean() if distance == "direct" else each.mean()
        for name, gradient in zip(("weight", "bias"), torch.autograd.grad(
                loss, list(layer.parameters())), strict=True):
            expected[f"network.{i}.{name}"] = gradient
        h = out
    assert_same(found, expected)


def test_direct_is_direct_random_target_projection():
    network = small(nn.Tanh)
    rule = TargetProjection(network, X, distance="direct")
    found = gradients(rule, X, Y)
    a = network[:2](X).detach()
    signal = -rule.projections["0"][Y] * (1 - a ** 2) / len(a)
    torch.testing.assert_close(found["network.0.weight"], signal.T @ X)


def test_a_layer_that_runs_twice_has_one_target():
    network = small(nn.Tanh)
    layer = nn.Linear(6, 6).double()
    twice = nn.Sequential(nn.Linear(len(X[0]), 6).double(), nn.Tanh(), layer, nn.Tanh(), layer,
                          nn.Tanh(), nn.Linear(6, len(network[4].weight)).double())
    rule = TargetProjection(twice, X)
    assert list(rule.projections.state_dict()) == ["/0", "/2"]
    found, h = gradients(rule, X, Y), twice[:2](X).detach()
    first = twice[2:4](h)
    second, t = twice[4:6](first.detach()), torch.tanh(rule.projections["2"][Y])
    loss = ((first - t) ** 2).mean() + ((second - t) ** 2).mean()
    torch.testing.assert_close(found["network.2.weight"],
                               torch.autograd.grad(loss, layer.weight)[0])


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_no_gradient_crosses_a_layer(layer):
    network = small()
    rule = TargetProjection(network, X)
    before = gradients(rule, X, Y)
    for i in {0, 2, 4} - {layer}:
        network[i].requires_grad_(False)
    rule.zero_grad(set_to_none=True)
    rule(X, Y)
    alone = {name: p.grad for name, p in rule.named_parameters() if p.grad is not None}
    assert_same(alone, {name: g for name, g in before.items() if name.startswith(
        f"network.{layer}.")})


def test_one_layers_activations_live_at_a_time():
    def measured(depth):
        x = torch.randn(512, 64)
        rule = TargetProjection(mlp(64, 10, hidden=(64,) * depth), x)
        return cost(rule, (x, torch.randint(10, (512,))), repeats=1, warmup=0)
    shallow, deep = measured(8), measured(32)
    assert deep.working_bytes < 1.15 * shallow.working_bytes
    assert deep.saved_bytes == shallow.saved_bytes


def test_what_has_no_label_does_not_count():
    rule = TargetProjection(small(), X)
    y = torch.tensor([0, -100, 1, 2, -100, 0])
    assert_same(gradients(rule, X, y), gradients(rule, X[y >= 0], y[y >= 0]))


def test_targets_can_be_numbers_and_one_hot_labels_are_the_labels():
    rule = TargetProjection(small(), X, loss=mse_loss)
    other = TargetProjection(rule.network, X)
    other.load_state_dict(rule.state_dict())
    found = gradients(rule, X, torch.eye(3).double()[Y])
    same = gradients(other, X, Y)
    assert_same({k: found[k] for k in list(found)[:4]}, {k: same[k] for k in list(same)[:4]})


def test_maps_are_compared_by_their_mean_and_flattened_ones_whole():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3),
                            nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)).double()
    x = torch.randn(6, 1, 8, 8).double()
    rule = TargetProjection(network, x)
    assert [tuple(rule.projections[name].shape) for name in ("0", "3")] == [(3, 4), (3, 8)]
    found = gradients(rule, x, Y)
    t = rule.projections["0"][Y].relu()
    loss = (network[:3](x).mean((2, 3)) - t).square().mean()
    torch.testing.assert_close(found["network.0.weight"],
                               torch.autograd.grad(loss, network[0].weight)[0])


class Last(nn.Module):
    """A recurrent layer's last answer."""

    def __init__(self, kind, **options):
        super().__init__()
        self.layer = kind(8, 32, batch_first=True, **options)

    def forward(self, x):
        return self.layer(x)[0][:, -1]


@pytest.mark.parametrize(("kind", "options", "act"), [
    (nn.RNN, {}, torch.tanh), (nn.RNN, {"nonlinearity": "relu"}, torch.relu),
    (nn.GRU, {}, torch.tanh), (nn.LSTM, {}, torch.tanh)])
def test_a_recurrent_layer_is_differentiated_through_its_steps(kind, options, act):
    network = nn.Sequential(Last(kind, **options), nn.Linear(32, 3))
    x = torch.randn(6, 4, 8)
    rule = TargetProjection(network, x)
    found = gradients(rule, x, Y)
    loss = (network[0](x) - act(rule.projections["0"][Y])).square().mean()
    torch.testing.assert_close(found["network.0.layer.weight_hh_l0"],
                               torch.autograd.grad(loss, network[0].layer.weight_hh_l0)[0])


def test_each_token_has_its_own_target_and_a_sample_the_mean_of_its_tokens():
    network = small()
    x, y = torch.randn(2, 4, 5).double(), torch.randint(3, (2, 4))
    rule, flat = TargetProjection(network, x), TargetProjection(network, x.flatten(0, 1))
    flat.load_state_dict(rule.state_dict())
    assert_same(gradients(rule, x, y), gradients(flat, x.flatten(0, 1), y.flatten()))

    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2,
                                     num_attention_heads=2, intermediate_size=16, num_labels=3)
    model = transformers.BertForSequenceClassification(config).eval()
    ids, mask = torch.randint(1, 20, (6, 5)), torch.ones(6, 5, dtype=torch.long)
    rule = TargetProjection(model, {"input_ids": ids, "attention_mask": mask})
    plain = gradients(rule, {"input_ids": ids, "attention_mask": mask}, Y)
    padded = {"input_ids": torch.cat([ids, ids[:, :2]], 1),
              "attention_mask": torch.cat([mask, torch.zeros_like(mask[:, :2])], 1)}
    found = gradients(rule, padded, Y)
    name = "network.bert.encoder.layer.1.attention.self.value.weight"
    torch.testing.assert_close(found[name], plain[name])


def test_nodes_of_a_graph_have_their_own_targets():
    geometric = pytest.importorskip("torch_geometric.nn")
    network = geometric.GCN(5, 8, num_layers=3, out_channels=3)
    x = torch.randn(4, 5), torch.tensor([[0, 1, 2, 3, 0], [1, 0, 3, 2, 2]])
    rule = TargetProjection(network, x)
    assert rule(x, torch.tensor([0, -100, 2, -100])).isfinite()
    assert all(p.grad is not None for p in rule.parameters())


def test_projections_have_their_scale_and_repeat_with_the_generator():
    network = nn.Sequential(nn.Linear(5, 900), nn.ReLU(), nn.Linear(900, 3))
    P, Q = (TargetProjection(network, X.float(), scale=0.5, generator=Generator().manual_seed(0)
                             ).projections["0"] for _ in "PQ")
    assert torch.equal(P, Q)
    assert float(P.std()) == pytest.approx(0.5, rel=0.05)


def train(rule, split, *, shuffled=False):
    y = split.y_train[torch.randperm(len(split.y_train))] if shuffled else split.y_train
    nw.fit(rule, Batches(split.x_train.flatten(1), y, 64), epochs=4, progress=False,
           optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-2))
    hits = rule.predict(split.x_test.flatten(1)).argmax(1) == split.y_test
    return float(hits.float().mean())


def test_it_learns_what_a_last_layer_on_random_features_does_not():
    split, example = digits(), torch.zeros(2, 64)
    for seed in range(3):
        torch.manual_seed(seed)
        learned = train(TargetProjection(mlp(64, 10, hidden=(64, 16)), example), split)
        frozen = mlp(64, 10, hidden=(64, 16))
        frozen[:-1].requires_grad_(False)
        control = train(TargetProjection(frozen, example), split)
        assert learned > 0.85
        assert learned > control + 0.1
    assert train(TargetProjection(mlp(64, 10, hidden=(64, 16)), example), split,
                 shuffled=True) < 0.3


def test_what_the_rule_cannot_do_is_refused():
    with pytest.raises(UnknownName, match="did you mean squared"):
        TargetProjection(small(), X, distance="squred")
    with pytest.raises(ValueError, match="scale must be above 0, got 0"):
        TargetProjection(small(), X, scale=0)
    with pytest.raises(ValueError, match="example must be an input"):
        TargetProjection(small())
    rule = TargetProjection(small(), X)
    for made, y, match in ((rule, Y + 1, "between 0 and 2"), (rule, Y[:1], "a target for each row"),
                           (TargetProjection(small(), X, loss=mse_loss), X,
                            r"shaped as the output \(batch, 3\)")):
        with pytest.raises(ValueError, match=match):
            made(X, y)
        assert all(p.grad is None for p in made.parameters())
