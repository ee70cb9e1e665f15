from functools import partial
from statistics import mean

from torch import nn

from evidence.small_models import language_model, parameters, text, train, width_for
from netwright.blocks.feedforward import GLU, FeedForward
from netwright.evidence import Curve, Outcome, Scale, evidence

WIDTH, BLOCKS = 32, 2
GATED = {"GLU": "sigmoid", "bilinear": "identity", "ReGLU": "relu", "GEGLU": "gelu",
         "SwiGLU": "silu"}
PLAIN = {"ReLU": "relu", "GELU": "gelu"}


@evidence(paper="003-047", claim="GEGLU and SwiGLU feed-forward blocks give a lower loss than "
          "plain ones with a ReLU or a GELU, at equal parameters.")
def glu_variants(scale: Scale) -> Outcome:
    """Train a character model with each variant, and with plain blocks, under the same seeds."""
    seeds, steps = (3, 600) if scale == "desk" else (5, 5000)
    data = text(context=32)
    size = parameters(_model(PLAIN, "GELU", 4 * WIDTH))
    hidden = width_for(size, partial(_model, GATED, "SwiGLU"), range(WIDTH, 4 * WIDTH))
    figures: dict[str, list[float]] = {}
    curves = {}
    for kind, units in ((PLAIN, 4 * WIDTH), (GATED, hidden)):
        for name in kind:
            runs = [train(partial(_model, kind, name, units), data, seed, steps=steps)
                    for seed in range(seeds)]
            figures[f"held-out loss, {name} (nats)"] = [run.losses[-1] for run in runs]
            curves[name] = Curve(runs[0].steps, [run.losses for run in runs])
    losses = {name: figures[f"held-out loss, {name} (nats)"] for name in (*PLAIN, *GATED)}
    control = min(PLAIN, key=lambda name: mean(losses[name]))
    below = {name: all(a < b for a, b in zip(losses[name], losses[control], strict=True))
             for name in GATED}
    figures["parameters, plain"] = [size]
    figures["parameters, gated"] = [parameters(_model(GATED, "SwiGLU", hidden))]
    return Outcome(
        verdict="shown" if below["GEGLU"] and below["SwiGLU"] else
        "partly shown" if any(below.values()) else "not shown",
        setting={"data": "tinyshakespeare in windows of 32 characters, 512 of its last tenth held "
                 "out", "training": f"{steps} steps of 16 windows, Adam 3e-3 falling to 0, no "
                 "tuning", "model": f"{BLOCKS} transformer blocks of width {WIDTH}",
                 "hidden": f"{4 * WIDTH} plain, {hidden} gated; all with biases"},
        figures=figures,
        note="Shown is: GEGLU and SwiGLU are below the better of the two plain blocks on every "
             "seed; partly shown, any gated block is. The paper pre-trains an encoder and decoder "
             "of 220 million parameters; this model is small and its training short.",
        curves=curves, axes=("step", "held-out loss (nats)"))


def _model(kind: dict[str, str], name: str, hidden: int) -> nn.Module:
    make = FeedForward if kind is PLAIN else GLU
    return language_model(WIDTH, BLOCKS, context=32, feedforward=lambda dim, _: make(
        dim, hidden, activation=kind[name], bias=True))  # type: ignore[arg-type]
