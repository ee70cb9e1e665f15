from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from evidence.learners._compare import difference, digits_lost
from netwright.data import Batches, digits
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.formal.learners import Learner, cross_entropy_error, learner, squared_error

RATE, BATCH = 0.1, 32


class _Recurrent(nn.Module):
    """Reads an image row by row; returns the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(8, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x.view(-1, 8, 8))[0][:, -1]


def _mlp() -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(64, 48), nn.Tanh()),
            nn.Sequential(nn.Linear(48, 32), nn.Tanh()), nn.Linear(32, 10)]


def _rnn() -> list[nn.Module]:
    return [_Recurrent(), nn.Linear(32, 10)]


@evidence(paper="003-062", claim="Backpropagation through a composite of networks is the "
          "composition of their learners, for a fixed step size and a suitable error function.")
def backprop_as_functor(scale: Scale) -> Outcome:
    """Train composed learners and the whole network side by side; compare after every step."""
    seeds, epochs = (3, 3) if scale == "desk" else (5, 20)
    figures: dict[str, list[float]] = {}
    curves: dict[str, Curve] = {}
    plans: dict[str, tuple[Callable[[], list[nn.Module]], torch.dtype, bool]] = {
        "MLP, float64": (_mlp, torch.float64, True), "RNN, float64": (_rnn, torch.float64, True),
        "MLP, float32": (_mlp, torch.float32, True),
        "control, MLP: requests that do not invert the error": (_mlp, torch.float64, False)}
    for name, (build, dtype, fitting) in plans.items():
        runs = [_train(build, dtype, seed, epochs, fitting) for seed in range(seeds)]
        lines = [run[0] for run in runs]
        figures[f"largest difference of a weight in {epochs} epochs, {name}"] = [
            max(line) for line in lines]
        figures[f"test accuracy, composed learners, {name} (%)"] = [run[1] for run in runs]
        figures[f"test accuracy, whole network by autograd, {name} (%)"] = [run[2] for run in runs]
        curves[name.partition(":")[0].replace(", ", " ")] = Curve(
            list(range(1, len(lines[0]) + 1)),
            [[digits_lost(distance) for distance in line] for line in lines])
    exact = all(max(figures[f"largest difference of a weight in {epochs} epochs, {name}"]) < 1e-10
                for name in ("MLP, float64", "RNN, float64"))
    control = min(figures[f"largest difference of a weight in {epochs} epochs, control, MLP: "
                          "requests that do not invert the error"]) > 1e-3
    return Outcome(
        verdict="shown" if exact and control else "not shown",
        setting={"MLP": "64-48-32-10, tanh, three learners", "RNN": "8 rows of 8 pixels, 32 tanh "
                 "units, then a linear layer: two learners", "error": "square between layers, "
                 "softmax cross-entropy at the end", "rate": f"{RATE} / {BATCH} of the batch's sum",
                 "batch": BATCH, "epochs": epochs, "data": "digits",
                 "other side": "torch.optim.SGD on the summed cross-entropy of the whole network"},
        figures=figures,
        note="Shown if in float64 no weight ever differs by 1e-10 or more, and the control's "
             "differ by more than 1e-3. In float32 a request holds a gradient as the difference of "
             "two activations, so the gradient is rounded as activations are. In the control the "
             "last learner inverts the cross-entropy where the layer before learns by the square.",
        curves=curves, axes=("step", "log10 of the largest difference of a weight"))


def _train(build: Callable[[], list[nn.Module]], dtype: torch.dtype, seed: int, epochs: int,
           fitting: bool) -> tuple[list[float], float, float]:
    """Return the largest difference after each step, and both accuracies in the end."""
    torch.manual_seed(seed)
    layers = [layer.to(dtype) for layer in build()]
    whole = nn.Sequential(*layers)
    net = _composed(layers, fitting)
    split = digits()
    x, y = split.x_train.flatten(1).to(dtype), split.y_train
    optimizer = torch.optim.SGD(whole.parameters(), RATE / BATCH)
    distances = []
    batches = Batches(x, y, BATCH, seed=seed)
    for _ in range(epochs):
        for a, b in batches:
            net = net.step(a, one_hot(b, 10).to(dtype))
            optimizer.zero_grad()
            nn.functional.cross_entropy(whole(a), b, reduction="sum").backward()
            optimizer.step()
            distances.append(difference(net.params, list(whole.parameters())))
    test = split.x_test.flatten(1).to(dtype)
    return distances, _accuracy(net(test), split.y_test), _accuracy(whole(test), split.y_test)


def _composed(layers: list[nn.Module], fitting: bool) -> Learner:
    rate = RATE / BATCH
    last = learner(layers[-1], rate=rate, error=cross_entropy_error,
                   request_error=squared_error if fitting else None)
    net = learner(layers[0], rate=rate)
    for layer in layers[1:-1]:
        net = net >> learner(layer, rate=rate)
    return net >> last


def _accuracy(scores: Any, y: Tensor) -> float:
    return 100 * (scores.argmax(1) == y).double().mean().item()
