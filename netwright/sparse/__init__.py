"""Sparse networks: tickets, masks that are learned, layers that compute with zeros."""

from netwright.runtime.faces import face

face(__name__, "netwright.blocks.sparse", "netwright.reshape.masking")
