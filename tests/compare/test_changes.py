from functools import partial
from typing import ClassVar

import pytest
import torch
from optuna.distributions import FloatDistribution
from torch import nn

import netwright as nw
from netwright.compare.changes import Change, changes
from netwright.compare.recipe import recipe
from netwright.errors import UnknownName
from netwright.objectives.losses import cross_entropy
from netwright.rules import Backprop, Rule


class Tuned(Backprop):
    search: ClassVar = {"strength": (0.5, 5.0), "rounds": (1, 8), "kind": ["a", "b"],
                        "learning_rate": (1e-5, 1e-1)}

    def __init__(self, network, example=None, *, num_classes, strength=2.0, rounds=3, kind="a",
                 loss=cross_entropy):
        super().__init__(network, loss=loss)
        self.got = {"example": example, "num_classes": num_classes, "strength": strength,
                    "rounds": rounds, "kind": kind}


def linear():
    return nn.Sequential(nn.Linear(6, 3))


def halved(loss_of):
    return lambda logits, y: loss_of(logits, y) / 2


@pytest.fixture
def own():
    x, y = torch.randn(20, 6), torch.arange(20) % 3
    return nw.Task("own", linear, (x, y, x, y), batch_size=8)


def test_a_rule_ends_a_change():
    with pytest.raises(ValueError, match="must end with its one rule, got Backprop before"):
        changes(["Backprop + MonoForward"])
    with pytest.raises(ValueError, match="must end with its one rule"):
        changes({"two": [partial(Tuned, strength=1.0), "Backprop"]})


def test_labels():
    found = changes(["Backprop", Tuned, partial(Tuned, strength=1.0), [nn.Identity, "Backprop"],
                     "prune_sublayers + Backprop"])
    assert [change.label for change in found] == [
        "Backprop", "Tuned", "Tuned(strength=1.0)", "Identity + Backprop",
        "prune_sublayers + Backprop"]
    assert [c.label for c in changes({"mine": Tuned, "theirs": "Backprop"})] == ["mine", "theirs"]
    assert [c.label for c in changes("Backprop")] == ["Backprop"]


def test_a_rule_gets_what_it_names(own):
    change, = changes(Tuned)
    rule = change.build(own.network(), own, {"learning_rate": 0.1, "strength": 4.0, "rounds": 5})
    assert torch.equal(rule.got.pop("example"), own.first)
    assert rule.got == {"num_classes": 3, "strength": 4.0, "rounds": 5, "kind": "a"}
    assert rule.loss is cross_entropy


def test_a_loss_of_ones_own_reaches_the_rule():
    x, y = torch.randn(20, 6), torch.arange(20) % 3
    loss = halved(cross_entropy)
    task = nw.Task("own", linear, (x, y, x, y), loss=loss)
    for given in (Tuned, "Backprop", nn.Sequential):
        change, = changes({"any": given})
        assert change.build(task.network(), task, {}).loss is loss


def test_what_a_partial_sets_is_not_tuned(own):
    change, = changes(partial(Tuned, strength=1.0, kind="b"))
    assert set(change.space(own)) == {"learning_rate", "rounds"}
    rule = change.build(own.network(), own, {"rounds": 7})
    assert (rule.got["strength"], rule.got["rounds"], rule.got["kind"]) == (1.0, 7, "b")


def test_functions_get_what_they_name(own):
    seen = []

    def first(n, example, task):
        seen.extend([example, task])
        return Backprop(n)

    def second(network, calibration, batch):
        seen.extend([calibration, batch])
        return nn.Sequential(network, nn.Tanh())
    for given in (first, second, lambda network: network):
        change, = changes({"any": given})
        assert isinstance(change.build(own.network(), own, {}), Rule)
    assert seen[1] is own
    assert torch.equal(seen[0], own.first)
    assert seen[2].shape == (8, 6)
    assert torch.equal(seen[3][1], own.batch[1])


def test_arguments_are_not_guessed_by_their_number(own):
    change, = changes({"any": lambda network, e, t: network})
    with pytest.raises(ValueError, match="needs e, t, which a comparison does not know"):
        change.build(own.network(), own, {})


