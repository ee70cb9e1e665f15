"""Rules at their default settings, on networks of many stages."""

import inspect
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import netwright as nw
from netwright.catalogue.facets import methods
from netwright.contracts.checks import offered
from netwright.rules import Backprop

FARTHEST = 30.0
RULES = [method for method in methods().values() if method.facets.kind == "rule"]


def deep(stages: int) -> nn.Sequential:
    """Return a network through which gradients neither fade nor grow much."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([20, *[16] * (stages - 1), 3]):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        nn.init.orthogonal_(layers[-2].weight, 1.2)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(32, 20), torch.arange(32) % 3


def made(method: Any, network: nn.Module, x: Tensor) -> nw.rules.Rule | None:
    """Return the rule, or None where it is for other networks and says for which."""
    try:
        rule: nw.rules.Rule = method.value(network, **offered(method.value, example=x,
                                                              generator=None))
    except ValueError as refused:
        if "network" not in str(refused):
            raise
        return None
    return rule


def sizes(network: nn.Sequential, before: list[Tensor]) -> Tensor:
    """Return how far each layer's weight was moved, by its gradient or by the rule itself."""
    found = []
    for layer, old in zip(network[::2], before, strict=True):
        assert isinstance(layer, nn.Linear)
        moved = layer.weight.detach() - old
        found.append((moved if layer.weight.grad is None else layer.weight.grad).norm())
    return torch.stack(found)


def weights(network: nn.Sequential) -> list[Tensor]:
    return [layer.weight.detach().clone() for layer in network[::2]]


@pytest.mark.parametrize("stages", [8, 16])
@pytest.mark.parametrize("method", RULES, ids=lambda method: method.name)
def test_every_layer_learns_at_a_comparable_rate_or_the_page_says_why_not(method, stages):
    """Its update over backpropagation's is within 30 times that of the median layer."""
    network, (x, y) = deep(stages), batch()
    rule = made(method, network, x)
    if rule is None:
        return
    before = weights(network)
    rule(x, y)
    found = sizes(network, before)
    if not found.any():  # what learns is beside the network
        assert any(p.grad is not None for p in rule.parameters()) or rule.updates_weights
        return
    exact = deep(stages)
    Backprop(exact)(x, y)
    shares = found / sizes(exact, before)
    shares = shares / shares.median()
    even = bool((shares > 1 / FARTHEST).all() and (shares < FARTHEST).all())
    page = Path(inspect.getfile(method.value)).with_suffix(".md")
    said = "**In deep networks.**" in page.read_text()
    assert even or said, f"{method.name}'s page does not say why {shares.tolist()} differ so much"


@pytest.mark.parametrize("method", RULES, ids=lambda method: method.name)
def test_a_call_tells_running_statistics_of_one_batch(method):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8),
                            nn.ReLU(), nn.Linear(8, 3))
    x, y = batch()
    rule = made(method, network, x)
    if rule is None:
        return
    rule(x, y)
    seen = int(network[1].num_batches_tracked)
    assert seen <= 1, f"{method.name} ran them {seen} times"
