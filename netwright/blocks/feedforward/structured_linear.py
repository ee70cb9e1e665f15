from math import gcd
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import linear

from netwright import checks
from netwright.catalogue.facets import method

__all__ = ["StructuredLinear"]

Kind = Literal["lowrank", "blockdense", "blockshuffle"]
KINDS = ("lowrank", "blockdense", "blockshuffle")


@method(
    "block",
    papers=["003-004"],
    place="linear",
    takes=("in_features", "out_features"),
    saves=["parameters", "file size", "inference memory", "inference time", "training time"],
    search={"kind": ["lowrank", "blockdense", "blockshuffle"], "share": [0.16, 0.32, 0.63]},
    variants={"plain": {}, "block-dense": {"kind": "blockdense"},
              "block-shuffle": {"kind": "blockshuffle"}},
)
class StructuredLinear(nn.Module):
    """A linear layer whose matrix is a product of two smaller or sparser ones.

    y = U V x + b;  lowrank: V (rank, in), U (out, rank), both dense;
    blockdense: V has `blocks` blocks on its diagonal and `rank` rows, U (out, rank) is dense;
    blockshuffle: y = S^-1 U S V x + b, both have blocks, the inner size is min(in, out), and S
    deals the entries round among the blocks, so that each block of U reads from each of V.

    Without `rank` and `blocks` they are chosen so that U and V have about `share` of the dense
    matrix's parameters. At the start the low-rank product is the best approximation of that rank
    to a Gaussian matrix of variance 1/in, its singular values halved between the two; the blocks
    and U of the others are orthonormal. The products are laid out so that the blocks of a matrix
    are one batched product on views.

    Args:
        in_features: size of the last axis of x.
        out_features: size of the last axis of y.
        kind: which of the three.
        rank: the inner size of lowrank and blockdense.
        blocks: how many blocks, 4 in blockdense where none is given.
        share: how many of the dense parameters to keep where rank or blocks is not given.
        bias: whether b is there.
        feature_major: let y lie in memory feature by feature where that saves a copy, which it
            does between two structured layers; its shape is the same.
        generator: draws the weights.

    Shapes: x (*, in_features), y (*, out_features).

    Raises:
        ValueError: `blocks` does not divide a size, no blocks that divide both sizes save
            parameters in blockshuffle, a size is out of range, or `share` is not
            between 0 and 1.
        UnknownName: no kind is called that.

    Paper: Wei, Moalla, Pascanu, Gulcehre, 2024, Building on Efficient Foundations: Effectively
    Training LLMs with Structured Feedforward Layers.

    >>> layer = StructuredLinear(64, 256, "blockdense")
    >>> layer(torch.zeros(2, 5, 64)).shape, layer.dense_weight().shape
    (torch.Size([2, 5, 256]), torch.Size([256, 64]))
    """

    def __init__(self, in_features: int, out_features: int, kind: Kind = "lowrank", *,
                 rank: int | None = None, blocks: int | None = None, share: float = 0.32,
                 bias: bool = True, feature_major: bool = False,
                 generator: Generator | None = None) -> None:
        super().__init__()
        checks.one_of(KINDS, kind=kind)
        checks.count(1, in_features=in_features, out_features=out_features)
        checks.between(0, 1, ends=(False, False), share=share)
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        self.feature_major = feature_major
        self.blocks = _blocks(kind, in_features, out_features, blocks, share)
        self.rank = _rank(kind, in_features, out_features, self.blocks, rank, share)
        b, r = self.blocks, self.rank
        if kind == "lowrank":
            first, second = _low_rank(out_features, in_features, r, generator)
        else:
            first = _orthonormal((b, r // b, in_features // b), generator)
            second = _orthonormal((out_features, r) if kind == "blockdense" else
                                  (b, out_features // b, r // b), generator)
        self.first, self.second = nn.Parameter(first), nn.Parameter(second)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return U V x + b."""
        _check(x, self.in_features)
        if self.kind == "lowrank":
            return linear(linear(x, self.first), self.second, self.bias)
        rows = x.reshape(-1, self.in_features)
        b = self.blocks
        # One column for each row of x, so that what leaves the blocks is already in one piece.
        columns = rows.view(len(rows), b, self.in_features // b).permute(1, 2, 0)
        inner = torch.bmm(self.first, columns)
        if self.kind == "blockdense":
            flat = inner.view(self.rank, len(rows))
            y = (self.second @ flat).t() if self.feature_major else linear(flat.t(), self.second)
        else:
            dealt = inner.view(self.rank // b, b, len(rows)).transpose(0, 1)
            if self.feature_major:
                y = torch.bmm(self.second, dealt).transpose(0, 1).reshape(
                    self.out_features, len(rows)).t()
            else:
                y = torch.bmm(dealt.mT, self.second.mT).permute(1, 2, 0).reshape(
                    len(rows), self.out_features)
        # Under autocast the product is narrower than the bias.
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def dense_weight(self) -> Tensor:
        """Return U V, the (out_features, in_features) matrix that this layer multiplies by."""
        if self.kind == "lowrank":
            return self.second @ self.first
        inner = torch.block_diag(*self.first)
        if self.kind == "blockdense":
            return self.second @ inner
        dealt = inner.view(self.rank // self.blocks, self.blocks, -1).transpose(0, 1)
        return (self.second @ dealt).transpose(0, 1).reshape(self.out_features, -1)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return (f"in_features={self.in_features}, out_features={self.out_features}, "
                f"kind={self.kind!r}, rank={self.rank}, blocks={self.blocks}, "
                f"bias={self.bias is not None}")


class Premerged(nn.Module):
    """A structured layer with its product at hand for small inputs; made by `premerge`.

    y = (U V) x + b where x has at most `rows` rows, else U (V x) + b.

    Shapes: x (*, in_features), y (*, out_features).

    Paper: Wei, Moalla, Pascanu, Gulcehre, 2024, Building on Efficient Foundations: Effectively
    Training LLMs with Structured Feedforward Layers.

    >>> Premerged(StructuredLinear(8, 16), rows=4)(torch.zeros(2, 8)).shape
    torch.Size([2, 16])
    """

    weight: Tensor

    def __init__(self, layer: StructuredLinear, rows: int) -> None:
        super().__init__()
        self.layer, self.rows = layer, rows
        self.register_buffer("weight", layer.dense_weight().detach())

    def forward(self, x: Tensor) -> Tensor:
        """Return y by the way that suits the number of rows."""
        _check(x, self.layer.in_features)
        if x.numel() <= self.rows * self.layer.in_features:
            return linear(x, self.weight, self.layer.bias)
        y: Tensor = self.layer(x)
        return y


def _check(x: Tensor, size: int) -> None:
    if not x.ndim or x.shape[-1] != size:
        raise ValueError(f"x must be (*, {size}), since in_features={size}, got {tuple(x.shape)}")


def _blocks(kind: Kind, before: int, after: int, blocks: int | None, share: float) -> int:
    if kind == "lowrank":
        if blocks is not None:
            raise ValueError(f"blocks must be None with kind='lowrank', got {blocks}; give rank")
        return 1
    shared = gcd(before, after) if kind == "blockshuffle" else before
    fits = [n for n in range(1, shared + 1) if shared % n == 0]
    if blocks is None:
        wanted = (before + after) / (max(before, after) * share) if kind == "blockshuffle" else 4
        fewer = [n for n in fits if kind == "blockdense" or n * max(before, after) > before + after]
        if not fewer:
            raise ValueError(f"in_features={before} and out_features={after} must have a common "
                             f"divisor of about {wanted:.3g} for kind='blockshuffle' to keep "
                             f"share={share} of the parameters, got {shared} as the greatest, "
                             "with which it has no fewer than a dense layer; give blocks=, other "
                             "sizes, or another kind")
        return min(fewer, key=lambda n: abs(n - wanted))
    if blocks not in fits:
        axes = (f"in_features={before} and out_features={after}" if kind == "blockshuffle" else
                f"in_features={before}")
        some = fits if len(fits) < 9 else [*fits[:8], "..."]
        raise ValueError(f"blocks must divide {axes}, got {blocks}; "
                         f"try one of {', '.join(map(str, some))}")
    return blocks


def _rank(kind: Kind, before: int, after: int, blocks: int, rank: int | None,
          share: float) -> int:
    if kind == "blockshuffle":
        if rank is not None:
            raise ValueError(f"rank must be None with kind='blockshuffle', got {rank}; give blocks")
        return min(before, after)
    most = min(before, after) if kind == "lowrank" else before
    if rank is None:
        wanted = share * before * after / (before / blocks + after)
        return min(most, blocks * max(1, round(wanted / blocks)))
    if not 1 <= rank <= most or rank % blocks:
        raise ValueError(f"rank must be between 1 and {most} and a multiple of blocks={blocks}, "
                         f"got {rank}")
    return rank


def _low_rank(rows: int, columns: int, rank: int,
              generator: Generator | None) -> tuple[Tensor, Tensor]:
    """Return V and U: the first singular vectors of a Gaussian matrix, each with half the values.

    By the eigenvectors of the smaller Gram matrix, a fraction of the whole decomposition's cost.
    """
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float32) / columns ** 0.5
    tall = rows >= columns
    matrix = matrix if tall else matrix.t()
    values, vectors = torch.linalg.eigh(matrix.t() @ matrix)
    halves = values[-rank:].clamp(min=1e-12) ** 0.25
    right = vectors[:, -rank:] * halves
    left = matrix @ vectors[:, -rank:] / halves
    first, second = (right, left) if tall else (left, right)
    dtype = torch.get_default_dtype()
    return first.t().contiguous().to(dtype), second.to(dtype)


def _orthonormal(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    """Return matrices with orthonormal rows or columns, whichever are fewer, evenly drawn."""
    normal = torch.randn(shape, generator=generator, dtype=torch.float32)
    wide = shape[-2] < shape[-1]
    q, r = torch.linalg.qr(normal.mT if wide else normal)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    return (q.mT if wide else q).contiguous().to(torch.get_default_dtype())
