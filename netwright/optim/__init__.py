"""Optimizers that step on a block of the parameters at a time."""

from netwright.runtime.faces import face

face(__name__)
