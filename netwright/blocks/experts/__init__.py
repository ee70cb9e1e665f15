"""Experts: feed-forward blocks of which each token uses a few."""

from netwright.blocks.experts.expert_choice_router import ExpertChoiceRouter
from netwright.blocks.experts.glu_experts import GLUExperts
from netwright.blocks.experts.hash_router import HashRouter, feed_token_ids
from netwright.blocks.experts.loss_free_router import LossFreeRouter
from netwright.blocks.experts.mixture import MixtureOfExperts, Usage, auxiliary_scale
from netwright.blocks.experts.routing import Routing, TopKRouter

__all__ = [
    "ExpertChoiceRouter",
    "GLUExperts",
    "HashRouter",
    "LossFreeRouter",
    "MixtureOfExperts",
    "Routing",
    "TopKRouter",
    "Usage",
    "auxiliary_scale",
    "feed_token_ids",
]
