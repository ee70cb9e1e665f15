"""Surgery on feed-forward layers, and what tells where they are."""

from netwright.reshape.feedforward.exchanging import (
    FeedForwardWeights,
    feedforward_weights,
    put_block,
    with_blocks,
    write_feedforward,
)
from netwright.reshape.feedforward.feedforwards import FeedForwardLayer, feedforwards
from netwright.reshape.feedforward.swap_feedforward import Swap, unswap_feedforward

__all__ = [
    "FeedForwardLayer",
    "FeedForwardWeights",
    "Swap",
    "feedforward_weights",
    "feedforwards",
    "put_block",
    "unswap_feedforward",
    "with_blocks",
    "write_feedforward",
]
