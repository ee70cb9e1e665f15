from collections.abc import Callable
from statistics import mean

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from evidence.small_models import language_model, text, train
from netwright.blocks import experts
from netwright.blocks.experts import MixtureOfExperts, TopKRouter, link_gates
from netwright.blocks.feedforward import GLU
from netwright.evidence import Curve, Outcome, Scale, evidence

HIDDEN, N, K = 64, 8, 2
SLACK, FEWER = 0.01, 0.9  # nats; the share of the vanilla mixture's calls
WAYS = ("MoE++", "vanilla")


@evidence(paper="000-010", claim="With zero, copy and constant experts beside the others a model "
          "is no worse, calls fewer feed-forward experts, and easy tokens choose the free ones.")
def moe_plus_plus(scale: Scale) -> Outcome:
    """Train a character model with free experts and one without, and count what tokens use."""
    seeds, steps, depth = (3, 300, 2) if scale == "desk" else (5, 5000, 4)

    def vanilla(dim: int, hidden: int) -> nn.Module:
        return MixtureOfExperts(dim, lambda: GLU(dim, HIDDEN), n_experts=N,
                                router=TopKRouter(dim, N, K, softmax="all"))

    def free(dim: int, hidden: int) -> nn.Module:
        return experts.moe_plus_plus(dim, lambda: GLU(dim, HIDDEN), N, k=K)
    make: dict[str, Callable[[], nn.Module]] = {
        "MoE++": lambda: link_gates(language_model(depth=depth, feedforward=free)),
        "vanilla": lambda: language_model(depth=depth, feedforward=vanilla)}
    losses, calls, curves = {}, {}, {}
    easy, hard = [], []
    for way in WAYS:
        runs = [train(make[way], text(), seed, steps=steps) for seed in range(seeds)]
        losses[way] = [run.losses[-1] for run in runs]
        curves[way] = Curve(runs[0].steps, [run.losses for run in runs])
        used = [_used(run.network, text().x_test[:256], text().y_test[:256]) for run in runs]
        calls[way] = [float(each.mean()) for _, each in used]
        if way == "MoE++":
            for loss, each in used:
                order = loss.argsort()
                third = len(order) // 3
                easy.append(float(each[order[:third]].mean()))
                hard.append(float(each[order[-third:]].mean()))
    level = mean(losses["MoE++"]) <= mean(losses["vanilla"]) + SLACK
    fewer = mean(calls["MoE++"]) <= FEWER * mean(calls["vanilla"])
    cheap = all(a < b for a, b in zip(easy, hard, strict=True))
    return Outcome(
        verdict="shown" if level and fewer and cheap else
        "partly shown" if level and fewer else "not shown",
        setting={"data": "tinyshakespeare, characters, context 64",
                 "model": f"width 48, {depth} blocks, {N} SwiGLUs of hidden {HIDDEN} in each, {K} "
                 "experts a token, softmax over all, balance loss 0.01",
                 "MoE++": "beside them one zero, one copy and two constant experts, share 0.75, "
                 "gates linked", "training": f"{steps} steps of 16 windows, Adam 3e-3 falling to 0",
                 "calls": "feed-forward experts a token and layer, 256 held-out windows"},
        figures={**{f"held-out loss, {way} (nats)": losses[way] for way in WAYS},
                 **{f"calls a token and layer, {way}": calls[way] for way in WAYS},
                 "calls, MoE++, the third of the tokens with the lowest loss": easy,
                 "calls, MoE++, the third of the tokens with the highest loss": hard},
        curves=curves, axes=("step", "held-out loss (nats)"),
        note=f"Shown is a loss at most {SLACK} nats above the vanilla mixture's, at most {FEWER} "
             "of its calls, and fewer calls for the tokens of low loss than for those of high loss "
             "under every seed; partly shown, the first two.")


@torch.no_grad()
def _used(network: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's loss, and how many feed-forward experts a layer it called."""
    network.eval()
    found: list[Tensor] = []
    routers = [m.router for m in network.modules() if isinstance(m, MixtureOfExperts)]
    handles = [router.register_forward_hook(
        lambda module, given, routing: found.append((routing.experts < N).float().sum(1)))
        for router in routers]
    logits = network(x)
    for handle in handles:
        handle.remove()
    loss = cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
    return loss, torch.stack(found).mean(0)
