"""The page of a file: its facts, its text, what was measured of it, and its public names."""

import re
from collections.abc import Iterable, Mapping
from functools import cache

from handbook.measured import benchmarks_of, cost_section, evidence_section
from handbook.pages import ROOT, Page, cell, gist, hand_written, link, pages
from netwright import papers
from netwright.catalogue.facets import KINDS, searched

MOST_MENTIONS = 10


def method_page(page: Page) -> str:
    """Return the page as Markdown."""
    heading, _, text = page.text.partition("\n")
    return "\n".join([
        heading or f"# {page.title}", "", *facts(page), "",
        text.strip() or "\n".join(f"- `{name.rpartition('.')[2]}`: {gist(value)}."
                                  for name, value in page.names.items()), "",
        *cost_section(page), *benchmarks_of(page), *evidence_section(page), *_mentions(page),
        *_reference(page)])


def facts(page: Page) -> list[str]:
    """Return what the methods say of themselves, as a table without a heading."""
    said = [entry.facets for entry in page.main]
    names = ", ".join(f"`nw.{entry.name}`" for entry in page.main) or ", ".join(
        f"`nw.{name}`" for name in page.names)
    kinds = _once(entry.kind for entry in said)
    keeps = {entry.keeps_function for entry in said} - {None}
    lines = {
        "Name": names,
        "Kind": "; ".join(f"{kind}: {KINDS[kind]}" for kind in kinds),
        "Place": ", ".join(_once(entry.place for entry in said if entry.place)),
        "Saves": ", ".join(_once(word for entry in said for word in entry.saves)),
        "Needs": ", ".join(_once(word for entry in said for word in entry.needs)),
        "Keeps the function": "" if len(keeps) != 1 else "yes" if True in keeps else "no",
        **{key[:1].upper() + key[1:]: cell(str(value)) for key, value in page.facts.items()},
        "Tuned": ", ".join(_once(_tuned(name, over) for entry in page.main
                                 for name, over in searched(entry.value).items())),
        "Papers": "; ".join(cell(papers.paper(paper).title) for paper in
                            _once(paper for entry in said for paper in entry.papers)),
    }
    return ["| | |", "|---|---|",
            *(f"| {key} | {value} |" for key, value in lines.items() if value)]


def _tuned(name: str, over: object) -> str:
    if isinstance(over, tuple) and len(over) == 2:
        return f"`{name}` from {over[0]:g} to {over[1]:g}"
    choices = over if isinstance(over, (list, tuple)) else [over]
    return f"`{name}` of {', '.join(map(str, choices))}"


def _once(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))


def _reference(page: Page) -> list[str]:
    parts = ["## Reference", ""]
    for name in page.names:
        parts += [f"::: netwright.{name}", ""]
    return parts


def _mentions(page: Page) -> list[str]:
    """Return a line with the guides and other texts in which a name of this page is used."""
    called = "|".join(rf"\bnw\.{room}(?:\w+\.)*{last}\b" for name in page.names
                      for room, last in [(name[:name.rfind(".") + 1], name.rpartition(".")[2])])
    capital = "|".join(last for name in page.names
                       if not (last := name.rpartition(".")[2]).islower())
    in_guides = f"{called}|`({capital})`" if capital else called
    found = [f"[{title}]({link(page.uri, uri)})" for uri, (title, text) in texts().items()
             if uri != page.uri and re.search(in_guides if uri.startswith("guides/") else called,
                                              text)]
    return ["**See also:** " + ", ".join(found[:MOST_MENTIONS]) + ".", ""] if found else []


@cache
def texts() -> Mapping[str, tuple[str, str]]:
    """Return the hand-written texts by their place, each with its title."""
    guides = {f"guides/{path.name}": hand_written(path)[0]
              for path in sorted((ROOT / "docs/guides").glob("*.md"))}
    return {uri: (text.partition("\n")[0].removeprefix("# "), text)
            for uri, text in (guides | {page.uri: page.text for page in pages()}).items()}
