"""Building blocks: modules that networks are made of."""

from netwright.blocks import reversible

__all__ = ["reversible"]
