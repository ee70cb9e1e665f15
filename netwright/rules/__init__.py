"""Learning rules: what can stand where `loss.backward()` stood."""

from netwright.rules.closed_form.block_coordinate_descent import BlockCoordinateDescent
from netwright.rules.closed_form.random_feature_boosting import RandomFeatureBoosting
from netwright.rules.denoising.diffusion_blocks import DiffusionBlocks
from netwright.rules.denoising.noprop import NoProp
from netwright.rules.denoising.noprop_continuous import NoPropContinuous
from netwright.rules.denoising.noprop_flow import NoPropFlow
from netwright.rules.discrete.reverse_derivative_ascent import ReverseDerivativeAscent
from netwright.rules.energy.dual_propagation import DualPropagation
from netwright.rules.energy.equilibrium_propagation import EquilibriumPropagation
from netwright.rules.energy.inference_learning import InferenceLearning
from netwright.rules.energy.predictive_coding import PredictiveCoding
from netwright.rules.estimators.black_box_prompt import BlackBoxPrompt
from netwright.rules.estimators.likelihood_ratio import LikelihoodRatio
from netwright.rules.estimators.quantized_forward_gradient import QuantizedForwardGradient
from netwright.rules.estimators.zeroth_order import ZerothOrder
from netwright.rules.exact.backprop import Backprop
from netwright.rules.exact.continual_backprop import ContinualBackprop
from netwright.rules.exact.dynamical_low_rank import DynamicalLowRank
from netwright.rules.exact.highway_backprop import HighwayBackprop
from netwright.rules.exact.pipelined_backprop import PipelinedBackprop
from netwright.rules.exact.reversible import Reversible
from netwright.rules.exact.two_stage_backward import TwoStageBackward
from netwright.rules.feedback.adaptive_feedback_alignment import AdaptiveFeedbackAlignment
from netwright.rules.feedback.counter_current import CounterCurrent
from netwright.rules.feedback.direct_feedback_alignment import DirectFeedbackAlignment
from netwright.rules.feedback.feedback_alignment import FeedbackAlignment
from netwright.rules.feedback.pepita import Pepita
from netwright.rules.feedback.product_feedback import ProductFeedback
from netwright.rules.feedback.stationary_feedback import StationaryFeedback
from netwright.rules.forward.forward_forward import ForwardForward
from netwright.rules.forward.forward_gradient import ForwardGradient
from netwright.rules.forward.physical_forward_forward import PhysicalForwardForward
from netwright.rules.forward.single_forward import SingleForward
from netwright.rules.hebbian.disinhibitory_hebb import DisinhibitoryHebb
from netwright.rules.hebbian.softhebb import SoftHebb
from netwright.rules.local.boosted_units import BoostedUnits
from netwright.rules.local.cascaded_forward import CascadedForward
from netwright.rules.local.delta_rule import DeltaRule
from netwright.rules.local.lls import LLS
from netwright.rules.local.local_losses import LocalLosses
from netwright.rules.local.momentum_auxiliary import MomentumAuxiliary
from netwright.rules.local.mono_forward import MonoForward
from netwright.rules.local.target_projection import TargetProjection
from netwright.rules.rule import Rule

__all__ = ["LLS", "AdaptiveFeedbackAlignment", "Backprop", "BlackBoxPrompt",
           "BlockCoordinateDescent", "BoostedUnits", "CascadedForward", "ContinualBackprop",
           "CounterCurrent", "DeltaRule", "DiffusionBlocks", "DirectFeedbackAlignment",
           "DisinhibitoryHebb", "DualPropagation", "DynamicalLowRank", "EquilibriumPropagation",
           "FeedbackAlignment", "ForwardForward", "ForwardGradient", "HighwayBackprop",
           "InferenceLearning", "LikelihoodRatio", "LocalLosses", "MomentumAuxiliary",
           "MonoForward", "NoProp", "NoPropContinuous", "NoPropFlow", "Pepita",
           "PhysicalForwardForward", "PipelinedBackprop", "PredictiveCoding", "ProductFeedback",
           "QuantizedForwardGradient", "RandomFeatureBoosting", "ReverseDerivativeAscent",
           "Reversible", "Rule", "SingleForward", "SoftHebb", "StationaryFeedback",
           "TargetProjection", "TwoStageBackward", "ZerothOrder"]
