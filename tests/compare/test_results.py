import math

import pytest

from netwright.compare.results import Comparison, Row


def test_a_comparison_round_trips(tmp_path):
    rows = [Row("task", "change", scores=[0.5, 0.7], train_time=[1.0, 2.0], step_time=0.001,
                curves=[[[1, 0.1, 2.0, 0.5]]], alignment={"0": 0.5}, hyperparameters={"lr": 0.1}),
            Row("task", "other", scores=[], train_time=[], step_time=0.0, curves=[],
                failure="it cannot")]
    found = Comparison(rows, {"seeds": [0, 1]})
    found.save(tmp_path / "kept.json")
    assert Comparison.load(tmp_path / "kept.json") == found
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]


def test_mean_and_spread():
    row = Row("task", "change", scores=[0.5, 0.7])
    assert row.mean == pytest.approx(0.6)
    assert row.spread == pytest.approx(0.02 ** 0.5)
    assert Row("task", "change", scores=[0.5]).spread == 0.0
    assert math.isnan(Row("task", "change").mean)
    assert math.isnan(Row("task", "change", scores=[0.5, math.nan]).spread)
