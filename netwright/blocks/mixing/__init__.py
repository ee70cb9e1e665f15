"""Token mixing: linear layers in place of attention."""

from netwright.runtime.faces import face

face(__name__)
