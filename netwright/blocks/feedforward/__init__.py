"""Feed-forward blocks: (*, dim) in and out, in place of two linear layers."""

from netwright.blocks.feedforward.feed_forward import GLU, FeedForward
from netwright.blocks.feedforward.self_guided import SelfGuided, guide, unguide
from netwright.blocks.feedforward.structured_feed_forward import (
    LowRankFeedForward,
    StructuredFeedForward,
)
from netwright.blocks.feedforward.structured_linear import StructuredLinear, premerge

__all__ = ["GLU", "FeedForward", "LowRankFeedForward", "SelfGuided", "StructuredFeedForward",
           "StructuredLinear", "guide", "premerge", "unguide"]
