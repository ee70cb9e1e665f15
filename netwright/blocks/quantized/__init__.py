"""Quantized layers: weights in a few bits, and the grids that they lie on."""

from netwright.runtime.faces import face

face(__name__)
