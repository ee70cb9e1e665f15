import itertools
import warnings
from typing import Any

import numpy
from sklearn.compose import TransformedTargetRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import StandardScaler

from evidence.boosting._tables import TABLES, table, tuned
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.models.boosting import BoostedUnitsClassifier, BoostedUnitsRegressor

STEPS, UNITS = 40, 2
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
SETS = ("diabetes", "breast cancer", "digits")
MARGIN, LOSS = 1.0, 2.0  # points


@evidence(paper="004-020", claim="Boosted units are competitive with networks trained by Adam, "
          "L-BFGS and SGD, and late units can be switched off with little loss.")
def boosted_units(scale: Scale) -> Outcome:
    """Train one hidden layer by boosting and as a whole; then switch the later units off."""
    seeds = range(3 if scale == "desk" else 10)
    rates = itertools.product((1e-3, 1e-2), (1e-4, 1e-1))
    grids: dict[str, list[dict[str, Any]]] = {
        "boosted": [{"learning_rate": rate} for rate in (0.1, 0.25, 0.5, 1.0)],
        "adam": [{"learning_rate_init": r, "alpha": a} for r, a in rates],
        "lbfgs": [{"alpha": a} for a in (1e-4, 1e-2, 1.0, 10.0)],
        "sgd": [{"learning_rate_init": r, "alpha": 1e-4} for r in (1e-3, 1e-2, 3e-2, 1e-1)]}
    scores: dict[str, dict[str, list[float]]] = {m: {t: [] for t in SETS} for m in grids}
    curves: dict[str, Curve] = {}
    rises = 0
    for name in SETS:
        classes, by_share = TABLES[name][1], []
        for seed in seeds:
            data = table(name, seed)
            for method, grid in grids.items():
                def make(options: dict[str, Any], method: str = method, classes: int = classes,
                         seed: int = seed) -> Any:
                    return _made(method, classes, seed, options)
                with warnings.catch_warnings():  # 200 passes are what each is given
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    best = make(tuned(make, grid, data, seed)).fit(data.x, data.y)
                scores[method][name].append(100 * best.score(data.x_test, data.y_test))
                if method == "boosted":
                    by_share.append([100 * best.truncate(round(share * STEPS)).score(
                        data.x_test, data.y_test) for share in SHARES])
                    rises += sum(b > a + 1e-12 for a, b in itertools.pairwise(best.losses_))
        curves[name] = Curve([100 * share for share in SHARES], by_share)
    means = {m: numpy.mean([scores[m][t] for t in SETS]) for m in grids}
    rival = max(means[m] for m in grids if m != "boosted")
    half = numpy.mean([[y[2] for y in curves[t].y] for t in SETS])
    holds = [means["boosted"] >= rival - MARGIN, half >= means["boosted"] - LOSS]
    figures = {f"{t}, {m} ({'accuracy' if TABLES[t][1] else 'R²'}, %)": scores[m][t]
               for t in SETS for m in grids}
    figures |= {f"{t}, boosted, {100 * share:.0f}% of the units (%)": [y[i] for y in curves[t].y]
                for t in SETS for i, share in enumerate(SHARES[:-1])}
    figures["steps after which the loss on the training set was higher"] = [float(rises)]
    return Outcome(
        verdict="shown" if all(holds) else "partly shown" if any(holds) else "not shown",
        setting={"tables": f"{', '.join(SETS)}: at most 800 samples, a third for testing, drawn "
                 "anew for each seed", "network": f"{STEPS * UNITS} logistic hidden units; "
                 f"boosted in {STEPS} steps of {UNITS}", "rivals": "scikit-learn's MLP by Adam, "
                 "L-BFGS and SGD with momentum, at most 200 passes",
                 "tuning": "the best of 4 settings each on a third of the training part"},
        figures=figures,
        note=f"Competitive means a mean over tables at most {MARGIN:.0f} point below the best "
             f"rival's; little loss means that half of the units lose at most {LOSS:.0f} points "
             "in the mean.",
        curves=curves, axes=("units that are on (%)", "test score (%)"))


def _made(method: str, classes: int, seed: int, options: dict[str, Any]) -> Any:
    if method == "boosted":
        kind = BoostedUnitsClassifier if classes else BoostedUnitsRegressor
        return kind(STEPS, UNITS, random_state=seed, **options)
    shared = {"hidden_layer_sizes": (STEPS * UNITS,), "activation": "logistic", "solver": method,
              "random_state": seed, **options}
    if classes:
        return MLPClassifier(**shared)
    return TransformedTargetRegressor(MLPRegressor(**shared), transformer=StandardScaler())
