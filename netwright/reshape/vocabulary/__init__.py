"""Vocabulary: which words a network knows."""

from netwright.runtime.faces import face

face(__name__)
