"""Reshapes: functions that take a network and return a changed copy."""

from netwright.reshape.experts.mix_lora import mix_lora
from netwright.reshape.experts.moefy import moefy
from netwright.reshape.experts.upcycle import upcycle
from netwright.reshape.pruning.prune_sublayers import prune_sublayers
from netwright.reshape.residual.reversible import reversible

__all__ = ["mix_lora", "moefy", "prune_sublayers", "reversible", "upcycle"]
