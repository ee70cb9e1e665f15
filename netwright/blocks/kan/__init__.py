"""Kolmogorov-Arnold blocks: the functions on the edges are learned."""

from netwright.blocks.kan.rational import GroupRational, RationalFeedForward

__all__ = ["GroupRational", "RationalFeedForward"]
