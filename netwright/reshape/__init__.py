"""Reshapes: functions that take a network and return a changed copy."""

from netwright.reshape.feedforward.swap_feedforward import swap_feedforward
from netwright.reshape.pruning.prune_sublayers import prune_sublayers
from netwright.reshape.residual.reversible import reversible

__all__ = ["prune_sublayers", "reversible", "swap_feedforward"]
