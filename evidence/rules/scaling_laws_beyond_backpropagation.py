import math
from collections.abc import Sequence

import torch
from torch import Tensor

from netwright.data import CHARACTERS, Split, characters, tinyshakespeare
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.measure import ScalingFit, cost, scaling_fit
from netwright.models import gpt
from netwright.objectives.losses import cross_entropy
from netwright.rules import Backprop, DirectFeedbackAlignment, Rule

Run = tuple[list[float], list[float]]  # steps, and the loss on the test part there

RULES = {"backpropagation": Backprop, "direct feedback alignment": DirectFeedbackAlignment}
WIDTHS, CONTEXT, BATCH, BLOCKS = (8, 16, 32, 64), 32, 16, 2
RATES = (1e-3, 3e-3, 1e-2)
FIRST = 50  # steps left out, in which the loss falls to that of single characters
BEYOND = 1000.0  # how many times the measured compute the fits are looked at


@evidence(paper="003-212", claim="Direct feedback alignment of transformers is at no compute "
          "budget worth its loss: its fitted loss against compute stays above backpropagation's.")
def scaling_laws_beyond_backpropagation(scale: Scale) -> Outcome:
    """Fit both rules' least loss against compute over four sizes of a character transformer."""
    steps, seeds = (1000, range(1, 4)) if scale == "desk" else (20_000, range(1, 6))
    text = characters(tinyshakespeare(), context=CONTEXT)
    half = len(text.x_test) // 2  # the last tenth of the text: half to tune on, half to test
    tuning = Split(*text[:2], text.x_test[:half][:200], text.y_test[:half][:200])
    split = Split(*text[:2], text.x_test[half:][:200], text.y_test[half:][:200])
    runs: dict[str, list[Run]] = {name: [] for name in RULES}
    free: list[Run] = []
    figures: dict[str, Sequence[float]] = {}
    rates = {}
    for name in RULES:
        for width in WIDTHS:
            tried = {rate: _train(name, tuning, width, rate, 0, 3 * steps // 10)[1][-1]
                     for rate in RATES}
            rate = rates[f"{name}, width {width}"] = min(tried, key=tried.__getitem__)
            step, forward = _flops(name, split, width)
            found = [_train(name, split, width, rate, seed, steps) for seed in seeds]
            runs[name] += [([step * s for s in at], losses) for at, losses in found]
            if name == "direct feedback alignment":
                free += [([forward * s for s in at], losses) for at, losses in found]
            figures[f"{name}, width {width}: loss at the end, nats a character"] = [
                losses[-1] for _, losses in found]
            figures[f"{name}, width {width}: GFLOP a step"] = [step / 1e9]
    exact, direct = (scaling_fit(found) for found in runs.values())
    bound = scaling_fit(free)
    for name, fit in (("backpropagation", exact), ("direct feedback alignment", direct),
                      ("direct feedback alignment, backward pass for nothing", bound)):
        low, high = fit.interval()
        figures |= {f"exponent, {name}": [fit.exponent], f"exponent, {name}, 2.5 %": [low],
                    f"exponent, {name}, 97.5 %": [high]}
    best_at, best = direct.envelope[-1]
    figures["compute of direct feedback alignment over backpropagation's at its least loss"] = [
        best_at / exact.compute_for(best)]
    above, even_free = _above(direct, exact), _above(bound, exact)
    crossings = {"as measured": direct.crossings(exact), "backward for nothing":
                 bound.crossings(exact)}
    return Outcome(
        verdict="shown" if above and even_free else "partly shown" if above else "not shown",
        setting={"data": "tinyshakespeare", "networks": f"transformers of {BLOCKS} blocks, widths "
                 f"{', '.join(map(str, WIDTHS))}, context {CONTEXT}, batch {BATCH}",
                 "steps": steps, "seeds": len(seeds), "optimizer": "Adam",
                 "learning rates tried, for each rule and width": list(RATES),
                 "rates chosen on another part of the text": rates,
                 "fit": f"loss = (C / C0)^-a of the least loss of any run with so much compute, "
                        f"from step {FIRST} on; confidence from 200 samples of the runs",
                 "compute": "FLOPs of a step of the rule times steps",
                 "above as measured": above, "above were the backward pass free": even_free,
                 "FLOPs at which the fits cross": {
                     key: [f"{place:.2g}" for place in places] or "nowhere"
                     for key, places in crossings.items()}},
        figures=figures,
        note="Above means that its fit is above backpropagation's from the least measured compute "
             f"to {BEYOND:.0f} times the greatest, and that its least loss is at each compute "
             "above backpropagation's. The sizes and budgets are far below the paper's, so nothing "
             "is said about large models but what the fits extrapolate. Feedback reaches blocks, "
             "which differentiate themselves exactly (the paper's macro feedback), so that a step "
             "costs about what backpropagation's does. Counted kindly, its backward pass is "
             "for nothing, as if a device did it aside.",
        curves=_curves(runs, exact, direct), axes=("FLOPs", "least loss, nats a character"))


def _train(name: str, split: Split, width: int, rate: float, seed: int, steps: int) -> Run:
    torch.manual_seed(seed)
    rule: Rule = RULES[name](gpt(len(CHARACTERS), CONTEXT, width=width, depth=BLOCKS),
                             split.x_train[:BATCH])
    optimizer = torch.optim.Adam(rule.parameters(), lr=rate)
    places = sorted({round(FIRST * (steps / FIRST) ** (i / 19)) for i in range(20)})
    losses = []
    for step in range(1, steps + 1):
        batch = torch.randint(len(split.x_train), (BATCH,))
        optimizer.zero_grad()
        rule(split.x_train[batch], split.y_train[batch])
        optimizer.step()
        if step in places:
            losses.append(_loss(rule.predict(split.x_test), split.y_test))
    return [float(place) for place in places], losses


def _loss(scores: Tensor, y: Tensor) -> float:
    return float(cross_entropy(scores, y))


def _flops(name: str, split: Split, width: int) -> tuple[int, int]:
    """Return the FLOPs of a step, and of its forward pass alone."""
    x, y = split.x_train[:BATCH], split.y_train[:BATCH]
    rule = RULES[name](gpt(len(CHARACTERS), CONTEXT, width=width, depth=BLOCKS), x)
    return (cost(rule, (x, y), repeats=1, warmup=0).flops,
            cost(rule.network, (x, None), repeats=1, warmup=0).flops)


def _above(direct: ScalingFit, exact: ScalingFit) -> bool:
    """Return whether the fit and the measured envelope of `direct` lie above those of `exact`."""
    (low, _), (high, _) = exact.envelope[0], exact.envelope[-1]
    places = [low * (BEYOND * high / low) ** (i / 200) for i in range(201)]
    measured = [place for place in places if place <= high]
    return all(direct(place) > exact(place) for place in places) and all(
        _least(direct.envelope, place) >= _least(exact.envelope, place) for place in measured)


def _least(points: Sequence[tuple[float, float]], compute: float) -> float:
    return min((loss for place, loss in points if place <= compute), default=math.inf)


def _curves(runs: dict[str, list[Run]], exact: ScalingFit, direct: ScalingFit) -> dict[str, Curve]:
    start = max(fit.envelope[0][0] for fit in (exact, direct))
    end = max(fit.envelope[-1][0] for fit in (exact, direct))
    count = int(math.log2(end / start)) + 1
    places = [end / 2 ** i for i in reversed(range(count))]
    curves = {}
    for (name, found), fit in zip(runs.items(), (exact, direct), strict=True):
        seeds = len(found) // len(WIDTHS)
        curves[name] = Curve(places, [
            [min(_least(list(zip(*run, strict=True)), place) for run in found[seed::seeds])
             for place in places] for seed in range(seeds)])
        curves[f"fit of {name}"] = Curve(places, [[fit(place) for place in places]])
    return curves
