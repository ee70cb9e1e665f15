"""Running steps that can be undone, and differentiating them from what they ended in."""

from netwright.runtime.faces import face

face(__name__)
