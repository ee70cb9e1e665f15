from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from netwright import checks
from netwright.blocks.experts.mixture import MixtureOfExperts
from netwright.blocks.feedforward.feed_forward import FeedForward
from netwright.catalogue.facets import method

__all__ = ["SelfAttention", "Sublayer", "par_pattern", "sublayers"]


@method("block", place="attention", takes=("dim", "heads"),
        variants={"plain": {}, "both ways": {"causal": False}})
class SelfAttention(nn.Module):
    """Attention of tokens over one another, with as many heads as you like.

    y = W_o concat_h softmax(Q_h K_h^T / sqrt(dim / heads)) V_h

    Args:
        dim: size of the last axis of x.
        heads: how many heads.
        causal: whether a token sees only itself and those before it.

    Shapes: x and y (*, length, dim).

    Raises:
        ValueError: `heads` does not divide `dim`.

    Paper: Vaswani, Shazeer, Parmar, et al., 2017, Attention Is All You Need.

    >>> import torch
    >>> SelfAttention(16)(torch.zeros(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, dim: int, heads: int = 4, *, causal: bool = True) -> None:
        super().__init__()
        checks.count(1, dim=dim)
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim={dim}, got {heads}")
        self.heads, self.causal = heads, causal
        self.query_key_value, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, length, dim) of (*, length, dim)."""
        query, key, value = self.query_key_value(x).unflatten(-1, (3, self.heads, -1)).movedim(
            -3, 0).transpose(-3, -2)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        y: Tensor = self.out(mixed.transpose(-3, -2).flatten(-2))
        return y


@method("block", place="residual stream", takes=("dim", "module"),
        network=lambda: Sublayer(8, nn.Linear(8, 8)))
class Sublayer(nn.Module):
    """Add to the signal what a module makes of a normalised copy.

    y = x + module(norm(x))

    Args:
        dim: size of the last axis of x.
        module: what is added, of the shape of x.

    Shapes: x and y (*, dim).

    Paper: Xiong, Yang, He, et al., 2020, On Layer Normalization in the Transformer Architecture.

    >>> import torch
    >>> Sublayer(16, nn.Linear(16, 16))(torch.zeros(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, dim: int, module: nn.Module) -> None:
        super().__init__()
        self.norm, self.module = nn.LayerNorm(dim), module

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, dim) of (*, dim)."""
        y: Tensor = x + self.module(self.norm(x))
        return y


@method("companion", papers=["003-014", "003-045"])
def sublayers(pattern: str, dim: int,
              kinds: Mapping[str, Callable[[int], nn.Module]] | None = None, *, heads: int = 4,
              hidden: int | None = None, n_experts: int = 8, k: int = 2,
              causal: bool = True) -> nn.Sequential:
    """Return a stack of residual sublayers in the order that a string says.

    h := h + kind(norm(h)) for each letter: "s" attention, "f" feed-forward, "g" experts.

    A transformer is "sf" * depth, a sandwich "s" * 3 + "sf" * 3 + "f" * 3; a Brainformer mixes all
    three in an order that was searched for.

    Args:
        pattern: one letter for each sublayer.
        dim: size of the signal's last axis.
        kinds: other letters, or other modules for these; each is called with `dim`.
        heads: of each "s".
        hidden: of each "f", and of each expert of "g"; 4 `dim` where none is given.
        n_experts: of each "g".
        k: how many experts a token uses.
        causal: whether a token sees only itself and those before it.

    Shapes: h (batch, length, dim).

    Raises:
        UnknownName: a letter has no kind.
        ValueError: `pattern` is empty.

    Paper: Zhou, Du, Huang, et al., 2023, Brainformers: Trading Simplicity for Efficiency.

    >>> import torch
    >>> sublayers("sgfsff", 16)(torch.zeros(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """
    make: dict[str, Callable[[int], nn.Module]] = {
        "s": lambda dim: SelfAttention(dim, heads, causal=causal),
        "f": lambda dim: FeedForward(dim, hidden),
        "g": lambda dim: MixtureOfExperts(dim, lambda: FeedForward(dim, hidden),
                                          n_experts=n_experts, k=k),
        **(kinds or {})}
    if not pattern:
        raise ValueError('pattern must hold a letter for each sublayer, got none; try "sf" * 4')
    for letter in pattern:
        checks.one_of(make, kind_of_sublayer=letter)
    return nn.Sequential(*(Sublayer(dim, make[letter](dim)) for letter in pattern))


@method("companion", papers=["003-014"])
def par_pattern(length: int, attention: int | None = None) -> str:
    """Return a pattern with little attention, all of it in the first two thirds.

    "s" spread evenly over the first two thirds of `length`, "f" elsewhere.

    Args:
        length: how many sublayers.
        attention: how many of them are attention; a third of them where none is given.

    Raises:
        ValueError: there is no attention, or the first two thirds do not hold it.

    Paper: Mandava, Migacz, Fit-Florea, 2020, Pay Attention when Required.

    >>> par_pattern(12)
    'sfsfsfsfffff'
    """
    attention = max(1, length // 3) if attention is None else attention
    early = -(-2 * length // 3)
    checks.between(1, early, whole=True, attention=attention,
                   advice=f"{early} is two thirds of length={length}")
    places = {early * i // attention for i in range(attention)}
    return "".join("s" if i in places else "f" for i in range(length))
