from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import netwright as nw


def chain(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def gradients(rule: nw.rules.Rule, x: object, y: Tensor) -> dict[str, Tensor]:
    """What `rule` puts into `.grad` of the network's parameters, and nothing left behind."""
    rule.zero_grad()
    rule(x, y)
    found = {name: p.grad for name, p in rule.network.named_parameters() if p.grad is not None}
    rule.zero_grad()
    return found


def trained(make: Callable[[nn.Module], nw.rules.Rule], seed: int, *, epochs: int = 6,
            width: int = 16, shuffled: bool = False,
            frozen: bool = False) -> tuple[nw.rules.Rule, float]:
    """A network of two hidden layers on the digits, and its accuracy on those held out."""
    torch.manual_seed(seed)
    x, y, x_test, y_test = nw.data.digits()
    if shuffled:
        y = y[torch.randperm(len(y))]
    network = chain(64, width, width, 10, activation=nn.Tanh)
    if frozen:
        network[:-1].requires_grad_(False)
    rule = make(network)
    optimizer = torch.optim.Adam([p for p in rule.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            rule(x[batch].flatten(1), y[batch])
            optimizer.step()
    hits = rule.predict(x_test.flatten(1)).argmax(1) == y_test
    return rule, float(hits.float().mean())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(cosine_similarity(a.detach().flatten(), b.detach().flatten(), dim=0))


@pytest.fixture
def make_chain() -> Callable[..., nn.Sequential]:
    return chain


@pytest.fixture(name="gradients")
def gradients_of() -> Callable[..., dict[str, Tensor]]:
    return gradients


@pytest.fixture(name="trained")
def trained_on_digits() -> Callable[..., tuple[nw.rules.Rule, float]]:
    return trained


@pytest.fixture(name="cosine")
def cosine_of() -> Callable[[Tensor, Tensor], float]:
    return cosine
