"""What a network, a rule or a change costs, and how it behaves."""

from netwright.measure.alignment import alignment
from netwright.measure.cost import Cost, cost
from netwright.measure.scaling import ScalingFit, scaling_fit

__all__ = ["Cost", "ScalingFit", "alignment", "cost", "scaling_fit"]
