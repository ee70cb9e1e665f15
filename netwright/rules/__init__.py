"""Learning rules: what can stand where `loss.backward()` stood."""

from netwright.rules.denoising.noprop import NoProp
from netwright.rules.energy.dual_propagation import DualPropagation
from netwright.rules.energy.equilibrium_propagation import EquilibriumPropagation
from netwright.rules.energy.predictive_coding import PredictiveCoding
from netwright.rules.exact.backprop import Backprop
from netwright.rules.feedback.direct_feedback_alignment import DirectFeedbackAlignment
from netwright.rules.feedback.feedback_alignment import FeedbackAlignment
from netwright.rules.forward.forward_forward import ForwardForward
from netwright.rules.forward.forward_gradient import ForwardGradient
from netwright.rules.local.mono_forward import MonoForward
from netwright.rules.rule import Rule

__all__ = ["Backprop", "DirectFeedbackAlignment", "DualPropagation", "EquilibriumPropagation",
           "FeedbackAlignment", "ForwardForward", "ForwardGradient", "MonoForward", "NoProp",
           "PredictiveCoding", "Rule"]
