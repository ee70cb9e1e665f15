"""Linearising: parts of a network replaced by the linear maps that come closest to them."""

from netwright.runtime.faces import face

face(__name__)
