"""Formal: learning as mathematics, in learners and lenses that compose and in circuits of bits."""

from netwright.runtime.faces import face

face(__name__)
