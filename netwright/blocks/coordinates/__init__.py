"""Coordinates: functions of coordinates, curves and time series."""

from netwright.runtime.faces import face

face(__name__)
