"""Flows: densities made of transforms that can be undone, trained without stored activations."""

from netwright.flows.coupling import AffineCouplingTransform, Permute
from netwright.flows.ffjord import FFJORD
from netwright.flows.flow import Flow, Transform
from netwright.flows.odeint import ReversibleHeun, odeint
from netwright.flows.reversible_sde import ReversibleSDESolver

__all__ = ["FFJORD", "AffineCouplingTransform", "Flow", "Permute", "ReversibleHeun",
           "ReversibleSDESolver", "Transform", "odeint"]
