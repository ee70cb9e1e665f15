"""Flows: densities made of transforms that can be undone, trained without stored activations."""

from netwright.flows.coupling import AffineCouplingTransform, Permute
from netwright.flows.ebflow import EBFlow, SmoothLeakyReLU, score_matching_loss
from netwright.flows.flow import Flow, Transform
from netwright.flows.gdn import GDN, gaussianize_layerwise
from netwright.flows.kernel_coupling import KernelCoupling
from netwright.flows.label_flow import LabelFlow, weak_constraint_loss
from netwright.flows.linear import LinearTransform
from netwright.flows.residual import LipSwish, ResidualTransform, spectral_norm

__all__ = [
    "GDN",
    "AffineCouplingTransform",
    "EBFlow",
    "Flow",
    "KernelCoupling",
    "LabelFlow",
    "LinearTransform",
    "LipSwish",
    "Permute",
    "ResidualTransform",
    "SmoothLeakyReLU",
    "Transform",
    "gaussianize_layerwise",
    "score_matching_loss",
    "spectral_norm",
    "weak_constraint_loss",
]
