"""Reshapes: functions that take a network and return a changed copy."""

from netwright.runtime.faces import face

face(__name__, "netwright.anatomy.exchanging", "netwright.anatomy.feedforwards")
