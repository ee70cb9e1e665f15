"""What the site shows of each method: one page for each file that has methods, or a text.

A page's text stands beside the file, under the same name: `mono_forward.md` beside
`mono_forward.py`. Its front matter, if it has any, becomes columns of the room's table. The text
of a folder is `index.md`, and what the folder is called is said before the colon in the docstring
of its `__init__.py`.
"""

import ast
import importlib
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mkdocs.utils.meta import get_data

from netwright.catalogue import facets
from netwright.catalogue.facets import KINDS, Method, methods, public_name
from netwright.runtime.faces import declared, files

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "netwright"


@dataclass(frozen=True)
class Page:
    """A file's page: `names` are the public names with what they stand for, as in its `__all__`.

    `methods` are those of the names that say what they are for.
    """

    module: str
    names: Mapping[str, Any]
    methods: Mapping[str, Method]
    text: str
    facts: Mapping[str, str]

    @property
    def uri(self) -> str:
        """The place on the site, which mirrors that in the package."""
        return "/".join(self.module.split(".")[1:]) + ".md"

    @property
    def main(self) -> list[Method]:
        """The methods, without those that go with another one unless there are no others."""
        own = [entry for entry in self.methods.values() if entry.facets.kind != "companion"]
        return own or list(self.methods.values())

    @property
    def title(self) -> str:
        """The heading of the text, else the names, else what the file is called."""
        if self.text.startswith("# "):
            return self.text.partition("\n")[0].removeprefix("# ")
        names = [name.rpartition(".")[2] for name in self.names]
        return ", ".join(names) if len(names) < 3 else said(self.module.rpartition(".")[2])


@cache
def pages() -> tuple[Page, ...]:
    """Return every page, in the order of the files."""
    known = methods()
    by_module: dict[str, dict[str, Method]] = {}
    for name, entry in known.items():
        by_module.setdefault(entry.value.__module__, {})[name] = entry
    found = []
    for module, path in files("netwright"):
        text, facts = hand_written(path.with_suffix(".md"))
        if declared(path) and (text or module in by_module):
            loaded = importlib.import_module(module)
            found.append(Page(module, {public_name(module, name): getattr(loaded, name)
                                       for name in declared(path)},
                              by_module.get(module, {}), text, facts))
    return tuple(found)


@cache
def page_of(name: str) -> Page:
    """Return the page that shows a public name, as in `rules.MonoForward`."""
    return next(page for page in pages() if name in page.names)


def hand_written(path: Path) -> tuple[str, Mapping[str, str]]:
    """Return a text and its front matter, nothing where there is no such file."""
    if not path.exists():
        return "", {}
    text, facts = get_data(path.read_text(encoding="utf-8"))
    return text.strip(), facts


@cache
def folders() -> dict[str, list[str]]:
    """Return the folders with pages by their place on the site, each with the folders in it.

    Rooms stand in the order of the kinds that they hold, and families by name.
    """
    found: dict[str, list[str]] = {"": []}
    for page in sorted(pages(), key=lambda page: (_rank(page.uri.split("/")[0]), page.uri)):
        parts = page.uri.split("/")[:-1]
        for depth in range(len(parts)):
            inside, folder = "/".join(parts[:depth]), "/".join(parts[:depth + 1])
            if folder not in found[inside]:
                found[inside].append(folder)
                found[folder] = []
    return found


@cache
def _rank(room: str) -> tuple[int, str]:
    kinds = [entry.facets.kind for page in pages() if page.uri.startswith(room + "/")
             for entry in page.methods.values() if entry.facets.kind != "companion"]
    first = max(sorted(set(kinds)), key=kinds.count) if kinds else list(KINDS)[-1]
    return list(KINDS).index(first), room


def called(folder: str) -> tuple[str, str]:
    """Return what a folder is called and what it holds, from the docstring of its package."""
    source = (PACKAGE / folder / "__init__.py").read_text(encoding="utf-8")
    doc = (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")[0].replace("\n", " ")
    title, colon, gist = doc.partition(": ")
    return (title, gist) if colon else (said(posixpath.basename(folder)), doc)


def said(name: str) -> str:
    """Return a file's name in words."""
    return name.replace("_", " ").capitalize()


def gist(value: Any) -> str:
    """Return the first sentence of a docstring, for the cell of a table."""
    return cell(facets.gist(value).partition(". ")[0].rstrip("."))


def cell(text: str) -> str:
    """Return text that cannot break out of a table's cell."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def link(source: str, target: str) -> str:
    """Return the way from one place on the site to another.

    >>> link("rules/local/mono_forward.md", "pictures/glu.svg")
    '../../pictures/glu.svg'
    """
    return posixpath.relpath(target, posixpath.dirname(source) or ".")
