"""Reshapes: functions that take a network and return a changed copy."""

from netwright.reshape.experts.mix_lora import mix_lora
from netwright.reshape.experts.moefy import moefy
from netwright.reshape.experts.multiplets import multiplets
from netwright.reshape.experts.prune_experts import prune_experts
from netwright.reshape.experts.upcycle import upcycle
from netwright.reshape.feedforward.bricks import find_bricks, keep_bricks
from netwright.reshape.feedforward.fuse_feedforward import fuse_feedforward
from netwright.reshape.feedforward.reparameterize import reparameterize
from netwright.reshape.feedforward.share_feedforward import share_feedforward
from netwright.reshape.feedforward.swap_feedforward import swap_feedforward
from netwright.reshape.mixing.interpolate_mixer import interpolate_mixer
from netwright.reshape.pruning.prune_sublayers import prune_sublayers
from netwright.reshape.residual.parallelize_residual import parallelize_residual
from netwright.reshape.residual.reversible import reversible

__all__ = ["find_bricks", "fuse_feedforward", "interpolate_mixer", "keep_bricks", "mix_lora",
           "moefy", "multiplets", "parallelize_residual", "prune_experts", "prune_sublayers",
           "reparameterize", "reversible", "share_feedforward", "swap_feedforward", "upcycle"]
