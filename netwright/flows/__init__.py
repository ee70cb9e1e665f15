"""Flows: densities made of transforms that can be undone, trained without stored activations."""

from netwright.flows.coupling import AffineCouplingTransform, Permute
from netwright.flows.flow import Flow, Transform
from netwright.flows.gdn import GDN, gaussianize_layerwise
from netwright.flows.kernel_coupling import KernelCoupling
from netwright.flows.label_flow import LabelFlow, weak_constraint_loss
from netwright.flows.linear import LinearTransform

__all__ = [
    "GDN",
    "AffineCouplingTransform",
    "Flow",
    "KernelCoupling",
    "LabelFlow",
    "LinearTransform",
    "Permute",
    "Transform",
    "gaussianize_layerwise",
    "weak_constraint_loss",
]
