from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Adam, Optimizer

from netwright import checks
from netwright.blocks.reversible.block import ReversibleBlock
from netwright.blocks.reversible.sequential import ReversibleSequential
from netwright.catalogue.facets import method
from netwright.errors import CannotReverse, Diverged
from netwright.objectives.losses import cross_entropy
from netwright.reversing.engine import Add, Update
from netwright.runtime.modes import training

__all__ = ["MultiSplitReversible", "ReversibleSearch", "Zero", "darts_reversible"]

Space = Mapping[str, Callable[[], nn.Module]]
Data = Iterable[tuple[Any, Tensor]]
MakeOptimizer = Callable[[list[Parameter]], Optimizer]


@method(
    "block",
    papers=["001-002"],
    place="residual stream",
    takes=("ops",),
    saves=["training memory"],
    search={"splits": [2, 4]},
    variants={"two operations": {"ops": {"linear": lambda: nn.Linear(4, 4), "tanh": nn.Tanh}}},
)
class MultiSplitReversible(ReversibleBlock):
    """Add to each split of the input, in turn, a weighted mixture of operations on the others.

    s_k = y_1 + ... + y_{k-1} + x_{k+1} + ... + x_n;
    y_k = x_k + sum over o of softmax(a_k)_o op_{k,o}(s_k).
    Inverse: x_k = y_k - the same mixture, for k = n down to 1.

    The a are the architecture. After a search `chosen` names the operation of the largest a in
    each split, and `derived` is the cell of those alone.

    Args:
        ops: The operations by name, each a function without arguments that makes a module; called
            once for each split. `Zero` is the one that leaves a split as it is.
        splits: Into how many parts the input is split.
        dim: The dimension that is split.
        architecture: The a; zeros of the cell's own where it is None. Cells that are given the
            same one share it, and it gathers the gradients of all.

    Shapes: x and y (*, splits c, *); an operation (*, c, *) -> the same; a (splits, operations).
    More arguments than x go to every operation.

    Raises:
        ValueError: there are fewer than two splits or no operation, or `architecture` is no
            parameter of that shape.
        CannotReverse: `splits` does not divide `dim`, or an operation does not keep the shape.

    Paper: Zhao, Dong, Shen, Zhang, Wei, Chen, 2021, Memory-Efficient Differentiable Transformer
    Architecture Search.

    >>> cell = MultiSplitReversible({"linear": lambda: nn.Linear(4, 4), "nothing": Zero}, splits=3)
    >>> x = torch.randn(5, 12)
    >>> torch.allclose(cell.inverse(cell(x)), x, atol=1e-6)
    True
    >>> cell.architecture.shape
    torch.Size([3, 2])
    """

    def __init__(self, ops: Space, splits: int = 2, *, dim: int = -1,
                 architecture: Parameter | None = None) -> None:
        super().__init__()
        checks.count(2, splits=splits, advice="a split is changed by the others")
        if not ops:
            raise ValueError("ops must name at least one operation, got none")
        shape = splits, len(ops)
        if architecture is None:
            architecture = Parameter(torch.zeros(shape))
        if not isinstance(architecture, Parameter) or architecture.shape != shape:
            raise ValueError(f"architecture must be an nn.Parameter of shape (splits, operations) "
                             f"= {shape}, got a {type(architecture).__name__} of shape "
                             f"{tuple(architecture.shape)}")
        self.streams, self.dim = splits, dim
        self.mixed = nn.ModuleList(_Mixed({name: make() for name, make in ops.items()})
                                   for _ in range(splits))
        self.architecture: Parameter | None = architecture

    def updates(self, *args: Any, **options: Any) -> list[Update]:
        """Return the additions to each split."""
        splits = range(len(self.mixed))
        return [_MixedAdd(f"the mixture of split {k}", mixed, [i for i in splits if i != k], k,
                          (self.architecture, k, *args), options)
                for k, mixed in enumerate(self.mixed)]

    def chosen(self) -> list[str]:
        """Return the name of each split's operation of the largest weight."""
        best = ([0] * len(self.mixed) if self.architecture is None
                else self.architecture.argmax(1).tolist())
        return [list(mixed.ops)[k] for mixed, k in zip(self._mixtures(), best, strict=True)]

    def derived(self, ops: Space | None = None) -> "MultiSplitReversible":
        """Return a copy that has each split's chosen operation alone, and no architecture.

        The operations keep their weights, or are made anew where the space is given as `ops`.
        """
        cell = deepcopy(self)
        cell.mixed = nn.ModuleList(
            _Mixed({name: mixed.ops[name] if ops is None else ops[name]()})
            for mixed, name in zip(cell._mixtures(), self.chosen(), strict=True))
        cell.architecture = None
        return cell

    def _mixtures(self) -> "list[_Mixed]":
        return [mixed for mixed in self.mixed if isinstance(mixed, _Mixed)]


