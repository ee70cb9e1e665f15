from math import sqrt
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import linear

from netwright import checks
from netwright.catalogue.facets import method
from netwright.errors import UnknownName

__all__ = ["PermutedKroneckerLinear", "channels_for", "effective_width"]

Permutation = Literal["none", "transpose", "random"] | tuple[Tensor, Tensor]


@method(
    "block",
    papers=["003-194"],
    place="linear",
    takes=("in_features", "out_features"),
    saves=["parameters", "file size"],
    search={"copies": [2, 4]},
    variants={"plain": {"copies": 2, "in_features": 4},
              "transposed": {"copies": 2, "in_features": 4, "permutation": "transpose"},
              "random": {"copies": 2, "in_features": 4, "permutation": "random"}},
)
class PermutedKroneckerLinear(nn.Module):
    """A wide linear layer that uses one small matrix many times, between two permutations.

    y = J_2 (I (x) W) J_1 x + J_2 (1 (x) b),  I the identity of size `copies`.

    Both mixing layers of an MLP-Mixer are of this kind, on a table X (tokens, channels) that is
    read row by row as one vector. Channel mixing X W^T: `copies` = tokens, no permutation. Token
    mixing W X: `copies` = channels, and "transpose", which reads the table by columns and writes
    it back by rows. "random" draws both permutations once, so that no axis is left.

    Args:
        copies: how often W is used.
        in_features: how many numbers W reads each time.
        out_features: how many it writes each time.
        permutation: "none", "transpose", "random", or the two as index tensors p and q:
            (J_1 x)_i = x_p(i) and (J_2 z)_i = z_q(i).
        bias: whether b is there.
        generator: draws the permutations.

    Shapes: x (*, copies * in_features), y (*, copies * out_features).

    Raises:
        ValueError: a size is below 1, an index tensor is no permutation of its size, or x has
            another size.
        UnknownName: no permutation is called that.

    Paper: Hayase, Karakida, 2024, Understanding MLP-Mixer as a Wide and Sparse MLP.

    >>> tokens, channels = 4, 6
    >>> mix = PermutedKroneckerLinear(channels, tokens, tokens, "transpose", bias=False)
    >>> x = torch.randn(2, tokens, channels)
    >>> torch.allclose(mix(x.flatten(1)).view(2, tokens, channels), mix.weight @ x, atol=1e-5)
    True
    """

    before: Tensor | None
    after: Tensor | None

    def __init__(self, copies: int, in_features: int, out_features: int,
                 permutation: Permutation = "none", *, bias: bool = True,
                 generator: Generator | None = None) -> None:
        super().__init__()
        checks.count(1, copies=copies, in_features=in_features, out_features=out_features)
        if isinstance(permutation, str) and permutation not in ("none", "transpose", "random"):
            raise UnknownName("permutation", permutation, ("none", "transpose", "random"))
        self.copies, self.in_features, self.out_features = copies, in_features, out_features
        # The two whose order is a transposition need no index.
        self.transposes = isinstance(permutation, str) and permutation == "transpose"
        before = after = None
        if not isinstance(permutation, str):
            before, after = (_checked(order, copies * size) for order, size in
                             zip(permutation, (in_features, out_features), strict=True))
        elif permutation == "random":
            before, after = (torch.randperm(copies * size, generator=generator)
                             for size in (in_features, out_features))
        self.register_buffer("before", before)
        self.register_buffer("after", after)
        small = nn.Linear(in_features, out_features, bias=bias)
        self.weight, self.bias = small.weight, small.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return y."""
        size = self.copies * self.in_features
        if not x.ndim or x.shape[-1] != size:
            raise ValueError(f"x must be (*, {size}), since copies={self.copies} and "
                             f"in_features={self.in_features}, got {tuple(x.shape)}")
        if self.transposes:
            table = x.unflatten(-1, (self.in_features, self.copies))
            y = self.weight @ table  # W for each column, without reading the table by columns
            return (y if self.bias is None else y + self.bias.to(y.dtype)[:, None]).flatten(-2)
        x = x if self.before is None else x.index_select(-1, self.before)
        y = linear(x.unflatten(-1, (self.copies, self.in_features)), self.weight, self.bias)
        y = y.flatten(-2)
        return y if self.after is None else y.index_select(-1, self.after)

    def dense_weight(self) -> Tensor:
        """Return J_2 (I (x) W) J_1, (copies * out_features, copies * in_features)."""
        identity = torch.eye(self.copies, dtype=self.weight.dtype, device=self.weight.device)
        if self.transposes:  # J_2 (I (x) W) J_1 = W (x) I
            return torch.kron(self.weight, identity)
        matrix = torch.kron(identity, self.weight)
        if self.before is not None and self.after is not None:
            matrix = matrix[self.after][:, self.before.argsort()]
        return matrix

    def extra_repr(self) -> str:
        """Return the sizes."""
        return (f"copies={self.copies}, in_features={self.in_features}, "
                f"out_features={self.out_features}, bias={self.bias is not None}")


@method("companion", papers=["003-194"])
def effective_width(tokens: int, channels: int) -> int:
    """Return the width of the sparse MLP that a Mixer of that size is: S C.

    Raises:
        ValueError: a size is below 1.

    Paper: Hayase, Karakida, 2024, Understanding MLP-Mixer as a Wide and Sparse MLP.

    >>> effective_width(tokens=16, channels=64)
    1024
    """
    checks.count(1, tokens=tokens, channels=channels)
    return tokens * channels


@method("companion", papers=["003-194"])
def channels_for(connections: int, tokens: int) -> int:
    """Return how many channels a Mixer has at so many connections of its mixing layers.

    (C S^2 + S C^2) / 2 = connections, the mean over a token and a channel mixing layer of the
    nonzero entries of their matrices, so that C = (sqrt(S^2 + 8 connections / S) - S) / 2, rounded.
    The effective width S C is largest at S = C = connections^(1/3): that is how the paper chooses
    the sizes.

    Raises:
        ValueError: a number is below 1, or there are too few connections for one channel.

    Paper: Hayase, Karakida, 2024, Understanding MLP-Mixer as a Wide and Sparse MLP.

    >>> [(s, channels_for(4096, s)) for s in (4, 16, 64)]
    [(4, 43), (16, 16), (64, 2)]
    """
    checks.count(1, connections=connections, tokens=tokens)
    channels = round((sqrt(tokens ** 2 + 8 * connections / tokens) - tokens) / 2)
    if channels < 1:
        raise ValueError(f"connections must be at least {(tokens ** 2 + tokens) // 2} for "
                         f"tokens={tokens} and one channel, got {connections}; take fewer tokens")
    return channels


def _checked(order: Tensor, size: int) -> Tensor:
    if order.shape != (size,) or not torch.equal(order.sort().values.cpu(), torch.arange(size)):
        raise ValueError(f"permutation must hold each of 0..{size - 1} once, got {order}; "
                         f"try torch.randperm({size})")
    return order.clone()
