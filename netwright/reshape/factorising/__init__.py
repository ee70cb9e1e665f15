"""Low rank: matrices as products of two thin ones."""

from netwright.runtime.faces import face

face(__name__)
