"""Flows: densities made of transforms that can be undone, trained without stored activations."""

from netwright.flows.act_norm import ActNorm
from netwright.flows.conditional import ConditionalAffineCoupling, ConditionalFlow
from netwright.flows.coupling import (
    AdditiveCouplingTransform,
    AffineCouplingTransform,
    Permute,
    SplineCouplingTransform,
)
from netwright.flows.ebflow import EBFlow, SmoothLeakyReLU, score_matching_loss
from netwright.flows.ffjord import FFJORD
from netwright.flows.flow import Flow, Transform
from netwright.flows.gdn import GDN, gaussianize_layerwise
from netwright.flows.image_coupling import coupling_net, image_coupling
from netwright.flows.inverse_convolution import InvConv2d
from netwright.flows.invertible_convolution import InvertibleConv3x3
from netwright.flows.invertible_rescaler import InvertibleRescaler
from netwright.flows.kernel_coupling import KernelCoupling
from netwright.flows.label_flow import LabelFlow, weak_constraint_loss
from netwright.flows.lattice import (
    GaugeTransform,
    U1Action,
    autocorrelation_time,
    field_loss,
    flow_hmc,
    gauge_flow,
    hmc,
    plaquettes,
    smooth_charge,
    topological_charge,
)
from netwright.flows.leapfrog import LeapfrogLayer, LeapfrogSampler
from netwright.flows.linear import LinearTransform
from netwright.flows.odeint import ReversibleHeun, odeint
from netwright.flows.part import Part, multi_scale
from netwright.flows.quad_coupling import QuadCoupling
from netwright.flows.residual import LipSwish, ResidualTransform, spectral_norm
from netwright.flows.reversible_sde import ReversibleSDESolver
from netwright.flows.squeeze import Squeeze

__all__ = ["FFJORD", "GDN", "ActNorm", "AdditiveCouplingTransform", "AffineCouplingTransform",
           "ConditionalAffineCoupling", "ConditionalFlow", "EBFlow", "Flow", "GaugeTransform",
           "InvConv2d", "InvertibleConv3x3", "InvertibleRescaler", "KernelCoupling", "LabelFlow",
           "LeapfrogLayer", "LeapfrogSampler", "LinearTransform", "LipSwish", "Part", "Permute",
           "QuadCoupling", "ResidualTransform", "ReversibleHeun", "ReversibleSDESolver",
           "SmoothLeakyReLU", "SplineCouplingTransform", "Squeeze", "Transform", "U1Action",
           "autocorrelation_time", "coupling_net", "field_loss", "flow_hmc", "gauge_flow",
           "gaussianize_layerwise", "hmc", "image_coupling", "multi_scale", "odeint", "plaquettes",
           "score_matching_loss", "smooth_charge", "spectral_norm", "topological_charge",
           "weak_constraint_loss"]
