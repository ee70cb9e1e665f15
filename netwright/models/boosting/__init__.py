"""Networks that are grown by gradient boosting, as scikit-learn estimators."""

from netwright.runtime.faces import face

face(__name__)
