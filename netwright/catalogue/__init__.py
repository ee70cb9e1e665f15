"""The papers, and what of them netwright has."""

from netwright.runtime.faces import face

face(__name__)