@method("companion")
class Zero(nn.Module):
    """Return zeros: the operation that leaves a split as it is.

    Shapes: x of any shape; zeros of the same.

    >>> Zero()(torch.ones(2))
    tensor([0., 0.])
    """

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return zeros of the shape of `x`."""
        return torch.zeros_like(x)


@checks.annotated
class ReversibleSearch(NamedTuple):
    """What a search found.

    `network` is the trained entry, cells and head; `chosen` the names of the operations, for each
    cell and split; `weights` what the softmax gave them after each epoch, for each cell (or for
    all, where they share them), split and operation. `derived()` is the network of the chosen
    operations, with the weights of the search, or with new ones where the space is given.

    Shapes: weights (epochs, cells or 1, splits, operations).
    """

    network: nn.Sequential
    chosen: list[list[str]]
    weights: Tensor

    def derived(self, ops: Space | None = None) -> nn.Sequential:
        """Return a network of the chosen operations, to be trained on."""
        entry, cells, head = self.network
        assert isinstance(cells, ReversibleSequential)
        found = [cell.derived(ops) for cell in cells]  # type: ignore[operator]
        return nn.Sequential(deepcopy(entry), ReversibleSequential(*found), deepcopy(head))


@method("companion", papers=["001-002"], saves=["training memory"])
def darts_reversible(space: Space, train: Data, validation: Data, *, entry: nn.Module,
                     head: nn.Module, splits: int = 2, depth: int = 4, shared: bool = True,
                     dim: int = -1, epochs: int = 10,
                     loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                     optimizer: MakeOptimizer | None = None,
                     architecture_optimizer: MakeOptimizer | None = None) -> ReversibleSearch:
    """Search the operations of reversible cells by gradient, in memory that depth does not grow.

    For each training batch:  a := a - rate_a dL_validation/da;  then  w := w - rate_w dL_train/dw.

    The network is `entry`, `depth` cells (`MultiSplitReversible`), `head`. All operations of a
    cell run, weighted by softmax(a), and the backward pass reconstructs what every cell was given.
    The gradient of a takes the weights as they are (the first-order form of differentiable
    search). `entry` and `head` are copied; the originals stay as they are.

    Args:
        space: The operations by name, each a function that makes a module which keeps the shape
            of a split.
        train: Batches (x, y) for the weights; passed over `epochs` times.
        validation: Batches for the architecture, passed over as often as is needed.
        entry: What makes the splits of x, for instance an embedding of width splits c.
        head: What makes the output of the last cell's.
        splits: Into how many parts each cell splits its input.
        depth: How many cells there are.
        shared: Whether all cells have one architecture, as cells have in the papers.
        dim: The dimension that is split.
        epochs: How often the training batches are passed over.
        loss: What both weights and architecture descend.
        optimizer: Makes the optimizer of the weights; Adam with a rate of 0.001 where it is None.
        architecture_optimizer: Makes that of the a; where it is None, that of differentiable
            architecture search: Adam, rate 0.0003, betas 0.5 and 0.999, weight decay 0.001.

    Shapes: x and y of the batches as `entry` and `loss` take them.

    Raises:
        ValueError: `depth` or `epochs` is below 1, or there are no batches.
        Diverged: a loss is not finite.

    Paper: Zhao, Dong, Shen, Zhang, Wei, Chen, 2021, Memory-Efficient Differentiable Transformer
    Architecture Search; and Liu, Simonyan, Yang, 2019, DARTS: Differentiable Architecture Search.

    >>> batches = [(torch.randn(16, 4), torch.randint(3, (16,)))]
    >>> space = {"linear": lambda: nn.Linear(4, 4), "nothing": Zero}
    >>> found = darts_reversible(space, batches, batches, entry=nn.Linear(4, 8),
    ...                          head=nn.Linear(8, 3), depth=2, epochs=3)
    >>> found.weights.shape
    torch.Size([3, 1, 2, 2])
    """
    checks.count(1, depth=depth, epochs=epochs)
    one = Parameter(torch.zeros(splits, len(space))) if shared else None
    cells = [MultiSplitReversible(space, splits, dim=dim, architecture=one) for _ in range(depth)]
    chain = ReversibleSequential(*cells)
    place = next((p for p in entry.parameters() if p.is_floating_point()), None)
    if place is not None:
        chain.to(place.device, place.dtype)
    network = nn.Sequential(deepcopy(entry), chain, deepcopy(head))
    architecture = list(dict.fromkeys(a for cell in cells
                                      if (a := cell.architecture) is not None))
    known = set(architecture)
    weights = [p for p in network.parameters() if p.requires_grad and p not in known]
    descend = optimizer(weights) if optimizer else Adam(weights, 1e-3)
    choose = (architecture_optimizer(architecture) if architecture_optimizer else
              Adam(architecture, 3e-4, betas=(0.5, 0.999), weight_decay=1e-3))
    held_out, history = _endless(validation), []
    with training(network):
        for _ in range(epochs):
            empty = True
            for batch in train:
                empty = False
                _step(network, next(held_out), loss, choose, resting=weights)
                _step(network, batch, loss, descend, resting=architecture)
            if empty:
                raise ValueError("train gave no batches; it must be an iterable of (x, y) that can "
                                 "be passed over again")
            history.append(torch.stack([a.detach().softmax(1) for a in architecture]))
    return ReversibleSearch(network, [cell.chosen() for cell in cells], torch.stack(history))


def _step(network: nn.Module, batch: tuple[Any, Tensor],
          loss: Callable[[Tensor, Tensor], Tensor], optimizer: Optimizer,
          resting: Sequence[Parameter]) -> None:
    """Step the optimizer's parameters, without gradients for those that rest."""
    for p in resting:
        p.requires_grad_(False)
    try:
        optimizer.zero_grad()
        value = loss(network(batch[0]), batch[1])
        if not value.isfinite():
            raise Diverged(f"the loss of the search is {value.item()}; lower the learning rate, or "
                           "normalise what the operations read")
        value.backward()
        optimizer.step()
    finally:
        for p in resting:
            p.requires_grad_(True)


