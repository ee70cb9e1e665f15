"""Trainings in one process and in two, run by test_distributed.py alone and under torchrun."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Generator, distributed, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import netwright as nw
from netwright.data import Batches
from netwright.rules import Rule

X = torch.randn(44, 6, generator=Generator().manual_seed(1))
Y = (X[:, :3].argmax(1) + (X[:, 3] > 1)) % 3
EDGES = torch.stack([torch.arange(44), torch.arange(44).roll(1)])

# What two processes train as one does, to rounding: sizes of shares differ, 9 = 4 + 5.
EQUAL: dict[str, tuple[str, dict]] = {
    "AdaptiveFeedbackAlignment": ("AdaptiveFeedbackAlignment", {}),
    "Backprop": ("Backprop", {}),
    "BoostedUnits": ("BoostedUnits", {"units": 3, "steps": 3}),
    "ContinualBackprop": ("ContinualBackprop", {"replacement_rate": 0.1, "maturity": 2}),
    "CascadedForward": ("CascadedForward", {}),
    "FeedbackAlignment": ("FeedbackAlignment", {}),
    "FeedbackAlignment, sign-symmetric": ("FeedbackAlignment", {"feedback": "sign_symmetric"}),
    "FeedbackAlignment, learned": ("FeedbackAlignment", {"feedback": "kolen_pollack"}),
    "CounterCurrent": ("CounterCurrent", {}),
    "DeltaRule": ("DeltaRule", {}),
    "DirectFeedbackAlignment": ("DirectFeedbackAlignment", {}),
    "DirectFeedbackAlignment, sign-symmetric": ("DirectFeedbackAlignment",
                                                {"feedback": "sign_symmetric"}),
    "DirectFeedbackAlignment, learned": ("DirectFeedbackAlignment",
                                         {"feedback": "kolen_pollack"}),
    "DirectFeedbackAlignment, ternary": ("DirectFeedbackAlignment", {"ternary": 0.4}),
    "DisinhibitoryHebb": ("DisinhibitoryHebb", {}),
    "DualPropagation": ("DualPropagation", {}),
    "EquilibriumPropagation": ("EquilibriumPropagation", {}),
    "HighwayBackprop": ("HighwayBackprop", {}),
    "LLS": ("LLS", {}),
    "LocalLosses": ("LocalLosses", {}),
    "MomentumAuxiliary": ("MomentumAuxiliary", {}),
    "MonoForward": ("MonoForward", {}),
    "ForwardForward, given negatives": ("ForwardForward", {"negatives": lambda x, y: x.flip(1)}),
    "ForwardGradient": ("ForwardGradient", {}),
    "Pepita": ("Pepita", {}),
    "PipelinedBackprop, predicted": ("PipelinedBackprop", {"spike_compensation": False}),
    "PredictiveCoding": ("PredictiveCoding", {}),
    "ProductFeedback": ("ProductFeedback", {}),
    "Reversible": ("Reversible", {}),
    "StationaryFeedback": ("StationaryFeedback", {"feedback": 0.5}),
    "SingleForward": ("SingleForward", {}),
    "TargetProjection": ("TargetProjection", {}),
    "TwoStageBackward": ("TwoStageBackward", {}),
    "ZerothOrder": ("ZerothOrder", {"epsilon": 0.1}),
}
# What cannot be equal, and why; the processes still end with the same weights as each other.
UNEQUAL: dict[str, tuple[str, dict]] = {
    "DirectFeedbackAlignment, noisy": ("DirectFeedbackAlignment", {"noise": 0.1}),  # each sample's
    "DiffusionBlocks": ("DiffusionBlocks", {"blocks": 1, "num_classes": 3}),  # each one's noise
    "ForwardForward": ("ForwardForward", {}),  # draws each sample's negative label
    "ForwardGradient, activities": ("ForwardGradient", {"perturb": "activities"}),  # each sample's
    "ForwardGradient, guided": ("ForwardGradient", {"guess": "local_loss"}),  # the batch's guess
    "InferenceLearning": ("InferenceLearning", {}),  # shortens its share's steps by its energy
    "LikelihoodRatio": ("LikelihoodRatio", {}),  # draws each sample's noise
    "NoProp": ("NoProp", {}),  # likewise
    "PipelinedBackprop": ("PipelinedBackprop", {}),  # keeps the last gradient of its own share
    "NoPropContinuous": ("NoPropContinuous", {}),  # likewise, and its time
    "NoPropFlow": ("NoPropFlow", {}),  # likewise
    "PhysicalForwardForward": ("PhysicalForwardForward", {}),  # draws each sample's negative label
    "PredictiveCoding, incremental": ("PredictiveCoding", {"incremental": True,
                                                           "weight_rate": 0.05}),
    # steps on the weights within a batch, by what this process sees of it
    "SoftHebb": ("SoftHebb", {}),  # divides its steps by the largest of its share
}
# What changes the weights itself leaves nothing to average, and is refused.
ALONE = {"BlackBoxPrompt", "BlockCoordinateDescent", "DynamicalLowRank",
         "QuantizedForwardGradient", "RandomFeatureBoosting", "ReverseDerivativeAscent"}


def network(*norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(distributed.get_rank() if distributed.is_initialized() else 0)
    return nn.Sequential(nn.Linear(6, 12), *norm, nn.ReLU(), nn.Linear(12, 8), nn.Tanh(),
                         nn.Linear(8, 3))


class Steps(nn.Module):
    """Reads 12 features as 4 steps of 3."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 3, batch_first=True)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.gru(h.unflatten(-1, (4, 3)))[0].flatten(1)


