"""Exporting: other programs than PyTorch that run a network."""

from netwright.runtime.faces import face

face(__name__)
