"""Pruning: what can go, and what tells beforehand what could."""

from netwright.runtime.faces import face

face(__name__)
