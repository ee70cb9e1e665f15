"""Pages that need no network: a template, its style and scripts, and the data, in one file."""

import json
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from netwright.report._figures import without_nan
from netwright.runtime.version import __version__
from netwright.runtime.written import write_text


def write_page(path: str | Path, template: str, payload: Any, **parts: str) -> Path:
    """Write a page of a template of this folder, with data for its script; return its path.

    The page holds its scripts and forbids itself every connection.
    """
    from plotly.offline import get_plotlyjs
    page = Template(_file(template)).substitute(
        parts, style=_file("_style.css"), plots=_file("_plots.js"), plotly=get_plotlyjs(),
        version=escape(__version__),
        data=json.dumps(without_nan(payload), allow_nan=False).replace("<", "\\u003c"))
    return write_text(path, page)


def _file(name: str) -> str:
    return files("netwright.report").joinpath(name).read_text("utf-8")
