"""Measures: what a network, a rule or a change costs, and how it behaves."""

from netwright.runtime.faces import face

face(__name__)
