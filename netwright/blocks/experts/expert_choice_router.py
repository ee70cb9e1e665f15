import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.blocks.experts.routing import Routing, check_choice, router_logits
from netwright.catalogue.facets import method

__all__ = ["ExpertChoiceRouter"]


@method("block", place="router", takes=("dim", "n_experts"), search={"k": [1.0, 2.0]})
class ExpertChoiceRouter(nn.Module):
    """Let each expert choose its tokens: the load is even, and tokens differ in their experts.

    s = softmax(W x) over experts;  expert e takes the c tokens with the largest s_e, with weight
    s_e;  c = round(k tokens / n_experts), at least 1

    Which experts a token gets depends on all tokens of the batch, later ones too: this is for
    encoders, not for models that write one token after the other. Padding is chosen by none and
    does not count.

    Args:
        dim: size of the last axis of x.
        n_experts: how many experts there are.
        k: how many of them a token uses on average; need not be whole.
        generator: draws the weight; the global state without one.

    Shapes: x (tokens, dim); mask (tokens,), True where a token is no padding; experts, weights and
    tokens (n_experts c,).

    Raises:
        ValueError: `k` is not above 0, or above `n_experts`.

    Paper: Zhou, Lei, Liu, et al., 2022, Mixture-of-Experts with Expert Choice Routing.

    >>> routing = ExpertChoiceRouter(16, n_experts=4, k=2)(torch.randn(10, 16))
    >>> routing.experts.bincount().tolist()
    [5, 5, 5, 5]
    """

    takes_mask = True

    def __init__(self, dim: int, n_experts: int, k: float = 2.0, *,
                 generator: Generator | None = None) -> None:
        super().__init__()
        checks.count(1, dim=dim)
        check_choice(n_experts, 1)
        checks.between(0, n_experts, ends=(False, True), k=k, advice=f"n_experts={n_experts}")
        self.n_experts, self.k = n_experts, k
        self.weight = nn.Parameter(torch.empty(n_experts, dim))
        nn.init.uniform_(self.weight, -dim ** -0.5, dim ** -0.5, generator=generator)

    def forward(self, x: Tensor, token_ids: Tensor | None = None,
                mask: Tensor | None = None) -> Routing:
        """Return the routing of x (tokens, dim)."""
        logits = router_logits(x, self.weight)
        scores = logits.softmax(-1)
        count = len(x) if mask is None else int(mask.sum())
        many = min(count, max(1, round(self.k * count / self.n_experts)))
        ranked = scores if mask is None else scores.masked_fill(~mask[:, None], -1.0)
        tokens = ranked.t().topk(many).indices
        weights = scores.t().gather(1, tokens)
        experts = torch.arange(self.n_experts, device=x.device)[:, None].expand_as(tokens)
        return Routing(experts.flatten(), weights.flatten(), logits, None, tokens.flatten())
