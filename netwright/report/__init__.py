"""A comparison's results for people: a table, a page with plots, and a picture."""

from netwright.report._figures import FIGURES, PALETTE, bytes_text, count_text, pareto, seconds_text
from netwright.report._page import html
from netwright.report._picture import picture
from netwright.report._table import table

__all__ = ["FIGURES", "PALETTE", "bytes_text", "count_text", "html", "pareto", "picture",
           "seconds_text", "table"]
