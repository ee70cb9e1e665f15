"""Pruning, and what tells beforehand what could be pruned."""

from netwright.reshape.pruning.prune_sublayers import sublayers, without_sublayers

__all__ = ["sublayers", "without_sublayers"]
