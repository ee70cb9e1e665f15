from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.blocks.experts.mixture import MixtureOfExperts
from netwright.blocks.experts.routing import Routing, check_choice, router_logits
from netwright.catalogue.facets import method
from netwright.errors import CannotReverse
from netwright.runtime.passes import Lent, running_again

__all__ = ["ConstantExpert", "CopyExpert", "PathwayRouter", "ZeroExpert", "link_gates",
           "moe_plus_plus"]


@method("block", place="experts", saves=["training time", "inference time"])
class ZeroExpert(nn.Module):
    """Return zeros: the token is left as it is by a residual network's block.

    y = 0

    Shapes: x and y (*, dim).

    Paper: Jin, Zhu, Yuan, Yan, 2024, MoE++: Accelerating Mixture-of-Experts Methods with
    Zero-Computation Experts.

    >>> ZeroExpert()(torch.ones(1, 2))
    tensor([[0., 0.]])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros like x."""
        return torch.zeros_like(x)


@method("block", place="experts", saves=["training time", "inference time"])
class CopyExpert(nn.Module):
    """Return the token itself.

    y = x

    Shapes: x and y (*, dim).

    Paper: Jin, Zhu, Yuan, Yan, 2024, MoE++: Accelerating Mixture-of-Experts Methods with
    Zero-Computation Experts.

    >>> CopyExpert()(torch.ones(1, 2))
    tensor([[1., 1.]])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        return x


@method(
    "block",
    papers=["000-010"],
    place="experts",
    takes=("dim",),
    saves=["training time", "inference time"],
)
class ConstantExpert(nn.Module):
    """Replace the token by a learnt vector, in part.

    y = a_1 x + a_2 v;  a = softmax(W x)

    Args:
        dim: size of the last axis of x.
        generator: draws v and W; the global state without one.

    Shapes: x and y (*, dim); v (dim,); W (2, dim).

    Paper: Jin, Zhu, Yuan, Yan, 2024, MoE++: Accelerating Mixture-of-Experts Methods with
    Zero-Computation Experts.

    >>> ConstantExpert(4)(torch.ones(2, 4)).shape
    torch.Size([2, 4])
    """

    def __init__(self, dim: int, *, generator: Generator | None = None) -> None:
        super().__init__()
        checks.count(1, dim=dim)
        self.constant = nn.Parameter(torch.empty(dim))
        self.weight = nn.Parameter(torch.empty(2, dim))
        for parameter in (self.constant, self.weight):
            nn.init.uniform_(parameter, -dim ** -0.5, dim ** -0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, dim) of (*, dim)."""
        shares = nn.functional.linear(x, self.weight).softmax(-1)
        return shares[..., :1] * x + shares[..., 1:] * self.constant


@method(
    "block",
    papers=["000-010"],
    place="router",
    takes=("dim", "n_experts"),
    search={"k": [1, 2]},
)
class PathwayRouter(nn.Module):
    """A top-k router that also reads the logits of the layer before: gating residuals.

    l_j = W_j x_j + V_j l_{j-1};  experts = the k largest of l_j;  weights = softmax(l_j)[experts]

    Without a layer before, or as long as V is the zeros it begins with, it is the `TopKRouter`
    with its softmax over all. The layers are linked by `link_gates(network)`. A router keeps the
    logits of its last pass, and with them, until the next, what they were made of. The link is no
    argument of the layer, so that its gradient would be lost where the layer before runs without
    a graph and again later: in reversible stacks, under `rules.Reversible` and reentrant
    checkpoints. There it is refused; checkpoints with `use_reentrant=False` are right.

    Args:
        dim: size of the last axis of x.
        n_experts: how many experts there are.
        k: how many of them a token uses.
        generator: draws W; the global state without one.

    Shapes: x (tokens, dim); l (tokens, n_experts); experts and weights (tokens, k).

    Raises:
        ValueError: `k` is below 1 or above `n_experts`, or the layer before has not seen the same
            tokens.
        CannotReverse: the gradient along a link would be lost.

    Paper: Jin, Zhu, Yuan, Yan, 2024, MoE++: Accelerating Mixture-of-Experts Methods with
    Zero-Computation Experts.

    >>> PathwayRouter(16, n_experts=8)(torch.zeros(5, 16)).experts.shape
    torch.Size([5, 2])
    """

    residual: nn.Parameter | None

    def __init__(self, dim: int, n_experts: int, k: int = 2, *,
                 generator: Generator | None = None) -> None:
        super().__init__()
        checks.count(1, dim=dim)
        check_choice(n_experts, k)
        self.n_experts, self.k = n_experts, k
        self.weight = nn.Parameter(torch.empty(n_experts, dim))
        nn.init.uniform_(self.weight, -dim ** -0.5, dim ** -0.5, generator=generator)
        self.register_parameter("residual", None)
        self._before: tuple[PathwayRouter, ...] = ()  # in a tuple, it is not a part of this module
        self._logits: Tensor | None = None
        self._lent = Lent()

    def follow(self, before: "PathwayRouter") -> None:
        """Read the logits of `before`, the router of the layer before, from now on."""
        self._before = (before,)
        if self.residual is None:
            self.residual = nn.Parameter(self.weight.new_zeros(self.n_experts, before.n_experts))

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Routing:
        """Return the routing of x (tokens, dim)."""
        logits = router_logits(x, self.weight)
        if self._before and self.residual is not None:
            logits = logits + router_logits(self._linked(x), self.residual)
        self._logits = logits
        probabilities = logits.softmax(-1)
        weights, experts = probabilities.topk(self.k)
        return Routing(experts, weights, logits, probabilities)

    def _linked(self, x: Tensor) -> Tensor:
        """Return the logits of the layer before, those of the first time if this runs again."""
        (before,) = self._before
        if running_again():
            seen = self._lent.find(x)
            learnt = seen is not None and seen.requires_grad
        else:
            seen = before._logits
            learnt = seen is not None and seen.requires_grad
            if seen is not None:
                # Cut off, since its graph is in the way of nothing then and need not live on.
                self._lent.note(x, seen.detach().requires_grad_(learnt))
        if seen is None or len(seen) != len(x):
            raise ValueError(f"the layer before must have seen the same {len(x)} tokens, got "
                             f"{0 if seen is None else len(seen)}; run the whole network")
        if torch.is_grad_enabled() and before.weight.requires_grad and not learnt:
            raise CannotReverse("the logits of the layer before must have a graph, got some of a "
                                "pass without one, so that their gradient would be lost; run the "
                                "linked layers outside of reversible stacks, rules.Reversible and "
                                "reentrant checkpoints (use_reentrant=False is right), or do not "
                                "call link_gates")
        return cast(Tensor, seen)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has had no pass, and what is inside a graph cannot be copied.
        return {**self.__dict__, "_logits": None, "_lent": Lent()}


