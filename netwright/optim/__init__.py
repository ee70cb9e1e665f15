"""Optimizers: they step on the parameters, also on a block of them at a time."""

from netwright.runtime.faces import face

face(__name__)
