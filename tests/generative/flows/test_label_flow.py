import math
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian

from netwright.generative.flows import LabelFlow, weak_constraint_loss
from netwright.measure import cost
from netwright.reversing.engine import undo

X = torch.randn(6, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))


def flow(classes=3, blocks=3):
    torch.manual_seed(0)
    model = LabelFlow(classes, 4, blocks, hidden=8).double()
    for part in model.transforms:
        nn.init.normal_(part.net.net[-1].weight, std=0.5)
    return model


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_inverse_and_log_determinant(classes):
    model, y = flow(classes), torch.rand(6, classes, dtype=torch.double)
    z, log_det = model(y, X)
    assert (model.inverse(z, X) - y).abs().max() < 1e-10
    dense = [torch.linalg.slogdet(jacobian(lambda one, x=x: model(one[None], x[None])[0][0], a))[1]
             for a, x in zip(y, X, strict=True)]
    torch.testing.assert_close(log_det, torch.stack(dense), rtol=1e-10, atol=1e-10)
    single = deepcopy(model).float()
    there = single(y.float(), X.float())[0]
    # Measured: 4e-7.
    assert (single.inverse(there, X.float()) - y.float()).abs().max() < 1e-5


def test_what_is_drawn_has_the_density_that_it_says():
    model = flow()
    y, log_prob = model.drawn(X)
    torch.testing.assert_close(log_prob, model.log_prob(y, X), rtol=1e-10, atol=1e-10)
    draws = [torch.Generator().manual_seed(s) for s in (1, 1, 2)]
    labels = [model.drawn(X, generator=draw)[0] for draw in draws]
    assert torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[0], labels[2])


def test_the_density_of_a_label_integrates_to_one():
    model, side = flow(2), torch.linspace(-12, 12, 241, dtype=torch.double)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        density = model.log_prob(grid, X[:1].expand(len(grid), 4)).exp()
    assert abs(density.sum() * 0.1 ** 2 - 1) < 1e-3


def test_gradients_through_the_inverse_are_plain_autograds():
    mine, theirs = flow(), flow()
    x = [X.clone().requires_grad_() for _ in range(2)]
    for _ in range(2):
        y, log_prob = mine.drawn(x[0], generator=torch.Generator().manual_seed(2))
        (y.square().sum() + log_prob.sum()).backward()
        z = torch.randn(6, 3, generator=torch.Generator().manual_seed(2), dtype=torch.double)
        y, minus = undo(theirs.steps(x[1]), [z, z.new_zeros(6)])
        base = -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)
        (y.square().sum() + (base - minus).sum()).backward()
    for a, b in zip([x[0], *mine.parameters()], [x[1], *theirs.parameters()], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)


def test_stored_bytes_are_flat_in_depth():
    class Drawn(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            y, log_prob = self.model.drawn(x)
            return y.sum(1) + log_prob

    def saved(blocks):
        return cost(Drawn(flow(blocks=blocks)), (X.repeat(50, 1), X), repeats=1, warmup=0,
                    loss=lambda out, _: out.mean()).saved_bytes

    assert saved(4) <= 1.05 * saved(2)


def test_the_loss_is_its_formula():
    model = flow()
    signals, bounds = torch.rand(6, 2, 3).double(), torch.rand(2, 3).double() / 5
    signals[1, 0], signals[4, 1] = math.nan, math.nan
    found = weak_constraint_loss(model, X, signals, bounds, weight=3.0,
                                 generator=torch.Generator().manual_seed(5))
    y, log_prob = model.drawn(X, generator=torch.Generator().manual_seed(5))
    expected = -log_prob.mean() / (3 * math.log(2))
    for m in range(2):
        for c in range(3):
            said = [i for i in range(6) if not signals[i, m, c].isnan()]
            rate = sum((1 - y[i, c]) * signals[i, m, c] + y[i, c] * (1 - signals[i, m, c])
                       for i in said) / len(said)
            expected = expected + 3 * (rate - bounds[m, c]).clamp(min=0) ** 2
    for i in range(6):
        outside = sum(max(0.0, -v) ** 2 + max(0.0, v - 1) ** 2 for v in y[i].tolist())
        expected = expected + 3 * (outside + (y[i].sum() - 1) ** 2) / 6
    torch.testing.assert_close(found, expected)


def test_it_learns_labels_that_it_never_sees():
    torch.manual_seed(0)
    x = torch.randn(300, 4)
    truth = (x[:, 0] + x[:, 1] > 0).long()
    wrong = torch.rand(300, 3) < torch.tensor([0.2, 0.25, 0.3])
    votes = nn.functional.one_hot(torch.where(wrong, 1 - truth[:, None], truth[:, None]), 2)
    bounds = wrong.float().mean(0)[:, None].expand(3, 2)

    def accuracy(signals):
        torch.manual_seed(1)
        model = LabelFlow(2, 4, 2, hidden=16)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            weak_constraint_loss(model, x, signals, bounds).backward()
            optimizer.step()
        return float((model.predict(x).argmax(1) == truth).float().mean())

    # Measured: 0.9 and 0.5.
    assert accuracy(votes.float()) > 0.8
    assert accuracy(votes[torch.randperm(300)].float()) < 0.7


def test_states_round_trip_and_autocast_trains():
    model, other = flow(), flow(blocks=3)
    nn.init.zeros_(other.transforms[0].net.net[0].weight)
    other.load_state_dict(model.state_dict())
    y = torch.rand(6, 3, dtype=torch.double)
    assert torch.equal(model(y, X)[0], other(y, X)[0])
    assert model.sample(6, X).shape == (6, 3)
    low = flow().float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = weak_constraint_loss(low, X.float(), torch.rand(6, 2, 3), torch.ones(2, 3) / 4)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in low.parameters())


@pytest.mark.parametrize(("make", "says"), [
    (lambda: LabelFlow(1, 4), "label_dim must be at least 2"),
    (lambda: LabelFlow(2, 4, 0), "must be at least 1"),
    (lambda: flow().predict(X, 0), "samples must be at least 1"),
    (lambda: weak_constraint_loss(flow(), X, torch.rand(6, 3), torch.rand(2, 3)),
     "signals must be"),
    (lambda: weak_constraint_loss(flow(), X, torch.rand(6, 2, 3), torch.rand(3)),
     "bounds must be"),
    (lambda: weak_constraint_loss(flow(), X, torch.rand(6, 2, 3), torch.rand(2, 3), weight=-1),
     "weight must be"),
])
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
