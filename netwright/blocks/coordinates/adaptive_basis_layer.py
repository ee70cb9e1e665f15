from itertools import pairwise

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import layer_norm

from netwright import checks
from netwright.blocks.feedforward.feed_forward import Activation, activation_module
from netwright.catalogue.facets import method

__all__ = ["AdaptiveBasisLayer"]


@method("block", papers=["003-132"], place="embedding", takes=("grid",), needs=["series"],
        network=lambda: AdaptiveBasisLayer(4, 6, torch.linspace(0, 1, 8)))
class AdaptiveBasisLayer(nn.Module):
    """Describe a curve by its products with a few functions that are learnt with the network.

    c_k = integral b_k(t) x(t) dt;  b_k = n_k / ||n_k||, n_k a small network of t.

    The networks of all functions are run as one, on the grid alone: what they cost does not grow
    with the number of curves. Put any network behind. Both penalties are in `penalty()`, which is
    to be added to the loss:

    ortho_penalty mean_(j<k) |<b_j, b_k>| + sparsity mean_k integral |b_k(t)| dt.

    What the paper leaves open: t is mapped onto -1 to 1 along each axis.

    Args:
        n_basis: how many functions.
        hidden: units of the hidden layers of each function's network.
        grid: where the curves are known: ascending numbers, or points of
            several dimensions with `weights`.
        layers: hidden layers of each network.
        ortho_penalty: how much functions that overlap cost.
        sparsity: how much functions that are not zero somewhere cost.
        weights: what each point counts in the integral; the trapezoidal rule where none is given.
        activation: a name, or what makes a module.
        generator: draws the weights; the global state without one.

    Shapes: grid (points,) or (points, axes); weights (points,); x (*, points), c (*, n_basis).

    Raises:
        ValueError: a size is below 1, the grid does not ascend, has fewer than two points or needs
            weights, or x has another number of points.
        UnknownName: no activation is called that.

    Paper: Yao, Mueller, Wang, 2021, Deep Learning for Functional Data Analysis with Adaptive Basis
    Layers.

    >>> layer = AdaptiveBasisLayer(4, 32, torch.linspace(0, 1, 50), ortho_penalty=0.1)
    >>> layer(torch.randn(8, 50)).shape, layer.basis().shape, layer.penalty().shape
    (torch.Size([8, 4]), torch.Size([4, 50]), torch.Size([]))
    """

    points: Tensor
    weights: Tensor

    def __init__(self, n_basis: int, hidden: int, grid: Tensor, ortho_penalty: float = 0.0,
                 sparsity: float = 0.0, *, layers: int = 3, weights: Tensor | None = None,
                 activation: Activation = "relu", generator: Generator | None = None) -> None:
        super().__init__()
        checks.count(1, n_basis=n_basis, hidden=hidden, layers=layers)
        checks.at_least(0, ortho_penalty=ortho_penalty, sparsity=sparsity)
        grid = torch.as_tensor(grid).detach()
        if not grid.is_floating_point():
            grid = grid.to(torch.get_default_dtype())
        if weights is None:
            weights = _trapezoidal(grid)
        elif weights.shape != grid.shape[:1]:
            raise ValueError(f"weights must be one number for each of the {len(grid)} points, got "
                             f"{tuple(weights.shape)}")
        points = grid[:, None] if grid.ndim == 1 else grid
        low, high = points.amin(0), points.amax(0)
        dtype = torch.get_default_dtype()
        self.register_buffer("points", (2 * (points - low) / (high - low).clamp(
            min=torch.finfo(grid.dtype).tiny) - 1).to(dtype))
        self.register_buffer("weights", weights.detach().to(dtype))
        self.n_basis, self.ortho_penalty, self.sparsity = n_basis, ortho_penalty, sparsity
        self.activation = activation_module(activation)
        sizes = [points.shape[1], *[hidden] * layers, 1]
        self.matrices, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in pairwise(sizes):
            bound = inputs ** -0.5
            for shape, into in (((n_basis, inputs, outputs), self.matrices),
                                ((n_basis, 1, outputs), self.biases)):
                into.append(nn.init.uniform_(torch.empty(shape), -bound, bound,
                                             generator=generator))

    def basis(self) -> Tensor:
        """Return the functions on the grid, (n_basis, points), each with a square integral of 1."""
        h = self.points.expand(self.n_basis, -1, -1)
        last = len(self.matrices) - 1
        for i, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
            h = torch.baddbmm(bias, h, matrix)
            if i < last:
                h = self.activation(layer_norm(h, h.shape[-1:]))
        n = h[..., 0]
        square = (n.square() * self.weights).sum(-1, keepdim=True)
        return n * square.clamp(min=torch.finfo(n.dtype).eps).rsqrt()

    def penalty(self) -> Tensor:
        """Return what is to be added to the loss, (); 0 where both strengths are 0."""
        total = self.points.new_zeros(())
        if not (self.ortho_penalty or self.sparsity):
            return total
        basis = self.basis()
        if self.ortho_penalty and self.n_basis > 1:
            overlaps = ((basis * self.weights) @ basis.T).abs()
            pairs = torch.ones_like(overlaps, dtype=torch.bool).triu(1)
            total = total + self.ortho_penalty * overlaps[pairs].mean()
        if self.sparsity:
            total = total + self.sparsity * (basis.abs() * self.weights).sum(-1).mean()
        return total

    def forward(self, x: Tensor) -> Tensor:
        """Return the products (*, n_basis) of curves (*, points) with the functions."""
        points = len(self.points)
        if x.shape[-1:] != (points,):
            raise ValueError(f"x must be (*, {points}), one number for each point of the grid, "
                             f"got {tuple(x.shape)}")
        return nn.functional.linear(x, self.basis() * self.weights)


def _trapezoidal(grid: Tensor) -> Tensor:
    if grid.ndim != 1:
        raise ValueError(f"weights must be given where the grid has several axes, got a grid of "
                         f"{tuple(grid.shape)} without; try 1 / points for a regular one")
    if len(grid) < 2 or not bool((grid.diff() > 0).all()):
        raise ValueError("grid must be at least two numbers that ascend, got "
                         f"{grid.tolist()[:5]}; sort the points, and the curves with them")
    steps = grid.diff()
    nothing = steps.new_zeros(1)
    return (torch.cat([steps, nothing]) + torch.cat([nothing, steps])) / 2
