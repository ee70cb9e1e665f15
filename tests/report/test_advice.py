import copy
import json
import re

import pytest
import torch

import netwright as nw
from netwright import report
from netwright.models import gpt

ODD = '<img src=x onerror="alert(1)"> & "quotes" </script>\n$x$ [bold]'
LAYERS = [("encoder.embedding", "Embedding", 4096, 1024, "QuantizedEmbedding of 4 bits"),
          ("encoder.0.up", "Linear", 2048, 0, "removed"),
          ("encoder.0.down", "Linear", 2048, 2048, "untouched"),
          ("head", "Linear", 1024, 512, "kept in bfloat16")]


def point(number, recipe, quality, size, time, **more):
    shares = {"size": size, "inference_time": time, "inference_memory": 0.9}
    figures = {"size": 9216 * size, "inference_time": 0.01 * time, "inference_memory": 9000.0}
    layers = [dict(zip(("name", "kind", "bytes", "bytes_after", "became"), layer, strict=True),
                   share=layer[2] / 9216) for layer in LAYERS] if number else []
    step = {"text": recipe, "name": "prune_sublayers", "gist": "Return a copy without some.",
            "papers": ["000-012", "999-999"], "evidence": ["shown"], "keeps_function": False,
            "after": {"quality": quality, "shares": shares, "seconds": 0.2}}
    return {"number": number, "folder": str(number) if number else "", "recipe": recipe,
            "plain": {}, "key": "", "shares": shares, "figures": figures, "layers": layers,
            "quality": {"value": quality, "low": quality - 0.01, "high": quality + 0.01,
                        "metric": quality, "screened": quality},
            "time": {"median": time, "low": time - 0.05, "high": time + 0.05, "turns": 21},
            "meets": size <= 0.5, "misses": [], "recommended": number == 2, "dominated": False,
            "slower": time > 1, "plain_dtype": False, "loads": "netwright.load" if number else "",
            "untouched": [layer for layer in layers if layer["became"] == "untouched"],
            "steps": [step, {**step, "after": None}] if number else [], **more}


def plausible():
    points = [point(0, "the original", 1.0, 1.0, 1.0),
              point(1, "prune_sublayers(remove=1)", 0.98, 0.7, 0.8),
              point(2, "prune_sublayers(remove=2) + narrow", 0.95, 0.4, 0.5),
              point(3, "narrow", 0.90, 0.45, 1.2, dominated=True)]
    return {"format": 1, "netwright": "0.1.0", "machine": {"cores": 2, "device": "CPU"},
            "model": {"class": "BertModel", "name": "minilm", "figures": {}, "dtypes": ["float32"]},
            "data": {"calibration": 64, "screening": 64, "final": 128, "batch": 16},
            "quality": {"name": "pairwise", "means": "correlation of similarities",
                        "labels": False, "original": 1.0},
            "wants": [{"resource": "size", "written": "size=0.5", "share": 0.5,
                       "absolute": 4608.0}],
            "keep": 0.93, "resources": ["size"], "budget": 60.0, "seconds": 58.0, "spent": 50.0,
            "points": points, "recommended": 2, "met": True, "verdict": "2 meets size=0.5.",
            "tried": [{"recipe": "narrow(ratio=0.9)", "steps": ["narrow"], "quality": 0.99,
                       "shares": {"size": 0.9, "inference_time": 0.95}, "seconds": 1.0,
                       "front": True}],
            "methods": [{"name": "reshape.narrow", "where": "2 layers: a, b", "saves": [],
                         "gist": "Return a narrower copy.", "papers": ["000-012"],
                         "evidence": [], "settings": 3}],
            "failed": [{"recipe": "merge", "reason": "the widths differ", "seconds": 0.1}],
            "aside": [{"name": "reshape.upcycle", "why": "it asks for training"}]}


def strange():
    """Names that would be markup, and nothing beside the original."""
    found = copy.deepcopy(plausible())
    found["model"]["name"] = found["verdict"] = found["points"][1]["recipe"] = ODD
    found["failed"][0]["reason"] = found["aside"][0]["why"] = ODD
    for layer in found["points"][1]["layers"]:
        layer["became"] = ODD
        layer["name"] = f"a.{ODD}"
    found["points"][3]["quality"]["value"] = float("nan")
    found["points"][3]["shares"] = {"size": float("nan")}
    return found


def empty():
    found = {**plausible(), "tried": [], "methods": [], "failed": [], "aside": [], "wants": [],
             "recommended": None, "verdict": "Nothing met the limits."}
    return {**found, "points": [{**found["points"][0], "recommended": False}]}


