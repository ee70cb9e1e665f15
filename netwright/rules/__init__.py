"""Rules: what can stand where `loss.backward()` stood."""

from netwright.runtime.faces import face

face(__name__)
