import json
import math
import os
import random
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from rich.console import Console

from netwright import report
from netwright.compare.results import Comparison, Row

nan = float("nan")
MIB = 1024 ** 2
ODD = '<img src=x onerror="alert(1)"> & "quotes" </script>\n$x$ [bold]'
CHANGES = {  # accuracy, seconds of a step, MiB at the peak, MiB saved, alignment
    "Backprop": (0.974, 1.10e-3, 1.9, 0.62, [1.0, 1.0, 1.0, 1.0]),
    "DirectFeedbackAlignment": (0.958, 1.15e-3, 1.7, 0.31, [0.41, 0.52, 0.63, 1.0]),
    "FeedbackAlignment": (0.961, 1.20e-3, 1.9, 0.62, [0.38, 0.55, 0.71, 1.0]),
    "ForwardForward": (0.941, 2.30e-3, 1.2, 0.12, [0.08, 0.05, 0.11, nan]),
    "ForwardGradient": (0.903, 1.70e-3, 1.4, 0.0, [0.02, 0.03, 0.02, 0.04]),
    "MonoForward": (0.967, 1.25e-3, 1.1, 0.11, [0.29, 0.44, 0.61, 0.92]),
    "NoProp": (0.948, 3.90e-3, 2.6, 0.20, []),
    "PredictiveCoding": (0.965, 9.80e-3, 2.3, 0.24, [0.71, 0.83, 0.92, 1.0]),
}


def row(task, change, score, step, peak, saved, cosines, seeds=3):
    draw = random.Random(task + change)
    ends = [score + draw.gauss(0, 0.004) for _ in range(seeds)]
    seconds = step * 45 * 10
    curves = [[(epoch, seconds * epoch / 10, 2.3 * math.exp(-epoch / 3) + draw.random() / 20,
                end - 0.6 * math.exp(-epoch / 2) + draw.gauss(0, 0.004)) for epoch in range(1, 11)]
              for end in ends]
    return Row(task, change, scores=ends, train_time=[seconds * draw.uniform(0.9, 1.1)
                                                      for _ in range(seeds)],
               step_time=step, peak_bytes=int(peak * MIB), saved_bytes=int(saved * MIB),
               parameters=26_506, flops=int(7.4e6), curves=curves, trials=8,
               alignment={f"{2 * i}": c for i, c in enumerate(cosines)},
               hyperparameters={"lr": 0.00123, "width": 128})


def rows(task, worse=0.0):
    return [row(task, change, score - worse, *figures)
            for change, (score, *figures) in CHANGES.items()]


def plausible() -> Comparison:
    failed = Row("digits with a CNN", "Sparse", failure="Diverged: loss is nan at step 12 of "
                 "epoch 1, in stage conv1; lower the learning rate")
    return Comparison(
        [*rows("digits with an MLP"), *rows("digits with a CNN", worse=0.006), failed],
        {"epochs": 10, "seeds": [0, 1, 2], "trials": 8, "machine": {"cores": 2, "device": "CPU"}})


def strange() -> Comparison:
    """One of everything that could go wrong, each in a task of its own."""
    many = [row("many", f"change {i}", 0.5 + i / 100, 1e-3 * (i + 1), i + 1, 0.1, [0.5, 0.6])
            for i in range(40)]
    lower = [Row("text", f"model {i}", metric="loss", higher_is_better=False, scores=[2.0 - i / 10],
                 peak_bytes=(i + 1) * MIB, train_time=[10.0 * 40 ** i], step_time=0.1,
                 parameters=10) for i in range(3)]
    return Comparison([
        Row(ODD, ODD, scores=[0.5, 0.6], peak_bytes=5, train_time=[1.0], step_time=1.0,
            curves=[[(1, 0.5, 1.0, 0.5)], [(1, 0.5, nan, 0.6), (2, 1.0, 0.4, 0.6)]],
            alignment={ODD: 0.5}, hyperparameters={ODD: ODD}),
        Row("none finished", "Backprop"),
        Row("all failed", "Backprop", failure=ODD),
        Row("not finite", "Backprop", scores=[nan, nan], peak_bytes=3, train_time=[nan],
            curves=[[(1, nan, nan, nan)]], alignment={"0": nan}),
        *lower, *many], {ODD: ODD, "list": [1, 2.34567]})


