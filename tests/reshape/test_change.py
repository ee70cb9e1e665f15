import io

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.errors import NothingToReshape, UnknownName
from netwright.models import gpt
from netwright.reshape import changes, decided, prune_sublayers, reshape
from netwright.reshape.change import named

X = torch.zeros(1, 8, dtype=torch.long)


@reshape
def narrow(model: nn.Module, example: torch.Tensor, width: int = 2, *,
           make: object = None) -> nn.Module:
    if width < 1:
        raise NothingToReshape("no width")
    return decided({"width": width}, weight=torch.full((width, 4), 3.0))


@narrow.applies
def narrowed(model, decision, weight=None):
    model[0] = nn.Linear(4, decision["width"])
    if weight is not None:
        model[0].weight.data = weight
    return model


def chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8))


def test_what_was_done_is_recorded_with_its_arguments_and_the_model_is_left():
    model, x = chain(), torch.randn(2, 4)
    changed = narrow(model, x, 3, make=nn.Tanh)
    (record,) = nw.changes(changed)
    assert record.arguments == {"width": 3, "make": {"name": "torch.nn.Tanh"}}
    assert record.decision == {"width": 3}
    assert changed[0].weight.eq(3).all()
    assert model[0].out_features == 8
    assert nw.changes(model) == []


def test_a_decision_is_applied_to_the_model_that_is_given():
    model = chain()
    applied = narrow.apply(model, narrow.decide(model, None, width=3))
    assert applied is model
    assert model[0].weight.shape == (3, 4)
    assert not model[0].weight.eq(3).all()  # what the first call alone had
    assert [record.decision for record in changes(model)] == [{"width": 3}]


def test_records_add_up_and_go_with_copies_and_pickles():
    model = gpt(64, context=8, depth=4)
    once = prune_sublayers(model, X, 1)
    twice = prune_sublayers(once, X, remove=2)
    assert [record.arguments["remove"] for record in changes(twice)] == [1, 2]
    assert len(changes(once)) == 1
    file = io.BytesIO()
    torch.save(twice, file)
    file.seek(0)
    assert changes(torch.load(file, weights_only=False)) == changes(twice)


def test_a_failed_call_leaves_no_record():
    model = chain()
    with pytest.raises(NothingToReshape):
        narrow(model, None, width=0)
    assert changes(model) == []
    with pytest.raises(TypeError, match="width"):
        narrow(model, None, widths=1)


def test_decisions_are_plain_data():
    with pytest.raises(TypeError, match="decision must be plain data"):
        decided({"units": torch.arange(3)})
    with pytest.raises(TypeError, match="decision must be plain data"):
        decided({"share": float("nan")})


def test_reshapes_are_found_by_name():
    assert named("prune_sublayers") is prune_sublayers
    assert named(f"{__name__}.narrow") is narrow
    with pytest.raises(UnknownName, match="did you mean prune_sublayers"):
        named("prune_sublayer")
