"""Feed-forward blocks: (*, dim) in and out, in place of two linear layers."""

from netwright.runtime.faces import face

face(__name__)
