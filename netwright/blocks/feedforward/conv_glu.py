from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from netwright import checks
from netwright.blocks.feedforward.feed_forward import Activation, activation_module
from netwright.catalogue.facets import method

__all__ = ["ConvGLU"]

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@method(
    "block",
    papers=["004-006"],
    place="feedforward",
    takes=("dim", "hidden"),
    needs=["images"],
    search={"kernel": [3, 5], "activation": ["gelu", "relu", "silu"]},
    variants={"plain": {}, "tokens of an image": {"size": (2, 2)},
              "causal": {"axes": 1, "causal": True}},
    batch=lambda: torch.randn(2, 4, 4, 8),
)
class ConvGLU(nn.Module):
    """A gated feed-forward block whose gate also sees a token's neighbours in the grid.

    y = W_2 (s(K * (W x + b) + k) * (V x + c)) + b_2;  K is a convolution of each channel alone.

    The tokens lie on a line, in an image or in a volume, whose edges are padded with zeros. Each
    token is then gated by what stands around it.

    Args:
        dim: size of the last axis of x.
        hidden: size of each branch; as in `GLU`, 8/3 `dim`, rounded up to a multiple of 8, where
            none is given.
        kernel: entries of K along each axis, or along all of them.
        axes: how many axes the grid has: 1, 2 or 3.
        size: the grid's, row by row in x's tokens; without it, x has an axis for each of the
            grid's.
        causal: whether a token sees only itself and those before it; of one axis.
        activation: a name, or what makes a module.
        out: size of the last axis of y, `dim` where none is given.
        bias: whether the layers and K have one.
        dropout: how much of the product is dropped in training.

    Shapes: with `size`, x (*, prod(size), dim) and y (*, prod(size), out); without, x (*, *grid,
    dim) and y (*, *grid, out).

    Raises:
        ValueError: a size is below 1, `axes` is none of 1, 2, 3, `kernel` or `size` has another
            number of them, `causal` has more than one, or x has another shape; a module in place
            of what makes an activation.
        UnknownName: no activation is called that.

    Paper: Shi, 2024, TransNeXt: Robust Foveal Visual Perception for Vision Transformers.

    >>> import torch
    >>> ConvGLU(16, size=(4, 4))(torch.zeros(2, 16, 16)).shape  # tokens of an image
    torch.Size([2, 16, 16])
    >>> ConvGLU(16, kernel=7, axes=1)(torch.zeros(2, 100, 16)).shape
    torch.Size([2, 100, 16])
    """

    def __init__(self, dim: int, hidden: int | None = None, *, kernel: int | Sequence[int] = 3,
                 axes: int = 2, size: Sequence[int] | None = None, causal: bool = False,
                 activation: Activation = "gelu", out: int | None = None, bias: bool = True,
                 dropout: float = 0.0) -> None:
        super().__init__()
        hidden = 8 * -(-dim // 3) if hidden is None else hidden
        out = dim if out is None else out
        if axes not in _CONVOLUTIONS:
            raise ValueError(f"axes must be 1, 2 or 3, got {axes}")
        kernels = (kernel,) * axes if isinstance(kernel, int) else tuple(kernel)
        self.axes, self.size = axes, None if size is None else tuple(size)
        for name, numbers in (("kernel", kernels), ("size", self.size)):
            if numbers is not None and len(numbers) != axes:
                raise ValueError(f"{name} must have a number for each of axes={axes}, got "
                                 f"{numbers}; give axes={len(numbers)}")
        if causal and axes > 1:
            raise ValueError(f"causal must be False where axes={axes}: only a line has an order")
        checks.count(1, dim=dim, hidden=hidden, out=out)
        for number in kernels:
            checks.count(1, kernel=number)
        for number in self.size or ():
            checks.count(1, size=number)
        before = [k - 1 if causal else (k - 1) // 2 for k in kernels]
        after = [k - 1 - b for k, b in zip(kernels, before, strict=True)]
        # A convolution pads both ends alike.
        self.pad = [] if before == after else [
            n for pair in zip(before[::-1], after[::-1], strict=True) for n in pair]
        self.gate = nn.Linear(dim, hidden, bias=bias)
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.convolution = _CONVOLUTIONS[axes](
            hidden, hidden, kernels, padding=0 if self.pad else before,  # type: ignore[arg-type]
            groups=hidden, bias=bias)
        self.activation = activation_module(activation)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden, out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, out) of (*, dim), where * ends with the grid or its tokens."""
        if self.size is None:
            if x.ndim <= self.axes:
                raise ValueError(f"x must end with {self.axes} axes of the grid and dim, since "
                                 f"axes={self.axes}, got {tuple(x.shape)}; give size=, where x has "
                                 "one axis of tokens")
            grid = tuple(x.shape[-1 - self.axes:-1])
        else:
            grid = self.size
            if x.ndim < 2 or x.shape[-2] != prod(grid):
                raise ValueError(f"x must have {prod(grid)} tokens along its last axis but one, "
                                 f"since size={self.size}, got {tuple(x.shape)}")
        leading = x.shape[:x.ndim - 1 - (self.axes if self.size is None else 1)]
        gate = self.gate(x)
        seen = gate.reshape(prod(leading), *grid, gate.shape[-1]).movedim(-1, 1)
        if self.pad:
            seen = pad(seen, self.pad)
        seen = self.convolution(seen).movedim(1, -1).reshape(gate.shape)
        y: Tensor = self.down(self.dropout(self.activation(seen) * self.up(x)))
        return y
