import random
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from netwright.data import characters, pydoc_text
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.objectives.losses import cross_entropy
from netwright.reshape import prune_sublayers
from netwright.reshape.pruning import sublayers, without_sublayers
from netwright.stages import call

SHARES = (0.125, 0.25, 0.375, 0.5)


@evidence(paper="000-012",
          claim="Removing a quarter of a language model's sublayers, each time the one that "
                "changes the output least, keeps 90 % of its performance without fine-tuning, "
                "and more than removing whole blocks does.")
def finercut(scale: Scale) -> Outcome:
    """Prune small Llamas that were trained on text, by sublayers, by blocks and at random."""
    depth, width, steps = (8, 72, 600) if scale == "desk" else (16, 144, 8000)
    seeds = range(3)
    text = characters(pydoc_text(), context=64)
    held_out = text.x_test[:256], text.y_test[:256]
    figures: dict[str, list[float]] = {}
    losses: dict[str, list[list[float]]] = {"least harmful sublayers": [],
                                            "least harmful blocks": [], "random sublayers": []}
    attention = []
    for seed in seeds:
        model = _trained(depth, width, steps, seed, text.x_train, text.y_train)
        drawn = torch.randperm(len(text.x_train), generator=torch.Generator().manual_seed(seed))
        calibration = text.x_train[drawn[:32]]
        names = sublayers(model, calibration)
        order = _removed(prune_sublayers(model, calibration, remove=depth))
        blocks = _blocks_in_order(model, calibration, names, rounds=depth // 2)
        draw = random.Random(seed)
        found = {"least harmful sublayers": [_quality(model, calibration, order, s, held_out)
                                             for s in SHARES],
                 "least harmful blocks": [_quality(model, calibration, blocks, s, held_out)
                                          for s in SHARES],
                 "random sublayers": [_average([
                     _quality(model, calibration, draw.sample(names, len(names)), s, held_out)
                     for _ in range(8)]) for s in SHARES]}
        whole = _measured(model, held_out)
        attention.append(fmean("self_attn" in name for name in order[:round(len(names) / 4)]))
        for way, values in found.items():
            losses[way].append([whole[0], *(loss for loss, _ in values)])
            figures.setdefault(f"accuracy kept, a quarter removed, {way} (%)", []).append(
                100 * values[1][1] / whole[1])
            figures.setdefault(f"loss, a quarter removed, {way} (nats a character)", []).append(
                values[1][0])
        figures.setdefault("loss, nothing removed (nats a character)", []).append(whole[0])
        figures.setdefault("accuracy, nothing removed (%)", []).append(100 * whole[1])
    figures["attention among the first quarter removed (%)"] = [100 * a for a in attention]

    kept = figures["accuracy kept, a quarter removed, least harmful sublayers (%)"]
    ours, theirs = (figures[f"loss, a quarter removed, least harmful {what} (nats a character)"]
                    for what in ("sublayers", "blocks"))
    keeps = fmean(kept) >= 90
    beats = all(a < b for a, b in zip(ours, theirs, strict=True))
    return Outcome(
        verdict="shown" if keeps and beats else "partly shown" if keeps or beats else "not shown",
        setting={"model": f"Llama of {depth} layers, width {width}, attention and feed-forward "
                          "network equal in size", "text": "pydoc_data.topics, by character, "
                 "windows of 64", "training": f"{steps} steps of Adam, batch 32",
                 "calibration": "32 windows of the training text, angular distance of the logits",
                 "measured on": "256 held-out windows", "random": "mean of 8 draws"},
        figures=figures,
        note="Attention and feed-forward network have as many weights as each other here, so that "
             "as many sublayers are as many weights whichever they are. The paper prunes Llama 3 "
             "of 8 and 70 billion weights and counts benchmark scores; performance here is the "
             "accuracy of the next character."
             f" It keeps {'at least' if keeps else 'less than'} 90 %, and "
             f"{'loses less than' if beats else 'does not always lose less than'} block removal.",
        curves={way: Curve([0, *(100 * share for share in SHARES)], values)
                for way, values in losses.items()},
        axes=("sublayers removed (%)", "held-out loss (nats a character)"))


def _trained(depth: int, width: int, steps: int, seed: int, x: Tensor, y: Tensor) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=96, hidden_size=width, intermediate_size=4 * width // 3, num_attention_heads=4,
        num_hidden_layers=depth, bos_token_id=None, eos_token_id=None, use_cache=False))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (32,))
        optimizer.zero_grad()
        cross_entropy(call(model, x[rows]), y[rows]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def _removed(model: Any) -> list[str]:
    return list(model.removed_sublayers)


def _blocks_in_order(model: nn.Module, x: Tensor, names: Sequence[str], rounds: int) -> list[str]:
    """Return the sublayers of whole blocks, the least harmful block first, chosen as they are."""
    pairs = [list(pair) for pair in zip(names[::2], names[1::2], strict=True)]
    gone: list[str] = []
    with torch.no_grad():
        outputs = call(model, x)
        for _ in range(rounds):
            def change(pair: list[str], gone: list[str] = gone) -> float:
                new = call(without_sublayers(model, x, gone + pair), x)
                cosine = nn.functional.cosine_similarity(outputs.double(), new.double(), dim=-1)
                return float(cosine.clamp(-1, 1).acos().mean())
            least = min(pairs, key=change)
            pairs.remove(least)
            gone = gone + least
    return gone


def _quality(model: nn.Module, x: Tensor, order: Sequence[str], share: float,
             held_out: tuple[Tensor, Tensor]) -> tuple[float, float]:
    total = len(sublayers(model, x))
    return _measured(without_sublayers(model, x, list(order[:round(share * total)])), held_out)


@torch.no_grad()
def _measured(model: nn.Module, held_out: tuple[Tensor, Tensor]) -> tuple[float, float]:
    x, y = held_out
    logits = call(model, x)
    return float(cross_entropy(logits, y)), float((logits.argmax(-1) == y).float().mean())


def _average(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    first, second = zip(*pairs, strict=True)
    return fmean(first), fmean(second)
