"""Building blocks: modules that networks are made of."""

from netwright.blocks import coordinates, experts, feedforward, kan, mixing, reversible

__all__ = ["coordinates", "experts", "feedforward", "kan", "mixing", "reversible"]
