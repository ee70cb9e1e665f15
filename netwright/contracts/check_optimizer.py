from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from netwright import checks
from netwright.contracts.check_rule import ordinary_batch, ordinary_network
from netwright.contracts.checks import (
    Make,
    check,
    check_once,
    expect,
    expect_same,
    hold,
    offered,
)
from netwright.objectives.losses import cross_entropy
from netwright.rules.exact.backprop import Backprop
from netwright.training.loop import fit

__all__ = ["check_optimizer"]


@checks.annotated
def check_optimizer(optimizer: Callable[..., Optimizer], *,
                    arguments: Mapping[str, Any] | None = None,
                    network: Callable[[], nn.Module] | None = None,
                    batch: Callable[[], tuple[Tensor, Tensor]] | None = None) -> None:
    """Hold an optimizer to what every optimizer keeps to: in `nw.fit`, with states and groups.

    It is built as optimizer(parameters, **arguments), on its declared variants where `arguments`
    are not given; a generator is given where it takes one. Its `step` takes a closure or none, as
    its signature says. Where the class has `differentiates = True`, the closure returns the loss
    with its graph, otherwise it calls `backward`.

    Raises:
        BrokenContract: the optimizer does not keep to it; says in one line what was expected, what
            was seen, and how to mend it.

    >>> class Still(torch.optim.SGD):
    ...     def step(self, closure=None):
    ...         pass
    >>> check_optimizer(Still, arguments={"lr": 0.1})
    Traceback (most recent call last):
    netwright.errors.BrokenContract: Still: it trains in fit: expected weights that move, got the \
same; step on .grad, or on the closure's loss
    """
    hold("optimizer", optimizer, arguments=arguments, network=network, batch=batch)


class Case:
    """A network, a batch, and an optimizer of its parameters."""

    def __init__(self, method: Callable[..., Optimizer], arguments: Mapping[str, Any],
                 network: Callable[[], nn.Module] | None,
                 batch: Callable[[], tuple[Tensor, Tensor]] | None, *,
                 groups: Callable[[nn.Module], Iterable[Any]] = nn.Module.parameters,
                 embedding: nn.Module | None = None) -> None:
        torch.manual_seed(0)
        self.network = embedding or (network or ordinary_network)()
        torch.manual_seed(7)
        self.x, self.y = (batch or ordinary_batch)()
        self.generator = torch.Generator().manual_seed(3)
        self.optimizer: Any = method(groups(self.network), **arguments,
                                     **offered(method, generator=self.generator))

    def loss(self) -> Tensor:
        return cross_entropy(self.network(self.x), self.y)

    def step(self) -> Any:
        def closure() -> Tensor:
            if not getattr(self.optimizer, "differentiates", False):
                self.optimizer.zero_grad()
                with torch.enable_grad():
                    loss = self.loss()
                loss.backward()
                return loss
            return self.loss()
        return self.optimizer.step(closure)

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.network.named_parameters()}

    def moved(self, before: Mapping[str, Tensor]) -> list[str]:
        return [name for name, p in self.network.named_parameters()
                if not torch.equal(p, before[name])]


def fitted(case: Case, epochs: int, folder: Path | None = None) -> list[float]:
    history = fit(Backprop(case.network), [(case.x, case.y)], epochs=epochs, progress=False,
                  optimizer=case.optimizer, checkpoint=folder)
    return [epoch.loss for epoch in history.epochs]


@check
def it_trains_in_fit(make: Make) -> None:
    case = make()
    before = case.weights()
    losses = fitted(case, 5)
    expect(case.moved(before), "weights that move", "the same",
           "step on .grad, or on the closure's loss")
    with torch.no_grad():
        after = float(case.loss())
    expect(after < losses[0], f"a loss below the {losses[0]:.6g} of the start after five steps",
           f"{after:.6g}", "step against the gradient, and not too far")


