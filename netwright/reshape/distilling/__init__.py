"""Distilling: a changed network trained on what another one says."""

from netwright.runtime.faces import face

face(__name__)
