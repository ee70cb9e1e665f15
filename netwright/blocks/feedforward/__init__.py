"""Feed-forward blocks: (*, dim) in and out, in place of two linear layers."""

from netwright.blocks.feedforward.fast_feedforward import FastFeedforward
from netwright.blocks.feedforward.feed_forward import GLU, FeedForward

__all__ = ["GLU", "FastFeedforward", "FeedForward"]
