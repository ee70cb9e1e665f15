from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot, softplus
from torch.overrides import TorchFunctionMode

from netwright.data import digits
from netwright.errors import UnknownName
from netwright.measure import cost
from netwright.rules import ForwardForward

X = torch.rand(6, 12, generator=torch.Generator().manual_seed(0)) + 0.1
Y = torch.tensor([0, 1, 2, 0, 1, 2])
TRUE_AND_FALSE = torch.tensor([1.0] * 6 + [-1.0] * 6)


def mlp(*sizes):
    layers = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def unit(h):
    rms = h.flatten(1).square().mean(1).sqrt().clamp_min(1e-6)
    return h / rms.view(-1, *[1] * (h.ndim - 1))


def labelled(x, labels, classes=3, amplitude=1.0):
    x = x.clone()
    x.flatten(1)[:, :classes] = amplitude * (
        one_hot(labels, classes) if labels.dtype == torch.int64 else labels)
    return unit(x)


def next_label(seed, y=Y, classes=3):
    """Draw the negative labels as a rule without hard negatives and with this seed does."""
    generator = torch.Generator().manual_seed(seed)
    return (y + torch.randint(1, classes, y.shape, generator=generator)) % classes


def plain(network, seed=0, **options):
    return ForwardForward(network, hard_negatives=False, predict_by="goodness",
                          generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize(("options", "loss_of"), [
    ({}, lambda h: (h.square().sum(1) - h.shape[1]) / (h.shape[1] / 10)),
    ({"threshold": 2.0, "temperature": 3.0}, lambda h: (h.square().sum(1) - 2) / 3),
    ({"goodness": "mean", "threshold": 2.0}, lambda h: (h.square().mean(1) - 2) / 0.1),
])
def test_gradients_and_loss_are_those_of_each_layer_by_autograd(options, loss_of):
    network = mlp(12, 8, 7, 3).double()
    x, h, losses = X.double(), None, []
    h = torch.cat([labelled(x, Y), labelled(x, next_label(0))])
    expected = []
    for layer in (network[:2], network[2:4]):
        h = layer(h.detach())
        losses.append(softplus(-TRUE_AND_FALSE * loss_of(h)).mean())
        expected += torch.autograd.grad(losses[-1], list(layer.parameters()))
        h = unit(h)
    loss = plain(network, **options)(x, Y)
    torch.testing.assert_close(loss, torch.stack(losses).mean().detach())
    for parameter, gradient in zip(network[:4].parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert network[4].weight.grad is None


def test_one_linear_layer_in_closed_form():
    network = nn.Sequential(nn.Linear(12, 4, bias=False), nn.ReLU(), nn.Linear(4, 3))
    W = network[0].weight
    x = torch.cat([labelled(X, Y), labelled(X, next_label(0))])
    h = (x @ W.T).clamp_min(0)
    p = torch.sigmoid(((h ** 2).sum(1) - 4) / 0.4)  # that a sample is real
    slope = torch.where(TRUE_AND_FALSE > 0, p - 1, p) / 0.4 / 12
    expected = (2 * slope[:, None] * h).T @ x
    plain(network)(X, Y)
    torch.testing.assert_close(W.grad, expected.detach())


@pytest.mark.parametrize("collaborate", [True, "earlier"])
@pytest.mark.parametrize(("options", "unit_of"), [
    ({}, lambda h: h.shape[1]), ({"goodness": "mean"}, lambda h: 1),
    ({"threshold": 2.0, "temperature": 3.0}, None)])
def test_layers_that_collaborate_count_the_frozen_goodness_of_the_others(collaborate, options,
                                                                         unit_of):
    network = mlp(12, 8, 7, 6, 3).double()
    hs, goodness, units = [torch.cat([labelled(X.double(), Y),
                                      labelled(X.double(), next_label(0))])], [], []
    for layer in (network[:2], network[2:4], network[4:6]):
        h = layer(hs[-1])
        goodness.append(h.square().mean(1) if "goodness" in options else h.square().sum(1))
        units.append(unit_of(h) if unit_of else 0)
        hs.append(unit(h).detach())
    losses, expected = [], []
    for i, own in enumerate(goodness):
        counted = [j for j in range(3) if j < i or (collaborate is True and j > i)]
        gamma = sum(goodness[j].detach() for j in counted)
        u = sum(units[j] for j in [i, *counted])
        z = (own + gamma - (u or 2)) / (units[i] / 10 or 3)
        losses.append(softplus(-TRUE_AND_FALSE * z).mean())
        expected += torch.autograd.grad(losses[-1], list(network[2 * i].parameters()))
    rule = plain(network, collaborate=collaborate, **options)
    torch.testing.assert_close(rule(X.double(), Y), torch.stack(losses).mean().detach())
    for parameter, gradient in zip(network[:6].parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert network[6].weight.grad is None


def test_the_first_of_two_passes_leaves_no_trace_and_draws_what_the_second_does():
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in
              (nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5))]
    rule = plain(nn.Sequential(*layers, nn.Linear(12, 3)), collaborate=True)
    own, foretold = [], []
    learn = rule._learn

    def watch(h, x, sign, weight, shared):
        own.append(h.detach().square().sum(1))
        foretold.append(shared[0])
        return learn(h, x, sign, weight, shared)

    rule._learn = watch
    rule(X, Y)
    for total in foretold:
        torch.testing.assert_close(total, sum(own))
    assert [m.num_batches_tracked.item() for m in rule.modules()
            if isinstance(m, nn.BatchNorm1d)] == [1, 1, 1]


def test_layers_that_collaborate_take_positives_and_negatives_one_by_one_too():
    for collaborate in (True, "earlier"):
        network = mlp(12, 8, 7, 3)
        false = torch.rand(6, 12)
        rule = ForwardForward(network, negatives=lambda x, y: false, collaborate=collaborate)  # noqa: B023
        rule(X)
        together = network[2].weight.grad.clone()
        rule.zero_grad()
        rule._contrast([unit(X), unit(false)], None)
        torch.testing.assert_close(network[2].weight.grad, together)


def test_no_gradient_crosses_a_boundary():
    network = mlp(12, 8, 8, 3)
    rule = ForwardForward(network, generator=torch.Generator().manual_seed(0))
    rule(X, Y)
    first, last = network[0].weight.grad.clone(), network[4].weight.grad.clone()
    rule.zero_grad()
    rule.generator.manual_seed(0)
    rule.hard_negatives = False  # the negatives are all that the later stages decide
    rule(X, Y)
    plainly = network[0].weight.grad.clone()
    with torch.no_grad():
        network[2].weight.mul_(3)
    rule.zero_grad()
    rule.generator.manual_seed(0)
    rule(X, Y)
    assert torch.equal(network[0].weight.grad, plainly)
    assert not torch.equal(network[4].weight.grad, last)
    assert first.abs().sum() > 0


@pytest.mark.parametrize("options", [
    {}, {"goodness": "mean"}, {"goodness": "by_class"}, {"collaborate": True}])
def test_blocks_are_exact_inside_and_no_gradient_crosses_them(options):
    options = {"hard_negatives": False, "predict_by": "goodness", **options}
    network = mlp(12, 8, 7, 6, 5, 3).double()
    rule = ForwardForward(network, X.double(), blocks=2,
                          generator=torch.Generator().manual_seed(0), **options)
    assert rule.stages.names == ["0", "4", "8"]
    rule.generator.manual_seed(0)
    by_class = rule.by_class
    h = unit(X.double()) if by_class else torch.cat([labelled(X.double(), Y),
                                                     labelled(X.double(), next_label(0))])
    hs = []
    for block in (network[:4], network[4:8]):
        hs.append(block(h))
        h = unit(hs[-1]).detach()
    expected = []
    for i, h in enumerate(hs):
        if by_class:
            loss = cross_entropy((h @ rule.kernels[i].weight.T).square(), Y)
        else:
            mean = "goodness" in options and not by_class
            sizes = [a.square().mean(1) if mean else a.square().sum(1) for a in hs]
            units = [1.0 if mean else a.shape[1] for a in hs]
            collaborate = "collaborate" in options
            others = sizes[1 - i].detach() if collaborate else 0
            threshold = sum(units) if collaborate else units[i]
            z = (sizes[i] + others - threshold) / (units[i] / 10)
            loss = softplus(-TRUE_AND_FALSE * z).mean()
        expected += torch.autograd.grad(loss, list(network[4 * i:4 * i + 4].parameters()),
                                        retain_graph=True)
    rule(X.double(), Y)
    for parameter, gradient in zip(network[:8].parameters(), expected, strict=True):
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(parameter.grad, gradient)
    assert network[8].weight.grad is None


def test_blocks_by_name_and_one_block_a_stage():
    network = mlp(12, 8, 7, 6, 3)
    assert ForwardForward(network, blocks=["2"]).stages.names == ["0", "2", "6"]
    assert ForwardForward(network, blocks=["0", "4"]).stages.names == ["0", "4", "6"]
    single, plainly = plain(network, blocks=3), plain(network)
    single(X, Y)
    together = [network[i].weight.grad.clone() for i in (0, 2, 4)]
    single.zero_grad()
    plainly(X, Y)
    for gradient, i in zip(together, (0, 2, 4), strict=True):
        assert torch.equal(network[i].weight.grad, gradient)
    torch.testing.assert_close(single.predict(X), plainly.predict(X))


def test_goodness_by_class_is_the_mean_of_squared_class_channels():
    cnn = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(),
                        nn.Flatten(), nn.Linear(80, 3))
    x = torch.rand(6, 1, 8, 8)
    rule = ForwardForward(cnn, x, goodness="by_class")
    assert [kernel.weight.shape for kernel in rule.kernels] == [(3, 4), (3, 80)]
    M, N = (kernel.weight for kernel in rule.kernels)
    a = cnn[:2](unit(x))
    first = nn.functional.conv2d(a, M.view(3, 4, 1, 1)).square().mean((2, 3))
    b = cnn[2:5](unit(a).detach())
    second = (b @ N.T).square()
    torch.testing.assert_close(rule.predict(x), ((first + second) / 2).detach())
    losses = [cross_entropy(first, Y), cross_entropy(second, Y)]
    expected = [*torch.autograd.grad(losses[0], [cnn[0].weight, M]),
                *torch.autograd.grad(losses[1], [cnn[2].weight, N])]
    torch.testing.assert_close(rule(x, Y), sum(losses).detach() / 2)
    for parameter, gradient in zip([cnn[0].weight, M, cnn[2].weight, N], expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert cnn[5].weight.grad is None
    last = ForwardForward(cnn, x, goodness="by_class", skip=1)
    last.load_state_dict(rule.state_dict())
    torch.testing.assert_close(last.predict(x), second.detach())
    softmax = ForwardForward(cnn, x, goodness="by_class", predict_by="softmax")
    assert softmax(x, Y).isfinite()
    assert cnn[5].weight.grad is not None
    assert softmax.predict(x).shape == (6, 3)


def test_goodness_by_class_of_tokens_leaves_padding_out():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2,
                                     num_attention_heads=2, intermediate_size=16, num_labels=3,
                                     max_position_embeddings=8)
    torch.manual_seed(0)
    bert = transformers.BertForSequenceClassification(config)
    ids, mask = torch.randint(20, (6, 5)), torch.ones(6, 5, dtype=torch.int64)
    mask[:, 3:] = 0
    x = {"input_ids": ids, "attention_mask": mask}
    rule = ForwardForward(bert, x, goodness="by_class", blocks=1)
    other = {"input_ids": ids * mask, "attention_mask": mask}
    torch.testing.assert_close(rule.predict(x), rule.predict(other))
    assert rule(x, Y).isfinite()
    assert all(p.grad is not None for p in rule.stages[0].parameters())


