from copy import deepcopy

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.contracts import check_reshape, checks
from netwright.errors import BrokenContract, NothingToReshape
from netwright.reshape import decided, reshape


@reshape
def sound(model: nn.Module, example: torch.Tensor) -> nn.Module:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise NothingToReshape("there is no linear layer")
    return decided({"layer": names[0]})


@sound.applies
def halved(model, decision):
    layer = model.get_submodule(decision["layer"])
    if nn.utils.parametrize.is_parametrized(layer):
        raise ValueError("the layer is parametrized")
    layer.weight.data.mul_(0.5)
    return model


class Single(nn.Linear):
    """Runs in a network of any dtype, and keeps to its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


@reshape
def forgetful(model: nn.Module, example: torch.Tensor) -> nn.Module:
    last = model[-1]
    return decided({}, part=Single(last.in_features, last.out_features))


@forgetful.applies
def with_part(model, decision, part=None):
    model[-1] = part or nn.Linear(model[-1].in_features, 5)
    return model


@reshape
def elsewhere(model: nn.Module, data: torch.Tensor, generator: torch.Generator) -> nn.Module:
    return decided({"seed": int(torch.randint(9, ()))})


@elsewhere.applies
def rebuilt(model, decision):
    plain = deepcopy(model).float()
    plain._forward_hooks.clear()
    return plain


def in_place(model, example):
    model[-1].weight.data.zero_()
    return model


def unrecorded(model):
    return deepcopy(model)


BROKEN = [
    (in_place, "its argument stays as it was", r"got another '5\.weight'"),
    (unrecorded, "what was done is recorded", "0 where 0 were before"),
    (forgetful, "its decision alone builds the result again", "no error, got RuntimeError"),
    (forgetful, "the result is saved and loaded", "build it with the same sizes"),
    (forgetful, "dtype modes buffers hooks and what is frozen stay", "torch.float64"),
    (elsewhere, "random state stays as it was", "a changed global random state"),
    (elsewhere, "its data are called calibration or example", "got data; give it that name"),
]


def held(method, name):
    check = next(check for check in checks("reshape") if check.name == name)
    check(method, arguments={"data": torch.zeros(1)} if method is elsewhere else {})


@pytest.mark.parametrize(("method", "name", "words"), BROKEN,
                         ids=[f"{method.__name__} {name}" for method, name, _ in BROKEN])
def test_what_is_broken_is_named(method, name, words):
    with pytest.raises(BrokenContract, match=words):
        held(method, name)


def test_a_reshape_of_ones_own_that_keeps_to_it_passes():
    check_reshape(sound, network=lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
                  batch=lambda: torch.randn(5, 4))


def test_nothing_to_reshape_must_be_said():
    check = next(check for check in checks("reshape")
                 if check.name == "where there is nothing it says so")
    check(sound)
    with pytest.raises(BrokenContract, match="expected NothingToReshape"):
        check(unrecorded)


def test_the_room_shows_it():
    assert nw.contracts.check_reshape is check_reshape
