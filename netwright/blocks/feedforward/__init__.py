"""Feed-forward blocks: (*, dim) in and out, in place of two linear layers."""

from netwright.blocks.feedforward.adaptive_activation import AGLU, APA
from netwright.blocks.feedforward.conv_glu import ConvGLU
from netwright.blocks.feedforward.fast_feedforward import FastFeedforward
from netwright.blocks.feedforward.feed_forward import GLU, FeedForward
from netwright.blocks.feedforward.gated_perceptron import GatedPerceptron
from netwright.blocks.feedforward.multiplet import LehmerMultiplet
from netwright.blocks.feedforward.neuron import Neuron, Step
from netwright.blocks.feedforward.permuted_kronecker import (
    PermutedKroneckerLinear,
    channels_for,
    effective_width,
)
from netwright.blocks.feedforward.projection_head import ProjectionHead, maxsim
from netwright.blocks.feedforward.quadratic import (
    QuadraticFeedForward,
    QuadraticLinear,
    relinear_groups,
)
from netwright.blocks.feedforward.repa_feed_forward import RePaFeedForward
from netwright.blocks.feedforward.scalable_kernel import (
    SNNK,
    RandomFeatures,
    Sine,
    bundle,
    solve_ridge,
)
from netwright.blocks.feedforward.self_guided import SelfGuided, guide, unguide
from netwright.blocks.feedforward.star import Star, StarBlock
from netwright.blocks.feedforward.structured_feed_forward import (
    LowRankFeedForward,
    StructuredFeedForward,
)
from netwright.blocks.feedforward.structured_linear import StructuredLinear, premerge

__all__ = ["AGLU", "APA", "GLU", "SNNK", "ConvGLU", "FastFeedforward", "FeedForward",
           "GatedPerceptron", "LehmerMultiplet", "LowRankFeedForward", "Neuron",
           "PermutedKroneckerLinear", "ProjectionHead", "QuadraticFeedForward", "QuadraticLinear",
           "RandomFeatures", "RePaFeedForward", "SelfGuided", "Sine", "Star", "StarBlock", "Step",
           "StructuredFeedForward", "StructuredLinear", "bundle", "channels_for",
           "effective_width", "guide", "maxsim", "premerge", "relinear_groups", "solve_ridge",
           "unguide"]