def test_goodness_by_class_of_nodes():
    torch_geometric = pytest.importorskip("torch_geometric.nn")
    network = torch_geometric.GCN(12, 8, 3, 3)
    edges = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]])
    y = Y.clone()
    y[3:] = -100
    rule = ForwardForward(network, (X, edges), goodness="by_class")
    h = network.convs[0](unit(X), edges).relu()
    loss = cross_entropy((h @ rule.kernels[0].weight.T).square()[:3], Y[:3])
    (expected,) = torch.autograd.grad(loss, [network.convs[0].lin.weight])
    rule((X, edges), y)
    torch.testing.assert_close(network.convs[0].lin.weight.grad, expected)
    assert rule.predict((X, edges)).shape == (6, 3)


@pytest.mark.parametrize("depth", [3, 8])
def test_the_softmax_reads_all_hidden_stages_but_the_first(depth):
    network = mlp(12, *[6] * depth, 3)
    rule = ForwardForward(network, predict_by="softmax")
    assert list(rule.readouts) == [str(i) for i in range(1, depth - 1)]
    with torch.no_grad():
        for readout in rule.readouts.values():
            readout.weight.normal_()
    h, hidden = labelled(X, torch.full((1, 3), 1 / 3)), []
    for i in range(depth):
        h = unit(network[2 * i:2 * i + 2](h).detach())
        hidden.append(h)
    readers = [readout.weight for readout in rule.readouts.values()]
    scores = network[-1](hidden[-1]) + sum(a @ M.T for a, M in zip(hidden[1:-1], readers,
                                                                    strict=True))
    torch.testing.assert_close(rule.predict(X), scores.detach())
    expected = torch.autograd.grad(cross_entropy(scores, Y), [*readers, network[-1].weight])
    rule(X, Y)
    got = [*[M.grad for M in readers], network[-1].weight.grad]
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_deep_softmax_is_trained_on_the_activity_that_it_saw():
    def gradients(kept, monkeypatch):
        torch.manual_seed(0)
        layers = [m for i in range(6) for m in
                  (nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5))]
        rule = ForwardForward(nn.Sequential(*layers, nn.Linear(12, 3)),
                              generator=torch.Generator().manual_seed(0))
        monkeypatch.setattr("netwright.rules.forward._softmax.KEPT", kept)
        rule(X, Y)
        return [*(p.grad for p in rule.parameters()), *rule.buffers()]
    with pytest.MonkeyPatch.context() as patch:
        for a, b in zip(gradients(0, patch), gradients(9, patch), strict=True):
            torch.testing.assert_close(a, b)


