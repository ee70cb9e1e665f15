from collections.abc import Sequence
from functools import partial
from statistics import fmean

from torch import Tensor, nn

from evidence.small_models import parameters, text, train
from netwright.blocks.experts import MixtureOfExperts, TopKRouter
from netwright.blocks.feedforward import FeedForward
from netwright.data import CHARACTERS
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.measure import effective_params, fit_routed_scaling

WIDTHS, EXPERTS, SEEN = (16, 32, 64), (1, 2, 4, 8), 6


@evidence(paper="001-134", claim="A law bilinear in the logarithms of size and number of experts "
          "fits the loss of routed language models better than a separable one: experts lower the "
          "loss, and the less so, the larger the network.",
          shortfall=("scale",
                     "Up to 8 experts and 31,000 parameters, experts do not lower the loss at "
                     "all: width 16 goes from 2.66 to 2.65 nats, 32 from 2.42 to 2.46, 64 from "
                     "2.27 to 2.26, and a network with 8 experts is worth its own size. With "
                     "nothing to fit, both laws miss a network left out by 1.2 to 1.3 %. The "
                     "training is 200 steps; the paper has up to 512 experts, 1.3 billion "
                     "parameters an input and 130 billion tokens."))
def routed_scaling(scale: Scale) -> Outcome:
    """Train routed language models of characters over a grid of sizes and experts."""
    seeds, steps, widths = ((range(3), 200, WIDTHS) if scale == "desk" else
                            (range(5), 5000, (*WIDTHS, 128, 256)))
    data = text()
    sizes = {width: parameters(_Routed(width, 1)) for width in widths}
    cells = [(width, experts) for width in widths for experts in EXPERTS]
    n, e = [float(sizes[width]) for width, _ in cells], [float(experts) for _, experts in cells]
    found: dict[str, list[float]] = {}
    lines: dict[int, list[list[float]]] = {width: [] for width in widths}
    for seed in seeds:
        loss = [train(partial(_Routed, width, experts), data, seed,
                      steps=steps, looks=1).losses[-1] for width, experts in cells]
        for width in widths:
            lines[width].append([value for value, (w, _) in zip(loss, cells, strict=True)
                                 if w == width])
        law = fit_routed_scaling(n, e, loss)
        new = {"a, of log size": law.a, "b, of log experts": law.b,
               "c, of their product": law.c,
               "misfit, bilinear (%)": 100 * law.error,
               "misfit, separable (%)":
                   100 * fit_routed_scaling(n, e, loss, interaction=False).error,
               "misfit of a network left out, bilinear (%)": _left_out(n, e, loss, True),
               "misfit of a network left out, separable (%)": _left_out(n, e, loss, False),
               **{f"effective size of {size} parameters with {EXPERTS[-1]} experts":
                  effective_params(size, EXPERTS[-1], law) for size in sizes.values()}}
        for name, value in new.items():
            found.setdefault(name, []).append(value)
    bilinear, separable = (found[f"misfit of a network left out, {law} (%)"]
                           for law in ("bilinear", "separable"))
    better = fmean(bilinear) <= 0.9 * fmean(separable)
    helps = all(value < 0 for name in ("a, of log size", "b, of log experts")
                for value in found[name])
    fades = all(value > 0 for value in found["c, of their product"])
    held = better + helps + fades
    return Outcome(
        verdict="shown" if held == 3 else "partly shown" if held else "not shown",
        setting={"network": f"the last {SEEN} characters, embedded, through a linear layer of each "
                 "width and a residual feed-forward layer twice as wide, of which each character "
                 "uses one expert (top-1 of a softmax over all, balance loss 0.01)",
                 "grid": f"widths {widths}, so sizes {tuple(sizes.values())}, times {EXPERTS} "
                 "experts", "data": "tinyshakespeare; loss on 512 held-out windows of 64",
                 "training": f"{steps} steps of Adam, 16 windows, 3e-3 falling to 0, for all",
                 "holds if": "a network that was left out of the fit is missed by at most 0.9 of "
                 "what the separable law misses it by, a and b are negative and c positive with "
                 "every seed"},
        figures=found,
        note="The bilinear law holds the separable one, so that it is compared on networks left "
             f"out of the fit: it misses them by {fmean(bilinear):.2f} %, the separable one by "
             f"{fmean(separable):.2f} %. The paper's networks are transformers of up to 1.3 "
             "billion parameters an input with up to 512 experts, trained on 130 billion tokens, "
             "and three ways of routing; the saturation that it adds to the law needs more experts "
             "than these have.",
        curves={f"width {width}": Curve(EXPERTS, values) for width, values in lines.items()},
        axes=("experts", "held-out loss (nats a character)"))


def _left_out(n: Sequence[float], e: Sequence[float], loss: Sequence[float],
              interaction: bool) -> float:
    """Return the root mean square error (%) for networks that the fit has not seen."""
    errors = []
    for i in range(len(n)):
        rest = [[values[j] for j in range(len(n)) if j != i] for values in (n, e, loss)]
        law = fit_routed_scaling(rest[0], rest[1], rest[2], interaction=interaction)
        errors.append((law(n[i], e[i]) / loss[i] - 1) ** 2)
    return 100 * fmean(errors) ** 0.5


class _Routed(nn.Module):
    """Predicts each next character from the last few."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(CHARACTERS), 16)
        self.mix = nn.Linear(16 * SEEN, width)
        self.norm = nn.LayerNorm(width)

        def make() -> nn.Module:
            return FeedForward(width, 2 * width, activation="relu")

        self.experts = make() if experts == 1 else MixtureOfExperts(
            width, make, TopKRouter(width, experts, 1, softmax="all"), n_experts=experts)
        self.out = nn.Linear(width, len(CHARACTERS))

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, length, characters) of (batch, length)."""
        before = nn.functional.pad(self.embed(x), (0, 0, SEEN - 1, 0))
        h = self.mix(before.unfold(1, SEEN, 1).flatten(2)).relu()
        added: Tensor = self.experts(self.norm(h))
        return self.out(h + added)