def build(rule: str, options: dict) -> Rule:
    generator = Generator().manual_seed(7 + (distributed.is_initialized()
                                             and distributed.get_rank()))
    made, example = network(), X[:4]
    if rule == "EquilibriumPropagation":  # takes no ReLU
        made[1] = nn.Tanh()
    if rule == "StationaryFeedback":  # takes what has recurrent layers
        made[1] = Steps()
    if rule == "DiffusionBlocks":  # returns what it takes
        made[2], made[4] = nn.Linear(12, 12), nn.Linear(12, 6)
    if rule == "DeltaRule":  # takes one layer of neurons
        made = nn.Sequential(nn.Linear(6, 3), nn.Sigmoid())
    if rule == "SingleForward":  # takes graphs
        made, example = nw.models.gcn(6, 3, dropout=0), (X, EDGES)
    return getattr(nw.rules, rule)(made, example=example, generator=generator, **options)


def by_rule(rule: str, options: dict) -> dict[str, torch.Tensor]:
    made = build(rule, options)
    train, validation = Batches(X, Y, 9, seed=2), Batches(X, Y, 20, shuffle=False)
    if rule == "SingleForward":  # takes graphs, which are not shared out
        train = validation = [((X, EDGES), Y)]
    history = nw.fit(made, train, epochs=2, validation=validation,
                     optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9))
    return dict(made.state_dict()) | {"loss": torch.tensor([e.loss for e in history.epochs])} | {
        "metric": torch.tensor([e.metric for e in history.epochs])}


def fitted(*norm: nn.Module, train: object = None, **options: object) -> dict[str, torch.Tensor]:
    made = network(*norm)
    chosen = {"epochs": 2, "optimizer": lambda p: torch.optim.SGD(p, 0.2, momentum=0.5), **options}
    nw.fit(made, train or Batches(X, Y, 9, seed=2), **chosen)
    return dict(made.state_dict())


def accumulated() -> dict[str, torch.Tensor]:
    return fitted(accumulate=3, clip=0.5)


def unlabelled() -> dict[str, torch.Tensor]:
    y = Y.clone()
    y[::3] = -100
    return fitted(train=Batches(X, y, 9, shuffle=False))


def lbfgs() -> dict[str, torch.Tensor]:
    return fitted(train=Batches(X[:43], Y[:43], 43),
                  optimizer=lambda p: torch.optim.LBFGS(p, max_iter=3,
                                                        line_search_fn="strong_wolfe"))


def one_sample() -> dict[str, torch.Tensor]:
    return fitted(train=Batches(X[:5], Y[:5], 2, shuffle=False))  # the last batch has one sample


def early() -> dict[str, torch.Tensor]:
    return fitted(epochs=6, patience=1, validation=Batches(X, 2 - Y, 9), train=None)


def normed() -> dict[str, torch.Tensor]:
    return fitted(nn.BatchNorm1d(12))


def sampled() -> dict[str, torch.Tensor]:
    data = TensorDataset(X, Y)
    sampler = DistributedSampler(data) if distributed.is_initialized() else None
    return fitted(train=DataLoader(data, 4, sampler=sampler))


def resumed(folder: Path) -> dict[str, torch.Tensor]:
    options = {"checkpoint": folder, "optimizer": torch.optim.Adam}
    fitted(nn.BatchNorm1d(12), nn.Dropout(0.2), epochs=1, **options)
    return fitted(nn.BatchNorm1d(12), nn.Dropout(0.2), epochs=3, **options)


def uninterrupted(folder: Path) -> dict[str, torch.Tensor]:
    return fitted(nn.BatchNorm1d(12), nn.Dropout(0.2), epochs=3, checkpoint=folder,
                  optimizer=torch.optim.Adam)


SAME: list[Callable[[], dict[str, torch.Tensor]]] = [accumulated, unlabelled, lbfgs, one_sample,
                                                     early]


def outcomes() -> dict[str, dict[str, torch.Tensor]]:
    """Return what every training ends with."""
    found = {name: by_rule(*how) for name, how in (EQUAL | UNEQUAL).items()}
    return found | {case.__name__: case() for case in SAME}


def errors() -> dict[str, str]:
    """Return what is said where the processes cannot train together."""
    rank, said = distributed.get_rank(), {}
    cases = {"uneven": lambda: fitted(train=[(X, Y)] * (rank + 1))}
    cases |= {rule: lambda rule=rule: nw.fit(getattr(nw.rules, rule)(
        *([nw.circuits.evaluator(2, 3)] if rule == "ReverseDerivativeAscent" else
          [nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), X[:4]])), [(X, Y)], epochs=1)
        for rule in ALONE}
    cases |= {f"{rule}, no share": lambda rule=rule: nw.fit(  # 19 are 9, 9 and 1
        build(rule, {}), Batches(X[:19], Y[:19], 9, seed=2), epochs=1)
        for rule in ("BoostedUnits", "ContinualBackprop")}
    for name, case in cases.items():
        try:
            case()
        except ValueError as error:
            said[name] = str(error)
    x = X.clone() if rank else X
    if rank:
        x[3] = float("inf")
    try:
        fitted(train=[(x, Y)])
    except (ArithmeticError, ValueError) as error:
        said["diverged"] = f"{type(error).__name__}: {error}"
    return said


def main() -> None:
    torch.set_num_threads(1)
    work = Path(sys.argv[1])
    fitted(epochs=1)  # joins the processes
    found = outcomes() | {"normed": normed(), "sampled": sampled(),
                          "resumed": resumed(work / "resumed"),
                          "uninterrupted": uninterrupted(work / "uninterrupted")}
    rank = distributed.get_rank()
    torch.save({"outcomes": found, "errors": errors()}, work / f"{rank}.pt")


if __name__ == "__main__":
    main()
