from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from netwright import checks
from netwright.blocks.experts.routing import Routing, check_choice, router_logits
from netwright.catalogue.facets import method
from netwright.runtime.distributed import summed

__all__ = ["LossFreeRouter"]


@method(
    "block",
    papers=["002-130"],
    place="router",
    takes=("dim", "n_experts"),
    search={"k": [1, 2], "bias_rate": (0.0001, 0.01)},
    variants={"plain": {}, "softmax": {"scores": "softmax"}},
)
class LossFreeRouter(nn.Module):
    """Send tokens to the experts with the best biased scores; the bias evens their load.

    s = sigmoid(W x);  experts = the k largest of s + b;  weights = s[experts];
    after each step of the optimizer: b_e := b_e + bias_rate sign(mean load - load of e)

    The bias only says who is chosen: it is in no weight, and nothing of it is in a gradient, so no
    balance loss bends what the router learns. The load is what was asked for, before any capacity,
    over all forward passes since the last step, so that adding up gradients makes one update of
    them; a pass that runs again (checkpointing, reversible stacks) counts once and finds the same
    bias. A step has been taken when a `torch.optim` optimizer that holds the router's weight says
    so, or where none ever did, when the weight has changed in place by the next pass. Call
    `update_bias()` yourself after each step where the weight is frozen.

    With `torch.distributed` the loads of all processes are added up before the bias moves. What was
    observed since the last step is in the `state_dict`.

    Args:
        dim: size of the last axis of x.
        n_experts: how many experts there are.
        k: how many of them a token uses.
        bias_rate: how far the bias goes in a step. The paper's is for some 10^5 steps.
        scores: `"sigmoid"` of each logit, or `"softmax"` over all.
        normalize: whether a token's weights are divided by their sum.
        generator: draws the weight; the global state without one.

    Shapes: x (tokens, dim); experts and weights (tokens, k); bias (n_experts,).

    Raises:
        ValueError: `k` is below 1 or above `n_experts`, or 1 with `normalize`, or `scores` is
            another word.

    Paper: Wang, Gao, Zhao, Sun, Dai, 2024, Auxiliary-Loss-Free Load Balancing Strategy for
    Mixture-of-Experts.

    >>> router = LossFreeRouter(16, n_experts=4, bias_rate=0.5)
    >>> router.observe(torch.tensor([5, 5, 0, 2]))
    >>> router.update_bias()
    >>> router.bias
    tensor([-0.5000, -0.5000,  0.5000,  0.5000])
    """

    moves: Tensor

    def __init__(self, dim: int, n_experts: int, k: int = 2, *, bias_rate: float = 1e-3,
                 scores: Literal["sigmoid", "softmax"] = "sigmoid", normalize: bool = False,
                 generator: Generator | None = None) -> None:
        super().__init__()
        checks.count(1, dim=dim)
        check_choice(n_experts, k)
        checks.one_of(["sigmoid", "softmax"], kind_of_scores=scores)
        checks.at_least(0, bias_rate=bias_rate)
        if normalize and k == 1:
            raise ValueError("normalize must be False with k=1, got True: the only weight would "
                             "always be 1, and the router would learn nothing")
        self.n_experts, self.k, self.bias_rate = n_experts, k, bias_rate
        self.scores, self.normalize = scores, normalize
        self.weight = nn.Parameter(torch.empty(n_experts, dim))
        nn.init.uniform_(self.weight, -dim ** -0.5, dim ** -0.5, generator=generator)
        # Whole numbers, which no change of the module's dtype rounds.
        self.register_buffer("moves", torch.zeros(n_experts, dtype=torch.long))
        # No buffer: those of process 0 would be given to all, and a pass must not lose its own.
        self.load = torch.zeros(n_experts, dtype=torch.long)
        self._seen: tuple[int, int] | None = None
        self._told = False  # whether an optimizer has ever said that it stepped
        _alive.add(self)

    @property
    def bias(self) -> Tensor:
        """What is added to the scores before the choice, (n_experts,)."""
        return self.bias_rate * self.moves

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Routing:
        """Return the routing of x (tokens, dim)."""
        if self.training and not torch.compiler.is_compiling():
            self._look_for_a_step()
        logits = router_logits(x, self.weight)
        scores = logits.sigmoid() if self.scores == "sigmoid" else logits.softmax(-1)
        experts = (scores.detach() + self.bias).topk(self.k).indices
        weights = scores.gather(1, experts)
        if self.normalize:
            weights = weights / weights.sum(1, keepdim=True)
        return Routing(experts, weights, logits)

    def observe(self, load: Tensor) -> None:
        """Count the tokens that each expert was asked for, (n_experts,)."""
        self.load = self.load.to(load.device) + load

    @torch.no_grad()
    def update_bias(self) -> None:
        """Move the bias towards the experts that have been given less than their share."""
        load = summed(self.load.to(self.moves.device))
        self.moves += (load.sum() - self.n_experts * load).sign()
        self.load = torch.zeros_like(load)

    def get_extra_state(self) -> Tensor:
        """Return what the `state_dict` holds of what was observed since the last step."""
        return self.load.clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Take what was observed from a `state_dict`."""
        self.load, self._seen = state.clone(), None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._seen = None
        _alive.add(self)

    def _look_for_a_step(self) -> None:
        now = id(self.weight), self.weight._version
        if (not self._told and self._seen is not None and self._seen[0] == now[0]
                and self._seen != now):
            self.update_bias()
        self._seen = now


_alive: WeakSet[LossFreeRouter] = WeakSet()


def _after_step(optimizer: Optimizer, args: Any, options: Any) -> None:
    """Move the biases of the routers whose weights have been stepped, in the optimizer's order."""
    routers = {id(router.weight): router for router in _alive if router.training}
    if not routers:
        return
    for p in [p for group in optimizer.param_groups for p in group["params"]]:
        if (router := routers.get(id(p))) is not None:
            router._told = True
            router.update_bias()


register_optimizer_step_post_hook(_after_step)
