from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import pairwise
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.blocks.experts.glu_experts import GLUExperts, bank_of
from netwright.blocks.experts.routing import Routing, TopKRouter
from netwright.catalogue.facets import method
from netwright.objectives.added_loss import with_auxiliary
from netwright.runtime.passes import running_again

__all__ = ["MixtureOfExperts", "Usage"]


class Usage(NamedTuple):
    """What a `MixtureOfExperts` did in its last forward pass.

    Attributes:
        load: (n_experts,) how many tokens each expert was given.
        dropped: (), how many pairs of a token and an expert found the expert full.
        balance_loss: (), n_experts sum_e f_e p_e, which is 1 where all is even, before it is
            multiplied by `balance`; 0 where the router gives no probabilities.
        z_loss: (), the mean of logsumexp(logits)^2, before it is multiplied by `z`.
    """

    load: Tensor
    dropped: Tensor
    balance_loss: Tensor
    z_loss: Tensor


@method(
    "block",
    papers=["003-001"],
    place="feedforward",
    takes=("dim",),
    search={"k": [1, 2], "balance": (0.001, 0.1)},
    variants={"plain": {"experts": lambda: nn.Linear(8, 8), "n_experts": 4},
              "one by one": {"experts": lambda: nn.Linear(8, 8), "n_experts": 4, "fused": False}},
)
class MixtureOfExperts(nn.Module):
    """Run each token through the few experts that a router chooses for it.

    y = sum_j w_j expert_{e_j}(x) + shared(x),  e and w being router(x)'s experts and weights

    In training two losses teach the router without a change to your loop: they are added to the
    gradient in the backward pass, the output being what it is without them.

    balance n sum_e f_e p_e + z mean(logsumexp(logits)^2);  f_e is expert e's share of the pairs of
    a token and an expert, p_e the mean of its probability.

    Their gradient is that of a loss of which backward() is called once and unscaled. Where you
    divide the loss by the number of batches whose gradients you add up, or where a GradScaler
    multiplies it, call backward() within `auxiliary_scale` of the same factor; otherwise the
    former makes them stronger by that number, and the latter lets them all but vanish.

    Experts that are alike, `GLU`s, `FeedForward`s of two layers or a `GLUExperts`, are run in one
    pass over the tokens sorted by expert, whose backward pass is written by hand. It keeps the two
    branches of each routed token and nothing else; it has no second derivative, for which
    `fused=False` is there. Other experts, which are to come after those in a list, are called one
    by one, those without tokens not at all.

    Args:
        dim: size of the last axis of x.
        experts: modules (rows, dim) -> (rows, out); or one, to be copied, or a function that makes
            one, with `n_experts`; or a `GLUExperts`.
        router: a module (x (tokens, dim), token_ids) -> `Routing`; a `TopKRouter(dim, n_experts,
            k)` where none is given. If it has a method `observe(load)`, that is called with the
            tokens that each expert was asked for, before any capacity, after each pass in training;
            not when a pass runs again in the backward pass.
        n_experts: how many, where neither `experts` nor `router` says it.
        k: how many a token uses, for the router that is made here.
        capacity: None, and no token is dropped; or a factor: each expert takes at most
            ceil(capacity * pairs / n_experts) tokens, first those of which it is the first choice,
            each in the order of tokens. What it does not take adds nothing.
        shared: a module that every token runs through, or several.
        balance: strength of the balance loss; for experts that are to differ in load, one for each.
        z: strength of the z-loss; 0.001 is common.
        fused: whether experts that are alike are run in one pass.

    Shapes: x (*, dim); token_ids (*), int64, for routers that ask for them; y (*, out).

    Raises:
        ValueError: the sizes of x, the experts' outputs, the router or `token_ids` do not fit, or
            `n_experts`, `k` or `capacity` is out of range, or the router's logits are not finite.
            The last is asked together with the experts' counts, in the one transfer from the
            device that they need.

    Paper: Jiang, Sablayrolles, Roux, et al., 2024, Mixtral of Experts.

    >>> from netwright.blocks.feedforward import GLU
    >>> moe = MixtureOfExperts(16, lambda: GLU(16, 32), n_experts=4, k=2)
    >>> moe(torch.randn(2, 5, 16)).shape, int(moe.usage.load.sum())
    (torch.Size([2, 5, 16]), 20)
    """

    usage: Usage

    def __init__(self, dim: int,
                 experts: Sequence[nn.Module] | nn.Module | Callable[[], nn.Module],
                 router: nn.Module | None = None, *, n_experts: int | None = None, k: int = 2,
                 capacity: float | None = None,
                 shared: nn.Module | Sequence[nn.Module] | None = None,
                 balance: float | Sequence[float] = 0.01, z: float = 0.0,
                 fused: bool = True) -> None:
        super().__init__()
        wanted = getattr(router, "n_experts", None) if n_experts is None else n_experts
        self.experts = _modules(experts, wanted)
        n = self.experts.n_experts if isinstance(self.experts, GLUExperts) else len(self.experts)
        if n_experts not in (None, n):
            raise ValueError(f"n_experts must be the number of experts, {n}, got {n_experts}; "
                             "leave it out")
        checks.count(1, dim=dim)
        checks.above(0, capacity=capacity, optional=True,
                     advice="1.25 leaves some room, None drops nothing")
        self.router = TopKRouter(dim, n, k) if router is None else router
        if getattr(self.router, "n_experts", n) != n:
            raise ValueError(f"router must choose among the {n} experts, got one for "
                             f"n_experts={self.router.n_experts}")
        many = () if shared is None else (shared,) if isinstance(shared, nn.Module) else shared
        self.shared = nn.ModuleList(many)
        strengths = (balance,) * n if isinstance(balance, (int, float)) else tuple(balance)
        if len(strengths) != n:
            raise ValueError(f"balance must be one number, or one for each of the {n} experts, "
                             f"got {len(strengths)}")
        self.dim, self.n_experts, self.capacity, self.fused = dim, n, capacity, fused
        self.balance, self.z = strengths, z

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Return (*, out) of (*, dim); `token_ids` (*) is passed to the router."""
        if not x.ndim or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (*, {self.dim}), since dim={self.dim}, got "
                             f"{tuple(x.shape)}")
        if token_ids is not None and token_ids.shape != x.shape[:-1]:
            raise ValueError(f"token_ids must be {tuple(x.shape[:-1])}, one for each vector of x, "
                             f"got {tuple(token_ids.shape)}")
        flat = x.reshape(-1, self.dim)
        routing = self.router(flat, None if token_ids is None else token_ids.reshape(-1))
        sent = _dispatch(routing, len(flat), self.n_experts, self.capacity)
        usage, total = self._usage(routing, sent)
        if total is not None and self.training and total.requires_grad:
            sent = sent._replace(weights=with_auxiliary(sent.weights, total))
        y = self._experts(flat, sent)
        for i, module in enumerate(self.shared):
            more = module(flat)
            if more.shape != y.shape:
                raise ValueError(f"shared module {i} must return {tuple(y.shape)}, as the experts "
                                 f"do, got {tuple(more.shape)}")
            y = y + more
        if not running_again():
            self.usage = usage
            observe = getattr(self.router, "observe", None)
            if self.training and observe is not None:
                observe(sent.asked)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _experts(self, x: Tensor, sent: "_Sent") -> Tensor:
        plain = not self.fused or torch._C._are_functorch_transforms_active()
        bank, many = (None, 0) if plain else bank_of(self.experts)
        counts, inverse = sent.counts, sent.inverse
        cut = sum(counts[:many])
        fused = None
        if bank is not None:
            given, weights = x, sent.weights[:cut]
            if torch.is_autocast_enabled(x.device.type):
                given, bank = bank.cast(x, torch.get_autocast_dtype(x.device.type))
            with torch.autocast(x.device.type, enabled=False):
                fused = bank.run(given, weights.to(given.dtype), sent.rows[:cut],
                                 inverse if many == self.n_experts else None, counts[:many])
            if many == self.n_experts:
                return fused
        rows = x.index_select(0, sent.rows[cut:])
        if isinstance(self.experts, GLUExperts):
            y = self.experts(rows, counts)
        else:
            y = _called(self.experts, rows, counts, many, None if fused is None else fused.shape[1])
        y = y * sent.weights[cut:, None].to(y.dtype)
        if fused is not None:
            return fused.index_add(0, sent.rows[cut:], y.to(fused.dtype))
        if inverse is not None:
            return y.index_select(0, inverse.flatten()).view(*inverse.shape, y.shape[1]).sum(1)
        return y.new_zeros(len(x), y.shape[1]).index_add(0, sent.rows, y)

    def _usage(self, routing: Routing, sent: "_Sent") -> tuple[Usage, Tensor | None]:
        """Return what the pass does, and the two losses by their strengths."""
        n, nothing = self.n_experts, sent.asked.new_zeros((), dtype=torch.float32)
        balance_loss, z_loss, total = nothing, nothing, None
        if routing.probabilities is not None and len(routing.probabilities):
            shares = sent.asked / sent.asked.sum()
            parts = n * shares * routing.probabilities.mean(0)
            balance_loss = parts.sum()
            if any(self.balance):
                total = parts @ parts.new_tensor(self.balance)
        if routing.logits is not None and len(routing.logits):
            z_loss = routing.logits.logsumexp(-1).square().mean()
            if self.z:
                total = self.z * z_loss if total is None else total + self.z * z_loss
        return Usage(sent.load, sent.asked.sum() - sent.load.sum(), balance_loss.detach(),
                     z_loss.detach()), total

    def extra_repr(self) -> str:
        """Return what the modules do not say."""
        return f"dim={self.dim}, n_experts={self.n_experts}, capacity={self.capacity}"


class _Sent(NamedTuple):
    """The pairs of a token and an expert, sorted by expert."""

    rows: Tensor  # (pairs,) the tokens
    weights: Tensor  # (pairs,)
    inverse: Tensor | None  # (tokens, k) where each token's pairs lie, if it has k
    counts: list[int]  # the pairs of each expert
    load: Tensor  # the same
    asked: Tensor  # what it would be without a capacity


def _dispatch(routing: Routing, tokens: int, n: int, capacity: float | None) -> _Sent:
    experts, weights, whose = routing.experts, routing.weights, routing.tokens
    inverse = None
    if whose is None:
        k = experts.shape[1]
        if capacity is not None:  # first choices first
            experts, weights = experts.t(), weights.t()
            whose = torch.arange(tokens, device=experts.device).repeat(k)
        experts, weights = experts.reshape(-1), weights.reshape(-1)
    ordered, order = experts.sort(stable=True)
    places = torch.arange(len(order), device=order.device)
    if whose is None:
        inverse = torch.empty_like(order).scatter_(0, order, places).view(tokens, k)
        rows = order // k
    else:
        rows = whose[order]
    indices = torch.arange(n + 1, device=order.device)
    starts = torch.searchsorted(ordered, indices)
    looked = routing.logits if routing.logits is not None else routing.weights
    # One transfer brings the counts and whether all is finite.
    *bounds, finite = torch.cat([starts, looked.isfinite().all()[None].long()]).tolist()
    if not finite:
        raise ValueError("the router's logits must be finite, got infinite or undefined ones; "
                         "look for a loss that diverged, lower the learning rate, or give the "
                         "mixture z=0.001")
    if bounds[0] or bounds[-1] != len(order):
        raise ValueError(f"the router must choose experts from 0 to {n - 1}, got others; make it "
                         f"with n_experts={n}; a HashRouter answers so to "
                         "token ids outside its vocabulary")
    asked = load = starts.diff()
    counts = [end - start for start, end in pairwise(bounds)]
    if capacity is not None and max(counts) > (room := ceil(capacity * len(order) / n)):
        kept = places - starts[ordered] < room
        order, rows, load = order[kept], rows[kept], asked.clamp(max=room)
        counts = [min(count, room) for count in counts]
    return _Sent(rows, weights[order], inverse, counts, load, asked)


def _modules(experts: Any, n: int | None) -> nn.ModuleList | GLUExperts:
    if isinstance(experts, GLUExperts):
        return experts
    if not isinstance(experts, nn.ModuleList) and callable(experts):
        if n is None or n < 1:
            raise ValueError(f"n_experts must be at least 1 where experts is one module or a "
                             f"function, got {n}")
        if isinstance(experts, nn.Module):
            return nn.ModuleList(deepcopy(experts) for _ in range(n))
        return nn.ModuleList(experts() for _ in range(n))
    if not len(experts):
        raise ValueError("experts must hold at least one module, got none")
    return nn.ModuleList(experts)


def _called(experts: nn.ModuleList, rows: Tensor, counts: Sequence[int], first: int,
            width: int | None) -> Tensor:
    """Return what the experts from `first` on make of their rows, those that have any."""
    if not len(rows) and width is None:
        nothing: Tensor = experts[0](rows)
        return nothing
    found: list[Tensor] = []
    for i, part in enumerate(rows.split(list(counts[first:])), first):
        if not len(part):
            continue
        y = experts[i](part)
        if y.shape[:-1] != part.shape[:-1] or width not in (None, y.shape[-1]):
            raise ValueError(f"expert {i} must return ({len(part)}, "
                             f"{'out' if width is None else width}) of {tuple(part.shape)}, got "
                             f"{tuple(y.shape)}; all experts need one size of output")
        width = y.shape[-1]
        found.append(y)
    return torch.cat(found) if found else rows.new_zeros(0, width or 0)
