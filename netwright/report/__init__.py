"""Results for people: tables, pages with plots that need no network, and pictures."""

from netwright.report._advice import advice
from netwright.report._figures import FIGURES, PALETTE, pareto
from netwright.report._inspection import inspection
from netwright.report._page import html
from netwright.report._picture import picture
from netwright.report._table import table
from netwright.runtime.units import bytes_text, count_text, seconds_text

__all__ = ["FIGURES", "PALETTE", "advice", "bytes_text", "count_text", "html", "inspection",
           "pareto", "picture", "seconds_text", "table"]
