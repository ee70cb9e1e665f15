"""Numerics: closed forms, fixed points, and whole networks evaluated at once."""

from netwright.runtime.faces import face

face(__name__)
