"""What a network, a rule or a change costs, and how it behaves."""

from netwright.measure.alignment import alignment
from netwright.measure.cost import Cost, cost

__all__ = ["Cost", "alignment", "cost"]
