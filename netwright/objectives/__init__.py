"""Objectives: losses and metrics."""

from netwright.runtime.faces import face

face(__name__)
