"""Functions of coordinates, curves and time series."""

from netwright.blocks.coordinates.adaptive_basis_layer import AdaptiveBasisLayer
from netwright.blocks.coordinates.modulation import CoordinateAwareModulation
from netwright.blocks.coordinates.nbeats import NBeats
from netwright.blocks.coordinates.sape import SAPE, FourierFeatures

__all__ = ["SAPE", "AdaptiveBasisLayer", "CoordinateAwareModulation", "FourierFeatures", "NBeats"]