def _endless(data: Data) -> Iterator[tuple[Any, Tensor]]:
    while True:
        empty = True
        for batch in data:
            empty = False
            yield batch
        if empty:
            raise ValueError("validation gave no batches; it must be an iterable of (x, y) that "
                             "can be passed over again")


class _MixedAdd(Add):
    """The addition of a mixture of operations on the sum of all other splits."""

    def make(self, reads: Sequence[Tensor]) -> Tensor:
        """Return the mixture."""
        architecture, k, *args = self.args
        assert self.module is not None
        return self.module(reduce(add, reads), None if architecture is None else architecture[k],
                           *args, **self.options)


class _Mixed(nn.Module):
    """The operations of one split, weighted."""

    def __init__(self, ops: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.ops = nn.ModuleDict(ops)

    def forward(self, s: Tensor, architecture: Tensor | None, *args: Any,
                **options: Any) -> Tensor:
        made = []
        for name, op in self.ops.items():
            made.append(op(s, *args, **options))
            if not isinstance(made[-1], Tensor) or made[-1].shape != s.shape:
                got = (tuple(made[-1].shape) if isinstance(made[-1], Tensor)
                       else type(made[-1]).__name__)
                raise CannotReverse(f"operation {name!r} must return a tensor of the shape "
                                    f"{tuple(s.shape)} that it is given, got {got}")
        if architecture is None:
            return made[0]
        return reduce(add, [weight * m for weight, m in
                            zip(architecture.softmax(0), made, strict=True)])
