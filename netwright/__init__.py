"""netwright: change how a PyTorch network is built, trained and run, and measure each change."""

from netwright import rules
from netwright.stages import Stages, stages

__all__ = ["Stages", "rules", "stages"]
__version__ = "0.1.0"