@method("companion", papers=["000-010"])
def link_gates(network: nn.Module) -> nn.Module:
    """Let each `PathwayRouter` of `network` read the one before it, in their order; return it.

    Adds a matrix of (n_experts, n_experts before) to each but the first: call it before you make
    the optimizer.

    Raises:
        ValueError: there are fewer than two.

    Paper: Jin, Zhu, Yuan, Yan, 2024, MoE++: Accelerating Mixture-of-Experts Methods with
    Zero-Computation Experts.

    >>> layers = [moe_plus_plus(8, lambda: nn.Linear(8, 8), 4) for _ in range(3)]
    >>> link_gates(nn.Sequential(*layers))(torch.randn(5, 8)).shape
    torch.Size([5, 8])
    """
    routers = [module for module in network.modules() if isinstance(module, PathwayRouter)]
    if len(routers) < 2:
        raise ValueError(f"network must have at least two PathwayRouters, got {len(routers)}; "
                         "moe_plus_plus makes layers with one")
    for before, router in pairwise(routers):
        router.follow(before)
    return network


@method(
    "block",
    papers=["000-010"],
    place="feedforward",
    takes=("dim",),
    saves=["training time", "inference time"],
    search={"share": [0.5, 0.75], "k": [1, 2]},
    variants={"plain": {"experts": lambda: nn.Linear(8, 8), "n_experts": 4}},
)
def moe_plus_plus(dim: int, experts: Sequence[nn.Module] | Callable[[], nn.Module],
                  n_experts: int | None = None, *, zero: int = 1, copy: int = 1, constant: int = 2,
                  k: int = 2, share: float = 0.75, capacity: float | None = None,
                  balance: float = 0.01, generator: Generator | None = None) -> MixtureOfExperts:
    """Return a mixture in which some experts cost nothing: zeros, copies and constants.

    The balance loss is balance n (share sum_free f_e p_e + sum_others f_e p_e), with a share below
    1 for the free experts, so that they are given more tokens than the others. In place of a fixed
    number of products a token has as many as it chooses: easy tokens fewer, hard ones more.

    Args:
        dim: size of the last axis of x.
        experts: modules (rows, dim) -> (rows, dim), or a function that makes one.
        n_experts: how many it makes.
        zero: how many experts return zeros.
        copy: how many return the token.
        constant: how many replace it by a vector.
        k: how many experts a token uses.
        share: what the balance loss of free experts is multiplied by.
        capacity: as for `MixtureOfExperts`.
        balance: strength of the balance loss.
        generator: draws the router and the constants; the global state without one.

    Shapes: x and y (*, dim).

    Raises:
        ValueError: a number is out of range.

    Paper: Jin, Zhu, Yuan, Yan, 2024, MoE++: Accelerating Mixture-of-Experts Methods with
    Zero-Computation Experts.

    >>> moe = moe_plus_plus(8, lambda: nn.Linear(8, 8), n_experts=4)
    >>> moe(torch.randn(2, 5, 8)).shape, moe.n_experts
    (torch.Size([2, 5, 8]), 8)
    """
    checks.count(0, zero=zero, copy=copy, constant=constant)
    checks.above(0, share=share)
    if callable(experts):
        if n_experts is None or n_experts < 1:
            raise ValueError(f"n_experts must be at least 1 where experts is a function, got "
                             f"{n_experts}")
        experts = [experts() for _ in range(n_experts)]
    elif n_experts not in (None, len(experts)):
        raise ValueError(f"n_experts must be the number of experts, {len(experts)}, got "
                         f"{n_experts}; leave it out")
    free = [*(ZeroExpert() for _ in range(zero)), *(CopyExpert() for _ in range(copy)),
            *(ConstantExpert(dim, generator=generator) for _ in range(constant))]
    n = len(experts) + len(free)
    return MixtureOfExperts(
        dim, [*experts, *free], PathwayRouter(dim, n, k, generator=generator), capacity=capacity,
        balance=[balance] * len(experts) + [balance * share] * len(free))
