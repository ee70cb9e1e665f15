"""What a grown network needs to be a scikit-learn regressor or classifier."""

from copy import copy
from typing import Any, Self

import numpy
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Generator, Tensor, nn

from netwright import checks

Array = NDArray[Any]
FLOATS = [numpy.float64, numpy.float32]


class Grown(BaseEstimator):
    """A network that grows by steps, each of which is a network that could be stopped at.

    A method defines `_grow`, which returns a piece for each step, and `_network`, which makes the
    network of the first so many pieces. Numbers are kept in float64 until the network is done.
    """

    _squared: bool
    network_: nn.Module
    losses_: list[float]

    def _grow(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Any, list[float]]:
        raise TypeError(f"{type(self).__name__} must define _grow")

    def _network(self, pieces: Any, steps: int, mean: Tensor, scale: Tensor) -> nn.Module:
        raise TypeError(f"{type(self).__name__} must define _network")

    def _fit(self, x: Array, y: Tensor, mean: Tensor, scale: Tensor) -> None:
        seed = check_random_state(getattr(self, "random_state", None)).randint(2**31 - 1)
        pieces, losses = self._grow(torch.tensor(x, dtype=torch.float64), y,
                                    Generator().manual_seed(int(seed)))
        self._grown = (pieces, mean, scale, torch.tensor(x[:0]).dtype)
        self.losses_ = losses
        self.network_ = self._of_first(len(losses) - 1)

    def _of_first(self, steps: int) -> nn.Module:
        pieces, mean, scale, dtype = self._grown
        return self._network(pieces, steps, mean, scale).to(dtype).eval()

    def truncate(self, steps: int) -> Self:
        """Return this estimator as it was after so many steps, with a network of those alone."""
        check_is_fitted(self)
        grown = len(self.losses_) - 1
        checks.between(0, grown, whole=True, steps=steps,
                       advice=f"{grown} were grown; fit more of them")
        cut = copy(self)
        cut.network_, cut.losses_ = self._of_first(steps), self.losses_[:steps + 1]
        return cut

    @torch.no_grad()
    def _scores(self, X: Any) -> Array:
        check_is_fitted(self)
        x = torch.tensor(validate_data(self, X, reset=False, dtype=FLOATS))
        dtype = next(self.network_.parameters()).dtype
        return self.network_(x.to(dtype)).numpy()


class GrownRegressor(RegressorMixin, Grown):
    """A grown network that predicts numbers, one or several a sample."""

    _squared = True

    def fit(self, X: Any, y: Any) -> Self:
        """Grow the network on X (samples, features) and y (samples,) or (samples, outputs)."""
        X, y = validate_data(self, X, y, dtype=FLOATS, multi_output=True, y_numeric=True,
                             ensure_min_samples=2)
        self._one = y.ndim == 1
        target = torch.tensor(y, dtype=torch.float64).reshape(len(y), -1)
        mean, scale = target.mean(0), target.std(0, correction=0)
        scale = torch.where(scale > 0, scale, 1.0)
        self._fit(X, (target - mean) / scale, mean, scale)
        return self

    def predict(self, X: Any) -> Array:
        """Return what the network says of X, in the shape that y had."""
        scores = self._scores(X)
        return scores[:, 0] if self._one else scores

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class GrownClassifier(ClassifierMixin, Grown):
    """A grown network that predicts classes by the largest of their scores."""

    _squared = False
    classes_: Array

    def fit(self, X: Any, y: Any) -> Self:
        """Grow the network on X (samples, features) and y (samples,), classes of any type."""
        X, y = validate_data(self, X, y, dtype=FLOATS, ensure_min_samples=2)
        check_classification_targets(y)
        self.classes_, labels = numpy.unique(y, return_inverse=True)
        classes = len(self.classes_)
        if classes < 2:
            raise ValueError(f"y must hold at least 2 classes, got 1 class, {self.classes_[0]!r}; "
                             "there is nothing to tell apart")
        y = nn.functional.one_hot(torch.tensor(labels), classes).double()
        self._fit(X, y, torch.zeros(classes), torch.ones(classes))
        return self

    def decision_function(self, X: Any) -> Array:
        """Return the log odds of the second of two classes, or the scores of each of more."""
        scores = self._scores(X)
        return scores[:, 1] - scores[:, 0] if len(self.classes_) == 2 else scores

    def predict_proba(self, X: Any) -> Array:
        """Return the probability of each class, (samples, classes)."""
        return torch.softmax(torch.from_numpy(self._scores(X)), 1).numpy()

    def predict(self, X: Any) -> Array:
        """Return the most probable class of each sample."""
        best = self._scores(X).argmax(1)
        return self.classes_[best]
