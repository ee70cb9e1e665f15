"""Flows: densities made of transforms that can be undone, trained without stored activations."""

from netwright.flows.coupling import AffineCouplingTransform, Permute
from netwright.flows.ffjord import FFJORD
from netwright.flows.flow import Flow, Transform
from netwright.flows.odeint import ReversibleHeun, odeint

__all__ = ["FFJORD", "AffineCouplingTransform", "Flow", "Permute", "ReversibleHeun", "Transform",
           "odeint"]