def test_predicting_by_goodness_tries_every_label_whatever_the_chunks():
    network = mlp(12, 8, 7, 6, 3)
    expected = []
    for label in range(3):
        h, goodness = labelled(X, torch.full((6,), label)), []
        for layer in (network[:2], network[2:4], network[4:6]):
            h = layer(h)
            goodness.append(h.square().sum(1))
            h = unit(h)
        expected.append(goodness[1] + goodness[2])
    expected = torch.stack(expected, 1).detach()
    for rows in (1, 12, 4096):
        torch.testing.assert_close(ForwardForward(network, max_rows=rows).predict(X), expected)


def test_hard_negatives_follow_the_prediction_and_are_never_true():
    rule = ForwardForward(mlp(12, 8, 3), generator=torch.Generator().manual_seed(0))
    y = torch.zeros(20000, dtype=torch.int64)
    p = torch.tensor([0.9, 0.08, 0.02])
    drawn = rule._other_labels(y, p.log().expand(20000, 3)).bincount(minlength=3) / 20000
    torch.testing.assert_close(drawn, torch.tensor([0.0, 0.8, 0.2]), atol=0.015, rtol=0)
    certain = torch.tensor([[200.0, 0.0, 0.0]]).expand(20000, 3)
    assert (rule._other_labels(y, certain) != y).all()
    even = rule._other_labels(y, None).bincount(minlength=3) / 20000
    torch.testing.assert_close(even, torch.tensor([0.0, 0.5, 0.5]), atol=0.015, rtol=0)


