"""Reversible blocks: what they were given is reconstructed from what they return."""

from netwright.blocks.reversible.block import ReversibleBlock
from netwright.blocks.reversible.coupling import AdditiveCoupling, AffineCoupling
from netwright.blocks.reversible.engine import Add, Update
from netwright.blocks.reversible.graph import GroupedReversible, ReversibleGIN
from netwright.blocks.reversible.mbconv import MBConv, ReversibleMBConv
from netwright.blocks.reversible.multi_split import (
    MultiSplitReversible,
    ReversibleSearch,
    Zero,
    darts_reversible,
)
from netwright.blocks.reversible.revbifpn import RevBiFPN, RevSilo
from netwright.blocks.reversible.revcol import ColumnLevel, ColumnSupervision, RevCol, RevColumn
from netwright.blocks.reversible.sequential import ReversibleSequential
from netwright.blocks.reversible.transformer import (
    DoubleStreams,
    MergeStreams,
    ReversibleTransformerBlock,
)
from netwright.blocks.reversible.unet import ReversibleUNet

__all__ = ["Add", "AdditiveCoupling", "AffineCoupling", "ColumnLevel", "ColumnSupervision",
           "DoubleStreams", "GroupedReversible", "MBConv", "MergeStreams", "MultiSplitReversible",
           "RevBiFPN", "RevCol", "RevColumn", "RevSilo", "ReversibleBlock", "ReversibleGIN",
           "ReversibleMBConv", "ReversibleSearch", "ReversibleSequential",
           "ReversibleTransformerBlock", "ReversibleUNet", "Update", "Zero", "darts_reversible"]