def text(shown, width, color=None) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console:
        console.print(shown)
    console.file.close()
    return console.export_text()


# The Pareto front.

def test_the_front_holds_what_nothing_beats():
    points = [(1, 0.9), (2, 0.95), (3, 0.94), (4, 0.99), (2, 0.91)]
    assert report.pareto(points) == [0, 1, 3]


def test_the_front_of_losses_is_the_front_of_their_negatives():
    points = [(1, 3.0), (2, 2.0), (3, 2.5), (4, 1.0)]
    assert report.pareto(points, higher_is_better=False) == [0, 1, 3]
    assert report.pareto([(c, -s) for c, s in points]) == [0, 1, 3]


def test_the_front_equals_its_definition_on_random_points():
    draw = random.Random(0)
    for _ in range(50):
        points = [(draw.randint(0, 6), draw.randint(0, 6)) for _ in range(12)]
        defined = {i for i, (c, s) in enumerate(points) if not any(
            d <= c and t >= s and (d, t) != (c, s) for d, t in points)}
        assert set(report.pareto(points)) == defined


def test_points_that_are_not_finite_are_not_on_the_front():
    assert report.pareto([(nan, 1.0), (1.0, nan), (math.inf, 2.0), (5.0, 0.1)]) == [3]
    assert report.pareto([]) == []


# Units.

@pytest.mark.parametrize(("write", "value", "expected"), [
    (report.bytes_text, 0, "0 B"), (report.bytes_text, 1023, "1023 B"),
    (report.bytes_text, 10.4 * MIB, "10.4 MiB"), (report.bytes_text, 2.0 ** 60, "1048576 TiB"),
    (report.bytes_text, nan, "–"), (report.seconds_text, 2.5e-6, "2.5 µs"),
    (report.seconds_text, 0.1234, "123 ms"), (report.seconds_text, 12, "12 s"),
    (report.seconds_text, 7200, "2 h"), (report.seconds_text, nan, "–"),
    (report.count_text, 999, "999"), (report.count_text, 7.4e6, "7.4 M"),
    (report.count_text, 0, "0"), (report.count_text, nan, "–")])
def test_units(write, value, expected):
    assert write(value) == expected


# The table.

@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal_and_loses_no_figure(width):
    printed = text(report.table(plausible()), width)
    assert max(map(len, printed.splitlines())) <= width
    assert "…" not in printed
    assert {line.split()[0] for line in printed.splitlines() if "±" in line} == set(CHANGES)
    mono = next(line for line in printed.splitlines() if line.startswith("Mono"))
    for figure in ("±", "1.25ms", "1.1M", "113K", "26.5k", "7.4M"):
        assert figure in mono


def test_the_best_of_a_task_are_marked():
    lines = text(report.table(plausible()), 120).splitlines()
    first = lines[:next(i for i, line in enumerate(lines) if "CNN" in line)]
    best = next(line for line in first if line.startswith("Backprop"))
    lean = next(line for line in first if line.startswith("MonoForward"))
    assert re.search(r"\*97\.\d±0\.\d", best)
    assert "*1.1M" in lean
    assert "*26.5k" not in "".join(first)  # all have as many


def test_failures_have_their_reason():
    printed = " ".join(text(report.table(plausible()), 80).split())
    assert "Sparse on digits with a CNN failed: Diverged: loss is nan at step 12" in printed


def test_strange_rows_are_printed():
    printed = text(report.table(strange()), 80)
    assert max(map(len, printed.splitlines())) <= 80
    assert "[bold]" in printed
    assert "nan" not in printed
    assert text(report.table(Comparison([])), 80)


# The page.

def test_the_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    assert report.html(plausible(), path) == path
    before = path.read_bytes()

    def broken(*_):
        raise OSError("disk is full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk is full"):
        report.html(Comparison([]), path)
    assert path.read_bytes() == before


