"""Objectives that break the contract in one way each, and what is said of them."""

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

import netwright as nw
from netwright.errors import BrokenContract


@nw.method("objective", needs=["classes"])
def plain(scores, y):
    return nw.objectives.cross_entropy(scores, y)


@nw.method("objective", needs=["classes"])
def each(scores, y):
    return cross_entropy(scores, y, reduction="none")


@nw.method("objective", needs=["classes"])
def summed(scores, y):
    return cross_entropy(scores, y, reduction="sum")


@nw.method("objective", needs=["classes"])
def draws(scores, y):
    draws.calls = getattr(draws, "calls", 0) + 1
    return plain(scores, y) * draws.calls


@nw.method("objective", needs=["classes"])
def half_cut(scores, y):
    return plain(scores, y) + plain(scores.detach() ** 2, y)


@nw.method("objective", needs=["classes"])
def always_float32(scores, y):
    return plain(scores.float(), y)


@nw.method("objective", needs=["classes"])
def first_counts_more(scores, y):
    return plain(scores, y) + plain(scores[:1], y[:1])


@nw.method("objective", needs=["classes"])
def counts_all(scores, y):
    told = y != -100
    return cross_entropy(scores[told], y[told], reduction="sum") / len(y)


@nw.method("objective", needs=["classes"])
def flat_only(scores, y):
    return cross_entropy(scores, y)


@nw.method("objective", needs=["series"])
def writes(forecast, target):
    loss = (forecast - target).abs().mean()
    target.zero_()
    return loss


@nw.method("objective", needs=["series"])
def halves(forecast, target):
    return mse_loss(forecast, target) * (1 if torch.is_grad_enabled() else 0.5)


@pytest.mark.parametrize(("objective", "check", "words"), [
    (each, "it is one finite number", r"got \(6,\)"),
    (draws, "it is one finite number", "keep nothing between two calls"),
    (half_cut, "a loss has the slope of finite differences", "mend the gradient"),
    (always_float32, "it keeps the type of its numbers", "got torch.float32"),
    (first_counts_more, "the order of samples does not matter", "treat all samples alike"),
    (summed, "it is a mean over the samples", "divide by the number"),
    (counts_all, "labels of minus 100 do not count", "leave them out of the mean"),
    (flat_only, "leading axes count as samples", "flatten all axes"),
    (writes, "its arguments are left as they were", "work on copies"),
    (halves, "it runs without gradients", "under no_grad"),
])
def test_what_is_broken_is_named_and_how_to_mend_it(objective, check, words):
    single = {str(check): check for check in nw.contracts.checks("objective")}[check]
    with pytest.raises(BrokenContract, match=words) as broken:
        single(objective)
    assert str(broken.value).startswith(f"{objective.__name__}: {check}: expected ")
    single(plain)  # the control


def test_an_objective_of_ones_own_is_held_on_a_batch_of_ones_own():
    nw.contracts.check_objective(plain)
    nw.contracts.check_objective(torch.nn.functional.huber_loss, arguments={"delta": 0.5},
                                 batch=lambda: (torch.randn(8), torch.randn(8)))
