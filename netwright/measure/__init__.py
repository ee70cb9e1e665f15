"""What a network, a rule or a change costs, and how it behaves."""

from netwright.measure.alignment import alignment
from netwright.measure.cost import Cost, cost
from netwright.measure.memory import Memory, memory
from netwright.measure.routed_scaling import RoutedScaling, effective_params, fit_routed_scaling
from netwright.measure.scaling import ScalingFit, scaling_fit

__all__ = ["Cost", "Memory", "RoutedScaling", "ScalingFit", "alignment", "cost",
           "effective_params", "fit_routed_scaling", "memory", "scaling_fit"]
