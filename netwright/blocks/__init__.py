"""Blocks: modules that networks are made of, by family and all together."""

from netwright.runtime.faces import face

face(__name__, "netwright.reversing", "netwright.objectives.added_loss")
