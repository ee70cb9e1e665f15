"""Reshapes: functions that take a network and return a changed copy."""

from netwright.reshape.experts.mix_lora import mix_lora
from netwright.reshape.experts.moefy import moefy
from netwright.reshape.experts.multiplets import multiplets
from netwright.reshape.experts.prune_experts import prune_experts
from netwright.reshape.experts.upcycle import upcycle
from netwright.reshape.pruning.prune_sublayers import prune_sublayers
from netwright.reshape.residual.reversible import reversible

__all__ = [
    "mix_lora",
    "moefy",
    "multiplets",
    "prune_experts",
    "prune_sublayers",
    "reversible",
    "upcycle",
]
