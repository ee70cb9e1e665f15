"""Kolmogorov-Arnold blocks: the functions on the edges are learned."""

from netwright.runtime.faces import face

face(__name__)
