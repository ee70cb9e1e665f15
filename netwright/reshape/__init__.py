"""Reshapes: functions that take a network and return a changed copy."""

from netwright.reshape.feedforward.reparameterize import reparameterize
from netwright.reshape.pruning.prune_sublayers import prune_sublayers
from netwright.reshape.residual.reversible import reversible

__all__ = ["prune_sublayers", "reparameterize", "reversible"]
