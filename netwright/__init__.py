"""netwright: change how a PyTorch network is built, trained and run, and measure each change."""

from netwright import data, errors, evidence, measure, papers, reshape, rules
from netwright.compare import compare, recorded
from netwright.history import History
from netwright.parallel_forward import fixed_point, parallel_forward, parallel_recurrence
from netwright.stages import Stages, stages
from netwright.tasks import Task
from netwright.training import fit

__all__ = ["History", "Stages", "Task", "compare", "data", "errors", "evidence", "fit",
           "fixed_point", "measure", "papers", "parallel_forward", "parallel_recurrence",
           "recorded", "reshape", "rules", "stages"]
__version__ = "0.1.0"
