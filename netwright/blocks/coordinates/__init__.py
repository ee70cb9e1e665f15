"""Functions of coordinates, curves and time series."""

from netwright.blocks.coordinates.modulation import CoordinateAwareModulation
from netwright.blocks.coordinates.sape import SAPE, FourierFeatures

__all__ = ["SAPE", "CoordinateAwareModulation", "FourierFeatures"]
