"""The docs build without a warning, and every Python block in them runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import netwright as nw

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


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


@pytest.mark.parametrize("rule", sorted(set(nw.rules.__all__) - {"Rule"}))
def test_every_rule_has_a_page_in_the_menu_and_a_line_in_the_map(rule):
    (page,) = [page for page in PAGES if f"::: netwright.rules.{rule}\n" in
               page.read_text(encoding="utf-8")]
    text, rules = page.read_text(encoding="utf-8"), ROOT / "docs" / "rules"
    assert page.parent == rules
    assert f"rules/{page.name}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert f"[`{rule}`]({page.name})" in (rules / "index.md").read_text(encoding="utf-8")
    for part in ("What it costs.", "When to use it.", "Options.", "What differs from the paper"):
        assert f"**{part}" in text, f"{page.name} does not say: {part}"


@pytest.mark.check
def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs")
    built = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict",
                            "--site-dir", str(tmp_path / "site")],
                           cwd=ROOT, capture_output=True, text=True,
                           env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert built.returncode == 0, built.stdout + built.stderr
    assert "WARNING" not in built.stderr
    evidence = (tmp_path / "site" / "evidence" / "index.html").read_text(encoding="utf-8")
    assert "Verdict" in evidence
