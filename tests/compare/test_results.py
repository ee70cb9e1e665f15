import math

import pytest

from netwright.compare.results import Comparison, Row
from netwright.errors import CorruptCheckpoint


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


@pytest.mark.parametrize("text", ["[" * 100_000, "{", '"x"', '{"rows": 3}', "[]"])
def test_a_file_that_is_no_comparison(tmp_path, text):
    file = tmp_path / "found.json"
    file.write_text(text)
    with pytest.raises(CorruptCheckpoint, match=r"found.json must be a comparison that save wrote"):
        Comparison.load(file)
    with pytest.raises(CorruptCheckpoint, match="got a folder"):
        Comparison.load(tmp_path)


def test_it_is_saved_under_a_name_that_cannot_be_laid_in_wait_for(tmp_path):
    (tmp_path / "other").write_text("kept")
    (tmp_path / "found.json.tmp").symlink_to(tmp_path / "other")
    Comparison([]).save(tmp_path / "found.json")
    assert (tmp_path / "other").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "found.json", "found.json.tmp", "other"]
    with pytest.raises(ValueError, match="got the folder"):
        Comparison([]).save(tmp_path)
