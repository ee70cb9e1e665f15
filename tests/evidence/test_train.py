import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from netwright.data import Batches, Split
from netwright.errors import Diverged
from netwright.evidence import falling, held_out_accuracy, held_out_errors, train
from netwright.evidence.train import on_progress
from netwright.rules import Backprop
from netwright.training import fit

X, Y = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
DATA = Split(X[:16], Y[:16], X[16:], Y[16:])
ACCURACY = "accuracy, {} (%)"


def linear():
    return nn.Linear(4, 3)


def adam(rule):
    return torch.optim.Adam(rule.parameters(), 0.05)


def test_it_is_fit_under_the_seed():
    runs = train({"module": linear, "rule": lambda: Backprop(linear())}, DATA,
                 {ACCURACY: held_out_accuracy}, seeds=[3, 4], optimizer=adam, epochs=2,
                 batch_size=8)
    torch.manual_seed(4)
    alone = linear()
    fit(alone, Batches(*DATA[:2], 8, seed=4), epochs=2, seed=4, progress=False,
        optimizer=adam(alone))
    for name in ("module", "rule"):
        assert torch.equal(runs.rules[name][1].network.weight, alone.weight)
        assert not torch.equal(runs.rules[name][0].network.weight, alone.weight)
    right = 100 * float((alone(DATA.x_test).argmax(1) == DATA.y_test).float().mean())
    assert runs.figures[ACCURACY.format("rule")][1] == pytest.approx(right)
    assert held_out_errors(runs.rules["rule"][1], [DATA[2:]]) == pytest.approx(100 - right)


def test_figures_are_the_ends_of_the_curves():
    runs = train({"a": linear}, DATA, {ACCURACY: held_out_accuracy}, seeds=[0, 1, 2],
                 optimizer=adam, steps=6, looks=3, batch_size=8, at_start=True)
    (curve,) = runs.curves(ACCURACY, "the {}").values()
    assert curve.x == [0, 2, 4, 6]
    assert runs.figures[ACCURACY.format("a")] == [line[-1] for line in curve.y]
    assert {len(line) for line in curve.y} == {4}


def test_steps_go_through_the_data_again_and_again():
    seen = []

    class Seen(nn.Linear):
        def forward(self, x):
            seen.extend(x[:, 0].tolist() if self.training else [])
            return super().forward(x)

    train({"seen": lambda: Seen(4, 3)}, DATA, {ACCURACY: held_out_accuracy}, seeds=[0],
          optimizer=adam, steps=4, looks=4, batch_size=8)
    assert sorted(seen) == sorted(2 * DATA.x_train[:, 0].tolist())
    assert seen[:16] != seen[16:]  # in another order


def test_a_rate_falls_over_the_whole_training():
    rates = []

    def plan(optimizer, steps):
        schedule = falling(optimizer, steps)
        rates.append((steps, schedule))
        return schedule
    train({"a": linear}, DATA, {}, seeds=[0], optimizer=adam, epochs=3, batch_size=4,
          scheduler=plan)
    (steps, schedule), = rates
    assert steps == 12
    assert schedule.get_last_lr() == [0.0]


def test_data_of_a_seed_and_another_loss():
    def data(seed):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        return [(x, x)], [(x, x)]

    def error(rule, test):
        ((x, y),) = test
        return float(mse_loss(rule.predict(x), y))
    runs = train({"a": lambda: nn.Linear(4, 4)}, data, {"error, {}": error}, seeds=[0, 1],
                 optimizer=adam, steps=40, looks=2, loss=mse_loss)
    for first, last in runs.lines["error, {}"]["a"]:
        assert last < first


def test_what_diverges_counts_as_what_is_said():
    def nothing():
        network = nn.Linear(4, 3)
        nn.init.constant_(network.weight, float("inf"))
        return network
    with pytest.raises(Diverged):
        train({"a": nothing}, DATA, {ACCURACY: lambda *_: 1.0}, seeds=[0], optimizer=adam,
              epochs=2)
    runs = train({"a": nothing}, DATA, {ACCURACY: lambda *_: 1.0}, seeds=[0], optimizer=adam,
                 epochs=2, at_start=True, diverged=7.0)
    assert runs.lines[ACCURACY]["a"] == [[1.0, 7.0, 7.0]]


def test_it_tells_how_far_it_is():
    told = []
    token = on_progress.set(told.append)
    try:
        train({"a": linear, "b": linear}, DATA, {}, seeds=[0, 1], optimizer=adam, epochs=1)
    finally:
        on_progress.reset(token)
    assert told == [0.0, 0.25, 0.5, 0.75]


def test_mistakes_are_found_before_anything_is_trained():
    def never():
        raise AssertionError
    for options in ({}, {"epochs": 1, "steps": 6}, {"steps": 7, "looks": 3}):
        with pytest.raises(ValueError, match="steps"):
            train({"a": never}, DATA, {}, seeds=[0], optimizer=adam, **options)
