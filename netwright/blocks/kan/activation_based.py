import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import conv1d, linear

from netwright import checks
from netwright.blocks.feedforward.feed_forward import Activation, activation_module
from netwright.catalogue.facets import method

__all__ = ["AFKANFeedForward", "AFKANLinear"]

Reduce = Literal["global", "spatial", "linear", "none"]
_COMBINATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda a, b: a + b,
    "prod": lambda a, b: a * b,
    "sum_prod": lambda a, b: a + b + a * b,
    "quad1": lambda a, b: (a * b).square(),
    "quad2": lambda a, b: a * b + a.square() + b.square(),
    "cubic1": lambda a, b: (a + b) * (a.square() + b.square()),
    "cubic2": lambda a, b: (a * b).pow(3),
}
_REDUCTIONS = ("global", "spatial", "linear", "none")


@method(
    "block",
    papers=["003-121"],
    place="linear",
    takes=("inputs", "outputs"),
    search={"grid": [3, 5]},
    variants={"plain": {}, "linear reduction": {"reduce": "linear"},
              "no reduction": {"reduce": "none"}},
)
class AFKANLinear(nn.Module):
    """A Kolmogorov-Arnold layer whose functions are combinations of two shifted activations.

    f_ik = c(s(x_i - low_k), s(high_k - x_i)),  k of grid + order;  h_i = sum_k a_ik f_ik;
    y = W s(norm(h)).

    low and high begin on a uniform grid over [0, 1] and learn. c is a sum, a product, or a
    polynomial of the two up to the sixth degree: `quad1` is (p q)^2, `quad2` p q + p^2 + q^2,
    `cubic1` (p + q)(p^2 + q^2), `cubic2` (p q)^3. ReLU with `quad1` makes bumps that look like
    B-splines: with `reduce="none"`, where every function has a weight for every output and y is
    their product alone, that is ReLU-KAN.

    The reductions need only one weight for each edge. `"global"`: a_i = softmax over i of a linear
    function of f_i. `"spatial"`: a_ik = softmax over k of a convolution of f_k over i.
    `"linear"`: a_ik is one weight for each k.

    Args:
        inputs: the last axis of x.
        outputs: the last axis of y.
        grid: intervals of the grid.
        order: how many steps further each function reaches.
        activation: s, a name or what makes a module.
        combine: c.
        reduce: how the functions of an input become one number.
        normalize_functions: whether each row's f is moved to [0, 1] by its least and largest.
        norm: whether h is normalised over the inputs.
        generator: draws the weights.

    Shapes: x (*, inputs); y (*, outputs).

    Raises:
        ValueError: a size is below 1, or x has another last axis.
        UnknownName: no activation, combination or reduction is called that.

    Paper: Ta, Tran, 2025, AF-KAN: Activation Function-Based Kolmogorov-Arnold Networks for
    Efficient Representation Learning.

    >>> AFKANLinear(64, 10)(torch.rand(3, 64)).shape
    torch.Size([3, 10])
    """

    def __init__(self, inputs: int, outputs: int, *, grid: int = 3, order: int = 3,
                 activation: Activation = "silu", combine: str = "quad1",
                 reduce: Reduce = "global", normalize_functions: bool = True, norm: bool = True,
                 generator: Generator | None = None) -> None:
        super().__init__()
        checks.count(1, inputs=inputs, outputs=outputs, grid=grid, order=order)
        checks.one_of(_COMBINATIONS, combination=combine)
        checks.one_of(_REDUCTIONS, reduction=reduce)
        self.inputs, self.outputs, self.combine, self.reduce = inputs, outputs, combine, reduce
        self.normalize_functions = normalize_functions
        self.activation, count = activation_module(activation), grid + order
        low = torch.arange(-order, grid) / grid
        self.low, self.high = nn.Parameter(low), nn.Parameter(low + (order + 1) / grid)
        fan = inputs * (count if reduce == "none" else 1)
        self.weight = nn.Parameter(_uniform((outputs, fan), fan, generator))
        self.norm = nn.LayerNorm(inputs) if norm and reduce != "none" else nn.Identity()
        if reduce in ("global", "linear"):
            self.mix = nn.Parameter(_uniform((count,), count, generator))
            self.shift = nn.Parameter(torch.zeros(()))
        elif reduce == "spatial":
            self.mix = nn.Parameter(_uniform((count, 1, 3), 3, generator))
            self.shift = nn.Parameter(torch.zeros(count))
        if reduce in ("global", "spatial"):
            self.temperature = nn.Parameter(torch.tensor(math.sqrt(inputs)))

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, outputs) of (*, inputs)."""
        if not x.ndim or x.shape[-1] != self.inputs:
            raise ValueError(f"x must be (*, {self.inputs}), since inputs={self.inputs}, "
                             f"got {tuple(x.shape)}")
        f = self.functions(x.reshape(math.prod(x.shape[:-1]), self.inputs))
        if self.reduce == "none":
            y = linear(f.flatten(1), self.weight)
        else:
            y = linear(self.activation(self.norm(self._reduced(f))), self.weight)
        return y.view(*x.shape[:-1], self.outputs)

    def functions(self, x: Tensor) -> Tensor:
        """Return the functions of (rows, inputs) as (rows, grid + order, inputs)."""
        x = x.unsqueeze(-2)
        f = _COMBINATIONS[self.combine](self.activation(x - self.low[:, None]),
                                        self.activation(self.high[:, None] - x))
        if self.normalize_functions:
            least, most = f.amin((1, 2), keepdim=True), f.amax((1, 2), keepdim=True)
            # A row whose functions are all the same has nothing to tell.
            f = (f - least) / (most - least).clamp(min=torch.finfo(f.dtype).eps)
        return f

    def extra_repr(self) -> str:
        """Return what a print shows."""
        return (f"{self.inputs}, {self.outputs}, combine={self.combine!r}, "
                f"reduce={self.reduce!r}")

    def _reduced(self, f: Tensor) -> Tensor:
        if self.reduce == "spatial":
            scores = conv1d(f, self.mix, self.shift, padding=1, groups=len(self.mix))
            return (f * (scores / self.temperature.clamp(min=1)).softmax(1)).sum(1)
        scores = torch.einsum("rki,k->ri", f, self.mix) + self.shift
        if self.reduce == "linear":
            return scores
        return f.sum(1) * (scores / self.temperature.clamp(min=1)).softmax(1)


@method(
    "block",
    papers=["003-121"],
    place="feedforward",
    takes=("dim", "hidden"),
    search={"grid": [3, 5], "reduce": ["global", "spatial", "linear", "none"]},
)
class AFKANFeedForward(nn.Sequential):
    """A feed-forward block of two activation-based Kolmogorov-Arnold layers.

    y = A_2(A_1(x)).

    Args:
        dim: size of the last axis of x.
        hidden: units between the layers, 4 `dim` where none is given.
        out: size of the last axis of y, `dim` where none is given.
        grid: intervals of the grid.
        order: how many steps further each function reaches.
        activation: a name, or what makes a module.
        combine: as in `AFKANLinear`.
        reduce: as in `AFKANLinear`; with "none" each unit has grid + order times the weights.

    Shapes: x (*, dim), y (*, out).

    Raises:
        ValueError: a size is below 1.
        UnknownName: as in `AFKANLinear`.

    Paper: Ta, Tran, 2025, AF-KAN: Activation Function-Based Kolmogorov-Arnold Networks for
    Efficient Representation Learning.

    >>> AFKANFeedForward(16, 64)(torch.zeros(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, dim: int, hidden: int | None = None, *, out: int | None = None,
                 grid: int = 3, order: int = 3, activation: Activation = "silu",
                 combine: str = "quad1", reduce: Reduce = "global") -> None:
        hidden = 4 * dim if hidden is None else hidden
        out = dim if out is None else out
        checks.count(1, dim=dim, hidden=hidden, out=out)
        super().__init__(*[AFKANLinear(before, after, grid=grid, order=order,
                                       activation=activation, combine=combine, reduce=reduce)
                           for before, after in ((dim, hidden), (hidden, out))])


def _uniform(shape: tuple[int, ...], fan: int, generator: Generator | None) -> Tensor:
    """Return what a linear layer of `fan` inputs begins with."""
    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(fan)
