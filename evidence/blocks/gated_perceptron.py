from collections.abc import Callable
from functools import partial
from statistics import mean

import torch
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import Tensor, nn

from netwright.blocks.feedforward import GatedPerceptron
from netwright.evidence import Curve, Outcome, Scale, evidence

SETS = {"iris": load_iris, "breast cancer": load_breast_cancer}
MAKES: dict[str, Callable[[int, int], nn.Module]] = {"gated": GatedPerceptron, "plain": nn.Linear}
EVERY = 50


@evidence(paper="003-118", claim="A perceptron that also sees the product of its inputs learns "
          "XOR, and on iris and breast cancer is at least as accurate as without it and near a "
          "support vector machine.",
          shortfall=("claim",
                     "XOR is learnt under every seed. On iris and on breast cancer, five folds "
                     "drawn anew for each of three seeds, the product does not help: 95.1 "
                     "against 95.6 % without it, 95.3 against 97.1 %, and the machine has 95.8 "
                     "and 97.7 %. The product of all 30 standardised inputs does harm from the "
                     "first 50 steps on (96.3 against 97.7 %). The paper's third set was not to "
                     "be had."))
def gated_perceptron(scale: Scale) -> Outcome:
    """Train single layers with and without the product; cross-validate them."""
    seeds, steps = (3, 300) if scale == "desk" else (10, 3000)
    corners = torch.tensor([[0., 0.], [0., 1.], [1., 0.], [1., 1.]])
    xor = torch.tensor([0, 1, 1, 0])
    figures: dict[str, list[float]] = {}
    curves = {}
    for name, make in MAKES.items():
        figures[f"XOR accuracy, {name} (%)"] = [
            _trained(make, corners, xor, corners, xor, seed, steps, 0.1)[-1]
            for seed in range(seeds)]
    for data, load in SETS.items():
        x, y = load(return_X_y=True)
        folds = [list(StratifiedKFold(5, shuffle=True, random_state=seed).split(x, y))
                 for seed in range(seeds)]
        for name, make in MAKES.items():
            runs = [[_fold(partial(_trained, make), x, y, fold, seed, steps) for fold in some]
                    for seed, some in enumerate(folds)]
            lines = [[mean(at) for at in zip(*some, strict=True)] for some in runs]
            figures[f"{data} accuracy, {name} (%)"] = [line[-1] for line in lines]
            curves[f"{data}, {name}"] = Curve(list(range(EVERY, steps + 1, EVERY)), lines)
        figures[f"{data} accuracy, support vector machine (%)"] = [
            mean(_fold(_machine, x, y, fold, seed, steps)[-1] for fold in some)
            for seed, some in enumerate(folds)]

    def accuracy(data: str, name: str) -> float:
        return mean(figures[f"{data} accuracy, {name} (%)"])

    solves = min(figures["XOR accuracy, gated (%)"]) == 100
    ahead = [accuracy(data, "gated") - accuracy(data, "plain") for data in SETS]
    near = [accuracy(data, "support vector machine") - accuracy(data, "gated") <= 2
            for data in SETS]
    return Outcome(
        verdict="shown" if solves and min(ahead) >= 0 and all(near) else
        "partly shown" if solves and min(ahead) >= -1 else "not shown",
        setting={"data": "scikit-learn's, standardised, 5 folds drawn anew for each seed; XOR of "
                 "0 and 1", "layer": "one linear layer to the classes' logits, its gate the "
                 "product of all inputs: 2, 4 and 30", "training": f"{steps} steps of the whole "
                 "set, Adam 3e-2 (XOR 0.1), no tuning", "machine": "scikit-learn's SVC as it is"},
        figures=figures,
        note="Shown is: XOR is learnt under every seed, and on both sets the mean accuracy is not "
             "below that without the product and within 2 points of the machine's; partly shown, "
             "XOR is learnt and nothing is lost by more than a point. The paper's PIMA data come "
             "with no library and are left out.",
        curves=curves, axes=("step", "cross-validated accuracy (%)"))


def _fold(run: Callable[..., list[float]], x: Tensor, y: Tensor, fold: tuple[Tensor, Tensor],
          seed: int, steps: int) -> list[float]:
    scaler = StandardScaler().fit(x[fold[0]])
    parts = [(torch.from_numpy(scaler.transform(x[rows])).float(), torch.from_numpy(y[rows]))
             for rows in fold]
    return run(*parts[0], *parts[1], seed, steps, 3e-2)


def _trained(make: Callable[[int, int], nn.Module], x: Tensor, y: Tensor, x_test: Tensor,
             y_test: Tensor, seed: int, steps: int, rate: float) -> list[float]:
    torch.manual_seed(seed)
    layer = make(x.shape[1], int(y.max()) + 1)
    optimizer = torch.optim.Adam(layer.parameters(), rate)
    found = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(x), y).backward()
        optimizer.step()
        if step % EVERY == 0:
            with torch.no_grad():
                found.append(100 * float((layer(x_test).argmax(1) == y_test).float().mean()))
    return found


def _machine(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, *_: float) -> list[float]:
    return [100 * SVC().fit(x.numpy(), y.numpy()).score(x_test.numpy(), y_test.numpy())]
