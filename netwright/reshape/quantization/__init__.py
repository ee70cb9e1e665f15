"""Quantization: fewer bits for the numbers that a network holds."""

from netwright.runtime.faces import face

face(__name__)
