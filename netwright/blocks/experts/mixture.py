from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import pairwise
from math import ceil
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from netwright import checks
from netwright.blocks.experts.glu_experts import GLUExperts, bank_of
from netwright.blocks.experts.routing import Routing, TopKRouter
from netwright.catalogue.facets import method
from netwright.objectives.added_loss import with_auxiliary
from netwright.runtime.modes import transformed
from netwright.runtime.padding import read_padding, real_of
from netwright.runtime.passes import Lent, running_again

__all__ = ["MixtureOfExperts", "Usage", "feed_attention_mask"]


class Usage(NamedTuple):
    """What a `MixtureOfExperts` did in its last forward pass, padding apart.

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
              "dense": {"experts": lambda: nn.Linear(8, 8), "n_experts": 4, "form": "dense"},
              "one by one": {"experts": lambda: nn.Linear(8, 8), "n_experts": 4, "fused": False}},
)
class MixtureOfExperts(nn.Module):
    """Run each token through the few experts that a router chooses for it.

    y = sum_j w_j expert_{e_j}(x) + shared(x),  e and w being router(x)'s experts and weights

    In training two losses teach the router without a change to your loop: they are added to the
    gradient in the backward pass, the output being what it is without them.

    balance n sum_e f_e p_e + z mean(logsumexp(logits)^2);  f_e is expert e's share of the pairs of
    a token and an expert, p_e the mean of its probability.

    Padding counts in no load and in neither loss, takes no expert's room from other tokens, and
    is not chosen by experts that choose their tokens: what stands there changes nothing elsewhere.
    Say where it is by `mask`, or let the model's `attention_mask` be seen by all mixtures in it by
    `feed_attention_mask(model)`; netwright's reshapes do so for the mixtures that they make.

    Their gradient is that of a loss of which backward() is called once and unscaled. Where you
    divide the loss by the number of batches whose gradients you add up, or where a GradScaler
    multiplies it, call backward() within `auxiliary_scale` of the same factor; otherwise the
    former makes them stronger by that number, and the latter lets them all but vanish.

    Experts that are alike, `GLU`s, `FeedForward`s of two layers or a `GLUExperts`, with nothing to
    them but their weights (no hooks, no patched `forward`, nothing quantised), are run in one pass
    over the tokens sorted by expert, whose backward pass is written by hand. It keeps the two
    branches of each routed token and nothing else; it has no second derivative, for which
    `fused=False` is there. Other experts, which are to come after those in a list, are called one
    by one, those without tokens not at all.

    How many tokens an expert has is known only when they are there, which no graph can hold. With
    `form="dense"`, to be set at any time, every expert runs on every token and those that were not
    chosen count 0: the same outputs up to rounding at n_experts / k times the products, in one
    graph for `torch.compile(fullgraph=True)`. It is what `torch.export` and ONNX get in any case.

    Args:
        dim: size of the last axis of x.
        experts: modules (rows, dim) -> (rows, out); or one, to be copied, or a function that makes
            one, with `n_experts`; or a `GLUExperts`.
        router: a module (x (tokens, dim), token_ids) -> `Routing`; a `TopKRouter(dim, n_experts,
            k)` where none is given. If it has a method `observe(load)`, that is called with the
            tokens that each expert was asked for, before any capacity, after each pass in training;
            not when a pass runs again in the backward pass. If it has `takes_mask = True`, it is
            called with a third argument, which vectors are real, (tokens,), or None.
        n_experts: how many, where neither `experts` nor `router` says it.
        k: how many a token uses, for the router that is made here. Where it is 1, the weight is
            the softmax over all, as a softmax over one would teach the router nothing.
        capacity: None, and no token is dropped; or a factor: each expert takes at most
            ceil(capacity * pairs / n_experts) tokens, first those of which it is the first choice,
            each in the order of tokens. What it does not take adds nothing.
        shared: a module that every token runs through, or several.
        balance: strength of the balance loss; for experts that are to differ in load, one for each.
        z: strength of the z-loss; 0.001 is common.
        fused: whether experts that are alike are run in one pass.
        form: "routed", where experts run on their own tokens, or "dense".

    Shapes: x (*, dim); token_ids (*), int64, for routers that ask for them; mask (*), True or not
    0 at tokens that are no padding; y (*, out).

    Raises:
        UnknownName: `form` is neither of the two.
        ValueError: the sizes of x, the experts' outputs, the router, `token_ids` or `mask` do not
            fit, or `n_experts`, `k` or `capacity` is out of range, or the router's logits are not
            finite. The last is asked together with the experts' counts, in the one transfer from
            the device that they need.

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
                 fused: bool = True, form: Literal["routed", "dense"] = "routed") -> None:
        super().__init__()
        checks.one_of(["routed", "dense"], form=form)
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
        self.balance, self.z, self.form = strengths, z, form
        self._lent = Lent()

    def forward(self, x: Tensor, token_ids: Tensor | None = None,
                mask: Tensor | None = None) -> Tensor:
        """Return (*, out) of (*, dim); `token_ids` (*) is passed to the router."""
        if not x.ndim or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (*, {self.dim}), since dim={self.dim}, got "
                             f"{tuple(x.shape)}")
        if token_ids is not None and token_ids.shape != x.shape[:-1]:
            raise ValueError(f"token_ids must be {tuple(x.shape[:-1])}, one for each vector of x, "
                             f"got {tuple(token_ids.shape)}")
        if mask is not None and mask.shape != x.shape[:-1]:
            raise ValueError(f"mask must be {tuple(x.shape[:-1])}, one entry for each vector of x "
                             f"that is 0 where it is padding, got {tuple(mask.shape)}")
        flat, real = x.reshape(-1, self.dim), self._real(x, mask)
        told = (real,) if getattr(self.router, "takes_mask", False) else ()
        routing = self.router(flat, None if token_ids is None else token_ids.reshape(-1), *told)
        dense = self.form == "dense" or torch.compiler.is_exporting() or torch.jit.is_tracing()
        sent = (_shares if dense else _dispatch)(routing, len(flat), self.n_experts, self.capacity,
                                                 real)
        usage, total = self._usage(routing, sent, real)
        if total is not None and self.training and total.requires_grad:
            sent = sent._replace(weights=with_auxiliary(sent.weights, total))
        y = self._all(flat, sent.weights) if dense else self._experts(flat, sent)
        for i, module in enumerate(self.shared):
            more = module(flat)
            if more.shape != y.shape:
                raise ValueError(f"shared module {i} must return {tuple(y.shape)}, as the experts "
                                 f"do, got {tuple(more.shape)}")
            y = y + more
        if not running_again() and not torch.compiler.is_exporting():
            self.usage = usage
            observe = getattr(self.router, "observe", None)
            if self.training and observe is not None:
                observe(sent.asked)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _real(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """Return which rows are real, (tokens,): the same when a pass runs again."""
        if mask is not None:
            return mask.reshape(-1) != 0
        real = self._lent.find(x) if running_again() else None
        if real is None:
            real = real_of(x)
        compiled = torch.compiler.is_compiling()
        if not compiled and not running_again() and (real is not None or self._lent.kept) and (
                self.training or torch.is_grad_enabled()):
            self._lent.note(x, real)
        return None if real is None else real.reshape(-1)

    def _all(self, x: Tensor, shares: Tensor) -> Tensor:
        """Return (tokens, out): all experts' outputs by their shares (tokens, n_experts)."""
        y: Any = None
        for i in range(self.n_experts):
            part = (self.experts.expert(i, x) if isinstance(self.experts, GLUExperts) else
                    self.experts[i](x))
            part = part * shares[:, i, None].to(part.dtype)
            y = part if y is None else y + part
        return cast(Tensor, y)

    def _experts(self, x: Tensor, sent: "_Sent") -> Tensor:
        plain = not self.fused or transformed()
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

    def _usage(self, routing: Routing, sent: "_Sent",
               real: Tensor | None) -> tuple[Usage, Tensor | None]:
        """Return what the pass does, and the two losses by their strengths."""
        n, nothing = self.n_experts, sent.asked.new_zeros((), dtype=torch.float32)
        balance_loss, z_loss, total = nothing, nothing, None
        if routing.probabilities is not None and len(routing.probabilities):
            shares = sent.asked / sent.asked.sum().clamp(min=1)
            parts = n * shares * _mean(routing.probabilities, real)
            balance_loss = parts.sum()
            if any(self.balance):
                total = parts @ parts.new_tensor(self.balance)
        if routing.logits is not None and len(routing.logits):
            z_loss = _mean(routing.logits.logsumexp(-1).square(), real)
            if self.z:
                total = self.z * z_loss if total is None else total + self.z * z_loss
        return Usage(sent.load, sent.asked.sum() - sent.load.sum(), balance_loss.detach(),
                     z_loss.detach()), total

    def extra_repr(self) -> str:
        """Return what the modules do not say."""
        return f"dim={self.dim}, n_experts={self.n_experts}, capacity={self.capacity}"


@method("companion")
def feed_attention_mask(network: nn.Module) -> list[RemovableHandle]:
    """Let all mixtures of `network` know which positions its `attention_mask` calls padding.

    Adds hooks to `network` and to the modules in it that begin a stream of positions, as an
    encoder and a decoder do, which read the mask that they are called with: `attention_mask`, or
    `src_key_padding_mask` and the like of PyTorch's transformers. It holds for that pass, and for
    its parts when they are run again in its backward pass. The handles that are returned remove
    the hooks: `handle.remove()` of each. Without such an argument there is nothing to read, and
    `mask` is to be given to each `MixtureOfExperts`.

    Raises:
        ValueError: no module of `network` has such an argument.

    >>> class Encoder(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.moe = MixtureOfExperts(4, lambda: nn.Linear(4, 4), n_experts=2, k=1)
    ...     def forward(self, inputs_embeds, attention_mask=None):
    ...         return self.moe(inputs_embeds)
    >>> encoder = Encoder()
    >>> handles = feed_attention_mask(encoder)
    >>> y = encoder(torch.randn(2, 5, 4), attention_mask=torch.tensor([[1, 1, 0, 0, 0]] * 2))
    >>> int(encoder.moe.usage.load.sum())
    4
    """
    handles = read_padding(network)
    if not handles:
        raise ValueError(f"network must have a module that takes attention_mask or a "
                         f"key_padding_mask and is not fed yet, got a {type(network).__name__} "
                         "without one; give mask= to each MixtureOfExperts")
    return handles


class _Sent(NamedTuple):
    """The pairs of a token and an expert, sorted by expert."""

    rows: Tensor  # (pairs,) the tokens
    weights: Tensor  # (pairs,)
    inverse: Tensor | None  # (tokens, k) where each token's pairs lie, if it has k
    counts: list[int]  # the pairs of each expert
    load: Tensor  # the same, padding apart
    asked: Tensor  # what it would be without a capacity


def _dispatch(routing: Routing, tokens: int, n: int, capacity: float | None,
              real: Tensor | None) -> _Sent:
    experts, weights, whose = routing.experts, routing.weights, routing.tokens
    inverse = None
    if whose is None:
        k = experts.shape[1]
        if capacity is not None:  # first choices first
            experts, weights = experts.t(), weights.t()
            whose = torch.arange(tokens, device=experts.device).repeat(k)
        experts, weights = experts.reshape(-1), weights.reshape(-1)
    if real is not None and capacity is not None and whose is not None:  # and padding last
        last = (~real[whose]).long().argsort(stable=True)
        experts, weights, whose = experts[last], weights[last], whose[last]
    ordered, order = experts.sort(stable=True)
    places = torch.arange(len(order), device=order.device)
    if whose is None:
        inverse = torch.empty_like(order).scatter_(0, order, places).view(tokens, k)
        rows = order // k
    else:
        rows = whose[order]
    indices = torch.arange(n + 1, device=order.device)
    starts = torch.searchsorted(ordered, indices)
    counted = None if real is None else real[rows]
    # One transfer brings the counts, whether all is finite, and how many pairs are real.
    asked_for = starts[-1:] if counted is None else counted.sum()[None]
    *bounds, many, finite = torch.cat([starts, asked_for,
                                       _finite(routing, tokens, real)[None]]).tolist()
    _say(finite, bounds[0] == 0 and bounds[-1] == len(order), n)
    asked = load = _loads(ordered, starts, counted)
    counts = [end - start for start, end in pairwise(bounds)]
    if capacity is not None and max(counts) > (room := ceil(capacity * many / n)):
        kept = places - starts[ordered] < room
        order, rows = order[kept], rows[kept]
        load = asked.clamp(max=room)
        counts = [min(count, room) for count in counts]
    return _Sent(rows, weights[order], inverse, counts, load, asked)


def _shares(routing: Routing, tokens: int, n: int, capacity: float | None,
            real: Tensor | None) -> _Sent:
    """Return what `_dispatch` does with nothing that depends on how many tokens an expert has.

    `weights` are the shares (tokens, n_experts).
    """
    if not torch.compiler.is_compiling():
        _check_routing(routing, tokens, n, real)
    experts, weights, whose = routing.experts, routing.weights, routing.tokens
    if whose is None:  # first choices first
        whose = torch.arange(tokens, device=experts.device).repeat(experts.shape[1])
        experts, weights = experts.t().reshape(-1), weights.t().reshape(-1)
    chosen = experts[:, None] == torch.arange(n, device=experts.device)
    counted = chosen if real is None else chosen & real[whose, None]
    asked = load = counted.sum(0)
    if capacity is not None:
        room = (capacity * asked.sum() / n).ceil()
        before = counted.cumsum(0)
        if real is not None:  # padding takes what is left
            before = before.where(counted, asked + (chosen & ~counted).cumsum(0))
        weights = weights.where((before.where(chosen, 0).sum(1) <= room), 0)
        load = asked.minimum(room.to(asked.dtype))
    shares = weights.new_zeros(tokens, n).index_add(0, whose, chosen * weights[:, None])
    return _Sent(whose, shares, None, [], load, asked)


def _check_routing(routing: Routing, tokens: int, n: int, real: Tensor | None) -> None:
    """Raise where a router's choice or its logits cannot be."""
    inside = ((routing.experts >= 0) & (routing.experts < n)).all().long()
    finite, inside = torch.stack([_finite(routing, tokens, real), inside]).tolist()
    _say(finite, inside, n)


def _say(finite: int, inside: int, n: int) -> None:
    if not finite:
        raise ValueError("the router's logits must be finite, got infinite or undefined ones; "
                         "look for a loss that diverged, lower the learning rate, or give the "
                         "mixture z=0.001")
    if not inside:
        raise ValueError(f"the router must choose experts from 0 to {n - 1}, got others; make it "
                         f"with n_experts={n}; a HashRouter answers so to "
                         "token ids outside its vocabulary")


def _loads(ordered: Tensor, starts: Tensor, counted: Tensor | None) -> Tensor:
    """Return how many pairs each expert has, those of padding apart."""
    if counted is None:
        return starts.diff()
    return starts.new_zeros(len(starts) - 1).index_add_(0, ordered, counted.long())


def _finite(routing: Routing, tokens: int, real: Tensor | None) -> Tensor:
    """Return whether what the router says of real tokens is finite, as a number."""
    looked = routing.logits if routing.logits is not None else routing.weights
    finite = looked.isfinite()
    if real is not None and len(looked) == tokens:
        finite = finite | ~real.view(-1, *[1] * (looked.ndim - 1))
    return finite.all().long()


def _mean(values: Tensor, real: Tensor | None) -> Tensor:
    """Return the mean over the tokens that are no padding."""
    if real is None:
        return values.mean(0)
    values = values.where(real.view(-1, *[1] * (values.ndim - 1)), 0)
    return values.sum(0) / real.sum().clamp(min=1)


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
