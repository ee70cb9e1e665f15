import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import linear

from netwright import checks
from netwright.blocks.kan.bases import BASES, counts, features
from netwright.catalogue.facets import method

__all__ = ["KANFeedForward", "PrunedKANLinear", "SelectableKANLinear"]

Select = Literal["soft", "hard", "sum"]
_PLAIN = [name for name, basis in BASES.items() if basis.plain]


@method(
    "block",
    papers=["003-098"],
    place="linear",
    takes=("inputs", "outputs"),
    search={"grid": [3, 5, 8], "select": ["soft", "hard", "sum"]},
    variants={"plain": {}, "hard": {"select": "hard"}, "summed": {"select": "sum"}},
)
class SelectableKANLinear(nn.Module):
    """A Kolmogorov-Arnold layer whose outputs choose the family of functions on their edges.

    y_j = sum_b s_jb sum_i sum_k w_jbki f_bk(x_i) + bias_j;  s_j = softmax(logits_j / temperature).

    f_b are the functions of basis b: B-splines, Chebyshev polynomials of tanh(x), a Fourier
    series cos(k z), sin(k z) with z from -1 to 1 on the grid, Gaussians (rbf), Mexican hats
    (wavelet), or SiLU. The paper trains in three phases:
    everything (`select="soft"`), then each output with the basis it has chosen (`select="hard"`,
    the one with the largest logit, whose gradient is the softmax's), then without the others
    (`pruned()`). `select` can be changed at any time. `"sum"` has no choice and adds all bases;
    with `bases=("silu", "bspline")` it is the plain Kolmogorov-Arnold layer.

    All functions of all inputs are written side by side, in chunks of rows that stay in cache, and
    multiplied by one matrix. Uniform B-splines are evaluated in closed form.

    Args:
        inputs: the last axis of x.
        outputs: the last axis of y.
        bases: families to choose from.
        select: how.
        grid: intervals of the grid, frequencies of a Fourier series.
        order: degree of the B-splines.
        grid_range: where the grid begins and ends.
        temperature: a small one makes the soft choice harder.
        bias: whether a constant is added.
        generator: draws the weights.

    Shapes: x (*, inputs); y (*, outputs); weight (outputs, functions, inputs); logits (outputs,
    bases).

    Raises:
        ValueError: a size is below 1, `grid_range` is empty, there are no bases or one comes
            twice, or x has another last axis.
        UnknownName: no basis or `select` is called that.

    Paper: Yang, Zhang, Luo, Lu, Shen, 2024, Activation Space Selectable Kolmogorov-Arnold Networks.

    >>> layer, x = SelectableKANLinear(4, 6, select="hard"), torch.rand(3, 4)
    >>> torch.allclose(layer.pruned()(x), layer(x), atol=1e-6)
    True
    """

    center: Tensor
    reach: Tensor
    logits: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int,
                 bases: Sequence[str] = ("bspline", "fourier", "rbf", "silu"),
                 select: Select = "soft", *, grid: int = 5, order: int = 3,
                 grid_range: tuple[float, float] = (-1.0, 1.0), temperature: float = 1.0,
                 bias: bool = True, generator: Generator | None = None) -> None:
        super().__init__()
        checks.count(1, inputs=inputs, outputs=outputs, grid=grid, order=order)
        for name in bases:
            checks.one_of(BASES, basis=name)
        if not bases or len(set(bases)) < len(bases):
            raise ValueError(f"bases must be different and at least one, got {tuple(bases)}")
        if not grid_range[0] < grid_range[1]:
            raise ValueError(f"grid_range must rise, got {grid_range}; try (-1, 1)")
        checks.above(0, temperature=temperature)
        self.inputs, self.outputs, self.bases = inputs, outputs, tuple(bases)
        self.grid, self.order, self.temperature, self.select = grid, order, temperature, select
        low, high = grid_range
        self.register_buffer("center", torch.full((inputs,), (low + high) / 2))
        self.register_buffer("reach", torch.full((inputs,), (high - low) / 2))
        sizes = counts(bases, grid, order)
        self.weight = nn.Parameter(torch.empty(outputs, sum(sizes), inputs))
        nn.init.normal_(self.weight, generator=generator)
        with torch.no_grad():
            # Each basis by itself gives outputs of variance 1 on inputs spread over the grid, and
            # so do all together where they are added. Steep functions begin smaller: a stack of
            # high frequencies would be noise.
            z = torch.linspace(-1, 1, 201)[:, None]
            spread = self.center[:1] + self.reach[:1] * z
            share = len(bases) if select == "sum" else 1
            for name, part in zip(bases, self.weight.split(sizes, 1), strict=True):
                basis, at = BASES[name], spread if BASES[name].plain else z
                values = basis.values(at, grid, order)
                slopes = basis.slopes(at, values, grid, order)
                scale = 1 / (1 + slopes.square().mean(0).sqrt())
                power = (values * scale).square().sum(1).mean()
                part.mul_(scale * (inputs * share * power).rsqrt())
        choice = None if select == "sum" else nn.Parameter(torch.zeros(outputs, len(bases)))
        self.register_parameter("logits", choice)
        self.register_parameter("bias", nn.Parameter(torch.zeros(outputs)) if bias else None)

    @property
    def surrogate_gradient(self) -> bool:
        """Whether the logits are given the gradient of a softer choice than the one made."""
        return self.select == "hard"

    @property
    def select(self) -> Select:
        """How each output chooses among the bases: soft, hard, or sum, which does not choose."""
        return self._select

    @select.setter
    def select(self, select: Select) -> None:
        checks.one_of(["soft", "hard", "sum"], select=select)
        if "logits" in self._parameters and (self.logits is None) != (select == "sum"):
            raise ValueError(f"select={select!r} needs a layer that was made with it, this one was "
                             f"made with {self._select!r}")
        self._select: Select = select

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, outputs) of (*, inputs)."""
        flat = _rows(x, self.inputs)
        found = features(flat, self.center, self.reach, self.bases, self.grid, self.order)
        y = linear(found.flatten(1), self._edges().to(self.weight.dtype).flatten(1), self.bias)
        return y.view(*x.shape[:-1], self.outputs)

    def chosen(self) -> Tensor:
        """Return which of `bases` each output would choose, (outputs,)."""
        if self.logits is None:
            raise ValueError('a layer with select="sum" does not choose; make it with "soft"')
        return self.logits.argmax(1)

    def pruned(self) -> "PrunedKANLinear":
        """Return a layer that has of each output only the basis it has chosen."""
        return PrunedKANLinear(self)

    @torch.no_grad()
    def refit(self, x: Tensor, *, grid: int | None = None) -> None:
        """Lay each input's grid over what `x` holds of it, and fit the same functions on it.

        Old and new functions of an edge are as near as they can be on `x`, in the mean square.
        With another `grid` the weights are a new parameter: make the optimizer afterwards. A
        layer that was made with the grid of before takes over the new one with a state dict.
        """
        new_grid = self.grid if grid is None else grid
        checks.count(1, grid=new_grid)
        flat = _rows(x, self.inputs).double()
        if not len(flat) or not flat.isfinite().all():
            raise ValueError(f"x must hold finite rows, got {tuple(x.shape)}; leave out what is "
                             "not a number")
        low, high = flat.amin(0), flat.amax(0)
        reach = torch.where(high > low, (high - low) / 2, self.reach.double())
        center = (low + high) / 2
        parts = []
        olds = self.weight.double().split(counts(self.bases, self.grid, self.order), 1)
        for name, old in zip(self.bases, olds, strict=True):
            if name in _PLAIN:
                parts.append(old)
                continue
            before = features(flat, self.center.double(), self.reach.double(), [name], self.grid,
                              self.order)
            after = features(flat, center, reach, [name], new_grid, self.order)
            # Normal equations for each input: (new' new + tiny) w = new' old w_old.
            square = torch.einsum("rki,rli->ikl", after, after)
            tiny = 1e-10 * square.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
            square = square + tiny * torch.eye(square.shape[-1], dtype=square.dtype,
                                               device=square.device)
            across = torch.einsum("rki,rli->ikl", after, before) @ old.permute(2, 1, 0)
            parts.append(torch.linalg.solve(square, across).permute(2, 1, 0))
        weight = torch.cat(parts, 1).to(self.weight.dtype)
        if weight.shape == self.weight.shape:
            self.weight.copy_(weight)
        else:
            self.weight = nn.Parameter(weight, self.weight.requires_grad)
        self.grid = new_grid
        self.center.copy_(center)
        self.reach.copy_(reach)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str,
                              *args: Any) -> None:
        """Take the grid that the weights were refitted to, if it is another one."""
        weight = state_dict.get(prefix + "weight")
        if isinstance(weight, Tensor) and weight.ndim == 3 and weight.shape != self.weight.shape:
            grid = next((grid for grid in range(1, weight.shape[1] + 1) if sum(
                counts(self.bases, grid, self.order)) == weight.shape[1]), self.grid)
            if grid != self.grid and weight.shape[::2] == self.weight.shape[::2]:
                self.grid = grid
                self.weight = nn.Parameter(self.weight.new_empty(weight.shape),
                                           self.weight.requires_grad)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Return what a print shows."""
        return (f"{self.inputs}, {self.outputs}, bases={self.bases}, select={self.select!r}, "
                f"grid={self.grid}, order={self.order}")

    def _edges(self) -> Tensor:
        """Return the weights, each basis counted as its output chooses."""
        if self.logits is None:
            return self.weight
        gates = (self.logits / self.temperature).softmax(1)
        if self.select == "hard":
            gates = torch.zeros_like(gates).scatter(1, self.chosen()[:, None], 1.0) + (
                gates - gates.detach())
        sizes = torch.tensor(counts(self.bases, self.grid, self.order), device=gates.device)
        return self.weight * gates.repeat_interleave(sizes, 1,
                                                     output_size=self.weight.shape[1])[..., None]


