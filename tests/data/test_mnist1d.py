import numpy
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from netwright.data import mnist1d
from netwright.data.mnist1d import STROKES


def test_shapes_classes_and_scale():
    found = mnist1d(samples=2000)
    x, y = torch.cat([found.x_train, found.x_test]), torch.cat([found.y_train, found.y_test])
    assert x.shape == (2000, 1, 40)
    assert x.dtype == torch.float32
    assert y.bincount().tolist() == [200] * 10
    assert y.dtype == torch.int64
    assert x.mean().abs() < 1e-5
    assert (x.std() - 1).abs() < 1e-3


def test_without_chance_a_sample_is_its_stretched_stroke():
    found = mnist1d(samples=20, padding=(0, 0), scale=0, translation=1, correlated_noise=0,
                    noise=0, shear=0, length=12)
    strokes = (STROKES - STROKES.mean(1, keepdims=True)) / STROKES.std(1, keepdims=True)
    strokes = strokes - strokes[:, :1]
    strokes = (strokes - strokes.mean()) / strokes.std()
    numpy.testing.assert_allclose(found.x_train[:, 0], strokes[found.y_train], atol=1e-5)


def test_translation_only_turns_a_sample_round():
    still = mnist1d(samples=50, padding=(60, 60), scale=0, translation=1, correlated_noise=0,
                    noise=0, shear=0, length=72)
    moved = mnist1d(samples=50, padding=(60, 60), scale=0, translation=48, correlated_noise=0,
                    noise=0, shear=0, length=72)
    for x, y in zip(moved.x_train[:, 0], moved.y_train, strict=True):
        original = still.x_train[still.y_train == y][0, 0]
        assert any(torch.allclose(x.roll(-k), original, atol=1e-5) for k in range(48))


def test_a_linear_classifier_does_as_badly_as_published():
    # The paper: 32 % for logistic regression, 94 % for a convolutional network.
    found = mnist1d()
    model = LogisticRegression(max_iter=300).fit(found.x_train[:, 0].numpy(), found.y_train.numpy())
    assert 0.27 < model.score(found.x_test[:, 0].numpy(), found.y_test.numpy()) < 0.38


def test_the_seed_decides():
    first, same, other = mnist1d(samples=100), mnist1d(samples=100), mnist1d(samples=100, seed=1)
    assert torch.equal(first.x_train, same.x_train)
    assert not torch.equal(first.x_train, other.x_train)


def test_errors():
    with pytest.raises(ValueError, match=r"samples must be at least 10, got 9; .* 10 classes"):
        mnist1d(samples=9)
    with pytest.raises(ValueError, match="test must leave samples"):
        mnist1d(test=1.0)
