"""What a network, a rule or a change costs, and how it behaves."""

from netwright.measure.alignment import alignment
from netwright.measure.cost import Cost, cost
from netwright.measure.memory import Memory, memory
from netwright.measure.scaling import ScalingFit, scaling_fit

__all__ = ["Cost", "Memory", "ScalingFit", "alignment", "cost", "memory", "scaling_fit"]