def test_amplitude_input_normalisation_and_skip():
    network = mlp(12, 8, 7, 3)
    raw = X.clone()
    raw[:, :3] = 2 * one_hot(torch.zeros(6, dtype=torch.int64), 3)
    rule = ForwardForward(network, amplitude=2, normalise_input=False, skip=0)
    h = network[:2](raw)
    expected = h.square().sum(1) + network[2:4](unit(h)).square().sum(1)
    torch.testing.assert_close(rule.predict(X)[:, 0], expected.detach())


def test_a_network_without_a_classifier():
    rule = ForwardForward(nn.Sequential(*mlp(12, 8, 7), nn.ReLU()), num_classes=3,
                          classifier=False)
    assert rule(X, Y).isfinite()
    assert all(p.grad is not None for p in rule.parameters())
    assert rule.predict(X).shape == (6, 3)
    rule.predict_by = "softmax"
    assert rule.predict(X).shape == (6, 3)


def test_negatives_of_ones_own_need_no_labels():
    network = mlp(12, 8, 7, 3)
    false = torch.rand(6, 12)
    rule = ForwardForward(network, negatives=lambda x, y: false)
    losses, h = [], torch.cat([unit(X), unit(false)])
    for layer in (network[:2], network[2:4]):
        h = layer(h)
        g = h.square().sum(1) - h.shape[1]
        losses.append(softplus(-TRUE_AND_FALSE * g / (h.shape[1] / 10)).mean())
        h = unit(h)
    torch.testing.assert_close(rule(X), torch.stack(losses).mean().detach())
    assert network[4].weight.grad is None
    unlabelled = network[0].weight.grad.clone()
    rule.zero_grad()
    rule(X, Y)
    assert torch.equal(network[0].weight.grad, unlabelled)
    assert network[4].weight.grad is not None
    assert rule.predict(X).shape == (6, 3)


