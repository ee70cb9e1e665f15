from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import linear

from netwright import checks
from netwright.catalogue.facets import method

__all__ = ["Routing", "TopKRouter"]


class Routing(NamedTuple):
    """Which experts each token uses, and by how much: what a router returns.

    Either each token has the same number k of experts, and `tokens` is None, or the pairs of a
    token and an expert are listed one by one: `experts`, `weights` and `tokens` are (pairs,).

    Attributes:
        experts: (tokens, k) or (pairs,), int64; the experts' indices.
        weights: of the same shape; what each expert's output is multiplied by.
        logits: (tokens, n_experts); what the z-loss is of, and what must be finite.
        probabilities: (tokens, n_experts); what the balance loss is of. None where a router keeps
            the balance by other means.
        tokens: (pairs,), int64; whose pair it is.
    """

    experts: Tensor
    weights: Tensor
    logits: Tensor | None = None
    probabilities: Tensor | None = None
    tokens: Tensor | None = None


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weight^T + bias in float32 or wider, whatever autocast says."""
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
        return linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))


def check_choice(n_experts: int, k: int) -> None:
    """Raise ValueError where no token can choose `k` of `n_experts`."""
    checks.count(1, n_experts=n_experts)
    checks.between(1, n_experts, whole=True, k=k,
                   advice=f"a token cannot use one of n_experts={n_experts} twice")


@method(
    "block",
    papers=["003-001"],
    place="router",
    takes=("dim", "n_experts"),
    search={"k": [1, 2], "softmax": ["chosen", "all"]},
    variants={"plain": {}, "softmax over all": {"softmax": "all"}, "one": {"k": 1}},
)
class TopKRouter(nn.Module):
    """Send each token to the k experts with the largest logits of a linear layer.

    l = W x;  experts = the k largest of l;  weights = softmax(l[experts]), or softmax(l)[experts]

    The first, `softmax="chosen"`, is the way of Mixtral, whose weights add up to one; the second,
    `softmax="all"`, is that of the Switch Transformer, in which one expert's weight still teaches
    the router, and what k = 1 takes where you do not say. A softmax over one is always 1 and would
    teach nothing: with `softmax="chosen"` and k = 1 the weight is 1 and its gradient that of log
    softmax(l)[expert]. Logits are computed in float32 or wider.

    Args:
        dim: size of the last axis of x.
        n_experts: how many experts there are.
        k: how many of them a token uses.
        softmax: over the `"chosen"` logits or over `"all"`; where None is given, over the chosen
            ones for k above 1 and over all for k = 1.
        bias: whether the linear layer has one.
        generator: draws the weight; the global state without one.

    Shapes: x (tokens, dim); experts and weights (tokens, k).

    Raises:
        ValueError: `k` is below 1 or above `n_experts`, or `softmax` is another word.

    Paper: Jiang, Sablayrolles, Roux, et al., 2024, Mixtral of Experts.

    >>> routing = TopKRouter(16, n_experts=8)(torch.zeros(5, 16))
    >>> routing.experts.shape, routing.weights.sum(1).tolist()
    (torch.Size([5, 2]), [1.0, 1.0, 1.0, 1.0, 1.0])
    """

    def __init__(self, dim: int, n_experts: int, k: int = 2, *,
                 softmax: Literal["chosen", "all"] | None = None, bias: bool = False,
                 generator: Generator | None = None) -> None:
        super().__init__()
        checks.count(1, dim=dim)
        check_choice(n_experts, k)
        checks.one_of(["chosen", "all"], softmax=softmax, optional=True)
        self.n_experts, self.k = n_experts, k
        self.softmax = softmax or ("all" if k == 1 else "chosen")
        self.weight = nn.Parameter(torch.empty(n_experts, dim))
        nn.init.uniform_(self.weight, -dim ** -0.5, dim ** -0.5, generator=generator)
        self.bias = nn.Parameter(torch.zeros(n_experts)) if bias else None

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Routing:
        """Return the routing of x (tokens, dim)."""
        logits = router_logits(x, self.weight, self.bias)
        probabilities = logits.softmax(-1)
        if self.softmax == "chosen" and self.k > 1:
            chosen, experts = logits.topk(self.k)
            return Routing(experts, chosen.softmax(-1), logits, probabilities)
        weights, experts = probabilities.topk(self.k)
        if self.softmax == "chosen":
            weights = weights / weights.detach()
        return Routing(experts, weights, logits, probabilities)
