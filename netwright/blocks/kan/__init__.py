"""Kolmogorov-Arnold blocks: the functions on the edges are learned."""

from netwright.blocks.kan.activation_based import AFKANFeedForward, AFKANLinear
from netwright.blocks.kan.autoencoder import KANAutoencoder
from netwright.blocks.kan.rational import GroupRational, RationalFeedForward
from netwright.blocks.kan.selectable import KANFeedForward, PrunedKANLinear, SelectableKANLinear

__all__ = ["AFKANFeedForward", "AFKANLinear", "GroupRational", "KANAutoencoder", "KANFeedForward",
           "PrunedKANLinear", "RationalFeedForward", "SelectableKANLinear"]
