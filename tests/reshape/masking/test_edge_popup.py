from copy import deepcopy

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.errors import NothingToReshape, UnknownName
from netwright.reshape.masking.edge_popup import top
from netwright.stages import call
from tests.anatomy.models import built


def network():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))


def train(model, steps=6, lr=0.1):
    torch.manual_seed(1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    x, y = torch.randn(32, 2, 6, 6), torch.randint(10, (32,))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def made(**options):
    return nw.sparse.edge_popup(network(), generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_weights_stay_bit_for_bit_and_exactly_the_share_counts(keep):
    model = made(keep=keep)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = train(model, 40)
    if keep < 1:  # there is nothing to choose among all
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    for name, before in frozen.items():
        assert torch.equal(model.get_parameter(name), before)
    for i in (0, 3):
        assert int(top(model[i].scores, keep).sum()) == round(keep * model[i].scores.numel())
        weight = model[i].layer.weight
        fan_in = weight[0].numel()
        assert torch.allclose(weight.abs(), torch.tensor((2 / (keep * fan_in)) ** 0.5))
        assert weight.min() < 0 < weight.max()


def test_the_gradient_of_a_scores_size_is_that_of_its_weight_times_the_weight():
    model = nw.sparse.edge_popup(nn.Sequential(nn.Linear(6, 4)), keep=0.5)
    layer = model[0]
    x, above = torch.randn(5, 6), torch.randn(5, 4)
    model(x).backward(above)
    expected = (above.T @ x) * layer.layer.weight * layer.scores.sign()
    assert torch.allclose(layer.scores.grad, expected, atol=1e-6)
    assert torch.equal(model(x), x @ (layer.layer.weight * top(layer.scores, 0.5)).T)


def test_recycling_copies_the_weights_of_the_largest_scores_to_the_least():
    model = made(recycle=0.25, every=2)
    layer = model[3]
    before = layer.layer.weight.detach().clone()
    scores = layer.scores.detach().clone()
    nw.sparse.recycle(model)
    assert torch.equal(layer.layer.weight, before)
    nw.sparse.recycle(model)
    order = scores.abs().flatten().argsort()
    expected = before.flatten()
    expected[order[:160]] = before.flatten()[order[-160:]]
    assert torch.equal(layer.layer.weight.flatten(), expected)
    assert torch.equal(layer.scores, scores)
    assert set(layer.layer.weight.unique().tolist()) <= set(before.unique().tolist())


def test_no_recycling_is_plain_edge_popup():
    one, other = made(), made(recycle=0.0, every=1)
    for _ in range(3):
        assert train(one) == train(other)
        nw.sparse.recycle(other)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "resnet"])
def test_architectures_learn_scores_and_come_back_from_disk(name, tmp_path):
    model, x = built(name)
    before = deepcopy(model.state_dict())
    scored = nw.sparse.edge_popup(model, keep=0.5).train()
    call(scored, x).square().sum().backward()
    learning = {n for n, p in scored.named_parameters() if p.requires_grad}
    assert learning
    assert all(n.endswith(".scores") for n in learning)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    nw.save(scored.eval(), tmp_path)
    assert torch.equal(call(nw.load(tmp_path, model), x), call(scored, x))


def test_attention_that_reads_its_weights_itself_is_left():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    scored = nw.sparse.edge_popup(layer).eval()
    assert [n for n, p in scored.named_parameters() if p.requires_grad] == [
        "linear1.scores", "linear2.scores"]


def test_bad_input_is_told():
    for options, error in (({"keep": 0.0}, ValueError), ({"recycle": 0.6}, ValueError),
                           ({"every": 0}, ValueError), ({"layers": ["7"]}, UnknownName)):
        with pytest.raises(error):
            made(**options)
    with pytest.raises(NothingToReshape):
        nw.sparse.edge_popup(nn.ReLU())
