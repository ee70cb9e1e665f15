"""Flows: densities made of transforms that can be undone, trained without stored activations."""

from netwright.flows.coupling import (
    AdditiveCouplingTransform,
    AffineCouplingTransform,
    Permute,
    SplineCouplingTransform,
)
from netwright.flows.flow import Flow, Transform

__all__ = ["AdditiveCouplingTransform", "AffineCouplingTransform", "Flow", "Permute",
           "SplineCouplingTransform", "Transform"]
