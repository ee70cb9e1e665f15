"""Generative models: densities and samplers."""

from netwright.runtime.faces import face

face(__name__)
