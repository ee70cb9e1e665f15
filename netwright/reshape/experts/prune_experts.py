from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy
import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.blocks.experts.mixture import MixtureOfExperts
from netwright.blocks.experts.routing import TopKRouter, router_logits
from netwright.blocks.feedforward.feed_forward import FeedForward
from netwright.catalogue.facets import method
from netwright.errors import NothingToReshape
from netwright.reshape._calibration import Stream, show_inputs
from netwright.reshape.change import decided, reshape
from netwright.runtime.padding import real_rows

__all__ = ["prune_experts"]

Method = Literal["cluster_router", "usage", "random"]
_COUNTS = ("n_experts", "num_experts", "num_local_experts")
_GROUPS = ("num_group", "n_group")
_CHOSEN = ("k", "top_k", "num_experts_per_tok")


@method(
    "reshape",
    papers=["003-005"],
    place="experts",
    saves=["parameters", "file size", "inference memory"],
    needs=["experts", "calibration data"],
    keeps_function=False,
    search={"keep": [2, 4], "method": ["cluster_router", "usage"]},
    variants={"clusters": {"keep": 2}, "usage": {"keep": 2, "method": "usage"},
              "random": {"keep": 2, "method": "random"}},
    network=lambda: nn.Sequential(nn.Embedding(16, 8), MixtureOfExperts(
        8, [FeedForward(8, 16) for _ in range(4)], TopKRouter(8, 4, 2)), nn.Linear(8, 16)),
    batch=lambda: torch.randint(16, (2, 8)),
)
@reshape
@torch.no_grad()
def prune_experts(model: nn.Module, calibration: Any, keep: int, *,
                  method: Method = "cluster_router",
                  generator: Generator | None = None) -> nn.Module:
    """Return a copy with `keep` experts in each mixture, chosen by how a task's tokens are routed.

    l = X R^T over the task's tokens X;  clusters of experts by 1 - corr(l_i, l_j), `keep` of them;
    of each cluster the expert stays that has the largest mean of softmax(l).

    Experts that the router wants for the same tokens stand in for each other ("cluster_router").
    "usage" keeps those with the largest mean of softmax(l), "random" any. A router loses the rows
    of the others, so that their tokens go to the next best. Where a token used more than `keep`
    experts it uses `keep`. The choice needs no labels, and what `attention_mask` calls padding
    takes no part in it; train on afterwards where you can.

    What the paper leaves open here: clusters are made by average linkage, which draws nothing.
    Where a router chooses groups of experts first, as DeepSeek's, as many stay in each.

    Args:
        model: with mixtures of experts: `MixtureOfExperts` with a router that has a weight
            (experts, dim), such as `TopKRouter`, or Hugging Face's Mixtral and others whose blocks
            hold `experts` and a `gate` or `router` with such a weight.
        calibration: some of the task's data: what the model takes, or batches of that, such as a
            loader, of which one is in memory at a time.
        keep: how many experts stay.
        method: how they are chosen.
        generator: draws "random"; the global state without one.

    Raises:
        NothingToReshape: the model has no such mixture.
        UnknownName: no method is called that.
        ValueError: `keep` is not between 1 and the number of experts of each mixture, or the data
            are empty or give router logits that are not finite.

    Paper: Sarkar, Lausen, Cevher, Zha, Brox, Karypis, 2024, Revisiting SMoE Language Models by
    Evaluating Inefficiencies with Task Specific Expert Pruning.

    >>> from netwright.models import gpt
    >>> from netwright.reshape import upcycle
    >>> x = torch.randint(96, (4, 16))
    >>> mixture = upcycle(gpt(96, context=16), x, n_experts=8)
    >>> smaller = prune_experts(mixture, x, keep=4)
    >>> smaller(x).shape, len(list(smaller.parameters())) < len(list(mixture.parameters()))
    (torch.Size([4, 16, 96]), True)
    """
    known = Method.__args__  # type: ignore[attr-defined]
    checks.one_of(known, method=method)
    stream = Stream(calibration)
    found = _mixtures(model)
    for mixture in found:
        checks.between(1, mixture.experts, whole=True, keep=keep,
                       advice=f"{mixture.name!r} has {mixture.experts} experts")
        if mixture.groups > 1 and (keep % mixture.groups or keep < 2 * mixture.groups):
            raise ValueError(f"keep must be a multiple of the {mixture.groups} groups in which "
                             f"{mixture.router!r} chooses, and at least two in each, got {keep}; "
                             f"try {2 * mixture.groups}")
    seen = {mixture.router: _Seen(model.get_submodule(mixture.router)) for mixture in found}
    show_inputs(model, list(seen), stream, lambda name, x: seen[name].add(real_rows(x), name))
    chosen = []
    for mixture in found:
        usage, likeness = seen[mixture.router].usage(mixture.router), seen[mixture.router].likeness
        size = mixture.experts // mixture.groups
        parts = [slice(i * size, (i + 1) * size) for i in range(mixture.groups)]
        chosen.append(torch.cat([part.start + _stay(
            usage[part], likeness[part, part], keep // mixture.groups, method, generator)
            for part in parts]))
    return decided({"mixtures": [{**mixture._asdict(), "stay": stay.tolist()}
                                 for mixture, stay in zip(found, chosen, strict=True)]})


@prune_experts.applies
@torch.no_grad()
def _fewer(model: nn.Module, decision: Mapping[str, Any]) -> nn.Module:
    pruned: Any = model
    for said in decision["mixtures"]:
        _prune(pruned.get_submodule(said["name"]), pruned.get_submodule(said["router"]),
               said["experts"], torch.tensor(said["stay"]), said["groups"])
    first = decision["mixtures"][0]
    used = _most_used(pruned.get_submodule(first["router"]), len(first["stay"]), first["groups"])
    for part in (pruned, getattr(pruned, "config", None)):
        _count(part, first["experts"], len(first["stay"]), used)
    return pruned


class _Mixture(NamedTuple):
    """Where a mixture of experts is."""

    name: str
    router: str
    experts: int
    groups: int = 1  # a token may use those of a few groups alone


def _mixtures(model: nn.Module) -> list[_Mixture]:
    found = []
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        for child in ("router", "gate"):
            router = getattr(module, child, None)
            weight = getattr(router, "weight", None)
            if not isinstance(experts, nn.Module) or not isinstance(weight, Tensor):
                continue
            if weight.ndim == 2 and weight.shape[0] == _number(experts):
                groups = next((number for part in (router, module) for key in _GROUPS
                               if isinstance(number := getattr(part, key, None), int)), 1)
                found.append(_Mixture(name, f"{name}.{child}".lstrip("."), weight.shape[0], groups))
    if not found:
        raise NothingToReshape(f"{type(model).__name__} has no mixture of experts whose router has "
                               "a weight (experts, dim): no module holds `experts` and a `router` "
                               "or `gate` that fits them")
    return found


def _number(experts: nn.Module) -> int:
    if isinstance(experts, nn.ModuleList):
        return len(experts)
    sizes = {p.shape[0] for p in experts.parameters(recurse=False) if p.ndim > 1}
    return sizes.pop() if len(sizes) == 1 else 0


class _Seen:
    """What a router's logits were, summed over the tokens so far."""

    def __init__(self, router: Any) -> None:
        self.router, self.tokens = router, 0
        self.chosen: Any = 0.0  # sum of softmax(l)
        self.sum: Any = 0.0
        self.products: Any = 0.0
        self.near: Tensor | None = None  # the first batch's mean, beside which sums stay exact

    def add(self, x: Tensor, name: str) -> None:
        """Take in the tokens x (tokens, dim)."""
        if not len(x):
            return
        logits = router_logits(x, self.router.weight, getattr(self.router, "bias", None)).double()
        if not logits.isfinite().all():
            raise ValueError(f"calibration must give finite router logits, got others in "
                             f"{name!r}; check the inputs and the weights")
        self.near = logits.mean(0) if self.near is None else self.near
        self.chosen = self.chosen + logits.softmax(-1).sum(0)
        logits = logits - self.near
        self.sum, self.products = self.sum + logits.sum(0), self.products + logits.T @ logits
        self.tokens += len(x)

    def usage(self, name: str) -> Tensor:
        """Return the mean of softmax(l) over the tokens."""
        if not self.tokens:
            raise ValueError(f"calibration must give {name!r} tokens that are no padding, got "
                             "none; check its attention_mask")
        usage: Tensor = self.chosen / self.tokens
        return usage

    @property
    def likeness(self) -> Tensor:
        """The correlations of the logits over the tokens."""
        covariance = self.products - self.sum[:, None] * self.sum / self.tokens
        length = covariance.diagonal().clamp(min=0).sqrt()
        length = length.clamp(min=torch.finfo(torch.double).tiny)
        return covariance / length / length[:, None]


def _stay(usage: Tensor, likeness: Tensor, keep: int, method: Method,
          generator: Generator | None) -> Tensor:
    """Return which experts stay, in their order."""
    n = len(usage)
    if method == "random":
        return torch.randperm(n, generator=generator)[:keep].sort().values
    if method == "usage" or keep == n:
        return usage.topk(keep).indices.sort().values.cpu()
    distances = (1 - likeness).clamp(min=0).cpu().numpy()
    numpy.fill_diagonal(distances, 0.0)
    from sklearn.cluster import AgglomerativeClustering
    owner = torch.from_numpy(AgglomerativeClustering(
        keep, metric="precomputed", linkage="average").fit_predict(distances))
    best = [usage.cpu().where(owner == cluster, -1.0).argmax() for cluster in range(keep)]
    return torch.stack(best).sort().values


def _prune(block: Any, router: Any, n: int, stay: Tensor, groups: int) -> None:
    if isinstance(block.experts, nn.ModuleList):
        block.experts = nn.ModuleList(block.experts[i] for i in stay.tolist())
    else:
        _select(block.experts, n, stay)
    _select(router, n, stay)
    vars(block).pop("usage", None)  # how many tokens each expert had, those that went among them
    strengths = getattr(block, "balance", None)
    if isinstance(strengths, tuple) and len(strengths) == n:
        block.balance = tuple(strengths[i] for i in stay.tolist())
    for module in (block, block.experts, router):
        _count(module, n, len(stay), _most_used(router, len(stay), groups))


def _most_used(router: Any, keep: int, groups: int) -> int:
    """Return how many experts a token can use."""
    open_groups = getattr(router, "topk_group", groups)
    return keep // groups * open_groups if isinstance(open_groups, int) else keep


def _select(module: nn.Module, n: int, stay: Tensor) -> None:
    """Keep the experts' parts of every parameter and buffer that has one for each."""
    for name, p in list(module.named_parameters(recurse=False)):
        if p.ndim and p.shape[0] == n:
            setattr(module, name, nn.Parameter(p.detach()[stay.to(p.device)], p.requires_grad))
    for name, b in list(module.named_buffers(recurse=False)):
        if b.ndim and b.shape[0] == n:
            setattr(module, name, b[stay.to(b.device)])


def _count(module: Any, n: int, keep: int, most: int) -> None:
    for name in _COUNTS:
        if getattr(module, name, None) == n:
            setattr(module, name, keep)
    for name in _CHOSEN:
        used = getattr(module, name, None)
        if isinstance(used, int) and used > most:
            setattr(module, name, most)
