"""Reversible blocks: what they were given is reconstructed from what they return."""

from netwright.blocks.reversible.block import ReversibleBlock
from netwright.blocks.reversible.coupling import AdditiveCoupling, AffineCoupling
from netwright.blocks.reversible.engine import Add, Update
from netwright.blocks.reversible.graph import GroupedReversible, ReversibleGIN
from netwright.blocks.reversible.multi_split import (
    MultiSplitReversible,
    ReversibleSearch,
    Zero,
    darts_reversible,
)
from netwright.blocks.reversible.sequential import ReversibleSequential
from netwright.blocks.reversible.transformer import (
    DoubleStreams,
    MergeStreams,
    ReversibleTransformerBlock,
)

__all__ = ["Add", "AdditiveCoupling", "AffineCoupling", "DoubleStreams", "GroupedReversible",
           "MergeStreams", "MultiSplitReversible", "ReversibleBlock", "ReversibleGIN",
           "ReversibleSearch", "ReversibleSequential", "ReversibleTransformerBlock", "Update",
           "Zero", "darts_reversible"]
