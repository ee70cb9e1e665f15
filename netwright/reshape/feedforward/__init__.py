"""Feed-forward layers: surgery on them, and what tells where they are."""

from netwright.runtime.faces import face

face(__name__, "netwright.anatomy.exchanging", "netwright.anatomy.feedforwards")