def test_the_page_holds_plotly_once_and_refers_to_nothing_outside(tmp_path):
    page = report.html(plausible(), tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("plotly.js v") == 1
    own = page.replace(report_plotly(), "")
    assert not re.findall(r"(?:src|href)=[\"']?(?![\"']?data:)", own)
    assert "http" not in own.replace("http-equiv", "")
    assert "default-src 'none'" in own


def report_plotly() -> str:
    from plotly.offline import get_plotlyjs
    return get_plotlyjs()


def test_odd_names_stay_text(tmp_path):
    page = report.html(strange(), tmp_path / "report.html").read_text(encoding="utf-8")
    own = page.replace(report_plotly(), "")
    assert "<img" not in own
    assert own.count("</script>") == 3
    stored = re.search(r'id="data">(.*?)</script>', own, re.DOTALL).group(1)
    assert json.loads(stored)["tasks"][0]["rows"][0]["change"] == ODD


# The picture.

def test_the_picture_has_a_mark_for_each_change_and_rings_the_front(tmp_path):
    path = report.picture(plausible(), tmp_path / "picture.svg", task="digits with an MLP")
    tags = [(e.tag.split("}")[1], e.get("class")) for e in ElementTree.parse(path).iter()]
    assert tags.count(("circle", None)) == 2 * len(CHANGES)
    assert tags.count(("circle", "key")) == len(CHANGES)
    chosen = plausible().rows[:len(CHANGES)]
    fronts = sum(len(report.pareto((cost(r), r.mean) for r in chosen)) for cost in (
        lambda r: r.peak_bytes, lambda r: sum(r.train_time)))
    assert tags.count(("circle", "front")) == fronts


def test_the_picture_survives_strange_rows(tmp_path):
    path = report.picture(strange(), tmp_path / "picture.svg")
    assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_the_picture_names_every_change_beside_its_point_and_no_name_covers_another(tmp_path):
    scores = [0.973, 0.971, 0.969, 0.968, 0.957, 0.956, 0.41]
    close = Comparison([Row("digits", f"Change{i}", scores=[score], train_time=[1 + i / 10],
                            peak_bytes=1_000_000 + 50_000 * i)
                        for i, score in enumerate(scores)])
    path = report.picture(close, tmp_path / "picture.svg")
    names = [(e.text, float(e.get("x")), float(e.get("y"))) for e in ElementTree.parse(path).iter()
             if (e.text or "").startswith("Change") and e.get("x")]
    assert [name for name, *_ in names].count("Change3") == 3  # two panels and the key
    for i, (_, u, v) in enumerate(names):
        assert all(abs(u - x) >= 50 or abs(v - y) >= 13 for _, x, y in names[:i])


@pytest.mark.parametrize("best", [0.99, 1.0])
def test_accuracies_go_by_the_error_unless_one_is_perfect(tmp_path, best):
    rows = [Row("digits", "A", scores=[best], train_time=[1], peak_bytes=1),
            Row("digits", "B", scores=[0.9], train_time=[2], peak_bytes=2)]
    text = report.picture(Comparison(rows), tmp_path / "picture.svg").read_text("utf-8")
    assert ("by the error on a log scale" in text) == (best < 1)


def test_a_picture_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="comparison has no scores to draw"):
        report.picture(Comparison([Row("digits", "Backprop")]), tmp_path / "picture.svg")
    with pytest.raises(ValueError, match="no task is called 'cifar'; known are digits"):
        report.picture(Comparison([Row("digits", "Backprop")]), tmp_path / "a.svg", task="cifar")
    assert not list(tmp_path.iterdir())


# The page in a browser.

