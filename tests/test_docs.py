"""Every method has its page, the site builds without a warning, and the pages' code runs."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import netwright as nw
from netwright.catalogue.facets import methods

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")),
         *sorted((ROOT / "netwright").rglob("*.md"))]

pytest.importorskip("mkdocs")
sys.path.insert(0, str(ROOT / "tools"))

from handbook import measured, tables  # noqa: E402 - the tools are no part of the package
from handbook.method_page import method_page  # noqa: E402
from handbook.pages import folders, page_of, pages  # noqa: E402


def blocks(page: Path) -> str:
    """Return a page's Python blocks as one program: later ones may use what earlier ones made."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"),
                                re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)],
                         ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = compile(blocks(page), str(page), "exec")
    assert exec(code, {"__name__": "__page__"}) is None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_public_name_that_a_page_shows_is_there(page):
    for name in set(re.findall(r"\bnw((?:\.[A-Za-z_]\w*)+)", page.read_text(encoding="utf-8"))):
        found = nw
        for part in name.split(".")[1:]:
            if isinstance(found, ModuleType):  # what a class or a function has is its own matter
                assert hasattr(found, part), f"nw{name} is not there"
                found = getattr(found, part)


@pytest.mark.parametrize("name", methods())
def test_every_method_has_a_page_with_its_facts_its_reference_and_its_evidence(name):
    page, entry = page_of(name), methods()[name]
    text = method_page(page)
    assert text.startswith("# ")
    assert f"::: netwright.{name}\n" in text
    if entry in page.main:
        assert f"`nw.{name}`" in text
        assert all(word in text for word in (*entry.facets.saves, *entry.facets.needs,
                                             entry.facets.kind, entry.facets.place))
    for paper in entry.facets.papers:
        found = measured.evidence_of([paper])
        assert found, f"no experiment is about the paper {paper} of {name}"
        assert all(measured.results()[result]["claim"] in text for result in found)


def test_every_method_that_stands_by_itself_is_in_the_table_and_in_the_index_of_its_room():
    table = tables.methods_page()
    indexes = {room: tables.folder_page(room) for room in folders()[""]}
    alone = [entry for entry in methods().values() if entry.facets.kind != "companion"]
    for entry in alone:
        if entry in page_of(entry.name).main:
            link = f"[`{entry.name.rpartition('.')[2]}`]"
            assert link in table
            assert link in indexes[page_of(entry.name).uri.partition("/")[0]]


def test_every_text_beside_the_code_belongs_to_a_page():
    places = {f"netwright/{page.uri}" for page in pages()}
    places |= {f"netwright/{folder}/index.md" for folder in folders() if folder}
    texts = {page.relative_to(ROOT).as_posix() for page in (ROOT / "netwright").rglob("*.md")}
    assert texts
    assert texts <= places


@pytest.mark.parametrize("rule", [page for page in pages() if page.text and any(
    entry.facets.kind == "rule" for entry in page.methods.values())], ids=lambda page: page.uri)
def test_the_text_of_a_rule_says_what_it_costs_and_how_it_differs_from_its_paper(rule):
    for part in ("What it costs.", "When to use it.", "Options.", "What differs from the paper"):
        assert f"**{part}" in rule.text, f"{rule.uri} does not say: {part}"
    assert set(rule.facts) == {"how the signal travels", "what it takes", "activations kept"}


def test_what_a_page_asks_for_is_listed_by_need_with_each_family_in_turn():
    lines = tables.asked('methods saves="training memory"', "index.md").splitlines()
    listed = [line for line in lines if line.startswith("- ")]
    assert len(listed) == tables.MOST
    assert len({re.search(r"\((.*)/", line)[1] for line in listed}) > 3
    assert lines[-1].endswith("(methods/index.md?saves=training+memory)")
    for line in listed:
        name = re.search(r"`(\w+)`", line)[1]
        assert any("training memory" in entry.facets.saves for entry in methods().values()
                   if entry.name.endswith(name))


def test_a_result_stands_in_full_on_one_page_alone():
    sections = [line for page in pages() for line in method_page(page).splitlines()
                if line.startswith("### ") and "#evidence-" in line]
    names = [re.search(r"#evidence-(\w+)", line)[1] for line in sections]
    assert sorted(names) == sorted(name for name, home in measured.homes().items()
                                   if home != measured.EVIDENCE)


@pytest.mark.check
@pytest.mark.browser
def test_the_table_is_filtered_by_menus_words_and_the_address(browser, tmp_path):
    rows = [("GLU", "block", "shown", "inference time, parameters"),
            ("Star", "block", "not shown", "–"), ("MonoForward", "rule", "shown", "parameters")]
    cells = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    (tmp_path / "table.html").write_text(
        '<div class="filter" data-columns="kind verdict saves place"></div><div><table><thead><tr>'
        "<th>method</th><th>kind</th><th>verdict</th><th>saves</th></tr></thead><tbody>"
        f"{cells}</tbody></table></div><script src='{ROOT / 'docs/scripts/filter.js'}'></script>")
    page = browser.new_page()

    def shown() -> list[str]:
        return page.locator("tbody tr:visible td:first-child").all_text_contents()

    address = (tmp_path / "table.html").as_uri()
    page.goto(address)
    assert page.locator("select").count() == 3  # there is no column of places
    assert shown() == ["GLU", "Star", "MonoForward"]
    page.select_option("select[name=kind]", "block")
    page.select_option("select[name=verdict]", "shown")
    assert shown() == ["GLU"]
    assert page.locator("output").text_content() == "1 of 3"
    assert page.url == address + "?kind=block&verdict=shown"
    page.goto(address + "?saves=parameters&kind=unknown")
    assert shown() == ["GLU", "MonoForward"]
    page.fill("input", "mono")
    assert shown() == ["MonoForward"]
    page.close()


@pytest.mark.check
@pytest.mark.timeout(900)
def test_the_site_builds_without_warnings(tmp_path):
    built = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict",
                            "--site-dir", str(tmp_path / "site")],
                           cwd=ROOT, capture_output=True, text=True,
                           env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert built.returncode == 0, built.stdout + built.stderr
    assert "WARNING" not in built.stderr
    site = tmp_path / "site"
    assert "Verdict" in (site / "rules/local/mono_forward/index.html").read_text(encoding="utf-8")
    assert 'class="filter"' in (site / "methods/index.html").read_text(encoding="utf-8")
    assert not [path for path in site.rglob("*") if path.suffix == ".py"]
