"""One experiment for each claim, with the results that were measured."""

from netwright.evidence.evidence import (
    Curve,
    Experiment,
    Outcome,
    evidence,
    experiment,
    experiments,
    machine,
    recorded,
    run,
)

__all__ = ["Curve", "Experiment", "Outcome", "evidence", "experiment", "experiments", "machine",
           "recorded", "run"]
