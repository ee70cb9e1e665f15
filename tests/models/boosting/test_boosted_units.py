from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

import netwright as nw
from netwright.errors import UnknownName
from netwright.models.boosting import BoostedUnitsClassifier, BoostedUnitsRegressor
from netwright.models.boosting.boosted_units import ACTIVATIONS, fit_part

CASES = [(BoostedUnitsRegressor, load_diabetes), (BoostedUnitsClassifier, load_wine)]
FEW = {"n_steps": 4, "n_units": 2, "random_state": 0, "iterations": 50}


def scaled(load):
    x, y = load(return_X_y=True)
    return StandardScaler().fit_transform(x), y


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_a_part_is_at_a_minimum_of_its_objective(activation):
    x, r = torch.randn(40, 3).double(), torch.randn(40, 2).double()
    part = fit_part(x, r, 3, activation, 0.1, 1000, torch.Generator().manual_seed(0))
    A, a, B, b = (value.clone().requires_grad_() for value in part)
    g = ACTIVATIONS[activation]()(x @ A.T + a) @ B.T + b
    objective = ((r - g).square().sum(1).mean() + 0.1 * (A.square().sum() + B.square().sum())) / 2
    gradients = torch.autograd.grad(objective, (A, a, B, b))
    # ReLU has kinks, where the search may stop
    assert max(g.abs().max() for g in gradients) < (5e-2 if activation == "relu" else 1e-3)
    zero = (r - r.mean(0)).square().sum(1).mean() / 2
    assert objective < zero


@pytest.mark.parametrize(("kind", "load"), CASES)
def test_the_merged_network_is_the_sum_of_its_parts(kind, load):
    x, y = scaled(load)
    model = kind(learning_rate=0.5, activation="tanh", **FEW).fit(x, y)
    (constant, parts), mean, scale, _ = model._grown
    x = torch.tensor(x)
    total = constant + sum(torch.tanh(x @ A.T + a) @ B.T + b for A, a, B, b in parts)
    torch.testing.assert_close(model.network_(x).detach(), total * scale + mean)
    assert [type(layer) for layer in model.network_] == [nn.Linear, nn.Tanh, nn.Linear]
    assert model.network_[0].out_features == 8


@pytest.mark.parametrize(("kind", "load"), CASES)
def test_it_starts_from_the_constant_with_the_least_loss(kind, load):
    x, y = scaled(load)
    none = kind(**FEW).fit(x, y).truncate(0)
    if kind is BoostedUnitsRegressor:
        np.testing.assert_allclose(none.predict(x), y.mean())
    else:
        np.testing.assert_allclose(none.predict_proba(x)[0], np.bincount(y) / len(y))
    assert none.network_[0].out_features == 0


@pytest.mark.parametrize(("kind", "load"), CASES)
def test_truncated_is_what_fewer_steps_give(kind, load):
    x, y = scaled(load)
    whole = kind(**FEW).fit(x, y)
    short, cut = kind(**{**FEW, "n_steps": 2}).fit(x, y), whole.truncate(2)
    np.testing.assert_array_equal(cut.predict(x), short.predict(x))
    assert cut.losses_ == short.losses_
    assert torch.equal(cut.network_[0].weight, whole.network_[0].weight[:4])
    assert cut.network_[0].out_features == 4
    np.testing.assert_array_equal(whole.truncate(4).predict(x), whole.predict(x))


@pytest.mark.parametrize(("kind", "load"), CASES)
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_the_loss_never_rises(kind, load, rate):
    x, y = scaled(load)
    model = kind(n_steps=15, learning_rate=rate, subsample=0.3, iterations=20,
                 random_state=1).fit(x, y)
    assert all(later <= before + 1e-12 for before, later in pairwise(model.losses_))
    assert model.losses_[-1] < 0.8 * model.losses_[0]


def test_the_network_is_an_ordinary_module_that_can_be_trained():
    x, y = scaled(load_wine)
    model = BoostedUnitsClassifier(**FEW).fit(x.astype(np.float32), y)
    inputs = torch.tensor(x, dtype=torch.float32)
    assert nw.stages(model.network_).names == ["0", "2"]
    history = nw.fit(model.network_, nw.data.Batches(inputs, torch.tensor(y), 32), epochs=2,
                     progress=False)
    assert history.epochs[1].loss < history.epochs[0].loss


def test_learns_what_labels_at_random_do_not_teach():
    for seed in range(3):
        for kind, load, chance in ((BoostedUnitsRegressor, load_diabetes, 0.1),
                                   (BoostedUnitsClassifier, load_breast_cancer, 0.75)):
            x, x_test, y, y_test = train_test_split(*scaled(load), random_state=seed)
            options = {"n_steps": 10, "learning_rate": 0.3, "iterations": 50, "random_state": seed}
            assert kind(**options).fit(x, y).score(x_test, y_test) > chance + 0.15
            shuffled = np.random.default_rng(seed).permutation(y)
            assert kind(**options).fit(x, shuffled).score(x_test, y_test) < chance


def test_scikit_learns_own_checks():
    # Nothing is excepted; what is skipped needs pandas or an array library that is not there.
    for kind in (BoostedUnitsRegressor, BoostedUnitsClassifier):
        check_estimator(kind(n_steps=4, iterations=50), on_skip=None)


def test_in_pipelines_and_searches():
    x, y = load_wine(return_X_y=True)
    pipeline = make_pipeline(StandardScaler(), BoostedUnitsClassifier(**FEW))
    search = GridSearchCV(pipeline, {"boostedunitsclassifier__n_units": [1, 2]}, cv=2)
    assert search.fit(x, y).best_score_ > 0.8
    two = np.stack([x[:, 0], 10 * x[:, 1] + 5], 1)
    model = BoostedUnitsRegressor(**FEW).fit(StandardScaler().fit_transform(x), two)
    assert model.predict(StandardScaler().fit_transform(x)).shape == (178, 2)


@pytest.mark.parametrize(("options", "error", "match"), [
    ({"activation": "sigmoid"}, UnknownName, "known are logistic, relu, tanh"),
    ({"n_steps": 0}, ValueError, "n_steps must be at least 1, got 0"),
    ({"subsample": 0.0}, ValueError, "subsample must be above 0 and at most 1, got 0"),
    ({"learning_rate": 1.5}, ValueError, "learning_rate must be above 0 and at most 1"),
    ({"weight_decay": -1.0}, ValueError, "weight_decay must be at least 0, got -1"),
])
def test_errors(options, error, match):
    x, y = scaled(load_diabetes)
    with pytest.raises(error, match=match):
        BoostedUnitsRegressor(**options).fit(x, y)
