import math
import warnings
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from netwright import checks
from netwright.anatomy.layers import is_linear
from netwright.anatomy.replacing import linear_weight
from netwright.catalogue.facets import method
from netwright.runtime.modes import transformed

__all__ = ["SparseLinear"]

PAYS = 0.8  # the share of zeros from which on sparse products take less time than dense ones


@method(
    "block",
    place="linear",
    takes=("inputs", "outputs"),
    saves=["parameters", "training time"],
    search={"density": [0.02, 0.05, 0.1, 0.2]},
    variants={"sparse": {"density": 0.15}, "dense": {"density": 0.6}},
)
class SparseLinear(nn.Module):
    """A linear layer that holds and multiplies the weights alone that are not zero.

    y = x Sᵀ + bias;  dL/dx = dL/dy S;  dL/dS_ij = Σ dL/dy_i x_j where S_ij is held.

    S is in compressed rows, as is its transpose by an index into the same values, so that both
    products and the gradient, which is taken at the held places alone, are sparse. Below 80 %
    zeros, in types without sparse products and under forward-mode derivatives the matrix is filled
    out and multiplied densely, which is faster there; `path` says which it is.

    Args:
        inputs: the last axis of x.
        outputs: the last axis of y.
        density: the share of weights that is held, at places drawn at random.
        bias: whether a constant is added.
        generator: draws places and weights.

    Shapes: x (*, inputs); y (*, outputs); values (held,); rows and columns (held,), sorted.

    Raises:
        ValueError: a size is below 1, `density` is not above 0 and at most 1, or x has another
            last axis.

    Paper: Nikdan, Pegolotti, Iofinova, Kurtic, Alistarh, 2023, SparseProp: Efficient Sparse
    Backpropagation for Faster Training of Neural Networks.

    >>> layer = SparseLinear(64, 32, density=0.1)
    >>> layer(torch.randn(5, 64)).shape, len(layer.values), layer.path
    (torch.Size([5, 32]), 205, 'sparse')
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, inputs: int, outputs: int, *, density: float = 0.1, bias: bool = True,
                 generator: Generator | None = None) -> None:
        super().__init__()
        checks.count(1, inputs=inputs, outputs=outputs)
        checks.between(0, 1, ends=(False, True), density=density)
        held = max(1, round(density * inputs * outputs))
        places = torch.randperm(inputs * outputs, generator=generator)[:held].sort().values
        reach = 1 / math.sqrt(max(1.0, density * inputs))
        self._hold(inputs, outputs, places,
                   (torch.rand(held, generator=generator) * 2 - 1) * reach,
                   (torch.rand(outputs, generator=generator) * 2 - 1) * reach if bias else None)

    @classmethod
    def from_dense(cls, layer: nn.Module, mask: Tensor | None = None) -> "SparseLinear":
        """Return a sparse layer with the weights of a linear one, where `mask` is True.

        Without a mask what is not zero is held. The bias comes along.

        Raises:
            TypeError: `layer` is no linear layer.
            ValueError: `mask` has another shape than the weight, (outputs, inputs), or is False
                everywhere.

        >>> dense = nn.Linear(4, 3)
        >>> x = torch.randn(2, 4)
        >>> mask = torch.rand(3, 4) > 0.5
        >>> sparse = SparseLinear.from_dense(dense, mask)
        >>> torch.allclose(sparse(x), x @ (dense.weight * mask).T + dense.bias, atol=1e-6)
        True
        """
        if not is_linear(layer):
            raise TypeError(f"layer must be a linear layer, got {type(layer).__name__}; name one "
                            "of the network's")
        weight: Any = linear_weight(layer).detach()
        mask = weight != 0 if mask is None else mask
        if mask.shape != weight.shape or not bool(mask.any()):
            raise ValueError(f"mask must be {tuple(weight.shape)} and hold a weight, got "
                             f"{tuple(mask.shape)} with {int(mask.sum())} held")
        outputs, inputs = weight.shape
        places = mask.flatten().nonzero().flatten()
        bias: Any = layer.bias
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._hold(inputs, outputs, places, weight.flatten()[places],
                   None if bias is None else bias.detach().clone())
        return made

    def _hold(self, inputs: int, outputs: int, places: Tensor, values: Tensor,
              bias: Tensor | None) -> None:
        self.inputs, self.outputs = inputs, outputs
        rows, columns = places // inputs, places % inputs
        self.values = nn.Parameter(values)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)

    @property
    def path(self) -> str:
        """How products are made: "sparse" or "dense"."""
        zeros = 1 - len(self.values) / (self.inputs * self.outputs)
        precise = self.values.dtype in (torch.float32, torch.float64)
        return "sparse" if zeros >= PAYS and precise else "dense"

    def to_dense(self) -> Tensor:
        """Return the weight (outputs, inputs), zero where nothing is held."""
        flat = self.values.new_zeros(self.outputs * self.inputs)
        return flat.scatter(0, self.rows * self.inputs + self.columns, self.values).view(
            self.outputs, self.inputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return x Sᵀ + bias."""
        if x.shape[-1] != self.inputs:
            raise ValueError(f"x must have inputs={self.inputs} as its last axis, got shape "
                             f"{tuple(x.shape)}")
        if self.path == "dense" or x.dtype != self.values.dtype or not x.numel() or transformed():
            return linear(x, self.to_dense().to(x.dtype), self.bias)
        y: Tensor = _Product.apply(x.reshape(-1, self.inputs), self.values, self.rows,
                                   self.columns, self.outputs)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.outputs)

    def extra_repr(self) -> str:
        """Return the sizes, and how products are made."""
        held = len(self.values) / (self.inputs * self.outputs)
        return f"{self.inputs}, {self.outputs}, {held:.1%} held, {self.path} products"


class _Product(torch.autograd.Function):
    """x Sᵀ with both gradients taken at the held places alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, rows: Tensor, columns: Tensor,
                outputs: int) -> Tensor:
        ctx.save_for_backward(x, values, rows, columns)
        ctx.outputs = outputs
        return (_compressed(rows, columns, values, outputs, x.shape[1]) @ x.T).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, rows, columns = ctx.saved_tensors
        dx = dv = None
        grad = grad.contiguous()
        if ctx.needs_input_grad[0]:
            order = columns.argsort(stable=True)
            turned = _compressed(columns[order], rows[order], values[order], x.shape[1],
                                 ctx.outputs)
            dx = (turned @ grad.T).T
        if ctx.needs_input_grad[1]:
            held = _compressed(rows, columns, torch.zeros_like(values), ctx.outputs, x.shape[1])
            dv = torch.sparse.sampled_addmm(held, grad.T, x).values()
        return dx, dv, None, None, None


def _compressed(rows: Tensor, columns: Tensor, values: Tensor, height: int, width: int) -> Tensor:
    """Return a matrix in compressed rows; `rows` are sorted."""
    starts = torch.searchsorted(rows, torch.arange(height + 1, device=rows.device))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, columns, values, (height, width),
                                       check_invariants=False)
