from statistics import mean

import torch
from torch import Tensor, nn

from netwright.blocks.experts import MixtureOfExperts
from netwright.blocks.feedforward import FeedForward
from netwright.data import digits
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.reshape import mix_lora

TASKS, RANK, K, EXPERTS = 5, 4, 2, 8
WAYS = {"experts": (EXPERTS, RANK, K, 0.01), "experts, no balance loss": (EXPERTS, RANK, K, 0.0),
        "one adapter, as many active": (1, RANK * K, 1, 0.0),
        "one adapter, as many in all": (1, RANK * EXPERTS, 1, 0.0)}


@evidence(paper="003-187", claim="Low-rank experts on a frozen model learn several tasks better "
          "than one low-rank adapter of as many active parameters, with a balanced load.")
def mix_lora_tasks(scale: Scale) -> Outcome:
    """Teach a frozen network of digits five tasks that contradict each other."""
    seeds, steps = (3, 600) if scale == "desk" else (5, 5000)
    figures: dict[str, list[float]] = {}
    curves: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    split = digits()
    for seed in range(seeds):
        base = _base(split.x_train.flatten(1), split.y_train, seed)
        draw = torch.Generator().manual_seed(seed)
        labels = torch.stack([torch.randperm(10, generator=draw) for _ in range(TASKS)])
        for way, (n, rank, k, balance) in WAYS.items():
            tuned = mix_lora(base, torch.randn(2, 64 + TASKS), n_experts=n, rank=rank, k=k,
                             balance=balance, attention=False,
                             generator=torch.Generator().manual_seed(seed))
            curves[way].append(_tuned(tuned, split, labels, seed, steps))
            figures.setdefault(f"accuracy, mean of the tasks, {way} (%)", []).append(
                curves[way][-1][-1])
            figures.setdefault(f"parameters that learn, {way}", []).append(
                sum(p.numel() for p in tuned.parameters() if p.requires_grad))
            if n > 1:
                figures.setdefault(f"load of the busiest expert over the mean, {way}", []).append(
                    _busiest(tuned))

    def accuracy(way: str) -> list[float]:
        return figures[f"accuracy, mean of the tasks, {way} (%)"]

    better = all(a > b for a, b in zip(accuracy("experts"),
                                       accuracy("one adapter, as many active"), strict=True))
    loads = {way: figures[f"load of the busiest expert over the mean, {way}"]
             for way in ("experts", "experts, no balance loss")}
    even = max(loads["experts"]) < 2 and mean(loads["experts"]) < mean(
        loads["experts, no balance loss"])
    return Outcome(
        verdict="shown" if better and even else "partly shown" if better or even else "not shown",
        setting={"base": "digits of 8 x 8 pixels and 5 entries that name a task: a linear layer to "
                 "32, a residual feed-forward block of 64 hidden units, a linear layer; trained on "
                 "the digits' own labels with random task names, then frozen",
                 "tasks": "five; in each the labels are permuted at random", "experts":
                 f"{EXPERTS} of rank {RANK}, {K} for each sample", "one adapter":
                 f"rank {RANK * K}, or {RANK * EXPERTS}", "training":
                 f"{steps} steps of 128 samples with random tasks, Adam 3e-3, for all; 360 images "
                 "held out, each under every task"},
        figures=figures,
        note="Shown is a higher accuracy than that of one adapter with as many active parameters "
             "on every seed, and a busiest expert with less than twice the mean load on every "
             "seed, and less in the mean than without the balance loss; partly shown is one of the "
             "two.",
        curves={way: Curve([steps * (i + 1) / 6 for i in range(6)], lines)
                for way, lines in curves.items()},
        axes=("steps", "accuracy, mean of the tasks (%)"))


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.feedforward = nn.LayerNorm(32), FeedForward(32, 64)

    def forward(self, h: Tensor) -> Tensor:
        added: Tensor = h + self.feedforward(self.norm(h))
        return added


def _base(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64 + TASKS, 32), _Residual(), nn.LayerNorm(32),
                            nn.Linear(32, 10))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(300):
        rows, task = torch.randint(len(x), (128,)), torch.randint(TASKS, (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(_named(x[rows], task)), y[rows]).backward()
        optimizer.step()
    return network


def _named(x: Tensor, task: Tensor) -> Tensor:
    return torch.cat([x, nn.functional.one_hot(task, TASKS).to(x.dtype)], 1)


def _tuned(network: nn.Module, split: tuple[Tensor, ...], labels: Tensor, seed: int,
           steps: int) -> list[float]:
    """Train the adapters; return the mean accuracy (%) at six times."""
    x, y, x_test, y_test = split
    x, x_test = x.flatten(1), x_test.flatten(1)
    draws, found = torch.Generator().manual_seed(seed), []
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 3e-3)
    every = torch.arange(TASKS).repeat_interleave(len(x_test))
    held_out, truth = _named(x_test.repeat(TASKS, 1), every), labels[every, y_test.repeat(TASKS)]
    for step in range(1, steps + 1):
        rows = torch.randint(len(x), (128,), generator=draws)
        task = torch.randint(TASKS, (128,), generator=draws)
        optimizer.zero_grad()
        logits = network(_named(x[rows], task))
        nn.functional.cross_entropy(logits, labels[task, y[rows]]).backward()
        optimizer.step()
        if step % (steps // 6) == 0:
            network.eval()
            with torch.no_grad():
                found.append(100 * float((network(held_out).argmax(1) == truth).float().mean()))
            network.train()
    return found


def _busiest(network: nn.Module) -> float:
    """Return the largest load over the mean one, of the samples last seen."""
    (mixture,) = [m for m in network.modules() if isinstance(m, MixtureOfExperts)]
    load = mixture.usage.load.float()
    return float(load.max() / load.mean())
