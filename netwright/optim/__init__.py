"""Optimizers that step on a block of the parameters at a time."""

from netwright.optim.block_proximal_descent import BlockProximalDescent, stationarity_gap
from netwright.optim.greedy_block_descent import GreedyBlockDescent

__all__ = ["BlockProximalDescent", "GreedyBlockDescent", "stationarity_gap"]
