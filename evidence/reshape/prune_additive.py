import random
from copy import deepcopy
from statistics import fmean

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from evidence.desk_models import calibration_text, char_gpt, desk_text, held_out_loss
from netwright.evidence import Outcome, Scale, evidence
from netwright.objectives.losses import normalized_distillation
from netwright.reshape import prune_additive
from netwright.reshape.pruning import sublayers, without_sublayers

WAYS = ("least summed cost", "every second sublayer", "random sublayers")


@evidence(paper="002-036",
          claim="The costs of leaving out sublayers one by one add up well enough to choose a set "
                "by their sum, which is better than a set made by hand or at random.")
def laptop_diff(scale: Scale) -> Outcome:
    """Prune a character model by summed costs, and train it on its teacher's features."""
    sets, steps, seeds = (60, 150, range(2)) if scale == "desk" else (300, 2000, range(5))
    model = char_gpt()
    x = calibration_text(16)
    names = sublayers(model, x)
    alone = {name: _cost(model, [name], x) for name in names}
    draw = random.Random(0)
    drawn = [draw.sample(names, draw.randint(2, len(names) // 2)) for _ in range(sets)]
    summed = [sum(alone[name] for name in chosen) for chosen in drawn]
    rank = float(spearmanr(summed, [_cost(model, chosen, x) for chosen in drawn]).statistic)

    chosen = list(prune_additive(  # type: ignore[arg-type]
        model, x, _half(model, names)).removed_sublayers)
    removed = {WAYS[0]: [chosen], WAYS[1]: [names[::2], names[1::2]],
               WAYS[2]: [draw.sample(names, len(chosen)) for _ in range(8)]}
    losses = {way: [held_out_loss(without_sublayers(model, x, each)) for each in sets_]
              for way, sets_ in removed.items()}
    pruned = without_sublayers(model, x, chosen)
    figures: dict[str, list[float]] = {
        "rank correlation of summed and joint costs": [rank],
        "loss, nothing removed (nats a character)": [held_out_loss(model)],
        **{f"loss, half removed, {way} (nats)": values for way, values in losses.items()}}
    for normalized in (True, False):
        way = "normalized" if normalized else "plain"
        figures[f"loss after distillation, {way} (nats)"] = [
            held_out_loss(_distilled(pruned, model, steps, seed, normalized)) for seed in seeds]

    # The margin: a rank correlation of 0.8, and a tenth of a nat below the mean of both controls.
    adds = rank >= 0.8
    beats = all(fmean(losses[way]) - losses[WAYS[0]][0] > 0.1 for way in WAYS[1:])
    return Outcome(
        verdict="shown" if adds and beats else "partly shown" if adds or beats else "not shown",
        setting={"model": "GPT of 12 sublayers, trained on tinyshakespeare by character",
                 "calibration": "16 windows of 128 characters", "sets": f"{sets} drawn, of 2 to 6 "
                 "sublayers", "distillation": f"{steps} steps of AdamW on the features after each "
                 "sublayer that stays and the outputs", "measured on": "256 held-out windows",
                 "margin": "rank correlation 0.8; 0.1 nats below both controls"},
        figures=figures,
        note="The paper prunes the U-Net of a diffusion model; here it is a language model, whose "
             "sublayers are of two sizes.")


@torch.no_grad()
def _cost(model: nn.Module, names: list[str], x: Tensor) -> float:
    moved = model(x) - without_sublayers(model, x[:1], names)(x)
    return float(moved.square().sum(-1).mean())


def _half(model: nn.Module, names: list[str]) -> float:
    """Return the share of parameters that half of the sublayers have."""
    total = sum(p.numel() for p in model.parameters())
    left = without_sublayers(model, desk_text().x_test[:1], names)
    return (total - sum(p.numel() for p in left.parameters())) / total / 2


def _distilled(pruned: nn.Module, teacher: nn.Module, steps: int, seed: int,
               normalized: bool) -> nn.Module:
    """Return the pruned model after training on what the teacher's blocks give."""
    student, data = deepcopy(pruned).train(), desk_text()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(student.parameters(), 5e-4)
    for _ in range(steps):
        x = data.x_train[torch.randint(len(data.x_train), (8,), generator=generator)]
        with torch.no_grad():
            theirs = _features(teacher, x)
        ours = _features(student, x)
        loss = normalized_distillation(ours, theirs) if normalized else sum(
            (s - t).square().flatten(1).sum(1).mean() for s, t in zip(ours, theirs, strict=True))
        loss = loss + cross_entropy(ours[-1].flatten(0, 1), theirs[-1].flatten(0, 1).softmax(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student.eval()


def _features(model: nn.Module, x: Tensor) -> list[Tensor]:
    features = []
    for block in model.children():
        x = block(x)
        features.append(x)
    return features
