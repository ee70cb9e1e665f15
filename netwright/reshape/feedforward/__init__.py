"""Surgery on feed-forward layers, and what tells where they are."""

from netwright.reshape.feedforward.bricks import Bricks
from netwright.reshape.feedforward.exchanging import (
    FeedForwardWeights,
    feedforward_weights,
    put_block,
    with_blocks,
    write_feedforward,
)
from netwright.reshape.feedforward.feedforwards import FeedForwardLayer, feedforwards
from netwright.reshape.feedforward.fuse_feedforward import FeedForwardRun, feedforward_runs
from netwright.reshape.feedforward.swap_feedforward import Swap, unswap_feedforward

__all__ = ["Bricks", "FeedForwardLayer", "FeedForwardRun", "FeedForwardWeights", "Swap",
           "feedforward_runs", "feedforward_weights", "feedforwards", "put_block",
           "unswap_feedforward", "with_blocks", "write_feedforward"]
