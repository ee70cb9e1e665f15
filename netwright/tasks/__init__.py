"""What is trained on what: the built-in tasks, and those of a user's file."""

from netwright.runtime.faces import face

face(__name__)
