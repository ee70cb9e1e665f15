"""Blocks that break the contract in one way each, and what is said of them."""

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.errors import BrokenContract


class Linear(nn.Module):
    """A linear layer, with one thing added or left out by each block below."""

    def __init__(self, dim):
        super().__init__()
        self.layer = nn.Linear(dim, dim)

    def forward(self, x):
        return self.layer(x)


class Wider(Linear):
    def forward(self, x):
        return torch.cat([self.layer(x)] * 2, -1)


class Mixes(Linear):
    def forward(self, x):
        return self.layer(x) + x.mean(0)


class Viewed(Linear):
    def forward(self, x):
        return self.layer(x.view(-1, x.shape[-1])).view(x.shape)


class Rigid(Linear):
    def __init__(self, dim):
        super().__init__(dim)
        self.shift = torch.randn(dim)

    def forward(self, x):
        return self.layer(x) + self.shift


class Single(Linear):
    def forward(self, x):
        return self.layer(x) / x.abs().max()


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class WrongSlope(Linear):
    def forward(self, x):
        return Twice.apply(self.layer(x))


class CutOff(Linear):
    def forward(self, x):
        return self.layer(x).detach()


class Noisy(Linear):
    def forward(self, x):
        return self.layer(x) + torch.randn_like(x)


class Counts(Linear):
    def __init__(self, dim):
        super().__init__(dim)
        self.register_buffer("calls", torch.tensor(0.0))

    def forward(self, x):
        self.calls += 1
        return self.layer(x)


class Closed(Linear):
    def __init__(self, dim):
        super().__init__(dim)
        layer = self.layer
        self.run = lambda x: layer(x)

    def forward(self, x):
        return self.run(x)


class Writes(Linear):
    def forward(self, x):
        y = self.layer(x)
        x.data.mul_(0.5)
        return y


class Modes(Linear):
    def forward(self, x):
        return self.layer(x) * (1 if torch.is_grad_enabled() else 2)


class Misplaced(Linear):
    def __init__(self, width):
        super().__init__(width)


def placed(block):
    return nw.method("block", place="feedforward", takes=["dim"])(block)


@pytest.mark.parametrize(("block", "check", "words"), [
    (Wider, "it fits its declared place", "expected an output of the input's shape"),
    (Mixes, "leading axes stand apart", "x.flatten"),
    (Rigid, "it runs in bfloat16 and in float64", r"got torch.float32|got RuntimeError"),
    (Single, "a batch of none is a batch", "got RuntimeError"),
    (WrongSlope, "gradients are those of finite differences", "by the gradients of x"),
    (CutOff, "training gives finite gradients in the weights type", "do not detach"),
    (Noisy, "eval mode is deterministic and leaves no trace", "draw only where self.training"),
    (Counts, "eval mode is deterministic and leaves no trace", "update buffers only"),
    (Rigid, "state goes into a fresh block that returns the same", "as a parameter, a buffer"),
    (Closed, "a deep copy stands alone", "not closures"),
    (Writes, "the input is left as it was", "work on a copy"),
    (Modes, "it runs the same without gradients", "under no_grad"),
    (Viewed, "layouts do not matter", "got RuntimeError"),
])
def test_what_is_broken_is_named_and_how_to_mend_it(block, check, words):
    single = {str(check): check for check in nw.contracts.checks("block")}[check]
    with pytest.raises(BrokenContract, match=words) as broken:
        single(placed(block))
    assert str(broken.value).startswith(f"{block.__name__}: {check}: expected ")
    assert "\n" not in str(broken.value)
    single(placed(Linear))  # the control


def test_a_place_is_declared_and_supplies_what_is_taken():
    class Homeless(Linear):
        pass
    with pytest.raises(BrokenContract, match="declared place, got none"):
        nw.contracts.checks("block")[0](Homeless, arguments={"dim": 8})
    with pytest.raises(BrokenContract, match="unexpected keyword argument 'dim'"):
        nw.contracts.check_block(placed(Misplaced))
    with pytest.raises(BrokenContract, match="takes= to name arguments"):
        nw.contracts.check_block(placed(Misplaced), network=lambda: Misplaced(8))
    nw.contracts.check_block(placed(Linear))


def test_a_block_of_ones_own_is_held_on_an_input_of_ones_own():
    @nw.method("block", place="convolution", needs=["images"])
    class Own(nn.Conv1d):
        pass
    nw.contracts.check_block(Own, network=lambda: Own(2, 4, 3, padding=1),
                             batch=lambda: torch.randn(2, 2, 5))


def test_gradients_that_are_meant_to_differ_say_so():
    class Meant(WrongSlope):
        surrogate_gradient = True

    class Cut(CutOff):
        differentiable = False
    nw.contracts.check_block(placed(Meant))
    nw.contracts.check_block(placed(Cut))
