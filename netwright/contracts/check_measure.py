import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from netwright import checks
from netwright.contracts.checks import Make, check, expect, expect_same, hold
from netwright.rules.exact.backprop import Backprop
from netwright.rules.rule import Rule
from netwright.runtime.random_state import every_random_state

__all__ = ["check_measure"]


@checks.annotated
def check_measure(measure: Callable[..., Any], *, arguments: Mapping[str, Any] | None = None,
                  network: Callable[[], nn.Module] | None = None,
                  batch: Callable[[], tuple[Any, Tensor]] | None = None) -> None:
    """Hold a measure to what every measure keeps to: that it only looks.

    Its arguments are supplied by their names: `rule`, a rule on the network; `rule_or_model`,
    `network` or `model`, the network; `batch`, the pair (x, y), or `x` and `y` or `example`;
    `make`, a function of a depth that returns a network, and `depths`. Others are given by
    `arguments`, or by the declared variants. The network, unless `network` makes another, has a
    batch norm, a dropout, a frozen layer, and gradients.

    Raises:
        BrokenContract: the measure does not keep to it; says in one line what was expected, what
            was seen, and how to mend it.

    >>> def loudest(network, example):
    ...     return network.eval()(example).max().item()
    >>> check_measure(loudest)
    Traceback (most recent call last):
    netwright.errors.BrokenContract: loudest: it leaves what it measures as it was: expected train \
and eval modes as they were, got others; put them back, see netwright.runtime.modes
    """
    hold("measure", measure, arguments=arguments, network=network, batch=batch)


def ordinary_network() -> nn.Module:
    """Return a small network with all that a careless measure would change."""
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5),
                            nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    network[4].requires_grad_(False)
    return network


class Case:
    """A measure, and the arguments that it is given."""

    def __init__(self, method: Callable[..., Any], arguments: Mapping[str, Any],
                 network: Callable[[], nn.Module] | None,
                 batch: Callable[[], tuple[Any, Tensor]] | None) -> None:
        self.method = method
        torch.manual_seed(0)
        self.rule: Rule = Backprop((network or ordinary_network)())
        torch.manual_seed(7)
        self.batch = batch() if batch else (torch.randn(6, 6), torch.tensor([0, 1, 2, 0, 1, 2]))
        self.arguments = {**self._supplied(), **deepcopy(dict(arguments))}
        for p in self.rule.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None

    def _supplied(self) -> dict[str, Any]:
        def deep(depth: int) -> nn.Module:
            return nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh())
                                   for _ in range(depth)], nn.Linear(6, 3))
        x, y = self.batch
        network = self.rule.network
        known = {"rule": self.rule, "rule_or_model": network, "network": network, "model": network,
                 "batch": self.batch, "x": x, "example": x, "y": y, "make": deep, "depths": (1, 2)}
        return {name: known[name] for name in inspect.signature(self.method).parameters
                if name in known}

    def measure(self) -> Any:
        return self.method(**self.arguments)

    def modes(self) -> list[bool]:
        return [module.training for module in self.rule.modules()]

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.rule.named_parameters()
                if p.grad is not None}

    def state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.rule.state_dict().items()}

    def hooks(self) -> int:
        return sum(len(hooks) for module in self.rule.modules()
                   for name, hooks in vars(module).items() if name.endswith("_hooks"))


def expect_untouched(case: Case, act: Callable[[], object]) -> None:
    """Expect that `act` leaves the network, its gradients and the random states as they are."""
    state, gradients, modes, hooks = case.state(), case.gradients(), case.modes(), case.hooks()
    learns = [p.requires_grad for p in case.rule.parameters()]
    parameters = list(case.rule.parameters())
    held = [p.grad for p in parameters]
    torch.manual_seed(5)
    random = every_random_state()
    act()
    now = every_random_state()
    expect_same(case.state(), state, "weights and buffers as they were",
                "put them back, or work on a copy")
    expect_same(case.gradients(), gradients, "gradients as they were",
                "use torch.autograd.grad, or put .grad back")
    expect(all(p.grad is grad for p, grad in zip(parameters, held, strict=True)),
           ".grad to be the same tensors", "others", "put .grad back as it was")
    expect(case.modes() == modes, "train and eval modes as they were", "others",
           "put them back, see netwright.runtime.modes")
    expect(case.hooks() == hooks, f"{hooks} hooks as before", case.hooks(), "remove the handles")
    expect([p.requires_grad for p in case.rule.parameters()] == learns,
           "requires_grad as it was", "a change", "put it back")
    expect(torch.equal(now["torch"], random["torch"]) and now["python"] == random["python"],
           "random states as they were", "others", "see netwright.runtime.random_state")


@check
def it_leaves_what_it_measures_as_it_was(make: Make) -> None:
    for training in (True, False):
        case = make()
        case.rule.train(training)
        [*case.rule.network.modules()][1].train(not training)  # a part in the other mode
        expect_untouched(case, case.measure)


@check
def it_leaves_all_as_it_was_where_it_fails(make: Make) -> None:
    case = make()
    x, y = case.batch
    if "batch" in case.arguments and isinstance(x, Tensor):
        wide = torch.cat([x, x[..., :1]], -1)
        case.arguments["batch"] = wide, y
    elif "rule" not in case.arguments:
        return

    def fail() -> None:
        try:
            case.measure()
        except Exception:  # whatever it says of a batch that does not fit
            return
    expect_untouched(case, fail)


@check
def its_arguments_are_left_as_they_were(make: Make) -> None:
    case = make()
    before = [part.clone() for part in tree_leaves(case.batch)]
    plain = {name: deepcopy(value) for name, value in case.arguments.items()
             if not isinstance(value, nn.Module) and not callable(value)}
    case.measure()
    expect(all(map(torch.equal, tree_leaves(case.batch), before)), "the batch as it was", "another",
           "work on a copy")
    for name, value in plain.items():
        expect(repr(case.arguments[name]) == repr(value), f"{name} as it was", "another",
               "work on a copy")


@check
def it_measures_without_gradients_too(make: Make) -> None:
    case = make()
    with torch.no_grad():
        expect_untouched(case, case.measure)