def test_one_batch_of_both_or_one_after_the_other_is_the_same():
    network = mlp(12, 8, 7, 3)
    false = torch.rand(6, 12)
    rule = ForwardForward(network, negatives=lambda x, y: false)
    rule(X)
    together = network[0].weight.grad.clone()
    rule.zero_grad()
    loss = rule._contrast([unit(X), unit(false)], None)
    torch.testing.assert_close(network[0].weight.grad, together)
    torch.testing.assert_close(loss, rule(X))


def test_nodes_without_a_label_do_not_count():
    torch_geometric = pytest.importorskip("torch_geometric.nn")
    network = torch_geometric.GCN(12, 8, 3, 3)
    edges = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]])
    y = Y.clone()
    y[3:] = -100
    rule = ForwardForward(network, (X, edges), negatives=lambda x, y: (x[0].flip(0), x[1]))
    losses = []
    for features, sign in [(unit(X), 1), (unit(X.flip(0)), -1)]:
        a = network.convs[0](features, edges).relu()
        losses.append(softplus(-sign * (a.square().sum(1) - 8) / 0.8)[:3].mean() / 2)
    (expected,) = torch.autograd.grad(sum(losses), [network.convs[0].lin.weight])
    assert rule((X, edges), y).isfinite()
    torch.testing.assert_close(network.convs[0].lin.weight.grad, expected)
    assert rule.predict((X, edges)).shape == (6, 3)


def test_images_in_a_mapping_and_convolutions_with_batch_norm():
    x = torch.rand(6, 1, 8, 8)
    cnn = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3),
                        nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    before = x.clone()
    rule = ForwardForward(cnn)
    assert rule(x, Y).isfinite()
    assert all(p.grad.abs().sum() > 0 for p in rule.parameters())
    assert cnn[1].num_batches_tracked == 1  # of the labelled samples alone
    assert torch.equal(x, before)

    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
                                    intermediate_size=16, image_size=8, patch_size=4,
                                    num_channels=1, num_labels=3)
    vit = transformers.ViTForImageClassification(config)
    rule = ForwardForward(vit, {"pixel_values": x})
    torch.testing.assert_close(rule.predict({"pixel_values": x}), rule.predict(x))
    assert rule({"pixel_values": x}, Y).isfinite()


def test_frozen_stages_stay_and_autocast_trains_every_stage():
    network = mlp(12, 8, 7, 3)
    network[0].requires_grad_(False)
    rule = ForwardForward(network)
    with torch.autocast("cpu", torch.bfloat16):
        rule(X, Y)
        rule(X, Y)
    assert network[0].weight.grad is None
    assert all(network[i].weight.grad.abs().sum() > 0 for i in (2, 4))


@pytest.mark.parametrize("options", [{}, {"collaborate": True}, {"collaborate": "earlier"},
                                     {"goodness": "by_class"}])
def test_memory_does_not_grow_with_depth(options):
    def working_bytes(depth):
        rule = ForwardForward(mlp(64, *[64] * (depth - 1), 10), torch.rand(2, 64), **options)
        return cost(rule, (torch.rand(512, 64), torch.randint(10, (512,))), repeats=1,
                    warmup=0).working_bytes
    assert working_bytes(32) < 1.15 * working_bytes(8)


