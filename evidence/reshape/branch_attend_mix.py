import argparse
import inspect
import tarfile
import typing
from collections.abc import Iterator
from copy import deepcopy
from statistics import mean

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from evidence.small_models import held_out, parameters
from netwright.blocks.feedforward import FeedForward
from netwright.data import CHARACTERS, Split, characters, pydoc_text, tinyshakespeare
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.models.gpt import Embed
from netwright.objectives.losses import cross_entropy
from netwright.reshape import upcycle

CONTEXT, WIDTH, DEPTH = 48, 48, 2
WAYS = ("feed-forward and attention experts", "feed-forward experts", "copies of the seed",
        "mean of the specialists")


@evidence(paper="000-003", claim="Specialised copies of one model make a better mixture of experts "
          "where their attention layers become experts, too, not only their feed-forward layers.")
def branch_attend_mix(scale: Scale) -> Outcome:
    """Train three specialists from one seed, make one model of them, train it on."""
    seeds, steps = (3, 150) if scale == "desk" else (5, 3000)
    figures: dict[str, list[float]] = {}
    curves: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    domains = [_cut(text) for text in (tinyshakespeare(), pydoc_text(), _source())]
    mixed = Split(*(torch.cat(parts) for parts in zip(*domains, strict=True)))
    for seed in range(seeds):
        torch.manual_seed(seed)
        draws = torch.Generator().manual_seed(seed)
        base = _model()
        _train(base, mixed, steps, draws)
        specialists = [deepcopy(base) for _ in domains]
        for specialist, domain in zip(specialists, domains, strict=True):
            _train(specialist, domain, steps, draws)
        own = [held_out(s, d.x_test, d.y_test)[0]
               for s, d in zip(specialists, domains, strict=True)]
        figures.setdefault("loss of the specialists, each on its own domain (nats)", []).append(
            mean(own))
        x = mixed.x_test[:2]
        drawn = torch.Generator().manual_seed(seed)
        models = {
            WAYS[0]: upcycle(specialists, x, n_experts=3, attention=["attention"], generator=drawn),
            WAYS[1]: upcycle(specialists, x, n_experts=3, generator=drawn),
            WAYS[2]: upcycle(base, x, n_experts=3, noise=0.1, generator=drawn),
            WAYS[3]: _mean(specialists)}
        for way, model in models.items():
            losses = [held_out(model, mixed.x_test, mixed.y_test)[0]]
            again = torch.Generator().manual_seed(seed + 100)  # the same windows for all
            for _ in range(3):
                _train(model, mixed, steps // 3, again)
                losses.append(held_out(model, mixed.x_test, mixed.y_test)[0])
            curves[way].append(losses)
            figures.setdefault(f"loss of the mixed domains before training, {way} (nats)",
                               []).append(losses[0])
            figures.setdefault(f"loss of the mixed domains, {way} (nats)", []).append(losses[-1])
            figures.setdefault(f"parameters, {way}", []).append(parameters(model))

    def loss(way: str) -> list[float]:
        return figures[f"loss of the mixed domains, {way} (nats)"]

    below = {way: [a < b for a, b in zip(loss(WAYS[0]), loss(way), strict=True)]
             for way in WAYS[1:]}
    return Outcome(
        verdict="shown" if all(map(all, below.values())) else
        "partly shown" if mean(loss(WAYS[0])) < mean(loss(WAYS[1])) else "not shown",
        setting={"domains": "characters of tinyshakespeare, of Python's documentation and of three "
                 "modules of its library; the last tenth of each held out, 64 windows of it",
                 "model": f"a character model of width {WIDTH} with {DEPTH} layers and windows of "
                 f"{CONTEXT}", "training": f"the seed {steps} steps on all domains, each "
                 f"specialist {steps} on its own, then each mixture {steps} on all, in three "
                 "parts; 16 windows a step, Adam 2e-3 falling to 0 in each part", "experts":
                 "3, of which a token uses 2; attention experts weighed by a softmax"},
        figures=figures,
        note="Shown is a lower loss of the mixed domains, after equal steps on equal windows, than "
             "with feed-forward experts alone, with noisy copies of the seed as experts and with "
             "the specialists' mean, on every seed; partly shown is the first of these in the "
             "mean. Models differ in parameters and in time for a step: attention experts cost "
             "three attention layers.",
        curves={way: Curve([steps * i / 3 for i in range(4)], lines)
                for way, lines in curves.items()},
        axes=("steps on all domains", "loss of the mixed domains (nats)"))


def _source() -> str:
    return "\n".join(inspect.getsource(module) for module in (argparse, tarfile, typing))


def _cut(text: str) -> Split:
    split = characters(text[:300_000], context=CONTEXT)
    order = torch.randperm(len(split.x_test), generator=torch.Generator().manual_seed(0))[:64]
    return Split(split.x_train[:2500], split.y_train[:2500], split.x_test[order],
                 split.y_test[order])


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.query_key_value(h).unflatten(-1, (3, 4, WIDTH // 4)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention, self.feedforward = _Attention(), FeedForward(WIDTH, 4 * WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attention(self.norms[0](h))
        added: Tensor = h + self.feedforward(self.norms[1](h))
        return added


def _model() -> nn.Sequential:
    return nn.Sequential(Embed(len(CHARACTERS), CONTEXT, WIDTH), *(_Layer() for _ in range(DEPTH)),
                         nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(CHARACTERS)))


def _windows(data: Split, steps: int, draws: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(steps):
        rows = torch.randint(len(data.x_train), (16,), generator=draws)
        yield data.x_train[rows], data.y_train[rows]


def _train(model: nn.Module, data: Split, steps: int, draws: torch.Generator) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for x, y in _windows(data, steps, draws):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        falling.step()


@torch.no_grad()
def _mean(models: list[nn.Sequential]) -> nn.Module:
    mean_model = deepcopy(models[0])
    others = [dict(m.named_parameters()) for m in models]
    for name, parameter in mean_model.named_parameters():
        parameter.copy_(torch.stack([other[name] for other in others]).mean(0))
    return mean_model
