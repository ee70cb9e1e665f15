"""Experts: feed-forward blocks of which each token uses a few."""

from netwright.blocks.experts.glu_experts import GLUExperts
from netwright.blocks.experts.mixture import MixtureOfExperts, Usage, auxiliary_scale
from netwright.blocks.experts.routing import Routing, TopKRouter

__all__ = [
    "GLUExperts",
    "MixtureOfExperts",
    "Routing",
    "TopKRouter",
    "Usage",
    "auxiliary_scale",
]
