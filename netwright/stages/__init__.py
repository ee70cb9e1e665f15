"""A network as a chain of stages."""

from netwright.runtime.faces import face

face(__name__)
