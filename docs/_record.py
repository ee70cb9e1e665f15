"""Records what the pages of the rules show: every rule on both digits tasks.

    python docs/_record.py

Runs that `runs/netwright.db` holds already are not made again.
"""

from pathlib import Path

import netwright as nw
from netwright import report
from netwright.compare import CHANGES
from netwright.results import Comparison

HERE = Path(__file__).parent

# What is for other networks than those of the digits, or trains no classifier.
APART = {"Rule", "BlackBoxPrompt", "DiffusionBlocks", "ReverseDerivativeAscent", "SingleForward",
         "StationaryFeedback"}

found = nw.compare(changes=[name for name in nw.rules.__all__ if name not in APART])
found.save(HERE / "comparison.json")
default = Comparison([row for row in found.rows if row.change in CHANGES], found.settings)
report.picture(default, HERE / "comparison.svg")
