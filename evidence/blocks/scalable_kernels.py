import math
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot

from evidence.small_models import parameters
from netwright.blocks.feedforward import RandomFeatures, bundle, solve_ridge
from netwright.data import digits
from netwright.evidence import Curve, Outcome, Scale, evidence

FEATURES = (16, 64, 256, 1024, 4096)
BUNDLED = (64, 128, 256, 512)


@evidence(paper="000-022", claim="Random features of inputs and of weights approximate a layer, "
          "with an error that falls as features are added; a network bundled with them has a "
          "fifth of the parameters, a closed-form optimum, and competitive accuracy.")
def scalable_kernels(scale: Scale) -> Outcome:
    """Approximate random layers, and bundle an MLP of digits and solve it."""
    split, seeds, epochs = digits(), 3, 20 if scale == "desk" else 100
    errors = {name: [[_error(name, n, seed) for n in FEATURES] for seed in range(seeds)]
              for name in ("sin", "relu")}
    slopes = {name: [_slope(found) for found in rows] for name, rows in errors.items()}
    figures: dict[str, list[float]] = {
        **{f"relative error of a layer, {name}, {n} features": [row[i] for row in rows]
           for name, rows in errors.items() for i, n in enumerate(FEATURES)},
        **{f"slope of log error by log features, {name}": found for name, found in slopes.items()}}
    accuracies: dict[tuple[str, int], list[float]] = {}
    trained = []
    x, truth = split.x_train.flatten(1), split.y_train
    for seed in range(seeds):
        torch.manual_seed(seed)
        mlp = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
                            nn.Linear(128, 10))
        fresh = {n: bundle(mlp, n) for n in BUNDLED}
        _train(mlp, x, truth, epochs)
        trained.append(_right(mlp, split.x_test, split.y_test))
        for n in BUNDLED:
            at_trained = bundle(mlp, n)
            solved = solve_ridge(fresh[n], x, one_hot(truth, 10).float())
            for way, network in (("closed form", solved), ("the MLP's weights", at_trained)):
                accuracies.setdefault((way, n), []).append(
                    _right(network, split.x_test, split.y_test))
    whole, share = parameters(mlp), {n: parameters(fresh[n]) for n in BUNDLED}
    figures["test accuracy, MLP by backpropagation (%)"] = trained
    figures.update({f"test accuracy, bundled, {way}, {n} features (%)": found
                    for (way, n), found in accuracies.items()})
    figures.update({f"parameters, MLP as multiple of bundled, {n} features": [whole / count]
                    for n, count in share.items()})
    falls = all(-0.6 <= fmean(found) <= -0.4 for found in slopes.values())
    near = [n for n in BUNDLED if whole >= 5 * share[n]
            and fmean(accuracies["closed form", n]) >= fmean(trained) - 1]
    return Outcome(
        verdict="shown" if falls and near else "partly shown" if falls or near else "not shown",
        setting={"layers": "16 inputs of norm 1, 32 outputs with weights of norm 1 and normal "
                 "biases; relu against the arc-cosine kernel, its mean",
                 "MLP": f"64-128-128-10 on digits, ReLU, Adam, learning rate 0.003, {epochs} "
                 "epochs, batches of 64", "bundled": "two maps of random features and one "
                 "matrix; in closed form by ridge regression on the labels as vectors, penalty "
                 "0.001", "not tuned": "any of it"},
        figures=figures,
        note="Shown is a slope between -0.6 and -0.4 for both functions and a closed form within "
             "1 percentage point of backpropagation at a fifth of the parameters or fewer. "
             "Bundling with the trained weights instead of solving estimates each layer by "
             "samples, and ReLU layers by another function, the arc-cosine kernel.",
        curves={f"bundled, {way}": Curve(BUNDLED, [[accuracies[way, n][seed] for n in BUNDLED]
                                                   for seed in range(seeds)])
                for way in ("closed form", "the MLP's weights")}
        | {"MLP by backpropagation": Curve(BUNDLED, [[a] * len(BUNDLED) for a in trained])},
        axes=("features", "test accuracy (%)"))


def _error(name: str, n: int, seed: int) -> float:
    """Return the error of 20 draws of the features, over the size of what they approximate."""
    torch.manual_seed(seed)
    x, w = normalize(torch.randn(64, 16), dim=1), normalize(torch.randn(32, 16), dim=1)
    b = torch.randn(32)
    if name == "sin":
        exact = (x @ w.T + b).sin()
    else:
        u, v = torch.cat([x, torch.ones(64, 1)], 1), torch.cat([w, b[:, None]], 1)
        norms = u.norm(dim=1)[:, None] * v.norm(dim=1)
        angle = (u @ v.T / norms).clamp(-1, 1).acos()
        exact = norms * (angle.sin() + (math.pi - angle) * angle.cos()) / (2 * math.pi)
    wrong = []
    for _ in range(20):
        features = RandomFeatures(16, n, name)  # type: ignore[arg-type]
        made = features(x) @ features.of_weights(w, b).T
        wrong.append((made - exact).square().mean())
    return float((torch.stack(wrong).mean() / exact.square().mean()).sqrt())


def _slope(errors: list[float]) -> float:
    x, y = torch.tensor(FEATURES).log(), torch.tensor(errors).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def _train(network: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()


@torch.no_grad()
def _right(network: nn.Module, x: Tensor, y: Tensor) -> float:
    return 100 * float((network(x.flatten(1)).argmax(1) == y).float().mean())
