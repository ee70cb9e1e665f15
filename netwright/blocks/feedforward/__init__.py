"""Feed-forward blocks: (*, dim) in and out, in place of two linear layers."""

from netwright.blocks.feedforward.adaptive_activation import AGLU, APA
from netwright.blocks.feedforward.conv_glu import ConvGLU
from netwright.blocks.feedforward.feed_forward import GLU, FeedForward
from netwright.blocks.feedforward.gated_perceptron import GatedPerceptron
from netwright.blocks.feedforward.projection_head import ProjectionHead, maxsim
from netwright.blocks.feedforward.star import Star, StarBlock

__all__ = [
    "AGLU",
    "APA",
    "GLU",
    "ConvGLU",
    "FeedForward",
    "GatedPerceptron",
    "ProjectionHead",
    "Star",
    "StarBlock",
    "maxsim",
]
