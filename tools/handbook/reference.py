"""The reference of what is public and no method: one page for each room."""

import importlib
import inspect
from functools import cache

from handbook.pages import PACKAGE, called, pages, said
from netwright.runtime.faces import declared, files


@cache
def rooms() -> dict[str, list[str]]:
    """Return the public classes and functions that no page of a method shows, by room."""
    shown = {page.module for page in pages()}
    found: dict[str, list[str]] = {}
    for module, path in files("netwright"):
        loaded = importlib.import_module(module) if declared(path) and module not in shown else None
        for name in declared(path) if loaded else []:
            value = getattr(loaded, name)
            if inspect.isclass(value) or inspect.isroutine(value):
                found.setdefault(module.split(".")[1], []).append(f"{module}.{name}")
    return {room: names for room, names in found.items() if (PACKAGE / room).is_dir()}


def page(room: str) -> str:
    """Return the page of a room."""
    parts = [f"# {said(room)}", "", _described(room), ""]
    for name in rooms()[room]:
        parts += [f"::: {name}", "    options:", "      show_root_full_path: false", ""]
    return "\n".join(parts)


def _described(room: str) -> str:
    title, what = called(room)
    return what if title == said(room) else f"{title}: {what}"
