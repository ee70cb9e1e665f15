import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.anatomy.elementwise import ITSELF, Expression, Named, activation_name
from netwright.anatomy.feedforwards import feedforwards


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.up, self.down, self.function = nn.Linear(4, 6), nn.Linear(6, 4), function
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.down(self.function(self.up(x), self.scale))


@pytest.mark.parametrize("function", [
    lambda h, s: functional.gelu(h), lambda h, s: functional.gelu(h, approximate="tanh"),
    lambda h, s: h * torch.sigmoid(s * h), lambda h, s: h.relu().square() - 0.1,
    lambda h, s: functional.leaky_relu_(h, 0.2), lambda h, s: torch.maximum(h, h.sin())])
def test_what_was_computed_is_computed_again(function):
    layer = Layer(function)
    (found,) = feedforwards(layer, torch.randn(2, 4))
    h = torch.randn(3, 6)
    given = h.clone()
    torch.testing.assert_close(found.activation(h), function(given.clone(), layer.scale))
    assert torch.equal(h, given)  # also where the network worked in place


def test_a_learned_number_stays_learned():
    layer = Layer(lambda h, s: h * torch.sigmoid(s * h))
    (found,) = feedforwards(layer, torch.randn(2, 4))
    found.activation(torch.randn(3, 6)).sum().backward()
    assert layer.scale.grad is not None


def test_an_expression_is_copied_and_pickled():
    (found,) = feedforwards(Layer(lambda h, s: functional.silu(h) + 1), torch.randn(2, 4))
    h = torch.randn(5)
    for again in (copy.deepcopy(found.activation),
                  pickle.loads(pickle.dumps(found.activation))):
        assert torch.equal(again(h), found.activation(h))


@pytest.mark.parametrize(("activation", "name"), [
    (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu (tanh)"), (functional.silu, "silu"),
    (lambda h: h.relu() ** 2, "relu squared"), (ITSELF, "identity"),
    (Named("layer.act", nn.ReLU()), "relu"), (nn.PReLU(6), "PReLU"), (None, ""),
    (Expression(torch.add, (ITSELF, 3.0), {}), "add(h, 3.0)")])
def test_activations_go_by_what_they_compute_else_by_how_they_are_written(activation, name):
    assert activation_name(activation) == name
