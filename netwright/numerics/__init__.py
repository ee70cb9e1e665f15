"""Closed forms and fixed points."""

from netwright.runtime.faces import face

face(__name__)
