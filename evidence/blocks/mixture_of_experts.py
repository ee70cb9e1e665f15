from collections.abc import Callable
from statistics import mean

from torch import nn

from evidence.small_models import language_model, parameters, text, train
from netwright.blocks.experts import MixtureOfExperts
from netwright.blocks.feedforward import GLU
from netwright.evidence import Curve, Outcome, Scale, evidence

HIDDEN, N, K = 64, 8, 2
MARGIN = 0.01  # nats


@evidence(paper="003-001", claim="Two of eight experts for each token give a lower loss than a "
          "dense feed-forward layer with as many active parameters.")
def mixture_of_experts(scale: Scale) -> Outcome:
    """Train a character model with experts, and with dense layers of two sizes."""
    seeds, steps, depth = (3, 200, 2) if scale == "desk" else (5, 5000, 4)
    make: dict[str, Callable[[int, int], nn.Module]] = {
        "two of eight experts": lambda dim, hidden: MixtureOfExperts(
            dim, lambda: GLU(dim, HIDDEN), n_experts=N, k=K),
        "dense, as many active": lambda dim, hidden: GLU(dim, K * HIDDEN),
        "dense, as many in all": lambda dim, hidden: GLU(dim, N * HIDDEN)}
    figures: dict[str, list[float]] = {}
    curves = {}
    for way, feedforward in make.items():
        runs = [train(lambda make=feedforward: language_model(  # type: ignore[misc]
            depth=depth, feedforward=make), text(), seed, steps=steps) for seed in range(seeds)]
        figures[f"held-out loss, {way} (nats)"] = [run.losses[-1] for run in runs]
        figures[f"parameters, {way}"] = [parameters(runs[0].network)]
        curves[way] = Curve(runs[0].steps, [run.losses for run in runs])
        if way == "two of eight experts":
            loads = [max(float(m.usage.load.max() / m.usage.load.float().mean())
                         for m in run.network.modules() if isinstance(m, MixtureOfExperts))
                     for run in runs]
            figures["largest load over the mean load"] = loads
    losses = {way: figures[f"held-out loss, {way} (nats)"] for way in make}
    experts, active, whole = losses.values()
    lower = [a < b for a, b in zip(experts, active, strict=True)]
    return Outcome(
        verdict="shown" if all(lower) and mean(active) - mean(experts) > MARGIN else
        "partly shown" if mean(experts) < mean(active) else "not shown",
        setting={"data": "tinyshakespeare, characters, context 64",
                 "model": f"width 48, {depth} blocks, every feed-forward layer a SwiGLU or experts",
                 "training": f"{steps} steps of 16 windows, Adam 3e-3 falling to 0",
                 "experts": f"{N} SwiGLUs of hidden {HIDDEN}, {K} a token, balance loss 0.01",
                 "dense": f"hidden {K * HIDDEN} (as many active), {N * HIDDEN} (as many in all)"},
        figures=figures, curves=curves, axes=("step", "held-out loss (nats)"),
        note=f"Shown is a loss below that of the dense layer of equal active parameters under "
             f"every seed and by more than {MARGIN} nats on average. No rate was tuned for either. "
             f"The dense layer with all the experts' parameters, which costs four times the "
             f"products, has {mean(whole):.3f} nats.")
