"""Blocks that mix tokens with linear layers in place of attention."""

from netwright.blocks.mixing.mlp_mixer import MixerBlock, MLPMixer, TokenMixing
from netwright.blocks.mixing.ninformer import NiNBlock
from netwright.blocks.mixing.raft_mlp import RaftBlock, RaftTokenMixing
from netwright.blocks.mixing.res_mlp import Affine, ResMLP, ResMLPBlock
from netwright.blocks.mixing.sparse_mlp import ImportanceRouter, SparseMLPBlock

__all__ = ["Affine", "ImportanceRouter", "MLPMixer", "MixerBlock", "NiNBlock", "RaftBlock",
           "RaftTokenMixing", "ResMLP", "ResMLPBlock", "SparseMLPBlock", "TokenMixing"]
