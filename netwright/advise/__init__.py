"""What to change in a network, and to what end."""

from netwright.runtime.faces import face

face(__name__)
