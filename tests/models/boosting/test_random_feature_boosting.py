from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine, make_friedman1
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import netwright as nw
from netwright.errors import UnknownName
from netwright.models.boosting import (
    RandomFeatureBoostingClassifier,
    RandomFeatureBoostingRegressor,
)
from netwright.models.boosting.random_feature_boosting import (
    dense_sandwich,
    diagonal_sandwich,
    scalar_sandwich,
)
from netwright.numerics.closed_form import best_step, loss, pseudo_residual, ridge_solution

SMALL = {"n_features": 16, "width": 8, "random_state": 0}
DELTAS = ["gradient", "dense", "diagonal", "scalar"]


def scaled(load):
    x, y = load(return_X_y=True)
    return StandardScaler().fit_transform(x), y


def friedman():
    return make_friedman1(400, noise=0.5, random_state=0)


def lstsq(A, b, ridge, n):
    """min |b - A d|²/n + ridge |d|², as one least-squares problem."""
    top = np.vstack([A, np.sqrt(n * ridge) * np.eye(A.shape[1])])
    return np.linalg.lstsq(top, np.concatenate([b, np.zeros((A.shape[1], *b.shape[1:]))]),
                           rcond=None)[0]


@pytest.mark.parametrize(("n", "p"), [(12, 5), (5, 12)])
def test_closed_forms_are_least_squares_solutions(n, p):
    width, q, ridge = 4, 3, 0.3
    f, r = torch.randn(n, p).double(), torch.randn(n, q).double()
    W = torch.randn(q, width).double()
    torch.testing.assert_close(ridge_solution(f, r, ridge),
                               torch.tensor(lstsq(f.numpy(), r.numpy(), ridge, n)))
    # vec(f D W^T) = (f kron W) vec(D), by rows
    wanted = lstsq(np.kron(f.numpy(), W.numpy()), r.numpy().ravel(), ridge, n)
    torch.testing.assert_close(dense_sandwich(f, r, W, ridge),
                               torch.tensor(wanted.reshape(p, width)))
    g = torch.randn(n, width).double()
    columns = np.stack([np.outer(g[:, j], W[:, j]).ravel() for j in range(width)], 1)
    torch.testing.assert_close(diagonal_sandwich(g, r, W, ridge),
                               torch.tensor(lstsq(columns, r.numpy().ravel(), ridge, n)))
    one = (g @ W.T).numpy().reshape(-1, 1)
    torch.testing.assert_close(scalar_sandwich(g, r, W, ridge),
                               torch.tensor(lstsq(one, r.numpy().ravel(), ridge, n)[0]))


@pytest.mark.parametrize("squared", [True, False])
def test_the_residual_is_the_slope_and_the_step_the_best(squared):
    scores, direction = torch.randn(2, 30, 3).double()
    y = torch.eye(3).double()[torch.randint(3, (30,))]
    variable = scores.clone().requires_grad_()
    loss(variable, y, squared).backward()
    torch.testing.assert_close(pseudo_residual(scores, y, squared), -30 * variable.grad)
    step = best_step(scores, direction, y, squared)
    along = torch.linspace(step - 2, step + 2, 2001, dtype=torch.float64)
    values = [float(loss(scores + s * direction, y, squared)) for s in along]
    assert along[int(np.argmin(values))] == pytest.approx(step, abs=2e-3)
    assert best_step(scores, torch.zeros(30, 3).double(), y, squared) == 0
    far = best_step(scores, 1e4 * direction, y, squared)
    assert far == pytest.approx(step / 1e4, rel=1e-4)


