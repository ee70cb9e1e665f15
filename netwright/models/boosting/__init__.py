"""Boosting: networks that are grown step by step, as scikit-learn estimators."""

from netwright.runtime.faces import face

face(__name__)
