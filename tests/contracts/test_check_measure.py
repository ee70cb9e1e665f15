"""Measures that break the contract in one way each, and what is said of them."""

import random

import pytest
import torch
from torch.nn.functional import cross_entropy

import netwright as nw
from netwright.errors import BrokenContract
from netwright.runtime.modes import evaluating


def plain(model, batch):
    """The size of what the network returns: a measure that only looks."""
    with torch.no_grad(), evaluating(model):
        return float(model(batch[0]).abs().mean())


def trains(model, batch):
    model.train()(batch[0])


def differentiates(model, batch):
    cross_entropy(model.eval()(batch[0]), batch[1]).backward()


def steps(model, batch):
    with torch.no_grad():
        next(model.parameters()).add_(1)


def draws(model, batch):
    torch.rand(1)


def draws_in_python(model, batch):
    random.random()


def hooks(model, batch):
    model.register_forward_hook(lambda *_: None)


def thaws(model, batch):
    model.requires_grad_()


def stumbles(model, batch):
    mode = model.training
    model.train(not mode)
    plain(model, batch)
    model.train(mode)


def scales(model, batch):
    batch[0].mul_(2)


@pytest.mark.parametrize(("measure", "check", "words"), [
    (trains, "it leaves what it measures as it was", "expected weights and buffers|modes"),
    (differentiates, "it leaves what it measures as it was", "expected gradients as they were"),
    (steps, "it leaves what it measures as it was", "expected weights and buffers"),
    (draws, "it leaves what it measures as it was", "random states"),
    (draws_in_python, "it leaves what it measures as it was", "random states"),
    (hooks, "it leaves what it measures as it was", "remove the handles"),
    (thaws, "it leaves what it measures as it was", "requires_grad"),
    (stumbles, "it leaves all as it was where it fails", "modes as they were"),
    (scales, "its arguments are left as they were", "the batch as it was"),
    (differentiates, "it measures without gradients too", "got RuntimeError"),
])
def test_what_is_broken_is_named_and_how_to_mend_it(measure, check, words):
    single = {str(check): check for check in nw.contracts.checks("measure")}[check]
    with pytest.raises(BrokenContract, match=words) as broken:
        single(measure)
    assert str(broken.value).startswith(f"{measure.__name__}: {check}: expected ")
    nw.contracts.check_measure(plain)  # the control