@pytest.mark.parametrize("delta", DELTAS)
def test_the_first_block_is_the_closed_form(delta):
    x, y = scaled(load_diabetes)
    one = RandomFeatureBoostingRegressor(1, delta=delta, normalize=False, **SMALL).fit(x, y)
    x, before = torch.tensor(x), one.truncate(0).network_
    block, W = one.network_.blocks[0], before.readout.weight.detach() / y.std()
    with torch.no_grad():
        phi = before.lift(x)
        f = block.random_features(phi, x)
        if delta in ("diagonal", "scalar"):
            f = f[:, :8] + f[:, 8:]
        mean = f.mean(0)
        f = f - mean
        r = torch.tensor((y - y.mean()) / y.std())[:, None] - phi @ W.T
        r = r - r.mean(0)
        if delta == "gradient":
            G = r @ W
            D = torch.tensor(lstsq(f.numpy(), (G / G.square().sum(1).mean().sqrt()).numpy(),
                                   0.1, len(x)))
            scores = f @ D @ W.T
            D = D * (scores * r).sum() / scores.square().sum()
        elif delta == "dense":
            D = torch.tensor(lstsq(np.kron(f.numpy(), W.numpy()), r.numpy().ravel(), 0.1,
                                   len(x)).reshape(-1, 8))
        else:
            columns = np.stack([np.outer(f[:, j], W[:, j]).ravel() for j in range(8)], 1)
            columns = columns if delta == "diagonal" else columns.sum(1, keepdims=True)
            D = torch.tensor(lstsq(columns, r.numpy().ravel(), 0.1, len(x)))
            D = (D if delta == "diagonal" else D.expand(8)).diag()
        torch.testing.assert_close(block(phi, x) - phi, f @ D, atol=1e-8, rtol=1e-6)


def test_the_readouts_are_ridge_and_logistic_regression():
    from sklearn.linear_model import LogisticRegression, Ridge

    x, y = scaled(load_diabetes)
    model = RandomFeatureBoostingRegressor(2, **SMALL).fit(x, y)
    phi = np.asarray(representation(model, x))
    ridge = Ridge(alpha=0.01 * len(x)).fit(phi, y)
    np.testing.assert_allclose(model.predict(x), ridge.predict(phi), rtol=1e-7)
    x, y = scaled(load_wine)
    model = RandomFeatureBoostingClassifier(2, **SMALL).fit(x, y)
    phi = np.asarray(representation(model, x))
    logistic = LogisticRegression(C=1 / (2 * 0.01 * len(x)), max_iter=5000, tol=1e-9).fit(phi, y)
    np.testing.assert_allclose(model.predict_proba(x), logistic.predict_proba(phi), atol=1e-3)


@torch.no_grad()
def representation(model, x):
    network, x = model.network_, torch.tensor(x)
    phi = network.lift(x)
    for block in network.blocks:
        phi = block(phi, x)
    return phi


def test_swim_features_tell_their_two_samples_apart():
    x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 1.0]]).double()
    y = torch.tensor([[0.0], [1.0], [0.0]]).double()
    model = RandomFeatureBoostingRegressor(feature_scale=0.5)
    with torch.no_grad():
        u = model._draw(x, y, 20, torch.Generator().manual_seed(0))(x)
    torch.testing.assert_close(u.abs(), torch.full_like(u, 0.5))
    torch.testing.assert_close(u[0], -u[1])


@pytest.mark.parametrize("delta", DELTAS)
def test_the_loss_falls_with_every_block(delta):
    x, y = scaled(load_diabetes)
    model = RandomFeatureBoostingRegressor(6, delta=delta, normalize=False, ridge_readout=1e-6,
                                           **SMALL).fit(x, y)
    assert len(model.losses_) == 7
    assert all(later < before for before, later in pairwise(model.losses_))
    half = RandomFeatureBoostingRegressor(6, delta=delta, shrinkage=0.5, normalize=False,
                                          ridge_readout=1e-6, **SMALL).fit(x, y)
    assert model.losses_[1] < half.losses_[1] + 1e-3


def test_truncated_is_what_fewer_blocks_give_and_leaves_the_whole_alone():
    for kind, load in ((RandomFeatureBoostingRegressor, load_diabetes),
                       (RandomFeatureBoostingClassifier, load_wine)):
        x, y = scaled(load)
        whole = kind(4, **SMALL).fit(x, y)
        before = whole.predict(x)
        for t in (0, 2, 4):
            short, cut = kind(t, **SMALL).fit(x, y), whole.truncate(t)
            assert len(cut.network_.blocks) == t
            assert cut.losses_ == short.losses_
            np.testing.assert_array_equal(cut.predict(x), short.predict(x))
        with torch.no_grad():
            cut.network_.readout.bias.add_(100)
        np.testing.assert_array_equal(whole.predict(x), before)


