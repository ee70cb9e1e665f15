from statistics import fmean

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import one_hot

from netwright.data import Split, digits
from netwright.evidence import Outcome, Scale, every, evidence, figure, train
from netwright.reshape import find_bricks, keep_bricks
from netwright.reshape.feedforward import Bricks

TASKS = 3
MARGIN = 15


@evidence(paper="000-017",
          claim="The hidden units of a feed-forward layer that are active together serve one "
                "function: without such a group, the network fails chiefly at one task.",
          shown=[every(figure("share on one task, bricks (%)") > 50),
                 every(figure("share on one task, bricks (%)")
                       > figure("share on one task, random groups (%)") + MARGIN)],
          shortfall=("open",
                     "Taking a brick out costs 48 points on its chief task and 29 on each of the "
                     "others, a random group 13 and 8: bricks matter far more, but the share of "
                     "the loss that falls on one task is 46 % for both, where a third would be "
                     "no preference at all. One network of 96 units for three tasks was tried, "
                     "with bricks found by one clustering into 3. Whether its units serve all "
                     "tasks because they are few, or whether the clusters are not the functions, "
                     "is not known."))
def functional_bricks(scale: Scale) -> Outcome:
    """Take bricks, and groups at random, out of networks that read digits in three ways."""
    width, steps = (96, 600) if scale == "desk" else (512, 4000)
    figures: dict[str, list[float]] = {}
    runs = train({"digits": lambda: nn.Sequential(nn.Linear(64 + TASKS, width), nn.ReLU(),
                                                  nn.Linear(width, 10))},
                 _all_tasks, {}, seeds=range(3), steps=steps, looks=1, batch_size=64,
                 optimizer=lambda rule: torch.optim.Adam(rule.parameters(), 3e-3))
    for seed, rule in enumerate(runs.rules["digits"]):
        draw, model = Generator().manual_seed(seed), rule.network
        x_train, _, x_test, y_test = _tasks(seed)
        figures.setdefault("accuracy, whole (%)", []).append(
            fmean(_accuracies(model, x_test, y_test)))
        (found,) = find_bricks(model, x_train.flatten(0, 1), bricks=TASKS)
        for way, bricks in {"bricks": [found], "random groups": [
                _random(found, draw) for _ in range(10)]}.items():
            drops = torch.tensor([_drops(model, some, x_test, y_test) for some in bricks])
            share = drops.amax(-1).sum(-1) / drops.sum((-2, -1))
            figures.setdefault(f"share on one task, {way} (%)", []).append(
                100 * float(share.mean()))
            figures.setdefault(f"accuracy lost on the chief task, {way} (%)", []).append(
                float(drops.amax(-1).mean()))
            figures.setdefault(f"accuracy lost on the other tasks, {way} (%)", []).append(
                float(((drops.sum(-1) - drops.amax(-1)) / (TASKS - 1)).mean()))
    return Outcome(
        setting={"tasks": f"the digits of scikit-learn, seen in {TASKS} ways: as they are and with "
                          "their pixels in other orders, with a tag that says which",
                 "model": f"{64 + TASKS} inputs, {width} hidden ReLU units, 10 classes for all",
                 "training": f"{steps} steps of Adam, batch 64",
                 "bricks": f"{TASKS}, found on the training data of all tasks together",
                 "random groups": "10 draws of groups of the same sizes"},
        figures=figures,
        note="The share, of the accuracy that is lost, is 100 % where taking a group out hurts one "
             "task alone and a third where it hurts all alike; it is weighed by how much each "
             "group costs. Random groups cost little, and of little much falls on one task by "
             "chance. The paper looks at language models of billions of weights; here the "
             "functions are known.")


def _tasks(seed: int) -> Split:
    """Return the digits as each task sees them, the tasks along the first axis."""
    split, draw = digits(), Generator().manual_seed(seed)
    views = [torch.arange(64), *(torch.randperm(64, generator=draw) for _ in range(TASKS - 1))]

    def seen(x: Tensor) -> Tensor:
        flat = x.flatten(1)
        tags = one_hot(torch.arange(TASKS), TASKS).float()
        return torch.stack([torch.cat([flat[:, view], tag.expand(len(flat), -1)], 1)
                            for view, tag in zip(views, tags, strict=True)])
    return Split(seen(split.x_train), split.y_train, seen(split.x_test), split.y_test)


def _all_tasks(seed: int) -> Split:
    x, y, x_test, y_test = _tasks(seed)
    return Split(x.flatten(0, 1), y.repeat(TASKS), x_test.flatten(0, 1), y_test.repeat(TASKS))


@torch.no_grad()
def _accuracies(model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    return [100 * float((model(task).argmax(-1) == y).float().mean()) for task in x]


def _drops(model: nn.Module, found: Bricks, x: Tensor, y: Tensor) -> list[list[float]]:
    """Return, for each group and task, how much accuracy is lost without the group."""
    whole = _accuracies(model, x, y)
    lost = []
    for gone in range(len(found.units)):
        rest = [i for i in range(len(found.units)) if i != gone]
        without = _accuracies(keep_bricks(model, [found], [rest]), x, y)
        lost.append([max(0.0, a - b) for a, b in zip(whole, without, strict=True)])
    return lost


def _random(found: Bricks, draw: Generator) -> Bricks:
    order = torch.randperm(sum(map(len, found.units)), generator=draw)
    return Bricks(found.layer, tuple(
        part.sort().values for part in order.split([len(units) for units in found.units])))
