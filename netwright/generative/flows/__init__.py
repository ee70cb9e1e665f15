"""Flows: densities made of transforms that can be undone, trained without stored activations."""

from netwright.runtime.faces import face

face(__name__)
