"""Experts: feed-forward blocks of which each token uses a few."""

from netwright.blocks.auxiliary import auxiliary_scale
from netwright.blocks.experts.centroid_router import CentroidRouter
from netwright.blocks.experts.expert_choice_router import ExpertChoiceRouter
from netwright.blocks.experts.glu_experts import GLUExperts
from netwright.blocks.experts.hash_router import HashRouter, feed_token_ids
from netwright.blocks.experts.loss_free_router import LossFreeRouter
from netwright.blocks.experts.mixture import MixtureOfExperts, Usage
from netwright.blocks.experts.moe_plus_plus import (
    ConstantExpert,
    CopyExpert,
    PathwayRouter,
    ZeroExpert,
    link_gates,
    moe_plus_plus,
)
from netwright.blocks.experts.routing import Routing, TopKRouter
from netwright.blocks.experts.sublayers import SelfAttention, Sublayer, par_pattern, sublayers
from netwright.blocks.experts.widenet import WideNet

__all__ = ["CentroidRouter", "ConstantExpert", "CopyExpert", "ExpertChoiceRouter", "GLUExperts",
           "HashRouter", "LossFreeRouter", "MixtureOfExperts", "PathwayRouter", "Routing",
           "SelfAttention", "Sublayer", "TopKRouter", "Usage", "WideNet", "ZeroExpert",
           "auxiliary_scale", "feed_token_ids", "link_gates", "moe_plus_plus", "par_pattern",
           "sublayers"]
