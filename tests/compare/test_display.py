import io

import pytest
from rich.console import Console

from netwright.compare import display
from netwright.compare.display import Display, Status

BEGUN = [Status("digits", "Backprop", 2, 7, [3.0, 3.0], [("trial 2", 4, 15)]),
         Status("digits", "NoProp", 0, 7, [], [])]
ENDED = [Status("digits", "Backprop", 7, 7, [3.0] * 7, []),
         Status("digits", "NoProp", 7, 7, [], [], "needs labels")]


@pytest.fixture
def written(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda stderr: Console(
        file=file, force_terminal=True, width=100, color_system=None))
    return file


def test_a_terminal_shows_change_run_and_time_left(written):
    with Display(True) as shown:
        shown.show(BEGUN)
        shown._live.refresh()
        text = written.getvalue()
        assert "digits · Backprop · trial 2, epoch 4 of 15" in text
        assert "2 of 14 runs" in text
        assert "about 0:36 left" in text
        shown.show(ENDED)
    text = written.getvalue()
    assert "digits · Backprop: done" in text
    assert "digits · NoProp: failed: needs labels" in text


def test_nothing_is_shown_where_nothing_is_wanted(written):
    with Display(False) as shown:
        shown.show(BEGUN)
        shown.note("a line")
    assert written.getvalue() == ""


def test_more_runs_at_once_take_less_time():
    running = [("trial 2", 1, 9), ("trial 3", 1, 9)]
    assert display.left([Status("a", "b", 2, 7, [4.0, 6.0], running)]) == "about 0:12 left"


def test_escape_codes_in_names_are_not_passed_on(written):
    with Display(True) as shown:
        names = "di\x1b]0;title\x07gits", "Back\x1b[2Jprop"
        shown.show([Status(*names, 2, 7, [3.0], [("t", 1, 2)])])
        shown.note("a \x1b[31mline")
        shown.show([Status(*names, 7, 7, [3.0], [])])
        shown._live.refresh()
    assert "\x1b]0;title" not in written.getvalue()
    assert "\x1b[31mline" not in written.getvalue()
    assert "Back\x1b[2J" not in written.getvalue()
