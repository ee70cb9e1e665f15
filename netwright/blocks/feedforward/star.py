import torch
from torch import Tensor, nn

from netwright import checks
from netwright.blocks.feedforward.feed_forward import Activation, activation_module
from netwright.catalogue.facets import method

__all__ = ["Star", "StarBlock"]


@method(
    "block",
    papers=["001-045"],
    place="feedforward",
    takes=("dim", "hidden"),
    search={"activation": ["relu6", "gelu", "silu"]},
)
class Star(nn.Module):
    """A feed-forward block of the star operation: two linear branches, multiplied.

    y = W_3 (s(W_1 x + b_1) * (W_2 x + b_2)) + b_3

    Without s, each entry of the product is a quadratic form of x, so that `hidden` of them can
    span all (dim + 1)(dim + 2) / 2 monomials of degree two and below; n blocks in a row, those of
    degree 2^n. It is a `GLU` with the paper's activation, expansion and biases.

    Args:
        dim: size of the last axis of x.
        hidden: size of each branch, 3 `dim` where none is given.
        activation: a name, or what makes a module; `identity` for the bare operation.
        out: size of the last axis of y, `dim` where none is given.
        bias: whether the layers have one.

    Shapes: x (*, dim), y (*, out).

    Raises:
        ValueError: a size is below 1; a module in place of what makes an activation.
        UnknownName: no activation is called that.

    Paper: Ma, Dai, Bai, Wang, Fu, 2024, Rewrite the Stars.

    >>> import torch
    >>> Star(16)(torch.zeros(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, dim: int, hidden: int | None = None, *, activation: Activation = "relu6",
                 out: int | None = None, bias: bool = True) -> None:
        super().__init__()
        hidden = 3 * dim if hidden is None else hidden
        out = dim if out is None else out
        checks.count(1, dim=dim, hidden=hidden, out=out)
        self.gate = nn.Linear(dim, hidden, bias=bias)
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.activation = activation_module(activation)
        self.down = nn.Linear(hidden, out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, out) of (*, dim)."""
        y: Tensor = self.down(self.activation(self.gate(x)) * self.up(x))
        return y


@method(
    "block",
    papers=["001-045"],
    place="residual block",
    takes=("dim",),
    needs=["images"],
    search={"kernel": [3, 5, 7]},
    batch=lambda: torch.randn(2, 8, 4, 4),
)
class StarBlock(nn.Module):
    """A block of StarNet: the star operation between two convolutions of each channel alone.

    y = x + K_2 * norm(star(norm(K_1 * x))),  norm over the batch, star at each pixel.

    Args:
        dim: channels of x.
        hidden: size of the star's branches, 3 `dim` where none is given.
        kernel: the convolutions' side, which must be odd.
        activation: the star's, a name, or what makes a module.

    Shapes: x and y (batch, dim, height, width).

    Raises:
        ValueError: `dim` or `hidden` is below 1, `kernel` is not odd, or x has another shape; a
            module in place of what makes an activation.
        UnknownName: no activation is called that.

    Paper: Ma, Dai, Bai, Wang, Fu, 2024, Rewrite the Stars.

    >>> import torch
    >>> StarBlock(16)(torch.zeros(2, 16, 8, 8)).shape
    torch.Size([2, 16, 8, 8])
    """

    def __init__(self, dim: int, hidden: int | None = None, *, kernel: int = 7,
                 activation: Activation = "relu6") -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that the image keeps its size, got {kernel}")
        self.star = Star(dim, hidden, activation=activation)
        self.before = nn.Sequential(
            nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False),
            nn.BatchNorm2d(dim))
        self.after = nn.Sequential(
            nn.BatchNorm2d(dim), nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return x and what the block adds to it."""
        channels = self.star.gate.in_features
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"x must be (batch, {channels}, height, width), since dim={channels}, "
                             f"got {tuple(x.shape)}")
        h = self.star(self.before(x).movedim(1, -1)).movedim(-1, 1)
        y: Tensor = x + self.after(h)
        return y
