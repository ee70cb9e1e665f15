"""Data sets: those that ship with a library, and real ones under `NETWRIGHT_DATA`."""

from netwright.runtime.faces import face

face(__name__)
