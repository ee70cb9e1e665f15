"""Flows: densities made of transforms that can be undone, trained without stored activations."""

from netwright.flows.coupling import AffineCouplingTransform, Permute
from netwright.flows.flow import Flow, Transform
from netwright.flows.kernel_coupling import KernelCoupling
from netwright.flows.label_flow import LabelFlow, weak_constraint_loss

__all__ = [
    "AffineCouplingTransform",
    "Flow",
    "KernelCoupling",
    "LabelFlow",
    "Permute",
    "Transform",
    "weak_constraint_loss",
]
