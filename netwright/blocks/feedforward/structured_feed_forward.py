from torch import Generator, nn

from netwright import checks
from netwright.blocks.feedforward.feed_forward import Activation, activation_module
from netwright.blocks.feedforward.structured_linear import Kind, StructuredLinear
from netwright.catalogue.facets import method

__all__ = ["LowRankFeedForward", "StructuredFeedForward"]


@method(
    "block",
    papers=["003-004"],
    place="feedforward",
    takes=("dim", "hidden"),
    saves=["parameters", "file size", "inference memory", "inference time", "training time"],
    search={"kind": ["lowrank", "blockdense", "blockshuffle"], "share": [0.16, 0.32, 0.63]},
    variants={"plain": {}, "block-dense": {"kind": "blockdense"},
              "block-shuffle": {"kind": "blockshuffle"}},
)
class StructuredFeedForward(nn.Sequential):
    """A feed-forward block of two layers whose matrices are products of smaller or sparser ones.

    y = A_2 s(A_1 x + b_1) + b_2,  each A a `StructuredLinear`'s U V.

    Args:
        dim: size of the last axis of x.
        hidden: how many hidden units, 4 `dim` where none is given.
        kind: "lowrank", "blockdense" or "blockshuffle".
        rank: the inner size of lowrank and blockdense.
        blocks: how many blocks blockdense and blockshuffle have.
        share: how many of the dense parameters to keep where rank or blocks is not given.
        activation: a name, or what makes a module.
        out: size of the last axis of y, `dim` where none is given.
        bias: whether the layers have one.
        dropout: how much of each hidden layer is dropped in training.
        generator: draws the weights.

    Shapes: x (*, dim), y (*, out).

    Raises:
        ValueError: a size does not fit; see `StructuredLinear`.
        UnknownName: no kind or activation is called that.

    Paper: Wei, Moalla, Pascanu, Gulcehre, 2024, Building on Efficient Foundations: Effectively
    Training LLMs with Structured Feedforward Layers.

    >>> import torch
    >>> StructuredFeedForward(16, 64, kind="blockshuffle")(torch.zeros(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, dim: int, hidden: int | None = None, *, kind: Kind = "lowrank",
                 rank: int | None = None, blocks: int | None = None, share: float = 0.32,
                 activation: Activation = "gelu", out: int | None = None, bias: bool = True,
                 dropout: float = 0.0, generator: Generator | None = None) -> None:
        hidden = 4 * dim if hidden is None else hidden
        out = dim if out is None else out
        checks.count(1, dim=dim, hidden=hidden, out=out)

        def layer(before: int, after: int, *, feature_major: bool) -> StructuredLinear:
            return StructuredLinear(before, after, kind, rank=rank, blocks=blocks, share=share,
                                    bias=bias, feature_major=feature_major, generator=generator)

        parts: list[nn.Module] = [layer(dim, hidden, feature_major=True),
                                  activation_module(activation)]
        parts += [nn.Dropout(dropout)] if dropout else []
        super().__init__(*parts, layer(hidden, out, feature_major=False))


@method(
    "block",
    papers=["003-009"],
    place="feedforward",
    takes=("dim", "hidden"),
    saves=["parameters", "file size", "inference memory", "inference time", "training time"],
    search={"activation": ["gelu", "relu", "silu"]},
)
class LowRankFeedForward(StructuredFeedForward):
    """A feed-forward block of two layers, each a product of two dense matrices of inner size rank.

    y = U_2 V_2 s(U_1 V_1 x + b_1) + b_2.

    Without `rank` it is a quarter of `dim`, the paper's: at `hidden` = 4 `dim` that keeps 31 % of
    the dense block's parameters.

    Args:
        dim: size of the last axis of x and y.
        hidden: how many hidden units, 4 `dim` where none is given.
        rank: the inner size.
        activation: a name, or what makes a module.
        bias: whether the layers have one.
        generator: draws the weights.

    Shapes: x (*, dim), y (*, dim).

    Raises:
        ValueError: a size is below 1, or `rank` above `dim` or `hidden`.
        UnknownName: no activation is called that.

    Paper: Wei, Moalla, Pascanu, Gulcehre, 2024, Investigating Low-Rank Training in Transformer
    Language Models: Efficiency and Scaling Analysis.

    >>> import torch
    >>> LowRankFeedForward(16, 64)(torch.zeros(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, dim: int, hidden: int | None = None, rank: int | None = None, *,
                 activation: Activation = "gelu", bias: bool = True,
                 generator: Generator | None = None) -> None:
        super().__init__(dim, hidden, kind="lowrank", activation=activation, bias=bias,
                         rank=max(1, dim // 4) if rank is None else rank, generator=generator)
