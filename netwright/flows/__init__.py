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
