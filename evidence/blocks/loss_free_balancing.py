from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from evidence.small_models import language_model, text, train
from netwright.blocks.experts import LossFreeRouter, MixtureOfExperts, Routing
from netwright.blocks.feedforward import GLU
from netwright.evidence import Curve, Outcome, Scale, evidence

HIDDEN, N, K = 64, 8, 2
STRENGTHS = (0.001, 0.01)  # the paper's, and the Switch Transformer's
SLACK = 0.01  # nats


class WithProbabilities(nn.Module):
    """A router without its bias, whose balance a loss keeps."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.router = LossFreeRouter(dim, N, K, bias_rate=0.0)

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Routing:
        """Return the routing with each token's scores as shares."""
        routing: Routing = self.router(x)
        assert routing.logits is not None
        scores = routing.logits.sigmoid()
        return routing._replace(probabilities=scores / scores.sum(1, keepdim=True))


@evidence(paper="002-130", claim="A bias on the routing scores, moved against the load, gives a "
          "more even load than a balance loss, at no higher loss.")
def loss_free_balancing(scale: Scale) -> Outcome:
    """Train a character model with experts balanced by a bias and by losses of two strengths."""
    seeds, steps, depth, rate = (3, 200, 2, 0.01) if scale == "desk" else (5, 5000, 4, 0.001)

    def make(strength: float | None) -> Any:
        def feedforward(dim: int, hidden: int) -> nn.Module:
            router = (LossFreeRouter(dim, N, K, bias_rate=rate) if strength is None
                      else WithProbabilities(dim))
            return MixtureOfExperts(dim, lambda: GLU(dim, HIDDEN), router, n_experts=N,
                                    balance=strength or 0.0)
        return lambda: language_model(depth=depth, feedforward=feedforward)
    ways: dict[str, float | None] = {
        "bias": None, **{f"balance loss, {strength}": strength for strength in STRENGTHS}}
    losses, violations, curves = {}, {}, {}
    for way, strength in ways.items():
        runs = [train(make(strength), text(), seed, steps=steps) for seed in range(seeds)]
        losses[way] = [run.losses[-1] for run in runs]
        violations[way] = [_violation(run.network, text().x_test) for run in runs]
        curves[way] = Curve(runs[0].steps, [run.losses for run in runs])
    others = [way for way in ways if way != "bias"]
    evener = [mean(violations["bias"]) < mean(violations[way]) for way in others]
    better = [mean(losses["bias"]) <= mean(losses[way]) + SLACK for way in others]
    return Outcome(
        verdict="shown" if all(evener) and all(better) else
        "partly shown" if any(a and b for a, b in zip(evener, better, strict=True))
        else "not shown",
        setting={"data": "tinyshakespeare, characters, context 64",
                 "model": f"width 48, {depth} blocks, {N} SwiGLUs of hidden {HIDDEN} in each, {K} "
                 "a token, sigmoid scores",
                 "training": f"{steps} steps of 16 windows, Adam 3e-3 falling to 0",
                 "bias": f"rate {rate}", "balance losses": f"{STRENGTHS}"},
        figures={**{f"held-out loss, {way} (nats)": losses[way] for way in ways},
                 **{f"largest load over the mean, less 1, {way}": violations[way] for way in ways}},
        curves=curves, axes=("step", "held-out loss (nats)"),
        note="The load is that of all held-out windows, the mean over layers of (largest load / "
             f"mean load - 1). Shown is a more even load than with either strength of the loss, at "
             f"a held-out loss at most {SLACK} nats above; partly shown, both against one of them. "
             "The paper's rate of 0.001 is for 10^5 steps; 200 would move the bias by 0.2 at most, "
             "wherefore it is 0.01 here, which was set before the run and not tuned.")


@torch.no_grad()
def _violation(network: nn.Module, x: Tensor) -> float:
    """Return the mean over layers of the largest load over the mean load, less 1."""
    network.eval()
    layers = [m for m in network.modules() if isinstance(m, MixtureOfExperts)]
    loads = torch.zeros(len(layers), N)
    for part in x.split(128):
        network(part)
        loads += torch.stack([layer.usage.load for layer in layers])
    return float((loads.amax(1) / loads.mean(1) - 1).mean())
