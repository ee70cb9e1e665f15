from functools import partial

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.blocks.feedforward import AGLU, QuadraticLinear
from netwright.errors import NothingToReshape, UnknownName


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


X = torch.randn(5, 4)


def test_named_modules_are_others_and_the_rest_is_as_it_was(model):
    changed = nw.reshape.exchange_modules(model, {"1": AGLU})
    assert isinstance(changed[1], AGLU)
    assert torch.equal(changed(X), model[2](changed[1](model[0](X))))
    assert isinstance(model[1], nn.ReLU)


def test_what_is_made_may_run_after_the_module(model):
    changed = nw.reshape.exchange_modules(model, {"1": partial(QuadraticLinear, 8, 8)}, after=True)
    assert torch.equal(changed(X), model[2](changed[1][1](model[1](model[0](X)))))


def test_a_module_in_two_places_is_exchanged_in_both():
    shared = nn.Tanh()
    model = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared)
    changed = nw.reshape.exchange_modules(model, {"1": AGLU})
    assert changed[1] is changed[3]


def test_mode_and_dtype_are_kept(model):
    changed = nw.reshape.exchange_modules(model.double().eval(), {"1": AGLU})
    assert not changed[1].training
    assert changed(X.double()).dtype == torch.float64


@pytest.mark.parametrize("after", [False, True])
def test_the_result_is_saved_and_loaded(model, after, tmp_path):
    make = partial(QuadraticLinear, 8, 8, start="random")
    changed = nw.reshape.exchange_modules(model, {"1": make}, after=after)
    nw.save(changed, tmp_path / "changed")
    again = nw.load(tmp_path / "changed", nn.Sequential(nn.Linear(4, 8), nn.ReLU(),
                                                       nn.Linear(8, 3)))
    assert torch.equal(again(X), changed(X))
    assert [change.name for change in nw.changes(again)] == ["exchange_modules"]


def test_errors(model):
    with pytest.raises(UnknownName, match="no module is called '3'"):
        nw.reshape.exchange_modules(model, {"3": nn.ReLU})
    with pytest.raises(NothingToReshape, match="must name at least one module"):
        nw.reshape.exchange_modules(model, {})
