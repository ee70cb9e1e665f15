from functools import partial
from heapq import heapify, heapreplace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils.hooks import RemovableHandle

from netwright import checks
from netwright.blocks.experts.routing import Routing, check_choice
from netwright.catalogue.facets import method
from netwright.runtime.passes import Lent, running_again

__all__ = ["HashRouter", "feed_token_ids"]


@method(
    "block",
    papers=["003-147"],
    place="router",
    takes=("n_experts", "vocabulary"),
    needs=["tokens"],
    batch=lambda: (torch.randn(5, 8), torch.tensor([1, 0, 3, 9, 3])),
)
class HashRouter(nn.Module):
    """Send each token to the expert that a fixed table names for its id.

    expert = table[token id];  weight = 1

    Nothing is learnt and nothing needs to be balanced. Without `frequencies` the table is random,
    with as many ids for each expert; with them each id, the most frequent first, is given to the
    expert that has the least so far.

    The ids reach the router as `MixtureOfExperts`'s second argument, or, inside a network that
    passes only the signal from block to block, by `feed_token_ids(network)`.

    Args:
        n_experts: how many experts there are.
        vocabulary: how many ids there are, from 0.
        frequencies: how often each occurs, for a table that evens the load.
        generator: draws the random table, and the order of ids of one frequency; the global state
            without one.

    Shapes: x (tokens, dim); token_ids (tokens,); table (vocabulary,); frequencies (vocabulary,);
    experts and weights (tokens, 1).

    Raises:
        ValueError: there are no token ids, or a number is below 1, or `frequencies` has another
            length. A `MixtureOfExperts` raises it for ids that are not in the vocabulary.

    Paper: Roller, Sukhbaatar, Szlam, Weston, 2021, Hash Layers For Large Sparse Models.

    >>> router = HashRouter(2, 5, torch.tensor([9, 5, 4, 1, 1]))
    >>> [int(torch.tensor([9, 5, 4, 1, 1])[router.table == e].sum()) for e in (0, 1)]
    [10, 10]
    """

    table: Tensor

    def __init__(self, n_experts: int, vocabulary: int, frequencies: Tensor | None = None, *,
                 generator: Generator | None = None) -> None:
        super().__init__()
        check_choice(n_experts, 1)
        checks.count(1, vocabulary=vocabulary)
        if frequencies is not None and frequencies.shape != (vocabulary,):
            raise ValueError(f"frequencies must be ({vocabulary},), one for each id of the "
                             f"vocabulary, got {tuple(frequencies.shape)}")
        self.n_experts = n_experts
        order = torch.randperm(vocabulary, generator=generator)
        table = torch.arange(vocabulary) % n_experts
        if frequencies is not None:
            order = order[frequencies.cpu()[order].argsort(descending=True, stable=True)]
            table = _evened(frequencies.cpu()[order].tolist(), n_experts)
        self.register_buffer("table", torch.empty_like(order).index_put((order,), table))
        self.fed: Tensor | None = None
        self._lent = Lent()

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Routing:
        """Return the routing of x (tokens, dim) with ids (tokens,)."""
        ids = token_ids if token_ids is not None else self._fed(x)
        if ids is None:
            raise ValueError("token_ids must be given, since a HashRouter chooses by them, got "
                             "none; pass them to the MixtureOfExperts, or call "
                             "feed_token_ids(network) once")
        ids = ids.reshape(-1)
        if len(ids) != len(x):
            raise ValueError(f"token_ids must hold one id for each of the {len(x)} vectors, got "
                             f"{len(ids)}; are they from another forward pass?")
        # An id outside is sent to no expert, which is found with the counts of the experts.
        inside = (ids >= 0) & (ids < len(self.table))
        experts = self.table[ids.clamp(0, len(self.table) - 1)].where(inside, -1)
        return Routing(experts[:, None], x.new_ones(len(x), 1))

    def _fed(self, x: Tensor) -> Tensor | None:
        """Return the ids that the network was called with when `x` was routed first."""
        if self.fed is None or not running_again():
            if self.fed is not None and (self.training or torch.is_grad_enabled()):
                self._lent.note(x, self.fed)
            return self.fed
        ids: Tensor | None = self._lent.find(x)
        if ids is None:
            raise ValueError("token_ids must be known when a pass runs again in the backward "
                             "pass, got vectors that none of the last passes routed; pass the "
                             "ids to the MixtureOfExperts in place of feed_token_ids")
        return ids


@method("companion", papers=["003-147"])
def feed_token_ids(network: nn.Module, source: str = "") -> RemovableHandle:
    """Let all hash routers of `network` see the ids that it is called with.

    Adds a hook to `network`, or to the module in it that is called `source`, which keeps the
    first argument of each forward pass for the routers: the network's own where it takes ids, the
    embedding's where it takes something else or where its parts are run one by one. Each router
    keeps the ids of its last 16 passes, so that any of them can run again in its backward pass.
    The handle that is returned removes the hook: `handle.remove()`.

    Raises:
        ValueError: `network` has no hash router, or no module is called `source`; when it is run,
            the first argument is not a tensor of whole numbers.

    Paper: Roller, Sukhbaatar, Szlam, Weston, 2021, Hash Layers For Large Sparse Models.

    >>> from netwright.blocks.experts import MixtureOfExperts
    >>> from netwright.models import gpt
    >>> network = gpt(96, context=16, feedforward=lambda dim, hidden: MixtureOfExperts(
    ...     dim, lambda: nn.Linear(dim, dim), HashRouter(4, 96), n_experts=4))
    >>> handle = feed_token_ids(network)
    >>> network(torch.zeros(2, 16, dtype=torch.long)).shape
    torch.Size([2, 16, 96])
    """
    routers = [module for module in network.modules() if isinstance(module, HashRouter)]
    if not routers:
        raise ValueError(f"network must have a HashRouter, got a {type(network).__name__} without "
                         "one; other routers need no token ids")
    named = dict(network.named_modules())
    if source not in named:
        raise ValueError(f"source must name a module of the network, got {source!r}; "
                         f"its modules are {', '.join([*named][1:9])}, ...")
    return named[source].register_forward_pre_hook(partial(_keep, routers), with_kwargs=True)


def _keep(routers: list[HashRouter], module: nn.Module, args: tuple[Any, ...],
          kwargs: dict[str, Any]) -> None:
    ids = next(iter([*args, *kwargs.values()]), None)
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        got = f"{ids.dtype} values" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        raise ValueError(f"the first argument of {type(module).__name__} must be token ids, got "
                         f"{got}; name the embedding as source=")
    for router in routers:
        router.fed = ids


def _evened(frequencies: list[float], n: int) -> Tensor:
    """Return an expert for each of the falling frequencies: the one that has least so far."""
    loads = [(0.0, 0, e) for e in range(n)]
    heapify(loads)
    found = []
    for frequency in frequencies:
        load, many, e = loads[0]
        heapreplace(loads, (load + frequency, many + 1, e))
        found.append(e)
    return torch.tensor(found)