def test_the_network_is_an_ordinary_module_that_can_be_staged_and_trained():
    x, y = scaled(load_wine)
    model = RandomFeatureBoostingClassifier(2, **SMALL).fit(x.astype(np.float32), y)
    network, inputs = model.network_, torch.tensor(x, dtype=torch.float32)
    assert not network.training
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    probabilities = torch.softmax(network(inputs), 1).detach().numpy()
    np.testing.assert_allclose(probabilities, model.predict_proba(x.astype(np.float32)), atol=1e-6)
    assert nw.stages(network, inputs).names == ["lift", "blocks.0", "blocks.1", "readout"]
    rule = nw.rules.MonoForward(network, inputs)
    history = nw.fit(rule, nw.data.Batches(inputs, torch.tensor(y), 32), epochs=2, progress=False)
    assert history.epochs[1].loss < history.epochs[0].loss


@pytest.mark.parametrize(("kind", "load", "chance"), [
    (RandomFeatureBoostingRegressor, friedman, 0.1),
    (RandomFeatureBoostingClassifier, lambda: scaled(load_breast_cancer), 0.75)])
def test_better_than_its_random_features_alone_and_than_labels_at_random(kind, load, chance):
    gains = []
    for seed in range(3):
        x, x_test, y, y_test = train_test_split(*load(), random_state=seed)
        options = {"n_features": 64, "width": 16, "ridge": 1.0, "random_state": seed}
        model = kind(**options).fit(x, y)
        score = model.score(x_test, y_test)
        gains.append(score - model.truncate(0).score(x_test, y_test))
        shuffled = np.random.default_rng(seed).permutation(y)
        assert score > kind(**options).fit(x, shuffled).score(x_test, y_test) + 0.15
        assert score > chance + 0.15
    assert np.mean(gains) > 0.015


def test_scikit_learns_own_checks():
    # Nothing is excepted; what is skipped needs pandas or an array library that is not there.
    for kind in (RandomFeatureBoostingRegressor, RandomFeatureBoostingClassifier):
        check_estimator(kind(2, n_features=16, width=8), on_skip=None)


def test_in_pipelines_searches_and_with_several_outputs():
    x, y = load_wine(return_X_y=True)
    pipeline = make_pipeline(StandardScaler(), RandomFeatureBoostingClassifier(1, **SMALL))
    search = GridSearchCV(pipeline, {"randomfeatureboostingclassifier__ridge": [0.1, 1.0]}, cv=2)
    assert search.fit(x, y).best_score_ > 0.8
    model = RandomFeatureBoostingRegressor(2, features="normal", activation="relu", **SMALL)
    assert clone(model).get_params() == model.get_params()
    two = np.stack([x[:, 0], 10 * x[:, 1] + 5], 1)
    x = StandardScaler().fit_transform(x)
    assert model.fit(x, two).predict(x).shape == (178, 2)
    assert model.score(x, two) > 0.9


def test_the_random_state_decides():
    x, y = scaled(load_diabetes)
    first, again, other = (RandomFeatureBoostingRegressor(
        1, n_features=8, width=4, random_state=seed).fit(x, y).predict(x) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


@pytest.mark.parametrize(("options", "error", "match"), [
    ({"delta": "diag"}, UnknownName, "did you mean diagonal"),
    ({"features": "gauss"}, UnknownName, "no kind of random features"),
    ({"activation": "thanh"}, UnknownName, "did you mean tanh"),
    ({"ridge": 0.0}, ValueError, "ridge must be above 0"),
    ({"n_blocks": -1}, ValueError, "n_blocks must be at least 0, got -1"),
    ({"shrinkage": 2.0}, ValueError, "shrinkage must be above 0 and at most 1, got 2"),
])
def test_errors(options, error, match):
    x, y = scaled(load_diabetes)
    with pytest.raises(error, match=match):
        RandomFeatureBoostingRegressor(**options).fit(x, y)


def test_errors_of_classes_and_of_truncation():
    x, y = scaled(load_wine)
    with pytest.raises(ValueError, match="delta='dense' has a closed form for the squared loss"):
        RandomFeatureBoostingClassifier(delta="dense").fit(x, y)
    with pytest.raises(ValueError, match="y must hold at least 2 classes, got 1 class"):
        RandomFeatureBoostingClassifier().fit(x, np.zeros(len(x)))
    model = RandomFeatureBoostingClassifier(1, **SMALL).fit(x, y)
    with pytest.raises(ValueError, match=r"steps must be between 0 and 1, got .*; 1 were grown"):
        model.truncate(2)
