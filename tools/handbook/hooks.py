"""Makes the site: the pages of the methods, the lists of them, and what was measured.

Nothing is listed by hand: methods are found in the package, their texts beside their files, and
what was measured in the committed results.
"""

import re
import sys
from pathlib import Path
from textwrap import indent
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tools` is no package

import stubs
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from handbook import measured, ranking, reference, signals, tables
from handbook.method_page import method_page
from handbook.pages import ROOT, called, folders, link, pages, said
from handbook.pictures import drawn

MARK = re.compile(r"^( *)<!-- (measured map|measured comparison|methods(?: [^>]*)?) -->$",
                  re.MULTILINE)
PICTURE = re.compile(r"^!\[[^]]*\]\((?:\.\./)*pictures/(\w+)\.svg\)$", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the menu, and write the stubs in which the methods' names are looked up."""
    stubs.write(stubs.ROOT / "netwright")
    for part in config.nav or []:
        if "Guides" in part:
            part["Guides"] = _guides()
        elif "Methods" in part:
            part["Methods"] = [tables.METHODS, *map(_menu, folders()[""])]
        elif "Reference" in part:
            part["Reference"] += [{said(room): f"reference/{room}.md"}
                                  for room in reference.rooms()]
    return config


def _guides() -> list[str]:
    """Return the guides in the order in which their index names them, then any others."""
    index = ROOT / "docs/guides/index.md"
    named = re.findall(r"\]\(([\w-]+\.md)\)", index.read_text("utf-8"))
    there = sorted(path.name for path in index.parent.glob("*.md") if path != index)
    return [f"guides/{name}" for name in dict.fromkeys(["index.md", *named, *there])]


def _menu(folder: str) -> dict[str, Any]:
    """Return a folder's part of the menu: its index, the folders in it, then its pages."""
    own = [page for page in pages() if page.uri.rpartition("/")[0] == folder]
    return {called(folder)[0]: [
        f"{folder}/index.md", *map(_menu, folders()[folder]),
        *({page.title: page.uri} for page in sorted(own, key=lambda page: page.title.lower()))]}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures that are made here."""
    made = {tables.METHODS: tables.methods_page(), "reference/papers.md": tables.papers_page(),
            "reference/layout.md": tables.layout_page(),
            measured.EVIDENCE: measured.evidence_page(),
            "measured/ranking.md": ranking.page(),
            measured.BENCHMARKS: measured.benchmarks_page()}
    made |= {f"reference/{room}.md": reference.page(room) for room in reference.rooms()}
    made |= {page.uri: method_page(page) for page in pages()}
    made |= {f"{folder}/index.md": tables.folder_page(folder) for folder in folders() if folder}
    made |= {f"pictures/{name}.svg": drawn(result) for name, result in measured.results().items()}
    made |= {f"pictures/digits_{rule}.svg": drawn(curves)
             for rule, curves in measured.by_epoch().items()}
    made |= {"pictures/map_of_signals.svg": signals.schemes(),
             "pictures/map_of_costs.svg": signals.measured()}
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Put what is asked for by a mark in its place, and the verdict below each picture."""
    uri = page.file.src_uri
    if page.file.generated_by is None or uri.endswith("index.md"):
        markdown = PICTURE.sub(lambda shown: f"{shown[0]}\n\n{_verdict(shown[1], uri)}", markdown)
    return MARK.sub(lambda mark: indent(_made(mark[2], uri), mark[1]), markdown)


def _made(mark: str, uri: str) -> str:
    if mark == "measured map":
        return tables.measured_map(uri)
    return measured.whole_comparison() if mark == "measured comparison" else tables.asked(mark, uri)


def _verdict(name: str, uri: str) -> str:
    """Return what is claimed and what was found, to stand below a picture."""
    result = measured.results().get(name)
    if result is None:
        return ""  # a picture of the comparison, or one that MkDocs says is missing
    home = measured.homes()[name]
    return (f"*Claim:* {result['claim']} *Verdict:* **{measured.verdict_of(name)}**. "
            f"[What was run, and every figure]({link(uri, home)}#evidence-{name}).")
