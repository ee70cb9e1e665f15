"""Functions of coordinates, curves and time series."""

from netwright.blocks.coordinates.adaptive_basis_layer import AdaptiveBasisLayer
from netwright.blocks.coordinates.nbeats import NBeats

__all__ = ["AdaptiveBasisLayer", "NBeats"]
