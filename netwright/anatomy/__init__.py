"""What is inside a network, and how to put something else there."""

from netwright.runtime.faces import face

face(__name__)
