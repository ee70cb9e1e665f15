"""The step of several batches is that of one, and an epoch's figures do not know the batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy

import netwright as nw
from netwright.data import Batches
from netwright.objectives import mean_over_targets
from netwright.rules import Backprop

X = torch.randn(24, 6, generator=Generator().manual_seed(1))
Y = X[:, :3].argmax(1)
WEIGHT = torch.tensor([1.0, 7.0, 0.2])
SEQUENCES = torch.randn(24, 5, 6, generator=Generator().manual_seed(2))
TOKENS = SEQUENCES[..., :3].argmax(-1)
TOKENS[:9, 1:] = -100
SOFT = X[:, :3].softmax(1)
IGNORED = torch.where(torch.arange(24) % 3 == 0, 2, Y % 2)

LOSSES: dict[str, tuple[Tensor, Tensor, Any]] = {
    "mean": (X, Y, lambda o, y: cross_entropy(o, y)),
    "sum": (X, Y, lambda o, y: cross_entropy(o, y, reduction="sum")),
    "class weights": (X, Y, nn.CrossEntropyLoss(weight=WEIGHT)),
    "class weights, mean over samples": (X, Y, lambda o, y: cross_entropy(
        o, y, weight=WEIGHT, reduction="none").mean()),
    "ignored class": (X, IGNORED, lambda o, y: cross_entropy(o, y, ignore_index=2)),
    "smoothed": (X, Y, nn.CrossEntropyLoss(label_smoothing=0.2)),
    "tokens": (SEQUENCES, TOKENS, lambda o, y: cross_entropy(o.flatten(0, 1), y.flatten())),
    "tokens, mean over rows": (SEQUENCES, TOKENS, lambda o, y: cross_entropy(
        o.mT, y, reduction="none").sum(1).mean()),
    "squares": (X, SOFT, functional.mse_loss),
    "squares, weighed by y": (X, SOFT, lambda o, y: (
        (o - y).square().sum(1) * y[:, 0]).sum() / y[:, 0].sum()),
    "soft targets": (X, SOFT, lambda o, y: cross_entropy(o, y)),
    "margin": (X, SOFT, nn.SmoothL1Loss(reduction="sum")),
    "two parts": (X, Y, lambda o, y: cross_entropy(o, y) + 0.1 * o.square().mean()),
}


def moved_by(loss: Any, x: Tensor, y: Tensor, batch_size: int, accumulate: int = 1,
             dtype: torch.dtype = torch.float32) -> tuple[Tensor, float]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    before = torch.cat([p.detach().flatten() for p in net.parameters()])
    train = Batches(x.to(dtype), y.to(dtype) if y.is_floating_point() else y, batch_size,
                    shuffle=False)
    history = nw.fit(Backprop(net, loss=loss), train, epochs=1, accumulate=accumulate,
                     optimizer=lambda p: torch.optim.SGD(p, 0.1), progress=False)
    return torch.cat([p.detach().flatten() for p in net.parameters()]) - before, history[0].loss


@pytest.mark.parametrize("name", LOSSES)
def test_accumulated_batches_make_the_step_of_one_for_any_reduction(name: str) -> None:
    x, y, loss = LOSSES[name]
    whole, _ = moved_by(loss, x, y, 24)
    parts, _ = moved_by(loss, x, y, 7, accumulate=4)  # of 7, 7, 7 and 3
    torch.testing.assert_close(parts, whole, rtol=2e-4, atol=1e-6)
    assert not torch.allclose(whole, moved_by(loss, x, y, 7)[0], rtol=0.05)  # the control


@pytest.mark.parametrize("name", LOSSES)
def test_an_epochs_loss_does_not_know_the_batch_size(name: str) -> None:
    x, y, loss = LOSSES[name]

    def told(batch_size: int, accumulate: int = 1) -> float:
        net = nn.Linear(6, 3)
        with torch.no_grad():
            net.weight.copy_(torch.arange(18.0).view(3, 6) / 18)
            net.bias.zero_()
        return nw.fit(Backprop(net, loss=loss), Batches(x, y, batch_size, shuffle=False), epochs=1,
                      accumulate=accumulate, progress=False,
                      optimizer=lambda p: torch.optim.SGD(p, 0.0))[0].loss

    assert [told(7), told(2), told(5, 3)] == pytest.approx([told(24)] * 3, rel=1e-4)


def test_a_loss_that_contrasts_samples_cannot_be_accumulated() -> None:
    def contrast(o: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(o @ o.T, torch.arange(len(o)))

    with pytest.raises(ValueError, match="accumulate=2 cannot make the step of one larger batch"):
        moved_by(contrast, X, Y, 8, accumulate=2)
    assert moved_by(contrast, X, Y, 8)[1] > 0


def test_no_other_rule_is_left_out() -> None:
    """Rules that call their loss within torch.func, or on the outputs of heads."""
    weighed = nn.CrossEntropyLoss(weight=WEIGHT)

    def step(make: Callable, batch_size: int, accumulate: int) -> Tensor:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(),
                            nn.Linear(8, 3))
        rule = make(net)
        before = rule.network[2].weight.detach().clone()
        nw.fit(rule, Batches(X, Y, batch_size, shuffle=False), epochs=1, accumulate=accumulate,
               optimizer=lambda p: torch.optim.SGD(p, 0.1), progress=False)
        return rule.network[2].weight.detach() - before

    for make in (lambda net: nw.rules.MonoForward(net, example=X[:2], loss=weighed),
                 lambda net: nw.rules.DirectFeedbackAlignment(
                     net, example=X[:2], loss=weighed, generator=Generator().manual_seed(3)),
                 lambda net: nw.rules.FeedbackAlignment(
                     net, loss=weighed, generator=Generator().manual_seed(3))):
        torch.testing.assert_close(step(make, 8, 3), step(make, 24, 1), rtol=1e-3, atol=1e-6)


def test_the_weight_of_a_loss_survives_a_resume_within_an_epoch(tmp_path: Path) -> None:
    def train(stop_at: int | None, folder: Path) -> nw.History:
        torch.manual_seed(0)
        net = nn.Linear(6, 3)
        steps: list[int] = []

        class Stopped(torch.optim.SGD):
            def step(self, closure: Any = None) -> None:
                if len(steps) == stop_at:
                    raise KeyboardInterrupt
                steps.append(1)
                super().step(closure)

        return nw.fit(Backprop(net, loss=nn.CrossEntropyLoss(weight=WEIGHT)), Batches(X, Y, 5),
                      epochs=2, optimizer=lambda p: Stopped(p, 0.1), checkpoint=folder,
                      checkpoint_every=1, progress=False)

    whole = train(None, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(3, tmp_path / "broken")
    resumed = train(None, tmp_path / "broken")
    assert [e.loss for e in resumed.epochs] == [e.loss for e in whole.epochs]


# Metrics


def f1(scores: Tensor, y: Tensor) -> float:
    predicted = scores.argmax(-1)
    hits = ((predicted == 1) & (y == 1)).sum()
    return float(2 * hits / ((predicted == 1).sum() + (y == 1).sum()))


class Counting:
    """An object with state, as those of torchmetrics."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.hits = self.others = 0

    def update(self, scores: Tensor, y: Tensor) -> None:
        predicted = scores.argmax(-1)
        self.hits += int(((predicted == 1) & (y == 1)).sum())
        self.others += int((predicted == 1).sum() + (y == 1).sum())

    def compute(self) -> float:
        return 2 * self.hits / self.others


