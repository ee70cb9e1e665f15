"""Reversible blocks: what they were given is reconstructed from what they return."""

from netwright.runtime.faces import face

face(__name__, "netwright.reversing")