@check
def the_same_start_gives_the_same_end(make: Make) -> None:
    first, second = make(), make()
    fitted(first, 3)
    fitted(second, 3)
    expect_same(first.weights(), second.weights(), "the same weights from the same start",
                "draw from generator alone, and keep nothing on the class")


@check
def a_step_returns_the_closures_loss(make: Make) -> None:
    case = make()
    with torch.no_grad():
        before = case.loss()
    told = case.step()
    expect(isinstance(told, Tensor) and torch.allclose(told.detach(), before),
           f"step(closure) to return the loss before the step, {float(before):.6g}", told,
           "return the closure's loss")


@check
def state_goes_into_a_fresh_optimizer(make: Make) -> None:
    case = make()
    case.step()
    case.step()
    fresh = make()
    fresh.network.load_state_dict(case.network.state_dict())
    fresh.optimizer.load_state_dict(deepcopy(case.optimizer.state_dict()))
    expect_same(fresh.weights(), case.weights(), "weights that load_state_dict leaves alone",
                "change parameters in step alone")
    for one in (case, fresh):
        one.generator.manual_seed(5)
        one.step()
        one.step()
    expect_same(fresh.weights(), case.weights(), "the same steps from the same state_dict",
                "keep what the next step needs in self.state or in the groups")


@check
def it_goes_on_from_a_checkpoint(make: Make) -> None:
    with TemporaryDirectory() as folder:
        straight, first, again = make(), make(), make()
        fitted(straight, 4)
        fitted(first, 2, Path(folder) / "kept")
        history = fit(Backprop(again.network), [(again.x, again.y)], epochs=4, progress=False,
                      optimizer=again.optimizer, checkpoint=Path(folder) / "kept")
    expect(len(history.epochs) == 4, "four epochs in all", len(history.epochs),
           "let state_dict hold tensors and plain data alone")
    expect_same(again.weights(), straight.weights(),
                "the weights of a training that was never interrupted",
                "keep what the next step needs in self.state or in the groups")


@check
def groups_are_stepped_or_refused(make: Make) -> None:
    def halves(network: nn.Module) -> list[dict[str, Any]]:
        parameters = list(network.parameters())
        return [{"params": parameters[:2]}, {"params": parameters[2:]}]
    try:
        case = make(groups=halves)
    except ValueError as error:
        expect("group" in str(error), "two groups of parameters, or an error that says why not",
               error, "raise a ValueError that speaks of groups")
        return
    plain = make()
    case.step()
    plain.step()
    expect_same(case.weights(), plain.weights(), "the same step with the parameters in two groups",
                "go over self.param_groups")


@check
def a_parameter_without_a_gradient_stays(make: Make) -> None:
    def unused(network: nn.Module) -> list[Any]:
        network.unused = nn.Parameter(torch.full((3,), 0.5))
        return list(network.parameters())
    case = make(groups=unused)
    before = case.weights()
    for _ in range(len(before)):  # whatever takes its turn
        case.step()
    moved = case.moved(before)
    expect("unused" not in moved, "a parameter that the loss does not depend on to stay", "a step",
           "pass over what has no gradient")
    expect(moved, "the others to move", "none", "pass over what has no gradient alone")


class _Lookup(nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(8, 4, sparse=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.table(x[:, 0].abs().mul(3).long().clamp_max(7)))
        return scores


@check_once
def sparse_gradients_are_taken_or_refused(make: Make) -> None:
    case = make(embedding=_Lookup())
    before = case.weights()
    try:
        for _ in range(len(before)):
            case.step()
    except (RuntimeError, ValueError) as error:
        expect("sparse" in str(error), "a step with sparse gradients, or an error that says so",
               error, "make them dense by .to_dense(), or refuse them")
        expect_same(case.weights(), before, "weights as before the refused step",
                    "look at all gradients first")
        return
    expect(case.moved(before), "weights that move", "none", "step on sparse gradients too")
