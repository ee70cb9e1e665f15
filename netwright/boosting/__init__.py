"""Networks that are grown by gradient boosting, as scikit-learn estimators."""

from netwright.boosting.boosted_units import BoostedUnitsClassifier, BoostedUnitsRegressor
from netwright.boosting.random_feature_boosting import (
    RandomFeatureBoostingClassifier,
    RandomFeatureBoostingRegressor,
    RandomFeatureNetwork,
)

__all__ = ["BoostedUnitsClassifier", "BoostedUnitsRegressor", "RandomFeatureBoostingClassifier",
           "RandomFeatureBoostingRegressor", "RandomFeatureNetwork"]
