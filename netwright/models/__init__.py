"""Models: small whole networks to try changes on."""

from netwright.runtime.faces import face

face(__name__)
