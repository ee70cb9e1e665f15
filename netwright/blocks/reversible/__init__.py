"""Reversible blocks: what they were given is reconstructed from what they return."""

from netwright.blocks.reversible.block import ReversibleBlock
from netwright.blocks.reversible.coupling import AdditiveCoupling, AffineCoupling
from netwright.blocks.reversible.decoupler import ReversibleDecoupler, TransmissionPrompt
from netwright.blocks.reversible.downsample import InjectivePad, InvertibleDownsample
from netwright.blocks.reversible.engine import Add, Update
from netwright.blocks.reversible.irevnet import IRevNet, IRevNetBlock
from netwright.blocks.reversible.momentum import DropVelocity, MomentumBlock, StartVelocity
from netwright.blocks.reversible.revnet import RevNet
from netwright.blocks.reversible.sequential import ReversibleSequential

__all__ = [
    "Add",
    "AdditiveCoupling",
    "AffineCoupling",
    "DropVelocity",
    "IRevNet",
    "IRevNetBlock",
    "InjectivePad",
    "InvertibleDownsample",
    "MomentumBlock",
    "RevNet",
    "ReversibleBlock",
    "ReversibleDecoupler",
    "ReversibleSequential",
    "StartVelocity",
    "TransmissionPrompt",
    "Update",
]
