"""What the methods of a kind keep to, as checks that a method of your own can be held to."""

from netwright.runtime.faces import face

face(__name__)
