from functools import partial

import torch
from torch import Tensor, nn

from netwright.blocks.experts import MixtureOfExperts
from netwright.blocks.feedforward import FeedForward
from netwright.data import Batches, Split, digits
from netwright.evidence import (
    Outcome,
    Scale,
    every,
    evidence,
    figure,
    held_out_accuracy,
    most,
    train,
)
from netwright.reshape import mix_lora
from netwright.rules import Rule
from netwright.training import fit

TASKS, RANK, K, EXPERTS = 5, 4, 2, 8
WAYS = {"experts": (EXPERTS, RANK, K, 0.01), "experts, no balance loss": (EXPERTS, RANK, K, 0.0),
        "one adapter, as many active": (1, RANK * K, 1, 0.0),
        "one adapter, as many in all": (1, RANK * EXPERTS, 1, 0.0)}
ACCURACY = "accuracy, mean of the tasks, {} (%)"
LOAD = "load of the busiest expert over the mean, {}"


@evidence(paper="003-187", claim="Low-rank experts on a frozen model learn several tasks better "
          "than one low-rank adapter of as many active parameters, with a balanced load.",
          shown=[every(figure(ACCURACY.format("experts"))
                       > figure(ACCURACY.format("one adapter, as many active"))),
                 (most(LOAD.format("experts")) < 2)
                 & (figure(LOAD.format("experts"))
                    < figure(LOAD.format("experts, no balance loss")))],
          shortfall=("scale",
                     "The experts are better than one adapter on every seed (77 against 72 %), "
                     "and the busiest has 1.8 times the mean load, 2.2 without the balance loss. "
                     "It is below 2, as was asked, on two seeds of three (1.4, 1.9, 2.2); in an "
                     "earlier run on all. After 600 steps the accuracy still rises by 9 points "
                     "in 100 steps, so that the routers are measured in the midst of their "
                     "learning; the full scale has 5000 steps."))
def mix_lora_tasks(scale: Scale) -> Outcome:
    """Teach a frozen network of digits five tasks that contradict each other."""
    seeds, steps = (range(3), 600) if scale == "desk" else (range(5), 5000)
    runs = train({way: partial(_tuned, *how) for way, how in WAYS.items()}, _tasks,
                 {ACCURACY: held_out_accuracy}, seeds=seeds, steps=steps, batch_size=128,
                 optimizer=lambda rule: torch.optim.Adam(
                     (p for p in rule.parameters() if p.requires_grad), 3e-3))
    figures = dict(runs.figures)
    for way, rules in runs.rules.items():
        figures[f"parameters that learn, {way}"] = [
            float(sum(p.numel() for p in rule.parameters() if p.requires_grad)) for rule in rules]
        if WAYS[way][0] > 1:
            figures[LOAD.format(way)] = [_busiest(rule) for rule in rules]
    return Outcome(
        setting={"base": "digits of 8 x 8 pixels and 5 entries that name a task: a linear layer to "
                 "32, a residual feed-forward block of 64 hidden units, a linear layer; trained on "
                 "the digits' own labels with random task names, then frozen",
                 "tasks": "five; in each the labels are permuted at random", "experts":
                 f"{EXPERTS} of rank {RANK}, {K} for each sample", "one adapter":
                 f"rank {RANK * K}, or {RANK * EXPERTS}", "training":
                 f"{steps} steps of 128 samples with random tasks, Adam 3e-3, for all; 360 images "
                 "held out, each under every task"},
        figures=figures,
        note="The load is that of the held-out images under every task, after the training. With "
             "samples and tasks drawn with replacement, and a base trained under random task "
             "names, the busiest expert had 1.7 times the mean load on every seed, and the claim "
             "was shown; here it has more than twice on one.",
        curves=runs.curves(ACCURACY),
        axes=("steps", "accuracy, mean of the tasks (%)"))


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.feedforward = nn.LayerNorm(32), FeedForward(32, 64)

    def forward(self, h: Tensor) -> Tensor:
        added: Tensor = h + self.feedforward(self.norm(h))
        return added


def _tuned(experts: int, rank: int, k: int, balance: float) -> nn.Module:
    """Return a network that was trained on the digits, frozen, with adapters that learn."""
    base = nn.Sequential(nn.Linear(64 + TASKS, 32), _Residual(), nn.LayerNorm(32),
                         nn.Linear(32, 10))
    split = digits()
    fit(base, Batches(_named(split.x_train), split.y_train.repeat(TASKS), 128), epochs=5,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 3e-3), progress=False)
    return mix_lora(base, torch.randn(2, 64 + TASKS), n_experts=experts, rank=rank, k=k,
                    balance=balance, attention=False,
                    generator=torch.Generator().manual_seed(torch.initial_seed()))


def _tasks(seed: int) -> Split:
    """Return every digit under every task's name, with the class that the task gives it."""
    split, draw = digits(), torch.Generator().manual_seed(seed)
    labels = torch.stack([torch.randperm(10, generator=draw) for _ in range(TASKS)])
    return Split(_named(split.x_train), labels[:, split.y_train].flatten(),
                 _named(split.x_test), labels[:, split.y_test].flatten())


def _named(x: Tensor) -> Tensor:
    """Return the images with the name of each task in turn."""
    names = torch.eye(TASKS).repeat_interleave(len(x), 0)
    return torch.cat([x.flatten(1).repeat(TASKS, 1), names], 1)


def _busiest(rule: Rule) -> float:
    """Return the largest load over the mean one."""
    rule.predict(_named(digits().x_test))
    (mixture,) = [m for m in rule.modules() if isinstance(m, MixtureOfExperts)]
    load = mixture.usage.load.float()
    return float(load.max() / load.mean())
