import math
from pathlib import Path

import pytest

from netwright.training.history import Epoch, History

EPOCHS = [Epoch(1, 0.5, 0.9, 0.5, 0.1), Epoch(2, 1.0, 0.7, 0.8, 0.1), Epoch(3, 1.5, 0.5, 0.8, 0.1)]
BLIND = [Epoch(1, 0.5, 0.9, math.nan, 0.1), Epoch(2, 1.0, 0.7, math.nan, math.nan)]


def test_the_best_epoch_is_the_first_with_the_best_metric() -> None:
    assert History(EPOCHS).best.epoch == 2
    assert History(EPOCHS, higher_is_better=False).best.epoch == 1
    assert History(BLIND).best.epoch == 2  # no metric: the lowest loss
    with pytest.raises(ValueError, match="no epoch yet"):
        _ = History().best


@pytest.mark.parametrize("epochs", [EPOCHS, BLIND, []])
def test_json_keeps_everything(epochs: list[Epoch]) -> None:
    history = History(epochs, metric="error", higher_is_better=False, steps=7, stopped="patience")
    text = history.to_json()
    assert "NaN" not in text
    assert str(History.from_json(text)) == str(history)


def test_the_curve_is_plain() -> None:
    assert History(EPOCHS).curve[1] == (2, 1.0, 0.7, 0.8)


def test_the_plot_shows_what_there_is(tmp_path: Path) -> None:
    figure = History(EPOCHS, metric="error").plot(tmp_path / "plot.html")
    assert [trace.name for trace in figure.data] == ["training loss", "validation error",
                                                     "learning rate"]
    assert list(figure.data[0].y) == [0.9, 0.7, 0.5]
    assert "src=" not in (tmp_path / "plot.html").read_text(encoding="utf-8").split("<body>")[0]
    assert [trace.name for trace in History(BLIND).plot().data] == ["training loss",
                                                                    "learning rate"]
    with pytest.raises(ValueError, match="no epoch yet"):
        History().plot()