def test_the_page_says_what_the_advice_says(tmp_path):
    text = report.advice(plausible(), tmp_path / "page.html").read_text()
    for said in ("2 meets size=0.5.", "Asked for: size=0.5", "recommended; meets all limits",
                 "slower than the original", "beaten by another", "the widths differ",
                 "reshape.upcycle</b>: it asks for training", "FinerCut", "1 layers left as they",
                 "0.9500 (0.9400 to 0.9600)", "58 s of a budget of 1 min"):
        assert said in text, said


def test_the_page_asks_for_nothing_from_elsewhere(tmp_path):
    text = report.advice(plausible(), tmp_path / "page.html").read_text()
    own = text[:text.index("<script>")] + text[text.rindex("<script>"):]
    assert "default-src 'none'" in own
    assert not re.search(r"(src|href)=\"?https?:", own)


def test_names_are_never_markup(tmp_path):
    text = report.advice(strange(), tmp_path / "page.html").read_text()
    assert "<img" not in text[:text.index("<script>")]


@pytest.mark.parametrize("found", [{}, {"format": 2, "points": []}, {"format": 1}])
def test_what_is_no_advice_is_refused(tmp_path, found):
    with pytest.raises(ValueError, match="found must be an advice of format 1"):
        report.advice(found, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def inspected():
    model, x = gpt(96, context=16), torch.zeros(2, 16, dtype=torch.long)
    return nw.inspect(model, x, repeats=1), nw.applicable(model, x, kind="reshape")


def test_an_inspection_is_a_page(inspected, tmp_path):
    found, changes = inspected
    text = report.inspection(found, tmp_path / "page.html", changes).read_text()
    for said in (*found.said, *found.unusual, "reshape.prune_sublayers",
                 f"{len(changes)} changes apply to this network"):
        assert said in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    for key in ("parameters", "bytes", "flops"):
        assert sum(data["tree"]["values"][key]) == getattr(found.total, key)
    assert len(set(data["tree"]["ids"])) == len(data["tree"]["ids"])
    assert {*data["tree"]["parents"]} <= {"", *data["tree"]["ids"]}
    assert "netwright applicable lists it" in report.inspection(
        found, tmp_path / "page.html").read_text()


# In a browser.

class Page:
    """A page opened in a browser that has no network, and what the browser complained of."""

    def __init__(self, browser, path, **options):
        self.complaints, self.asked = [], []
        context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900},
                                      **options)
        self.page = context.new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text)
                     if message.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append("dialog"))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready=yes]")

    def quiet(self):
        assert self.complaints == []
        return all(url.startswith(("file:", "data:", "blob:")) for url in self.asked)


@pytest.mark.check
@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_front_and_the_layers_are_looked_through_in_a_browser(browser, tmp_path, scheme):
    opened = Page(browser, report.advice(plausible(), tmp_path / "page.html"), color_scheme=scheme)
    page, shown = opened.page, "section[data-shown]:not([hidden])"
    traces = "document.querySelector('[data-plot=front]')._fullData"
    assert page.evaluate(f"{traces}.find(t => t.meta === 'points').x.length") == 4
    assert page.evaluate(f"{traces}.find(t => t.meta === 'tried').x.length") == 1
    assert page.evaluate("document.querySelector('[data-plot=front]').layout.shapes.length") == 2
    assert page.inner_text(f"{shown} h2") == "2 · prune_sublayers(remove=2) + narrow"
    assert page.locator(f"{shown} .slice").count() >= len(LAYERS)

    page.click("button[data-resource=inference_time]")
    assert "Time of an answer" in page.text_content("[data-plot=front] .xtitle")
    assert page.evaluate("document.querySelector('[data-plot=front]').layout.shapes.length") == 1
    page.click("tr[data-point='3']")
    assert page.inner_text(f"{shown} h2") == "3 · narrow"
    page.focus("tr[data-point='1']")
    page.keyboard.press("Enter")
    assert page.get_attribute("tr[data-point='1']", "aria-selected") == "true"
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert opened.quiet()


@pytest.mark.check
@pytest.mark.browser
@pytest.mark.parametrize("found", [strange, empty])
def test_strange_advices_are_shown_in_a_browser(browser, tmp_path, found):
    opened = Page(browser, report.advice(found(), tmp_path / "page.html"))
    for row in opened.page.locator("tr[data-point]").all():
        row.click()
    assert opened.page.locator("img").count() == 0
    assert opened.quiet()


@pytest.mark.check
@pytest.mark.browser
def test_an_inspection_is_looked_through_in_a_browser(browser, inspected, tmp_path):
    opened = Page(browser, report.inspection(*inspected[:1], tmp_path / "page.html", inspected[1]))
    page = opened.page
    assert page.locator("[data-plot=tree] .slice").count() > len(inspected[0].kinds)
    assert page.locator("[data-plot=kinds] .trace").count() == len(inspected[0].kinds)
    page.click("button[data-figure=flops]")
    assert "Share of FLOPs" in page.text_content("[data-plot=stages] .xtitle")
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert opened.quiet()
