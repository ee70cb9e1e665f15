"""Pruning, and what tells beforehand what could be pruned."""

from netwright.runtime.faces import face

face(__name__)
