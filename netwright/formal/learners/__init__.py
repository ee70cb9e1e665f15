"""Learners and lenses: supervised learning as things that compose."""

from netwright.runtime.faces import face

face(__name__)