@method("companion", papers=["003-098"])
class PrunedKANLinear(nn.Module):
    """What is left of a selectable layer when each output keeps the basis it has chosen.

    Args:
        layer: a layer with `select` soft or hard; its weights are copied.

    Shapes: x (*, inputs), y (*, outputs).

    Paper: Yang, Zhang, Luo, Lu, Shen, 2024, Activation Space Selectable Kolmogorov-Arnold Networks.

    >>> PrunedKANLinear(SelectableKANLinear(4, 6))(torch.rand(3, 4)).shape
    torch.Size([3, 6])
    """

    center: Tensor
    reach: Tensor
    places: Tensor

    def __init__(self, layer: SelectableKANLinear) -> None:
        super().__init__()
        self.inputs, self.grid, self.order = layer.inputs, layer.grid, layer.order
        chosen, sizes = layer.chosen(), counts(layer.bases, layer.grid, layer.order)
        parts = list(layer.weight.detach().split(sizes, 1))
        kept = [(name, part[chosen == i]) for i, (name, part) in
                enumerate(zip(layer.bases, parts, strict=True)) if (chosen == i).any()]
        self.bases = tuple(name for name, _ in kept)
        self.weights = nn.ParameterList([nn.Parameter(part.clone()) for _, part in kept])
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self.register_buffer("center", layer.center.clone())
        self.register_buffer("reach", layer.reach.clone())
        # Outputs are computed basis after basis; where each one ended up.
        self.register_buffer("places", chosen.argsort(stable=True).argsort())

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, outputs) of (*, inputs)."""
        flat = _rows(x, self.inputs)
        found = features(flat, self.center, self.reach, self.bases, self.grid, self.order)
        starts = [0]
        for count in counts(self.bases, self.grid, self.order):
            starts.append(starts[-1] + count)
        y = torch.cat([linear(found[:, start:end].flatten(1), weight.flatten(1))
                       for weight, (start, end) in
                       zip(self.weights, pairwise(starts), strict=True)], 1)[:, self.places]
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], y.shape[-1])


@method(
    "block",
    papers=["003-098"],
    place="feedforward",
    takes=("dim", "hidden"),
    search={"grid": [3, 5, 8], "select": ["sum", "soft", "hard"]},
)
class KANFeedForward(nn.Sequential):
    """A feed-forward block of two Kolmogorov-Arnold layers.

    y = K_2(K_1(x)).

    Each edge has a function of its own, with as many weights as the bases have functions: 9 for
    the plain layer of grid 5 and order 3. `hidden=None` takes as many units as give the
    parameters of a plain block with 4 `dim` units, at least 1.

    Args:
        dim: size of the last axis of x.
        hidden: units between the layers.
        out: size of the last axis of y, `dim` where none is given.
        bases: families of functions; the plain layer's are SiLU and B-splines.
        select: how a layer's outputs choose among them; the plain layer adds them.
        grid: intervals of the grid.
        order: degree of the B-splines.
        grid_range: where the grids begin and end; (-2, 2) suits a normalised input.
        bias: whether the layers add a constant.
        generator: draws the weights.

    Shapes: x (*, dim), y (*, out).

    Raises:
        ValueError: a size is below 1, or as in `SelectableKANLinear`.

    Paper: Yang, Zhang, Luo, Lu, Shen, 2024, Activation Space Selectable Kolmogorov-Arnold Networks.

    >>> KANFeedForward(16, 8)(torch.zeros(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, dim: int, hidden: int | None = None, *, out: int | None = None,
                 bases: Sequence[str] = ("silu", "bspline"), select: Select = "sum",
                 grid: int = 5, order: int = 3, grid_range: tuple[float, float] = (-2.0, 2.0),
                 bias: bool = True, generator: Generator | None = None) -> None:
        out = dim if out is None else out
        if hidden is None:
            for name in bases:
                checks.one_of(BASES, basis=name)
            hidden = max(1, 4 * dim // max(1, sum(counts(bases, grid, order))))
        checks.count(1, dim=dim, hidden=hidden, out=out)
        super().__init__(*[SelectableKANLinear(
            before, after, bases, select, grid=grid, order=order, grid_range=grid_range,
            bias=bias, generator=generator) for before, after in ((dim, hidden), (hidden, out))])


def _rows(x: Tensor, inputs: int) -> Tensor:
    if not x.ndim or x.shape[-1] != inputs:
        raise ValueError(f"x must be (*, {inputs}), since inputs={inputs}, got {tuple(x.shape)}")
    return x.reshape(math.prod(x.shape[:-1]), inputs)
