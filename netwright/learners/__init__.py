"""Learners and lenses: supervised learning as things that compose."""

from netwright.learners import optimisers
from netwright.learners.backprop import Error, cross_entropy_error, learner, squared_error
from netwright.learners.bidirectional import SymmetricLens, learner_to_symmetric, lens_to_learner
from netwright.learners.category import Learner, identity
from netwright.learners.causal import Stateful, d_stateful, delayed_trace, pointwise
from netwright.learners.games import Game, as_game
from netwright.learners.lens import Lens, ParaLens
from netwright.learners.parametric import (
    boolean_rate,
    exclusive_or,
    learning_rate,
    loss,
    model,
    mse,
    parametric,
    softmax_cross_entropy,
    supervised,
)

__all__ = ["Error", "Game", "Learner", "Lens", "ParaLens", "Stateful", "SymmetricLens", "as_game",
           "boolean_rate", "cross_entropy_error", "d_stateful", "delayed_trace", "exclusive_or",
           "identity", "learner", "learner_to_symmetric", "learning_rate", "lens_to_learner",
           "loss", "model", "mse", "optimisers", "parametric", "pointwise",
           "softmax_cross_entropy", "squared_error", "supervised"]
