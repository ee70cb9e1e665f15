from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import linear
from torch.nn.parameter import is_lazy

from netwright import checks
from netwright.anatomy.replacing import replace
from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.rule import Rule, checked, output_for
from netwright.runtime.modes import same_buffers
from netwright.runtime.random_state import same_random_state
from netwright.stages import Stages

__all__ = ["DynamicalLowRank"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@method(
    "rule",
    papers=["002-135"],
    saves=["parameters", "file size", "inference memory"],
    needs=["labels"],
    search={"rate": (0.03, 1.0), "tolerance": [0.05, 0.1, 0.2]},
    variants={"plain": {}, "fixed rank": {"tolerance": None, "rank": 3}},
)
class DynamicalLowRank(Rule):
    """Train the factors of low-rank weights along the exact gradient, and let their ranks adapt.

    W = U S V^T, with orthonormal columns in U and V. A step, with G = dL/dW and the rate a:
    K := U S - a G V,    U1 := an orthonormal basis of [K, U];
    N := V S^T - a G^T U,    V1 := an orthonormal basis of [N, V];
    S1 := U1^T U S V^T V1 - a dL/dS there;    P D Q^T := S1 by its singular values, the smallest
    left out as long as the root of the sum of their squares is at most tolerance |S1|;
    U := U1 P, S := D, V := V1 Q.    Everything else that learns: w := w - a dL/dw.

    G is never made. A step takes two forward and backward passes, of products that are as narrow
    as the ranks; bases are twice as wide until they are cut again. Small singular values do no
    harm, as they do to the plain gradients of the factors. With `tolerance=None` the ranks stay
    as they are, and the bases are of K and of N alone.

    The rule works on a copy, `rule.network`, in which every linear layer and convolution (without
    groups) is a `LowRank` module, but for the last, for those named in `dense`, for frozen layers
    and for those that share their weight. It begins as the given weights, cut to `rank`, the full
    rank where that is None: then the copy is the same function. It can be trained on by other
    rules. `ranks` has each layer's present rank. The step is gradient descent, by the rule itself.

    Args:
        rate: a, the length of a step, above 0.
        tolerance: the share of a weight's norm that may be cut off in a step; None keeps the ranks.
        rank: of every layer at the start; by default the full one.
        least_rank: below which no layer falls.
        dense: names of modules that stay as they are.

    Shapes: W (outputs, inputs), of a convolution (outputs, channels * places); U (outputs, r),
    S (r, r), V (inputs, r).

    Raises:
        ValueError: an option is out of range, or the network has no layer to factorize.
        UnknownName: `dense` names no module.

    Paper: Schotthöfer, Zangrando, Kusch, Ceruti, Tudisco, 2022, Low-rank Lottery Tickets: Finding
    Efficient Low-rank Neural Networks via Matrix Differential Equations.

    >>> network = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3))
    >>> rule = DynamicalLowRank(network, rank=4)
    >>> rule(torch.randn(8, 20), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])).shape
    torch.Size([])
    >>> list(rule.ranks), rule.ranks["0"] <= 8
    (['0'], True)
    """

    updates_weights = True

    def __init__(self, network: nn.Module | Stages, example: Any = None, *, rate: float = 0.1,
                 tolerance: float | None = 0.1, rank: int | None = None, least_rank: int = 2,
                 dense: Iterable[str] = (),
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        given = network.model if isinstance(network, Stages) else network
        checks.above(0, rate=rate, advice="try 0.1")
        checks.between(0, 1, ends=(True, False), tolerance=tolerance, optional=True,
                       advice="it is the share of a weight's norm that may be cut off; try 0.1, or "
                              "None to keep the ranks")
        checks.count(1, rank=rank, optional=True, advice="None is the full rank")
        checks.count(1, least_rank=least_rank, advice="try 2")
        names = _names(given, dense)
        if not names:
            raise ValueError("network has no layer to factorize: none of its linear layers and "
                             "convolutions but the last is trainable, without groups and not in "
                             "dense; train it by Backprop")
        super().__init__(deepcopy(given), generator=generator)
        for name in names:
            layer = self.network.get_submodule(name)
            self.network = replace(self.network, name, LowRank(layer, rank))
        self.rate, self.tolerance, self.least_rank = rate, tolerance, least_rank
        self.loss = loss
        self.layers: dict[str, Any] = {name: self.network.get_submodule(name) for name in names}

    @property
    def resized(self) -> set[str]:  # type: ignore[override]
        """The names of the factors, whose shapes change with the ranks."""
        return {f"network.{name}.{factor}" for name in self.layers
                for factor in ("left", "core", "right")}

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each layer that is factorized."""
        return {name: layer.rank for name, layer in self.layers.items()}

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Make one step of every weight; return the loss before it, detached."""
        layers = [layer for layer in self.layers.values() if layer.core.requires_grad]
        factors = {id(p) for layer in self.layers.values()
                   for p in (layer.left, layer.core, layer.right)}
        others = [p for p in self.network.parameters()
                  if p.requires_grad and id(p) not in factors]
        with same_random_state(), same_buffers(self.network), _doubled(layers) as doubled:
            loss = checked(self.loss, output_for(self.loss, self.network, x), y)
            found = torch.autograd.grad(loss, doubled, materialize_grads=True) \
                if loss.requires_grad and doubled else ()
        before = [(layer, layer.left.data, layer.core.data, layer.right.data) for layer in layers]
        precisely = torch.autocast(loss.device.type, enabled=False)
        try:
            with torch.no_grad(), precisely:
                for i, layer in enumerate(layers):
                    self._widen(layer, found[2 * i], found[2 * i + 1])
            torch.clear_autocast_cache()  # it knows a weight by its place, not by its value
            learning = [*(layer.core for layer in layers), *others]
            second = checked(self.loss, output_for(self.loss, self.network, x), y)
            if learning and second.requires_grad:
                steps = torch.autograd.grad(second, learning, allow_unused=True)
                with torch.no_grad(), precisely:
                    for p, step in zip(learning, steps, strict=True):
                        if step is not None:
                            p.sub_(step, alpha=self.rate)
                    for layer in layers:
                        self._cut(layer)
                torch.clear_autocast_cache()
        except BaseException:
            for layer, *kept in before:
                layer.put(*kept)
            raise
        return loss.detach()

    def _widen(self, layer: Any, along_left: Tensor, along_right: Tensor) -> None:
        """Give `layer` new bases, and its core in them, from G V and G^T U."""
        left, core, right = layer.left.data, layer.core.data, layer.right.data
        k = left @ core - self.rate * along_left
        n = right @ core.t() - self.rate * along_right
        if self.tolerance is not None:
            k, n = torch.cat([k, left], 1), torch.cat([n, right], 1)
        new_left, new_right = _orthonormal(k), _orthonormal(n)
        layer.put(new_left, (new_left.t() @ left) @ core @ (right.t() @ new_right), new_right)

    def _cut(self, layer: Any) -> None:
        """Leave out the smallest singular values, up to the tolerance."""
        if self.tolerance is None:
            return
        p, values, q = torch.linalg.svd(_precise(layer.core.data), full_matrices=False)
        rest = values.square().flip(0).cumsum(0).flip(0).sqrt()  # what cutting from here loses
        kept = int((rest > self.tolerance * rest[0]).sum())
        kept = min(max(kept, self.least_rank), len(values))
        left, right = layer.left.data, layer.right.data
        layer.put(left @ p[:, :kept].to(left.dtype), values[:kept].diag().to(left.dtype),
                  right @ q[:kept].t().to(left.dtype))


class LowRank(nn.Module):
    """A linear layer or a convolution whose weight is U S V^T: `left`, `core` and `right`.

    Its rank may change, and loads with its state.
    """

    def __init__(self, layer: Any, rank: int | None = None) -> None:
        super().__init__()
        weight = layer.weight.detach()
        self.shape = tuple(weight.shape[1:])
        p, values, q = torch.linalg.svd(_precise(weight.flatten(1)), full_matrices=False)
        kept = len(values) if rank is None else min(rank, len(values))
        self.left = Parameter(p[:, :kept].to(weight.dtype).contiguous())
        self.core = Parameter(values[:kept].diag().to(weight.dtype))
        self.right = Parameter(q[:kept].t().to(weight.dtype).contiguous())
        self.bias = layer.bias
        self.convolve = _Convolution(layer) if isinstance(layer, _CONVOLUTIONS) else None
        self.doubled: tuple[Tensor, Tensor] | None = None

    @property
    def rank(self) -> int:
        """The number of columns of U and V."""
        return self.core.shape[0]

    def put(self, left: Tensor, core: Tensor, right: Tensor) -> None:
        """Set U, S and V, of whatever rank."""
        self.left.data, self.core.data = left.contiguous(), core.contiguous()
        self.right.data = right.contiguous()

    @property
    def weight(self) -> Tensor:
        """The product U S V^T in the shape of the layer's weight."""
        return (self.left @ self.core @ self.right.t()).view(-1, *self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for `x`."""
        right: Tensor = self.right
        if self.doubled is None:
            left = self.left @ self.core
        else:  # the second halves multiply to 0; their gradient is G^T U
            k, n = self.doubled
            left, right = torch.cat([k, self.left], 1), torch.cat([right, n], 1)
        if self.convolve is None:
            return linear(linear(x, right.t()), left, self.bias)
        h = self.convolve(x, right.t().reshape(-1, *self.shape))
        ends = [1] * (len(self.shape) - 1)
        return self.convolve.function(h, left.reshape(*left.shape, *ends), self.bias)

    def extra_repr(self) -> str:
        """Return the shape of the weight and the rank."""
        return f"{self.left.shape[0]} x {self.right.shape[0]}, rank {self.rank}"

    def _load_from_state_dict(self, state: dict, prefix: str, *rest: Any) -> None:
        for name in ("left", "core", "right"):
            stored: Any = state.get(prefix + name)
            own = getattr(self, name)
            if stored is not None and stored.ndim == 2 and (
                    name == "core" or stored.shape[0] == own.shape[0]):
                own.data = own.new_empty(stored.shape)
        super()._load_from_state_dict(state, prefix, *rest)


class _Convolution:
    """The convolution of a layer with weights to be given, without its bias."""

    def __init__(self, layer: Any) -> None:
        self.function = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[layer.weight.ndim - 2]
        self.stride, self.dilation = layer.stride, layer.dilation
        self.padding = layer.padding if layer.padding_mode == "zeros" else 0
        self.mode = layer.padding_mode
        self.edges = list(layer._reversed_padding_repeated_twice)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.mode != "zeros":
            x = nn.functional.pad(x, self.edges, mode=self.mode)
        return self.function(x, weight, None, self.stride, self.padding, self.dilation)


@contextmanager
def _doubled(layers: list[Any]) -> Iterator[list[Tensor]]:
    """Let each layer run on leaves whose gradients are G V and G^T U; yield those in pairs."""
    leaves = []
    for layer in layers:
        k = (layer.left @ layer.core).detach().requires_grad_()
        n = torch.zeros_like(layer.right).requires_grad_()
        layer.doubled = k, n
        leaves += [k, n]
    try:
        yield leaves
    finally:
        for layer in layers:
            layer.doubled = None


def _names(network: nn.Module, dense: Iterable[str]) -> list[str]:
    """Return the names of the layers to factorize."""
    modules = dict(network.named_modules())
    dense = list(dense)
    for name in dense:
        checks.one_of(modules, module=name)
    parameters = [id(p) for _, p in network.named_parameters(remove_duplicate=False)]
    found = [name for name, m in modules.items() if name and
             type(m) in (nn.Linear, *_CONVOLUTIONS) and not is_lazy(m.weight)
             and getattr(m, "groups", 1) == 1 and parameters.count(id(m.weight)) == 1]
    inside = tuple(f"{name}." for name in dense)
    return [name for name in found[:-1] if modules[name].weight.requires_grad
            and name not in dense and not name.startswith(inside)]


def _orthonormal(matrix: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns."""
    return torch.linalg.qr(_precise(matrix))[0].to(matrix.dtype)


def _precise(matrix: Tensor) -> Tensor:
    return matrix.float() if matrix.dtype in (torch.bfloat16, torch.float16) else matrix
