import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from netwright.blocks.feedforward import Neuron
from netwright.data import digits
from netwright.evidence import Loader, Outcome, Scale, evidence, least, most, train
from netwright.rules import Backprop, DeltaRule, Rule

X = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
TRUTH = {"AND": torch.tensor([0.0, 0.0, 0.0, 1.0]), "OR": torch.tensor([0.0, 1.0, 1.0, 1.0]),
         "XOR": torch.tensor([0.0, 1.0, 1.0, 0.0])}
EPOCHS = 200
ONE, TWO = ("right, one neuron by the delta rule, {} (%)",
            "right, two layers by backpropagation, {} (%)")
BEST = "most that were right in any epoch, one neuron, {} (%)"
DIGITS = "test accuracy on digits, {} by the delta rule (%)"
LEARNS_LINEAR = (least(ONE.format("AND")) >= 100) & (least(ONE.format("OR")) >= 100)
CANNOT = most(BEST.format("XOR")) <= 75


@evidence(paper="003-036", claim="The delta rule teaches one neuron linear problems, such as AND "
          "and OR, but not XOR, which two layers learn by backpropagation.",
          shown=[LEARNS_LINEAR, CANNOT, least(TWO.format("XOR")) >= 100],
          partly=LEARNS_LINEAR & CANNOT)
def delta_rule(scale: Scale) -> Outcome:
    """Train one neuron on AND, OR and XOR, two layers on XOR, and ten neurons on digits."""
    seeds = range(10 if scale == "desk" else 100)
    neurons = {name: train({name: lambda: DeltaRule(Neuron(2))}, (_samples(t), [(X, t)]),
                           {ONE: _right}, seeds=seeds, epochs=EPOCHS,
                           optimizer=lambda rule: torch.optim.SGD(rule.parameters(), lr=0.1))
               for name, t in TRUTH.items()}
    exclusive = [(X, TRUTH["XOR"])]
    layers = train({"XOR": _two_layers}, (exclusive, exclusive), {TWO: _right}, seeds=seeds,
                   epochs=EPOCHS,
                   optimizer=lambda rule: torch.optim.Adam(rule.parameters(), lr=0.05))
    split = digits()
    split = split._replace(x_train=split.x_train.flatten(1), x_test=split.x_test.flatten(1))
    ten = train({"ten neurons": lambda: DeltaRule(Neuron(64, units=10))}, split,
                {DIGITS: _class_by_sum}, seeds=range(3), epochs=5, batch_size=1,
                optimizer=lambda rule: torch.optim.SGD(rule.parameters(), lr=0.01))
    figures = {**layers.figures, **ten.figures}
    for name, run in neurons.items():
        figures |= run.figures
        figures[BEST.format(name)] = [max(line) for line in run.lines[ONE][name]]
    return Outcome(
        setting={"neuron": f"two inputs, a step, rate 0.1, one sample at a time, {EPOCHS} epochs",
                 "two layers": f"8 hidden units with tanh, Adam, learning rate 0.05, {EPOCHS} "
                 "steps of all four samples", "digits": "ten neurons with a step, rate 0.01, one "
                 "sample at a time, 5 epochs, classes by their weighted sums",
                 "not tuned": "any of it"},
        figures=figures,
        note="The digits are no part of the paper: they say how far one layer goes.",
        curves={label: curve for run, figure, label in (
                    *((run, ONE, "one neuron, {}") for run in neurons.values()),
                    (layers, TWO, "two layers, {}"))
                for label, curve in run.curves(figure, label).items()},
        axes=("epoch", "right (%)"))


def _samples(t: Tensor) -> Loader:
    return list(zip(X.split(1), t.split(1), strict=True))


def _right(rule: Rule, test: Loader) -> float:
    """Return the share (%) of outputs on the right side of the middle."""
    (x, t), = test
    # Two layers return a logit, which is above 0 where the neuron's output would be 1.
    middle = 0.5 if isinstance(rule, DeltaRule) else 0.0
    return 100 * float(((rule.predict(x)[:, 0] >= middle) == (t >= 0.5)).float().mean())


def _two_layers() -> Rule:
    return Backprop(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)),
                    loss=lambda z, y: binary_cross_entropy_with_logits(z[:, 0], y))


def _class_by_sum(rule: Rule, test: Loader) -> float:
    assert isinstance(rule, DeltaRule)
    with torch.no_grad():
        right = sum(int((rule.layer[0](x).argmax(1) == y).sum()) for x, y in test)
    return 100 * right / sum(len(y) for _, y in test)
