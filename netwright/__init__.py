"""netwright: change how a PyTorch network is built, trained and run, and measure each change."""

from netwright import circuits, data, errors, evidence, learners, measure, papers, reshape, rules
from netwright.compare import compare, recorded
from netwright.history import History
from netwright.stages import Stages, stages
from netwright.tasks import Task
from netwright.training import fit

__all__ = ["History", "Stages", "Task", "circuits", "compare", "data", "errors", "evidence", "fit",
           "learners", "measure", "papers", "recorded", "reshape", "rules", "stages"]
__version__ = "0.1.0"
