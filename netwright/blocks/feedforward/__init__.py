"""Feed-forward blocks: (*, dim) in and out, in place of two linear layers."""

from netwright.blocks.feedforward.feed_forward import GLU, FeedForward
from netwright.blocks.feedforward.multiplet import LehmerMultiplet
from netwright.blocks.feedforward.quadratic import (
    QuadraticFeedForward,
    QuadraticLinear,
    relinear_groups,
)

__all__ = ["GLU", "FeedForward", "LehmerMultiplet", "QuadraticFeedForward", "QuadraticLinear",
           "relinear_groups"]
