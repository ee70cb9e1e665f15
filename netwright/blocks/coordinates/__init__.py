"""Functions of coordinates, curves and time series."""

from netwright.blocks.coordinates.nbeats import NBeats

__all__ = ["NBeats"]
