import json
from functools import partial

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.compare.recipe import Recipe, recipe
from netwright.compare.steps import Step
from netwright.errors import UnknownName

TEXTS = ["MonoForward", "GLU",
         "swap_feedforward(make=StructuredFeedForward(rank=64)) + MonoForward",
         "prune_sublayers(remove=2)", "mlp(hidden=[8, 4], activation=Tanh) + SGD(momentum=0.9)",
         "MSELoss", "ForwardForward(threshold=-1.5, predict_by='softmax', blocks=None) + Adam"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_data_and_json_tell_the_same(text):
    found = recipe(text)
    assert str(found) == text
    data = json.loads(json.dumps(found.plain()))
    assert data == found.plain()
    assert recipe(data) == found
    assert recipe(json.dumps(data)) == found
    assert str(recipe(data)) == text


def test_python_tells_the_same():
    written = recipe("swap_feedforward(make=StructuredFeedForward(rank=64)) + MonoForward")
    make = partial(nw.blocks.StructuredFeedForward, rank=64)
    swap = partial(nw.reshape.swap_feedforward, make=make)
    assert recipe([swap, nw.rules.MonoForward]) == written
    assert recipe([swap, "MonoForward"]) == written
    held = written.network[0].function().keywords["make"]
    assert (held.func, held.keywords) == (make.func, make.keywords)
    assert written.rule.function() is nw.rules.MonoForward


def test_each_step_has_its_slot():
    found = recipe("mlp + GLU + MonoForward + SGD + MSELoss")
    assert [str(step) for step in found.network] == ["mlp", "GLU"]
    assert (str(found.rule), str(found.optimizer), str(found.objective)) == (
        "MonoForward", "SGD", "MSELoss")
    assert list(found.plain()) == ["network", "rule", "objective", "optimizer"]
    assert recipe({"optimizer": "SGD", "network": ["mlp", {"name": "GLU"}], "rule": "MonoForward",
                   "objective": nn.MSELoss}) == found
    assert recipe({}) == Recipe()
    assert str(Recipe()) == "Backprop"


def test_a_name_may_be_written_in_three_ways(tmp_path):
    assert recipe("GLU") == recipe("blocks.GLU") == recipe("nw.blocks.GLU")
    assert recipe("torch.optim.SGD") == recipe("SGD") == recipe(torch.optim.SGD)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe("GLU").plain()))
    assert recipe(file) == recipe("GLU")


def test_numbers_without_an_end_survive():
    found = recipe(partial(nw.reshape.prune_sublayers, remove=float("inf")))
    assert recipe(str(found)) == found


def own(network):
    return network


def test_functions_of_ones_own_are_told_by_name():
    found = recipe([own, partial(nw.rules.Backprop, loss=own)])
    assert str(found) == "own + Backprop(loss=own)"
    data = found.plain()
    assert data["network"][0]["function"].endswith("test_recipe:own")
    assert json.loads(json.dumps(data)) == data
    with pytest.raises(ValueError, match="test_recipe:own is a function of one's own, of which"):
        recipe(data)


@pytest.mark.parametrize(("text", "message"), [
    ("MonoForwad", "no change is called 'MonoForwad'; did you mean MonoForward"),
    ("prune_sublayers(removed=2)",
     "no argument of prune_sublayers is called 'removed'; did you mean remove"),
    ("prune_sublayers(2)", "must be written by name, such as calibration=..., got"),
    ("GLU(**{})", "must be written by name"),
    ("GLU +", "must be names with a plus between them"),
    ("GLU - MLP", "must be names with a plus between them"),
    ("3", "must be names with a plus between them"),
    ("GLU(bias=1 if True else 2)", "must be a number, a string"),
    ("GLU(bias=open('x'))", "no change is called 'open'"),
    ("GLU(bias=b'x')", "must be a number, a string"),
    ("Backprop + GLU", "must end with its one rule, got Backprop before"),
    ("SGD + Adam", "must have at most one optimizer, got SGD and Adam"),
    ("measure.cost", "cost is of the kind measure .*, which is no change by itself"),
    ("__import__('os').system('true')", "must be names with a plus between them"),
])
def test_what_cannot_be_read_says_why(text, message):
    with pytest.raises(ValueError, match=message):
        recipe(text)


def test_two_methods_of_one_name_want_the_longer():
    with pytest.raises(ValueError, match=r"may be blocks.sublayers or reshape.sublayers; write"):
        recipe("sublayers")


@pytest.mark.parametrize(("data", "error", "message"), [
    ({"rules": []}, UnknownName, "no slot of a recipe is called 'rules'; did you mean rule"),
    ({"rule": {"method": "Backprop"}}, ValueError, "must be a mapping with 'name' and 'arguments'"),
    ({"rule": {"name": 3}}, ValueError, "must have a string as its 'name'"),
    ({"rule": {"name": "GLU"}}, ValueError, "the slot 'rule' must hold what trains it, got GLU; "
     "put it into 'network'"),
    ({"rule": {"name": "LLS", "arguments": {"heat": 1}}}, UnknownName, "no argument of LLS"),
    ("{not json", ValueError, "the recipe must be JSON"),
])
def test_data_that_is_no_recipe(data, error, message):
    with pytest.raises(error, match=message):
        recipe(data)


def test_nothing_is_run_by_reading():
    with pytest.raises(ValueError, match="no change is called"):
        recipe({"rule": {"name": "os.system", "arguments": {"command": "true"}}})
    assert Step(nw.blocks.GLU, {"bias": True}).values() == {"bias": True}
