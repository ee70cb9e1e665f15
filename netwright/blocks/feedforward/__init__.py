"""Feed-forward blocks: (*, dim) in and out, in place of two linear layers."""

from netwright.blocks.feedforward.feed_forward import GLU, FeedForward

__all__ = ["GLU", "FeedForward"]
