"""Reshapes: functions that take a network and return a changed copy."""

from netwright.reshape.mixing.interpolate_mixer import interpolate_mixer
from netwright.reshape.pruning.prune_sublayers import prune_sublayers
from netwright.reshape.residual.reversible import reversible

__all__ = ["interpolate_mixer", "prune_sublayers", "reversible"]
