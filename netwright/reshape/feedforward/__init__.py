"""Surgery on feed-forward layers, and what tells where they are."""

from netwright.reshape.feedforward.exchanging import (
    FeedForwardWeights,
    feedforward_weights,
    put_block,
    with_blocks,
    write_feedforward,
)
from netwright.reshape.feedforward.feedforwards import FeedForwardLayer, feedforwards

__all__ = [
    "FeedForwardLayer",
    "FeedForwardWeights",
    "feedforward_weights",
    "feedforwards",
    "put_block",
    "with_blocks",
    "write_feedforward",
]