@pytest.mark.parametrize("metric", [f1, Counting()])
def test_a_metric_that_is_no_mean_is_of_all_samples(metric: Any) -> None:
    def scored(batch_size: int) -> list[float]:
        torch.manual_seed(0)
        history = nw.fit(nn.Linear(6, 3), Batches(X, Y, 24, shuffle=False), epochs=2,
                         validation=Batches(X, Y, batch_size, shuffle=False), metric=metric,
                         optimizer=lambda p: torch.optim.SGD(p, 0.5), progress=False)
        return [epoch.metric for epoch in history.epochs]

    assert scored(5) == pytest.approx(scored(24))
    assert scored(1) == pytest.approx(scored(24))


def test_f1_is_no_mean_of_the_batches() -> None:
    """The control of the test above."""
    torch.manual_seed(0)
    scores = nn.Linear(6, 3)(X).detach()
    parts = [f1(a, b) * len(b) / 24 for a, b in zip(scores.split(5), Y.split(5), strict=True)]
    assert sum(parts) != pytest.approx(f1(scores, Y), rel=0.02)


def test_a_metric_that_says_it_is_a_mean_is_averaged() -> None:
    sizes = []

    @mean_over_targets
    def first(scores: Tensor, y: Tensor) -> float:
        sizes.append(len(scores))
        return float((scores.argmax(-1) == y).float().mean())

    history = nw.fit(nn.Linear(6, 3), [(X, Y)], epochs=1, metric=first, progress=False,
                     validation=Batches(X, Y, 7, shuffle=False))
    assert sizes == [7, 7, 7, 3]
    assert 0 <= history[0].metric <= 1


def test_sequences_of_different_lengths_reach_a_metric_token_by_token() -> None:
    seen = []

    def metric(scores: Tensor, y: Tensor) -> float:
        seen.append((tuple(scores.shape), tuple(y.shape)))
        return 0.0

    validation = [(SEQUENCES[:2], TOKENS[:2]), (SEQUENCES[2:4, :3], TOKENS[2:4, :3])]
    nw.fit(nn.Linear(6, 3), [(SEQUENCES, TOKENS)], epochs=1, metric=metric, progress=False,
           validation=validation)
    assert seen == [((16, 3), (16,))]


def test_a_plateau_of_scores_that_are_no_numbers_is_none_of_losses() -> None:
    net, scores = nn.Linear(6, 3), iter([0.5, float("nan"), float("nan"), 0.4])
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    history = nw.fit(net, [(X, Y)], epochs=4, optimizer=optimizer, validation=[(X, Y)],
                     metric=lambda *_: next(scores), progress=False,
                     scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(
                         optimizer, mode="max", patience=0))
    assert [e.learning_rate for e in history.epochs] == pytest.approx([0.1, 0.1, 0.01, 0.001])


def test_scores_that_are_never_numbers_leave_the_weights_alone() -> None:
    torch.manual_seed(0)
    net = nn.Linear(6, 3)
    history = nw.fit(net, [(X, Y)], epochs=9, validation=[(X, Y)], patience=2, progress=False,
                     metric=lambda *_: float("nan"))
    assert len(history) == 2
    assert history.stopped == "patience"
