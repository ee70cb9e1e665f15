"""The training loop, its checkpoints and its history."""

from netwright.runtime.faces import face

face(__name__)