def test_reshapes_come_before_the_rule(own):
    def wider(network):
        return nn.Sequential(*network, nn.Linear(3, 5))
    change, = changes([[wider, wider_again, "Backprop"]])
    rule = change.build(own.network(), own, {})
    assert type(rule) is Backprop
    assert len(rule.network) == 3
    rule = changes([[wider]])[0].build(own.network(), own, {})
    assert rule.predict(torch.zeros(2, 6)).shape == (2, 5)


def wider_again(network):
    return nn.Sequential(*network, nn.Linear(5, 3))


def test_proposals_start_with_the_defaults_and_fill_the_space(own):
    change, = changes(Tuned)
    few, many = change.proposals(own, 4), change.proposals(own, 200)
    assert many[:4] == few
    assert few[0] == {"learning_rate": 1e-3, "strength": 2.0, "rounds": 3, "kind": "a"}
    rates = torch.tensor([p["learning_rate"] for p in many]).log10()
    # Evenly spread on a logarithmic scale: each fifth of the range holds about a fifth.
    assert torch.histc(rates, 5, min=-5, max=-1).sub(40).abs().max() <= 6
    assert {p["rounds"] for p in many} == set(range(1, 9))
    assert {p["kind"] for p in many} == {"a", "b"}
    assert all(0.5 <= p["strength"] <= 5 for p in many)


def test_what_a_method_among_the_arguments_searches_is_tuned_too(own):
    change, = changes("swap_feedforward(make=GLU) + ForwardGradient(perturb='weights')")
    space = change.space(own)
    assert space.keys() == {"learning_rate", "activation", "directions"}
    done = change.set({"activation": "relu", "directions": 16})
    assert str(done) == ("swap_feedforward(make=GLU(activation='relu')) + "
                         "ForwardGradient(perturb='weights', directions=16)")


def test_one_name_in_two_steps_is_set_in_each(own):
    change, = changes("upcycle + upcycle(k=1)")
    assert change.space(own).keys() == {"learning_rate", "0.n_experts", "1.n_experts", "k"}
    done = change.set({"0.n_experts": 2, "1.n_experts": 4, "k": 2})
    assert [step.arguments for step in done.network] == [
        {"n_experts": 2, "k": 2}, {"k": 1, "n_experts": 4}]


@pytest.mark.parametrize(("text", "space"), [
    ("SGD", (1e-4, 1e-2)), ("Adagrad", (1e-3, 1e-1)), ("SGD(lr=0.5)", None)])
def test_the_learning_rate_is_the_optimizers(own, text, space):
    change, = changes(text)
    found = change.space(own).get("learning_rate")
    assert (found and (found.low, found.high)) == (space and pytest.approx(space))
    parameter = nn.Parameter(torch.zeros(1))
    made = change.task(own).optimize([parameter], 0.25)
    assert made.param_groups[0]["lr"] == (0.25 if space else 0.5)


def test_every_change_has_the_learning_rate(own):
    space = changes("Backprop")[0].space(own)
    assert space == {"learning_rate": FloatDistribution(1e-4, 1e-2, log=True)}
    assert len(changes("Backprop")[0].proposals(own, 1)) == 1


def test_errors(own):
    with pytest.raises(UnknownName, match="no change is called 'Backprob'; did you mean Backprop"):
        changes(["Backprob"])
    with pytest.raises(ValueError, match="must hold at least one change"):
        changes([])
    with pytest.raises(ValueError, match="got 'Backprop' 2 times; pass a mapping"):
        changes(["Backprop", Backprop])
    for wrong in (linear(), 3, []):
        with pytest.raises(ValueError, match="a change must be a rule's name"):
            changes([wrong])
    def build(*steps):
        return Change("odd", recipe(list(steps))).build(own.network(), own, {})
    with pytest.raises(ValueError, match=r"must end with its one rule, got Backprop from <lambda>"):
        build(lambda network: Backprop(network), "Backprop")
    with pytest.raises(ValueError, match="must give a Rule or a network, got int from <lambda>"):
        build(lambda network: 3)
    with pytest.raises(ValueError, match="needs strange, which a comparison does not know"):
        build(lambda network, strange: network)
