import pytest
import torch
from torch import nn

import netwright as nw
from netwright.errors import MissingData
from netwright.tasks import Parts
from netwright.tasks.ready import check_ready


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


X, Y = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3


def own(split=None, **options):
    return nw.Task(**{"name": "own", "network": network, "batch_size": 10,
                      "data": split or (X[:20], Y[:20], X[20:], Y[20:]), **options})


def changed(tensor, place, value):
    copy = tensor.clone()
    copy[place] = value
    return copy


def boom(*args, **options):
    raise KeyError("boom")


def missing():
    raise MissingData("it is not there")


@pytest.mark.parametrize("task", [
    own(),
    own(network=lambda: nn.Linear(4, 1), loss=nn.functional.mse_loss,
        split=(X[:20], X[:20, :1], X[20:], X[20:, :1]), metric=nn.functional.mse_loss,
        higher_is_better=False),
    own(split=Parts([(X[:20], Y[:20])], [(X, Y)], [(X, Y)])),
    own(split=(X[:20], changed(Y[:20], 3, -100), X[20:], Y[20:])),
], ids=["labels", "targets", "loaders", "labels that are left out"])
def test_what_can_run_passes_and_nothing_is_changed(task):
    before, x, y = torch.get_rng_state(), X.clone(), Y.clone()
    check_ready(task)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(X, x)
    assert torch.equal(Y, y)


@pytest.mark.parametrize(("task", "message"), [
    (own((changed(X[:20], (3, 2), torch.nan), Y[:20], X[20:], Y[20:])),
     "x_train of task 'own' must not hold NaN, got NaN in sample 3"),
    (own((X[:20], Y[:20], changed(X[20:], (5, 1), torch.nan), Y[20:])),
     "x_test of task 'own' must not hold NaN, got NaN in sample 5"),
    (own((X[:20], changed(Y[:20], 9, 7), X[20:], Y[20:])),
     "in the train samples of task 'own' y must be between 0 and 2 .* got 7"),
    (own((X[:20], Y[:20], X[20:], changed(Y[20:], 9, -1))),
     "in the test samples of task 'own' y must be between 0 and 2 .* got -1"),
    (own((X[:20], Y[:20].float(), X[20:], Y[20:])), "dtype int64, got torch.float32"),
    (own((X[:20, :3], Y[:20], X[20:], Y[20:])),
     "network of task 'own' raised RuntimeError: .* on its train samples"),
    (own((X[:20], Y[:20], X[20:, :3], Y[20:])),
     "network of task 'own' raised RuntimeError: .* on its test samples"),
    (own((X[:20], Y[:19], X[20:], Y[20:])), "x_train of task 'own' must hold as many samples"),
    (own((X[:0], Y[:0], X[20:], Y[20:])), "y_train of task 'own' must hold at least one sample"),
    (own((X[:1], Y[:1], X[20:], Y[20:])), "must hold at least 2 samples"),
    (own((X[:20].numpy(), Y[:20], X[20:], Y[20:])), "x_train of .* must be a tensor, got ndarray"),
    (own(Parts([], [(X, Y)], [(X, Y)])), "train of task 'own' must hold at least one batch"),
    (own(Parts([(X, Y)], [(X, Y)], ((X, Y) for _ in "ab"))), "test of .* again, got generator"),
    (own(Parts([(X, Y)], [(X,)], [(X, Y)])), "validation of task 'own' must give pairs"),
    (own(data=boom), "data of task 'own' raised KeyError: 'boom'"),
    (own(network=boom), "network of task 'own' raised KeyError: 'boom'"),
    (own(network=lambda: 3), "must build an nn.Module, got int"),
    (own(network=nn.Identity), "must have parameters to train"),
    (own(loss=boom), "loss of task 'own' raised KeyError"),
    (own(loss=lambda scores, y: scores), r"without axes, got a tensor of shape \(2, 3\)"),
    (own(metric=boom, higher_is_better=True), "metric of task 'own' raised KeyError"),
    (own(metric=lambda scores, y: scores, higher_is_better=True), "must return one number"),
    (own(optimizer=boom), "optimizer of task 'own' raised KeyError"),
])
def test_what_cannot_run_is_named(task, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_ready(task)
    assert "\n" not in str(caught.value)


def test_missing_data_stays_what_it_is():
    with pytest.raises(MissingData, match="it is not there"):
        check_ready(own(data=missing))


def test_a_comparison_refuses_it_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="must not hold NaN"):
        nw.compare(own((changed(X[:20], 3, torch.nan), Y[:20], X[20:], Y[20:])), ["Backprop"],
                   storage=tmp_path / "a.db", progress=False)
    assert list(tmp_path.iterdir()) == []
