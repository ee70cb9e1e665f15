from collections.abc import Sequence
from typing import Any

from torch import Generator, Tensor, nn

from netwright import checks
from netwright.blocks.experts import MixtureOfExperts, Routing, TopKRouter
from netwright.blocks.feedforward import FeedForward
from netwright.blocks.mixing.mlp_mixer import check_tokens
from netwright.catalogue.facets import method

__all__ = ["ImportanceRouter", "SparseMLPBlock"]


@method(
    "block",
    papers=["003-100"],
    place="router",
    takes=("dim", "n_experts"),
    search={"k": [1, 2]},
)
class ImportanceRouter(TopKRouter):
    """Send each token to its k best experts, the most important tokens of the batch first.

    p = softmax(W x);  experts and weights = the k largest of p;  importance = max(p).

    Experts with a capacity then turn away the tokens that matter least, and not those that come
    last. The pairs of a token and an expert are listed by the importance of the token.

    Args:
        dim: size of the last axis of x.
        n_experts: how many experts there are.
        k: how many of them a token uses.
        generator: draws the weight; the global state without one.

    Shapes: x (tokens, dim); experts, weights and tokens (k tokens,).

    Raises:
        ValueError: `k` is below 1 or above `n_experts`.

    Paper: Lou, Xue, Zheng, You, 2022, Cross-token Modeling with Conditional Computation.

    >>> import torch
    >>> routing = ImportanceRouter(16, n_experts=4)(torch.randn(5, 16))
    >>> sorted(routing.tokens.tolist()), bool((routing.weights.diff() <= 0).all())
    ([0, 1, 2, 3, 4], True)
    """

    def __init__(self, dim: int, n_experts: int, k: int = 1, *,
                 generator: Generator | None = None) -> None:
        super().__init__(dim, n_experts, k, softmax="all", generator=generator)

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Routing:
        """Return the routing of x (tokens, dim)."""
        routing = super().forward(x, token_ids)
        tokens = routing.weights[:, 0].argsort(descending=True, stable=True)
        # All first choices before all second ones, each by importance.
        experts, weights = (part[tokens].t().reshape(-1)
                            for part in (routing.experts, routing.weights))
        return routing._replace(experts=experts, weights=weights, tokens=tokens.repeat(self.k))


@method(
    "block",
    papers=["003-100"],
    place="residual block",
    takes=("tokens", "dim"),
    needs=["images"],
    search={"k": [1, 2], "balance": (0.001, 0.1)},
)
class SparseMLPBlock(nn.Module):
    """Mix tokens by experts that each channel chooses, then channels by experts of each token.

    z = R_in(x), S x C made S' x C' by a linear layer along each axis;
    z := z + moe_S(norm(z)^T)^T, whose rows are channels;  z := z + moe_C(norm(z));  y = R_out(z).

    Each expert is a feed-forward block of two layers, and each row uses one. With twice the tokens
    and half the channels there are fewer rows to route across tokens, and each is longer. The whole
    batch is routed together: with a capacity, what an image gets depends on the others.

    Args:
        tokens: S, how many tokens there are.
        dim: C, how many channels each has.
        token_experts: how many experts mix tokens.
        channel_experts: how many experts mix channels.
        token_hidden: units of an expert that mixes tokens, half of `dim` where none is given.
        channel_hidden: units of an expert that mixes channels, 4 C' where none is given.
        k: how many experts a row uses.
        capacity: an expert takes at most `capacity` times its even share of the rows; None takes
            all.
        balance: strength of the losses that keep the experts' loads even.
        represent: (S', C'); the paper's (2 S, C / 2) where none is given; (S, C) leaves both linear
            layers out.
        router: `"importance"`, or `"order"`, which fills experts in the order of the rows.

    Shapes: x and y (*, tokens, dim).

    Raises:
        ValueError: a size is below 1, `dim` is odd and `represent` not given, `k` or `capacity` is
            out of range, `router` is another word, or x has another number of tokens.

    Paper: Lou, Xue, Zheng, You, 2022, Cross-token Modeling with Conditional Computation.

    >>> import torch
    >>> block = SparseMLPBlock(16, 24)
    >>> block(torch.randn(2, 16, 24)).shape, block.token_experts.usage.load.shape
    (torch.Size([2, 16, 24]), torch.Size([4]))
    """

    def __init__(self, tokens: int, dim: int, token_experts: int = 4, channel_experts: int = 4, *,
                 token_hidden: int | None = None, channel_hidden: int | None = None, k: int = 1,
                 capacity: float | None = 1.2, balance: float = 0.01,
                 represent: Sequence[int] | None = None, router: str = "importance") -> None:
        super().__init__()
        checks.one_of(["importance", "order"], router=router)
        if represent is None:
            if dim % 2:
                raise ValueError(f"dim must be even to be halved, got {dim}; give represent, "
                                 f"for example ({tokens}, {dim})")
            represent = (2 * tokens, dim // 2)
        checks.pair(represent=represent)
        more, fewer = represent
        sizes: dict[str, Any] = {"represent[0]": more, "represent[1]": fewer}
        checks.count(1, tokens=tokens, dim=dim, token_experts=token_experts,
                     channel_experts=channel_experts, **sizes)
        checks.count(1, optional=True, token_hidden=token_hidden, channel_hidden=channel_hidden)

        def mixture(size: int, hidden: int, n: int) -> MixtureOfExperts:
            route = (ImportanceRouter(size, n, k) if router == "importance" else
                     TopKRouter(size, n, k, softmax="all"))
            return MixtureOfExperts(size, lambda: FeedForward(size, hidden), route, n_experts=n,
                                    capacity=capacity, balance=balance)

        self.tokens = tokens
        inside, outside = (more, fewer), (tokens, dim)
        self.enter: nn.Module = nn.Identity()
        self.leave: nn.Module = nn.Identity()
        if inside != outside:
            self.enter, self.leave = _Represent(outside, inside), _Represent(inside, outside)
        self.token_norm, self.channel_norm = nn.LayerNorm(fewer), nn.LayerNorm(fewer)
        self.token_experts = mixture(
            more, max(1, dim // 2) if token_hidden is None else token_hidden, token_experts)
        self.channel_experts = mixture(
            fewer, 4 * fewer if channel_hidden is None else channel_hidden, channel_experts)

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, tokens, dim) of (*, tokens, dim)."""
        check_tokens(x, self.tokens)
        z = self.enter(x)
        z = z + self.token_experts(self.token_norm(z).mT).mT
        y: Tensor = self.leave(z + self.channel_experts(self.channel_norm(z)))
        return y


class _Represent(nn.Module):
    """A linear layer along the tokens, and one along the channels."""

    def __init__(self, before: tuple[int, int], after: tuple[int, int]) -> None:
        super().__init__()
        self.tokens = nn.Linear(before[0], after[0])
        self.channels = nn.Linear(before[1], after[1])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.channels(self.tokens(x.mT).mT)
        return y
