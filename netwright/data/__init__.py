"""Data sets: those that ship with a library, and real ones under `NETWRIGHT_DATA`."""

from netwright.data.batches import Batches
from netwright.data.images import Split, cifar10, digits, mnist

__all__ = ["Batches", "Split", "cifar10", "digits", "mnist"]
