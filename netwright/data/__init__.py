"""Data sets: those that ship with a library, and real ones under `NETWRIGHT_DATA`."""

from netwright.data.images import Split, cifar10, digits, mnist

__all__ = ["Split", "cifar10", "digits", "mnist"]
