"""Blocks that mix tokens with linear layers in place of attention."""

from netwright.blocks.mixing.mlp_mixer import MixerBlock, MLPMixer, TokenMixing
from netwright.blocks.mixing.ninformer import NiNBlock
from netwright.blocks.mixing.raft_mlp import RaftBlock, RaftTokenMixing
from netwright.blocks.mixing.res_mlp import Affine, ResMLP, ResMLPBlock

__all__ = [
    "Affine",
    "MLPMixer",
    "MixerBlock",
    "NiNBlock",
    "RaftBlock",
    "RaftTokenMixing",
    "ResMLP",
    "ResMLPBlock",
    "TokenMixing",
]
