"""Learning as mathematics: learners and lenses that compose, circuits of discrete values."""

from netwright.runtime.faces import face

face(__name__)
