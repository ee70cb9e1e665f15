from statistics import mean

import torch
from torch import Tensor, nn

from netwright.blocks.experts import MixtureOfExperts
from netwright.blocks.feedforward import FeedForward
from netwright.data import digits
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.reshape import prune_experts

TASKS, WIDTH, SIZES, K = 4, 32, (8, 16), 2
METHODS = ("cluster_router", "usage", "random")


@evidence(paper="003-005", claim="A mixture of experts can be pruned for one task without loss "
          "down to a number of experts that depends on how many it was trained with, and not "
          "further.",
          shortfall=("scale",
                     "Experts to spare appear as their number grows: half of 8, by the router's "
                     "clusters, cost 0.21 nats, half of 16 only 0.06; by usage half of 16 cost "
                     "0.001 and half of 8 still 0.17. At most 10 % more loss allows none of 8 to "
                     "go, and 1.3 of 16 in the mean. Random halves cost 1.0 and more. Four tasks "
                     "of small digits need nearly all of so few experts; models with many more "
                     "experts than a task uses are needed."))
def expert_pruning(scale: Scale) -> Outcome:
    """Prune mixtures trained on four tasks for each of them, and train small ones from scratch."""
    seeds, steps = (3, 500) if scale == "desk" else (5, 5000)
    figures: dict[str, list[float]] = {}
    curves: dict[str, list[list[float]]] = {}
    split = digits(test=0.4)
    for seed in range(seeds):
        draw = torch.Generator().manual_seed(seed)
        labels = torch.stack([torch.randperm(10, generator=draw) for _ in range(TASKS)])
        for n in SIZES:
            model = _trained(_network(n, seed), split, labels, None, steps, seed)
            whole = mean(_loss(model, split, labels, task) for task in range(TASKS))
            figures.setdefault(f"loss, {n} experts, all kept (nats)", []).append(whole)
            for method in METHODS:
                losses = []
                for keep in _keeps(n):
                    losses.append(mean(_pruned_loss(model, split, labels, task, keep, method,
                                                    seed) for task in range(TASKS)))
                    figures.setdefault(f"loss, {n} experts, {keep} kept by {method} (nats)",
                                       []).append(losses[-1])
                if method != "usage":
                    curves.setdefault(f"{n} experts, {method}", []).append(losses)
                if method == METHODS[0]:
                    figures.setdefault(f"fewest experts of {n} with at most 10% more loss",
                                       []).append(_threshold(losses, whole, n))
        for keep in (2, 4):
            figures.setdefault(f"loss, {keep} experts trained from scratch on the task (nats)",
                               []).append(mean(_loss(_trained(
                                   _network(keep, seed), split, labels, task, steps // TASKS, seed),
                                   split, labels, task) for task in range(TASKS)))

    def fewest(n: int) -> list[float]:
        return figures[f"fewest experts of {n} with at most 10% more loss"]

    flat = {n: all(f < n for f in fewest(n)) for n in SIZES}
    rises = {n: all(a > 1.1 * b for a, b in zip(
        figures[f"loss, {n} experts, 1 kept by cluster_router (nats)"],
        figures[f"loss, {n} experts, all kept (nats)"], strict=True)) for n in SIZES}
    above_chance = all(
        mean(figures[f"loss, {n} experts, {n // 2} kept by cluster_router (nats)"])
        < mean(figures[f"loss, {n} experts, {n // 2} kept by random (nats)"]) for n in SIZES)
    depends = mean(fewest(8)) / 8 != mean(fewest(16)) / 16
    found = [all(flat.values()), all(rises.values()), above_chance, depends]
    return Outcome(
        verdict="shown" if all(found) else "partly shown" if any(flat.values()) and found[1]
        else "not shown",
        setting={"tasks": "four: digits with permuted labels, the task named by 4 further inputs",
                 "model": f"a linear layer to {WIDTH}, a residual mixture of experts of 32 hidden "
                 f"units, {K} for each sample, a linear layer; 8 or 16 experts", "training":
                 f"{steps} steps of 128 samples of all tasks, Adam 3e-3 falling to 0; from scratch "
                 f"{steps // TASKS} steps on the task, which is its share", "pruning": "on 500 "
                 "training samples of a task, nothing is trained on afterwards; loss on 719 "
                 "images held out, mean of the tasks"},
        figures=figures,
        note="Shown is, with clusters of the router's logits and on every seed, fewer experts than "
             "all with at most 10% more loss for 8 and for 16 experts, more than that with one "
             "expert, a lower mean loss than a random half of the experts gives, and a threshold "
             "that is another share of 8 than of 16 experts; partly shown is the first for one "
             "size, and the second.",
        curves={way: Curve(_keeps(16 if way.startswith("16") else 8), lines)
                for way, lines in curves.items()},
        axes=("experts kept", "loss, mean of the tasks (nats)"))


def _keeps(n: int) -> list[int]:
    return [keep for keep in (1, 2, 3, 4, 6, 8, 12, 16) if keep <= n]


def _threshold(losses: list[float], whole: float, n: int) -> int:
    """Return the smallest number from which on nothing is lost."""
    good = n
    for keep, loss in reversed(list(zip(_keeps(n), losses, strict=True))):
        if loss > 1.1 * whole:
            break
        good = keep
    return good


class _Residual(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mixture = MixtureOfExperts(WIDTH, [FeedForward(WIDTH, 32) for _ in range(n)],
                                        k=min(K, n))

    def forward(self, h: Tensor) -> Tensor:
        added: Tensor = h + self.mixture(self.norm(h))
        return added


def _network(n: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64 + TASKS, WIDTH), _Residual(n), nn.LayerNorm(WIDTH),
                         nn.Linear(WIDTH, 10))


def _named(x: Tensor, task: Tensor) -> Tensor:
    # The name is as loud as the image.
    return torch.cat([x.flatten(1), 3.0 * nn.functional.one_hot(task, TASKS)], 1)


def _trained(network: nn.Module, split: tuple[Tensor, ...], labels: Tensor, task: int | None,
             steps: int, seed: int) -> nn.Module:
    x, y = split[:2]
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (128,), generator=draws)
        tasks = torch.randint(TASKS, (128,), generator=draws)
        tasks = tasks if task is None else torch.full_like(tasks, task)
        optimizer.zero_grad()
        logits = network(_named(x[rows], tasks))
        nn.functional.cross_entropy(logits, labels[tasks, y[rows]]).backward()
        optimizer.step()
        falling.step()
    return network.eval()


@torch.no_grad()
def _loss(network: nn.Module, split: tuple[Tensor, ...], labels: Tensor, task: int) -> float:
    x, y = split[2:]
    logits = network(_named(x, torch.full((len(x),), task)))
    return float(nn.functional.cross_entropy(logits, labels[task, y]))


def _pruned_loss(model: nn.Module, split: tuple[Tensor, ...], labels: Tensor, task: int,
                 keep: int, method: str, seed: int) -> float:
    x = _named(split[0][:500], torch.full((500,), task))
    pruned = prune_experts(  # type: ignore[call-overload]
        model, x, keep, method=method, generator=torch.Generator().manual_seed(seed))
    return _loss(pruned, split, labels, task)
