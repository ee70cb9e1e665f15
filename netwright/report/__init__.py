"""A comparison's results for people: a table, a page with plots, and a picture."""

from netwright.report._figures import FIGURES, PALETTE, pareto
from netwright.report._page import html
from netwright.report._picture import picture
from netwright.report._table import table
from netwright.runtime.units import bytes_text, count_text, seconds_text

__all__ = ["FIGURES", "PALETTE", "bytes_text", "count_text", "html", "pareto", "picture",
           "seconds_text", "table"]