class Page:
    """A report opened in a browser that has no network, and what the browser complained of."""

    def __init__(self, browser, comparison: Comparison, path: Path, **options) -> None:
        self.complaints: list[str] = []
        self.asked: list[str] = []
        report.html(comparison, path)
        context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900},
                                      **options)
        self.page = context.new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text)
                     if message.type in ("error", "warning", "trace") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append("dialog"))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready=yes]")

    def marks(self, plot: str, what: str = ".trace .point, .trace .js-line") -> int:
        return self.page.locator(f"section:not([hidden]) [data-plot={plot}]").locator(what).count()

    def visible(self, plot: str) -> list[str]:
        return self.page.evaluate(
            "plot => document.querySelector(`section:not([hidden]) [data-plot=${plot}]`)._fullData"
            ".filter(t => t.visible === true).map(t => t.meta)", plot)

    def quiet(self) -> bool:
        assert self.complaints == []
        return all(url.startswith(("file:", "data:", "blob:")) for url in self.asked)


@pytest.mark.check
@pytest.mark.browser
def test_the_page_works_in_a_browser_without_a_network(browser, tmp_path):
    opened = Page(browser, plausible(), tmp_path / "report.html")
    page = opened.page
    for plot in ("memory", "time", "curves", "alignment"):
        assert opened.marks(plot) >= len(CHANGES) - 1
    assert page.locator("section:not([hidden]) tbody tr").count() == len(CHANGES)

    front = report.pareto((r.peak_bytes, r.mean) for r in plausible().rows[:len(CHANGES)])
    rings = page.evaluate("document.querySelector('section:not([hidden]) [data-plot=memory]')"
                          "._fullData.find(t => t.meta === 'front').x.length")
    assert rings == len(front)
    assert opened.marks("memory", ".trace:first-child .point") == len(front)

    page.click("section:not([hidden]) .legend button[data-change=MonoForward]")
    for plot in ("memory", "time", "curves", "alignment"):
        assert "MonoForward" not in opened.visible(plot)
        assert "Backprop" in opened.visible(plot)
    page.click("section:not([hidden]) .legend button[data-all]")
    assert "MonoForward" in opened.visible("memory")
    page.dblclick("section:not([hidden]) .legend button[data-change=NoProp]")
    assert set(opened.visible("curves")) == {"NoProp"}
    page.click("section:not([hidden]) .legend button[data-all]")

    page.click("section:not([hidden]) [data-choose='memory saved_bytes memory']")
    assert "Saved for backward" in page.text_content(
        "section:not([hidden]) [data-plot=memory] .xtitle")
    page.click("section:not([hidden]) thead th:nth-child(5) button")
    assert page.inner_text("section:not([hidden]) tbody tr:first-child td").startswith("Mono")
    page.click("section:not([hidden]) thead th:nth-child(5) button")
    assert page.inner_text("section:not([hidden]) tbody tr:first-child td").startswith("NoProp")

    page.click(".tasks button:nth-child(2)")
    assert opened.marks("memory") >= len(CHANGES)
    assert "failed: Diverged" in page.inner_text("section:not([hidden]) tbody")
    assert opened.quiet()


@pytest.mark.check
@pytest.mark.browser
def test_strange_rows_are_shown_in_a_browser(browser, tmp_path):
    opened = Page(browser, strange(), tmp_path / "report.html", color_scheme="dark")
    assert " ".join(ODD.split()) in opened.page.inner_text("section:not([hidden]) h2")
    for i in range(len({r.task for r in strange().rows})):
        opened.page.click(f".tasks button:nth-child({i + 1})")
    assert opened.marks("memory") > 40
    assert opened.page.locator("img").count() == 0
    assert opened.quiet()


@pytest.mark.check
@pytest.mark.browser
@pytest.mark.parametrize("comparison", [Comparison([]), Comparison([row(
    "digits", "Backprop", *CHANGES["Backprop"], seeds=1)])], ids=["empty", "one row"])
def test_small_comparisons_are_shown_in_a_browser(browser, tmp_path, comparison):
    assert Page(browser, comparison, tmp_path / "report.html").quiet()


@pytest.mark.check
@pytest.mark.browser
def test_the_page_fits_a_narrow_screen(browser, tmp_path):
    opened = Page(browser, plausible(), tmp_path / "report.html")
    opened.page.set_viewport_size({"width": 400, "height": 800})
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 400
