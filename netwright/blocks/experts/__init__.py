"""Experts: feed-forward blocks of which each token uses a few."""

from netwright.runtime.faces import face

face(__name__, "netwright.objectives.added_loss")
