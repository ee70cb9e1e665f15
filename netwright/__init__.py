"""netwright: change how a PyTorch network is built, trained and run, and measure each change."""

import importlib
from typing import Any

from netwright import (
    blocks,
    circuits,
    data,
    errors,
    evidence,
    flows,
    learners,
    measure,
    optim,
    papers,
    reshape,
    rules,
)
from netwright.compare import compare, recorded
from netwright.history import History
from netwright.parallel_forward import fixed_point, parallel_forward, parallel_recurrence
from netwright.stages import Stages, stages
from netwright.tasks import Task
from netwright.training import fit

__all__ = ["History", "Stages", "Task", "blocks", "boosting", "circuits", "compare", "data",
           "errors", "evidence", "fit", "fixed_point", "flows", "learners", "measure", "optim",
           "papers", "parallel_forward", "parallel_recurrence", "recorded", "reshape", "rules",
           "stages"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "boosting":  # imports scikit-learn, which takes a second
        return importlib.import_module("netwright.boosting")
    raise AttributeError(f"module 'netwright' has no attribute {name!r}")
