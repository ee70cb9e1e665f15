"""Reshapes: functions that take a network and return a changed copy."""

from netwright.reshape.pruning.prune_sublayers import prune_sublayers
from netwright.reshape.residual.parallelize_residual import parallelize_residual
from netwright.reshape.residual.reversible import reversible

__all__ = ["parallelize_residual", "prune_sublayers", "reversible"]
