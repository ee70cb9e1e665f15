"""Reversible blocks: what they were given is reconstructed from what they return."""

from netwright.blocks.reversible.block import ReversibleBlock
from netwright.blocks.reversible.coupling import AdditiveCoupling, AffineCoupling
from netwright.blocks.reversible.decoupler import ReversibleDecoupler, TransmissionPrompt
from netwright.blocks.reversible.downsample import InjectivePad, InvertibleDownsample
from netwright.blocks.reversible.engine import Add, Update
from netwright.blocks.reversible.graph import GroupedReversible, ReversibleGIN
from netwright.blocks.reversible.irevnet import IRevNet, IRevNetBlock
from netwright.blocks.reversible.mbconv import MBConv, ReversibleMBConv
from netwright.blocks.reversible.momentum import DropVelocity, MomentumBlock, StartVelocity
from netwright.blocks.reversible.multi_split import (
    MultiSplitReversible,
    ReversibleSearch,
    Zero,
    darts_reversible,
)
from netwright.blocks.reversible.revbifpn import RevBiFPN, RevSilo
from netwright.blocks.reversible.revcol import ColumnLevel, ColumnSupervision, RevCol, RevColumn
from netwright.blocks.reversible.revnet import RevNet
from netwright.blocks.reversible.sequential import ReversibleSequential
from netwright.blocks.reversible.transformer import (
    DoubleStreams,
    MergeStreams,
    ReversibleTransformerBlock,
)
from netwright.blocks.reversible.unet import ReversibleUNet

__all__ = ["Add", "AdditiveCoupling", "AffineCoupling", "ColumnLevel", "ColumnSupervision",
           "DoubleStreams", "DropVelocity", "GroupedReversible", "IRevNet", "IRevNetBlock",
           "InjectivePad", "InvertibleDownsample", "MBConv", "MergeStreams", "MomentumBlock",
           "MultiSplitReversible", "RevBiFPN", "RevCol", "RevColumn", "RevNet", "RevSilo",
           "ReversibleBlock", "ReversibleDecoupler", "ReversibleGIN", "ReversibleMBConv",
           "ReversibleSearch", "ReversibleSequential", "ReversibleTransformerBlock",
           "ReversibleUNet", "StartVelocity", "TransmissionPrompt", "Update", "Zero",
           "darts_reversible"]
