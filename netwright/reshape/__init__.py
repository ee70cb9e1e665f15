"""Reshapes: functions that take a network and return a changed copy."""

from netwright.reshape.pruning.prune_sublayers import prune_sublayers

__all__ = ["prune_sublayers"]
