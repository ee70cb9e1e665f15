"""Flows: densities made of transforms that can be undone, trained without stored activations."""

from netwright.flows.coupling import (
    AdditiveCouplingTransform,
    AffineCouplingTransform,
    Permute,
    SplineCouplingTransform,
)
from netwright.flows.flow import Flow, Transform
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

__all__ = ["AdditiveCouplingTransform", "AffineCouplingTransform", "Flow", "GaugeTransform",
           "LeapfrogLayer", "LeapfrogSampler", "Permute", "SplineCouplingTransform", "Transform",
           "U1Action", "autocorrelation_time", "field_loss", "flow_hmc", "gauge_flow", "hmc",
           "plaquettes", "smooth_charge", "topological_charge"]
from netwright.flows.act_norm import ActNorm
from netwright.flows.conditional import ConditionalAffineCoupling, ConditionalFlow
from netwright.flows.coupling import AffineCouplingTransform, Permute
from netwright.flows.flow import Flow, Transform
from netwright.flows.image_coupling import coupling_net, image_coupling
from netwright.flows.inverse_convolution import InvConv2d
from netwright.flows.invertible_convolution import InvertibleConv3x3
from netwright.flows.invertible_rescaler import InvertibleRescaler
from netwright.flows.part import Part, multi_scale
from netwright.flows.quad_coupling import QuadCoupling
from netwright.flows.squeeze import Squeeze

__all__ = ["ActNorm", "AffineCouplingTransform", "ConditionalAffineCoupling", "ConditionalFlow",
           "Flow", "InvConv2d", "InvertibleConv3x3", "InvertibleRescaler", "Part", "Permute",
           "QuadCoupling", "Squeeze", "Transform", "coupling_net", "image_coupling", "multi_scale"]