def train(rule, split, *, shuffled=False):
    x, y = split.x_train.flatten(1), split.y_train
    y = y[torch.randperm(len(y))] if shuffled else y
    optimizer = torch.optim.Adam([p for p in rule.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(20):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            rule(x[batch], y[batch])
            optimizer.step()
    return (rule.predict(split.x_test.flatten(1)).argmax(1) == split.y_test).float().mean().item()


def test_learns_what_frozen_stages_and_shuffled_labels_do_not():
    split = digits()
    for seed in range(2):
        torch.manual_seed(seed)
        learned = train(ForwardForward(mlp(64, 128, 128, 10)), split)
        frozen = mlp(64, 128, 128, 10)
        frozen[:4].requires_grad_(False)
        assert learned > 0.9
        assert train(ForwardForward(frozen), split) < 0.4
    assert train(ForwardForward(mlp(64, 128, 128, 10)), split, shuffled=True) < 0.4


def test_blocks_learn_by_class_what_frozen_ones_and_shuffled_labels_do_not():
    def rule(*, frozen=False):
        network = mlp(64, 12, 12, 12, 10).requires_grad_(not frozen)
        return ForwardForward(network, torch.zeros(2, 64), goodness="by_class", blocks=2)

    split = digits()
    for seed in range(2):
        torch.manual_seed(seed)
        assert train(rule(), split) > 0.9
        assert train(rule(frozen=True), split) < 0.8
    assert train(rule(), split, shuffled=True) < 0.4


def test_layers_learn_together():
    split = digits()
    for collaborate in (True, "earlier"):
        torch.manual_seed(0)
        rule = ForwardForward(mlp(64, 64, 64, 10), hard_negatives=False, collaborate=collaborate)
        assert train(rule, split) > 0.9


def test_errors_name_what_was_wrong_and_leave_no_gradient():
    rule = ForwardForward(mlp(12, 8, 3))
    for x, y, message in [
            (X, Y + 1, "between 0 and 2"), (X, Y[:4], "one class a sample"),
            (X, Y.float(), "int64"), (X, None, "give negatives="),
            (X, torch.tensor([0, 1, -100, 0, 1, 2]), "a class for every sample"),
            (X[:, :2], Y, "at least 3 numbers"),
            (torch.ones(6, 12, dtype=torch.int64), Y, "got torch.int64; give negatives="),
            ((X, Y), Y, "got a tuple; give negatives="),
            ({"input_ids": Y}, Y, "a mapping of input_ids; give negatives=")]:
        with pytest.raises(ValueError, match=message):
            rule(x, y)
    assert all(p.grad is None for p in rule.parameters())
    for options, message in [
            ({"num_classes": 4}, "num_classes=4 must be"), ({"temperature": 0}, "temperature"),
            ({"skip": -1}, "skip"), ({"classifier": False}, "num_classes is needed"),
            ({"negatives": lambda x, y: x, "predict_by": "goodness"}, "must be 'softmax'"),
            ({"goodness": "by_class", "threshold": 1.0}, "threshold must be left out"),
            ({"goodness": "by_class", "negatives": lambda x, y: x}, "negatives must be left out"),
            ({"goodness": "by_class", "collaborate": True}, "collaborate must be left out"),
            ({"blocks": 0}, "blocks must be between 1 and 1, got 0; 1 stages"),
            ({"blocks": 2}, "got 2"),
            ({"blocks": ["1"]}, "no stage that can begin a block"),
            ({"blocks": ["0", "0"]}, "each once; try")]:
        with pytest.raises(ValueError, match=message):
            ForwardForward(mlp(12, 8, 3), **options)
    for options in ({"goodness": "summ"}, {"negatives": "label"}, {"predict_by": "soft"},
                    {"collaborate": "later"}):
        with pytest.raises(UnknownName):
            ForwardForward(mlp(12, 8, 3), **options)
    for y, message in [(None, "give negatives= to learn without labels"),
                       (torch.zeros(6, 2, dtype=torch.int64), "one class a sample where")]:
        with pytest.raises(ValueError, match=message):
            ForwardForward(mlp(12, 8, 3), X, goodness="by_class")(X, y)
    with pytest.raises(ValueError, match="a hidden stage before its classifier"):
        ForwardForward(nn.Sequential(nn.Linear(12, 3)))


def graph(seed=0, nodes=9):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(nodes, 6, generator=generator)
    edges = torch.randint(nodes, (2, 25), generator=generator)
    y = torch.randint(3, (nodes,), generator=generator)
    y[::3] = -100
    return (features, edges), y


def graph_network(kind="GCN", **options):
    models = pytest.importorskip("torch_geometric.nn.models")
    torch.manual_seed(0)
    return getattr(models, kind)(6, 8, num_layers=3, out_channels=3, **options)


def unit_rows(h):
    return h / h.square().mean(1, keepdim=True).sqrt().clamp_min(1e-6)


@pytest.mark.parametrize("kind", ["GCN", "GraphSAGE", "GAT", "GIN"])
@pytest.mark.parametrize("negatives", ["label_overlay", "virtual_nodes"])
def test_gradients_on_graphs_equal_those_of_each_copy_by_itself(kind, negatives):
    """Each layer's by autograd, on a positive and a negative graph that are built by hand."""
    (features, edges), y = graph()
    net = graph_network(kind)
    rule = ForwardForward(net, num_classes=3, negatives=negatives, hard_negatives=False,
                          amplitude=2.0)
    drawn = []
    own = rule._other_labels
    rule._other_labels = lambda *given: drawn.append(own(*given)) or drawn[-1]
    loss = rule((features, edges), y)
    assert torch.equal(drawn[0] < 0, y < 0)
    assert not ((drawn[0] == y) & (y >= 0)).any()
    graphs = []
    for labels in (y, drawn[0]):
        x, links = features.clone(), edges
        if negatives == "virtual_nodes":
            x = torch.cat([x, rule.virtual])
        for node, label in enumerate(labels.tolist()):
            if negatives == "label_overlay":
                x[node, :3] = 2 * torch.eye(3)[label] if label >= 0 else 2 / 3
            elif label >= 0:
                links = torch.cat([links, torch.tensor([[node, 9 + label], [9 + label, node]])], 1)
        graphs.append([unit_rows(x), links])
    known, losses = y >= 0, []
    for conv in net.convs[:2]:
        parts = []
        for sign, part in zip((1, -1), graphs, strict=True):
            h = conv(part[0].detach(), part[1]).relu()
            z = sign * (h[:9][known].square().sum(1) - 8) / 0.8
            parts.append(-torch.nn.functional.logsigmoid(z).mean() / 2)
            part[0] = unit_rows(h)
        losses.append(sum(parts))
        expected = torch.autograd.grad(losses[-1], conv.parameters())
        for p, gradient in zip(conv.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss, torch.stack(losses).mean().detach())


@pytest.mark.parametrize("negatives", ["label_overlay", "virtual_nodes"])
def test_predictions_on_graphs_are_of_each_label_by_itself(negatives):
    (features, edges), y = graph()
    weight = torch.rand(edges.shape[1], generator=torch.Generator().manual_seed(2))
    rule = ForwardForward(graph_network(), num_classes=3, negatives=negatives)
    for x in ((features, edges, weight), {"x": features, "edge_index": edges,
                                          "edge_weight": weight}):
        rule(x, y)
        together = rule.predict(x)
        rule.max_rows = 1  # a class at a time
        torch.testing.assert_close(rule.predict(x), together)
        rule.max_rows = 4096
        assert together.shape == (9, 3)
        softmax = ForwardForward(graph_network(), num_classes=3, negatives=negatives,
                                 predict_by="softmax")
        softmax(x, y)
        assert softmax.predict(x).isfinite().all()
    assert torch.equal(features, graph()[0][0])


@pytest.mark.parametrize("negatives", ["label_overlay", "virtual_nodes"])
def test_graphs_are_learned(negatives):
    """A ring of three groups: the nodes without a label, against shuffled labels."""
    def right(seed, *, shuffled=False):
        generator = torch.Generator().manual_seed(seed)
        truth = torch.arange(3).repeat_interleave(60)
        likely = torch.where(truth[:, None] == truth, 0.08, 0.01)
        edges = (torch.rand(180, 180, generator=generator) < likely).triu(1)
        features = torch.zeros(180, 12)
        features[:, 3:] = 0.5 * torch.randn(180, 9, generator=generator)
        features[torch.arange(180), 3 + truth] += 1
        known = torch.rand(180, generator=generator) < 0.5
        y = truth.where(known, -100)
        if shuffled:
            y[known] = y[known][torch.randperm(int(known.sum()), generator=generator)]
        torch.manual_seed(seed)
        models = pytest.importorskip("torch_geometric.nn.models")
        net = models.GraphSAGE(12, 32, num_layers=3, out_channels=3)
        rule = ForwardForward(net, num_classes=3, negatives=negatives, skip=0)
        x = features, (edges | edges.T).nonzero().T
        optimizer = torch.optim.Adam(rule.parameters(), 1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            rule(x, y)
            optimizer.step()
        return (rule.predict(x).argmax(1) == truth)[~known].float().mean().item()
    learned = sum(right(seed) for seed in range(3)) / 3
    shuffled = sum(right(seed, shuffled=True) for seed in range(3)) / 3
    assert learned > 0.7  # measured: 0.90 by label, 0.77 by virtual nodes
    assert shuffled < 0.5  # measured: 0.32 and 0.41


def test_errors_on_graphs():
    x, y = graph()
    with pytest.raises(ValueError, match="must be a graph network of PyTorch Geometric, got"):
        ForwardForward(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
                       negatives="virtual_nodes")
    with pytest.raises(UnknownName, match="did you mean virtual_nodes"):
        ForwardForward(graph_network(), num_classes=3, negatives="virtual_node")
    for negatives in ("label_overlay", "virtual_nodes"):
        rule = ForwardForward(graph_network(), num_classes=3, negatives=negatives)
        with pytest.raises(ValueError, match="at least one node, got -100 alone"):
            rule(x, torch.full_like(y, -100))
        with pytest.raises(ValueError, match="one class a sample"):
            rule(x, y[:5])
        with pytest.raises(ValueError, match="batch too; leave it out"):
            rule({"x": x[0], "edge_index": x[1], "batch": y}, y)
        assert all(p.grad is None for p in rule.parameters())
    with pytest.raises(ValueError, match="x must be a graph"):
        ForwardForward(graph_network(), num_classes=3, negatives="virtual_nodes").predict(x[0])


@pytest.mark.parametrize("options", [{}, {"predict_by": "softmax"}, {"goodness": "by_class",
                                     "predict_by": "softmax"}, {"collaborate": True}])
def test_running_statistics_are_those_of_the_samples_that_stages_learn_from(options):
    network = nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8),
                            nn.ReLU(), nn.Linear(8, 3), nn.BatchNorm1d(3))
    x = torch.randn(6, 20)
    rule = ForwardForward(network, x, **options)
    rule(x, torch.tensor([0, 1, 2, 0, 1, 2]))
    assert network[1].num_batches_tracked == 1


@pytest.mark.parametrize("negatives", ["label_overlay", "virtual_nodes"])
def test_labels_are_tried_on_some_nodes_while_the_others_are_neutral(negatives):
    (features, edges), _ = graph()
    rule = ForwardForward(graph_network(), num_classes=3, negatives=negatives, tried=9)
    found = rule.predict((features, edges))
    for node in range(9):
        for label in range(3):
            labels = torch.full((9,), -100)
            labels[node] = label
            with torch.no_grad():
                alone = rule._goodness_of((features, edges), labels)[node]
            torch.testing.assert_close(found[node, label], alone)
    with pytest.raises(ValueError, match="tried must be at least 1, got 0"):
        ForwardForward(graph_network(), num_classes=3, tried=0)


def test_predictions_multiply_once_what_the_labels_leave_as_it_is() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 8), nn.ReLU(),
                            nn.Linear(8, 3))
    x, taken = torch.rand(7, 1, 6, 6), []
    rule = ForwardForward(network)

    class Count(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (),
                               kwargs: Any = None) -> Any:
            if function is nn.functional.linear:
                taken.append(tuple(args[0].shape))
            return function(*args, **(kwargs or {}))
    with Count():
        found = rule.predict(x)
    assert taken[:2] == [(7, 36), (21, 3)]
    squares = []
    for label in range(3):
        h = x.flatten(1).clone()
        h[:, :3] = rule.amplitude * torch.eye(3)[label]
        h = h / h.square().mean(1, keepdim=True).sqrt()
        h = network[1](h).relu()  # whose goodness is not read
        h = network[3](h / h.square().mean(1, keepdim=True).sqrt()).relu()
        squares.append(h.square().sum(1))
    assert torch.allclose(found, torch.stack(squares, 1), rtol=1e-4)
