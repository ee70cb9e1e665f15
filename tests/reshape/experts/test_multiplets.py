from copy import deepcopy

import pytest
import torch
from torch import nn

from netwright.blocks.feedforward import FeedForward
from netwright.errors import NothingToReshape
from netwright.objectives.losses import contrast_within
from netwright.reshape import multiplets, upcycle


class Residual(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm, self.feedforward = nn.LayerNorm(width), FeedForward(width, 16)

    def forward(self, h):
        return h + self.feedforward(self.norm(h))


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), Residual(), nn.Linear(8, 4))


def test_only_feedforward_layers_learn_stage_by_stage():
    model, x = network(), torch.randn(20, 6)
    model[2].weight.requires_grad_(False)
    before, seen = deepcopy(model.state_dict()), []

    def train(copy, earlier):
        seen.append(len(earlier))
        assert torch.equal(copy(x), model(x))
        learn = {n for n, p in copy.named_parameters() if p.requires_grad}
        assert learn == {n for n, _ in copy.named_parameters() if "feedforward" in n}
        optimizer = torch.optim.SGD([p for p in copy.parameters() if p.requires_grad], 0.1)
        (copy(x) - len(earlier)).square().mean().backward()
        optimizer.step()

    models = multiplets(model, train, x, stages=3)
    assert seen == [1, 2, 3]
    assert len(models) == 4
    assert torch.equal(models[0](x), model(x))
    for copy in models:
        for name, p in copy.named_parameters():
            same = torch.equal(p, before[name])
            assert same == ("feedforward" not in name or copy is models[0])
            assert p.requires_grad == (name != "2.weight")
            assert p.grad is None
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(),
                                                 strict=True))
    assert not torch.equal(models[1](x), models[2](x))
    mixed = upcycle(models, x, n_experts=4, k=2)
    experts = mixed[1].feedforward.experts
    for expert, copy in zip(experts, models, strict=True):
        assert torch.equal(expert[0].weight, copy[1].feedforward[0].weight)
    assert torch.allclose(mixed[0].weight, model[0].weight)


def test_the_contrast_is_within_groups():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 7, 5, generator=draw, dtype=torch.double)
    groups = torch.tensor([0, 1, 0, 2, 1, 1, 0])
    total = 0.0
    for u, v in ((a, b), (b, a)):
        for i in range(7):
            rivals = [j for j in range(7) if groups[j] == groups[i]]
            scores = torch.stack([torch.cosine_similarity(u[i], v[j], dim=0) for j in rivals]) / 0.2
            total = total - scores.log_softmax(0)[rivals.index(i)] / 14
    torch.testing.assert_close(contrast_within(a, b, groups, temperature=0.2), total)
    torch.testing.assert_close(contrast_within(a, b), contrast_within(a, b, 0 * groups))
    a.requires_grad_()
    contrast_within(a, b, groups).backward()
    assert a.grad.isfinite().all()
    assert (a.grad[3] == 0).all()


@pytest.mark.parametrize("seed", range(2))
def test_a_stage_tells_apart_what_the_model_confuses(seed):
    """The model sees one axis of two; a copy that contrasts within its groups sees the other."""
    draw = torch.Generator().manual_seed(seed)
    places = torch.randn(300, 2, generator=draw)
    x = torch.cat([places, torch.zeros(300, 4)], 1)
    a, b = (x + 0.02 * torch.randn(x.shape, generator=draw) for _ in range(2))
    groups = (places[:, 0] * 2).round().long()
    model = network(seed)

    def recall(net):
        with torch.no_grad():
            alike = contrast_within(net(a), net(b), groups)
        return alike.item()

    def train(copy, earlier):
        optimizer = torch.optim.Adam([p for p in copy.parameters() if p.requires_grad], 1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            contrast_within(copy(a), copy(b), groups).backward()
            optimizer.step()

    first, second = multiplets(model, train, x, stages=1)
    assert recall(first) == recall(model)
    # Measured over 4 seeds: 0.6 to 0.64.
    assert recall(second) < 0.8 * recall(first)


def test_what_cannot_be_is_refused():
    model, x = network(), torch.randn(3, 6)
    with pytest.raises(ValueError, match="stages must be at least 1"):
        multiplets(model, lambda copy, earlier: None, x, stages=0)
    with pytest.raises(ValueError, match=r"changed 0\.weight in stage 1"):
        multiplets(model, lambda copy, earlier: copy[0].weight.data.zero_(), x)
    with pytest.raises(NothingToReshape):
        multiplets(nn.Linear(6, 6), lambda copy, earlier: None, x)
    with pytest.raises(ValueError, match="a and b must be"):
        contrast_within(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="groups"):
        contrast_within(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(2, dtype=torch.long))
