from copy import deepcopy
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from netwright.data import Batches, digits
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.formal.circuits import PolynomialCircuit, evaluator, sum_of_products
from netwright.rules import ReverseDerivativeAscent
from netwright.training import fit

MARGIN = 10  # points above the majority


@evidence(paper="001-034", claim="Reverse derivative ascent learns Boolean circuits directly, on "
          "benchmark data sets, without a network of real numbers in their place.")
def reverse_derivative_ascent(scale: Scale) -> Outcome:
    """Learn random functions, iris and digits by circuits of bits; shuffle labels as a control."""
    seeds = 10 if scale == "desk" else 50
    figures: dict[str, list[float]] = {}
    lines: dict[str, list[list[float]]] = {}
    for seed in range(seeds):
        measured = _functions(seed) | _chain(seed)
        for classes, codes in product((2, 3), ("one-hot", "binary")):
            name = f"iris, {classes} classes, {codes}"
            split = _iris(classes, seed)
            line = _one_pass(split, classes, codes, seed)
            lines.setdefault(name, []).append(line)
            measured[f"test accuracy, {name} (%)"] = line[-1]
            measured[f"test accuracy, {name}, labels shuffled (%)"] = _one_pass(
                _shuffled(split, seed), classes, codes, seed)[-1]
        for classes in (2, 3):
            measured[f"best that a table can do on the test bits of iris, {classes} classes (%)"] \
                = _ceiling(_iris(classes, seed))
        if seed < 3:
            measured["test accuracy, digits, 10 classes, one-hot (%)"] = _one_pass(
                _digits(seed), 10, "one-hot", seed, every=1437)[-1]
        for name, value in measured.items():
            figures.setdefault(name, []).append(value)
    means = {name: sum(values) / len(values) for name, values in figures.items()}
    functions = means["random functions of 4 bits learnt in one pass, table (%)"] == 100
    iris = all(means[f"test accuracy, iris, {classes} classes, {codes} (%)"]
               > 100 / classes + MARGIN
               > means[f"test accuracy, iris, {classes} classes, {codes}, labels shuffled (%)"]
               for classes, codes in product((2, 3), ("one-hot", "binary")))
    image = means["test accuracy, digits, 10 classes, one-hot (%)"] > 10 + MARGIN
    return Outcome(
        verdict="shown" if functions and iris and image else
                "partly shown" if functions or iris or image else "not shown",
        setting={"circuit": "the table of a function as a polynomial over Z2, weights 0 at first",
                 "iris": "four features, each 1 where it is in the upper half of its range; 25 "
                 "samples of each class to train, 25 to test; one pass, a sample at a time",
                 "digits": "mean of 3 x 3 fields, each 1 where above its training median; one "
                 "pass, a sample at a time; 3 seeds",
                 "chain": "6 bits to 3 to 1, weights drawn, batches of 4, 16 epochs; y is the "
                 "exclusive or of the sum of three bits and the product of the others",
                 "random functions": "10 for each seed, all 16 inputs seen once",
                 "majority": "50 % for two classes of iris, 33.3 % for three, 10 % for digits"},
        figures=figures,
        note=f"Shown if every function is learnt, and every accuracy is more than {MARGIN} points "
             "above the majority's where that of shuffled labels is not. The last sample at an "
             "address decides, so labels that differ on equal bits cost accuracy that a majority "
             "would not: the best a table can do is given. A sum of products can be any function "
             "of 4 bits too, but each step turns every product that is 1, and random functions are "
             "not found: what a circuit is made of decides whether it learns.",
        curves={name: Curve(list(range(5, 5 * len(runs[0]) + 1, 5)), runs)
                for name, runs in lines.items() if name.endswith("one-hot")},
        axes=("samples seen", "test accuracy (%)"))


def _functions(seed: int) -> dict[str, float]:
    """Return the share of random functions of 4 bits that two kinds of circuit learn."""
    x = torch.tensor(list(product((0, 1), repeat=4)))
    draw = torch.Generator().manual_seed(seed)
    targets = [torch.randint(2, (16,), generator=draw) for _ in range(10)]

    def learnt(circuit: PolynomialCircuit, y: Tensor, epochs: int) -> bool:
        rule = ReverseDerivativeAscent(circuit)
        fit(rule, Batches(x, y, 1, seed=seed), epochs=epochs, progress=False)
        return bool((rule.predict(x).argmax(1) == y).all())

    return {"random functions of 4 bits learnt in one pass, table (%)": 100 * sum(
                learnt(evaluator(4), y, 1) for y in targets) / 10,
            "random functions of 4 bits learnt in 20 passes, sum of products (%)": 100 * sum(
                learnt(sum_of_products(4), y, 20) for y in targets[:2]) / 2}


def _chain(seed: int) -> dict[str, float]:
    """Return how a chain of two circuits learns a function of 6 bits, and its last one alone."""
    x = torch.tensor(list(product((0, 1), repeat=6)))
    y = x[:, :3].sum(1) % 2 ^ x[:, 3:].prod(1)
    torch.manual_seed(seed)
    first, last = evaluator(6, 3), evaluator(3)
    for circuit in (first, last):
        circuit.weight.random_(2)
    untaught = first(x)
    found = {}
    for name, network, a in (("both", nn.Sequential(first, deepcopy(last)), x),
                             ("control, first kept as drawn", last, untaught)):
        rule = ReverseDerivativeAscent(network)
        batches = Batches(a, y, 4, seed=seed)
        for _ in range(16):
            for part, wanted in batches:
                rule(part, wanted)
        found[f"accuracy on a function of 6 bits, chain of two circuits, {name} (%)"] = 100 * (
            rule.predict(a).argmax(1) == y).double().mean().item()
    return found


Bits = tuple[Tensor, Tensor, Tensor, Tensor]


def _iris(classes: int, seed: int) -> Bits:
    """Return the features as bits: x to train, y to train, x to test, y to test."""
    from sklearn.datasets import load_iris
    features, labels = map(torch.from_numpy, load_iris(return_X_y=True))
    low, high = features.aminmax(dim=0)
    bits, labels = (2 * features > low + high).long(), labels.long()
    order = torch.randperm(150, generator=torch.Generator().manual_seed(seed))
    places = [order[labels[order] == c] for c in range(classes)]
    train, test = (torch.cat([p[part] for p in places]) for part in (slice(25), slice(25, None)))
    return bits[train], labels[train], bits[test], labels[test]


def _digits(seed: int) -> Bits:
    split = digits(seed=seed)
    train, test = (adaptive_avg_pool2d(x, 3).flatten(1) for x in (split.x_train, split.x_test))
    middle = train.median(0).values
    return (train > middle).long(), split.y_train, (test > middle).long(), split.y_test


def _shuffled(split: Bits, seed: int) -> Bits:
    x, y, *test = split
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1000 + seed))
    return x, y[order], test[0], test[1]


def _one_pass(split: Bits, classes: int, codes: str, seed: int, every: int = 5) -> list[float]:
    """Return the test accuracy after every few samples of one pass."""
    x, y, x_test, y_test = split
    outputs = classes if codes == "one-hot" else (classes - 1).bit_length()
    rule = ReverseDerivativeAscent(
        evaluator(x.shape[1], outputs), num_classes=classes,
        codes="one-hot" if codes == "one-hot" else "binary")
    line = []
    for step, (a, b) in enumerate(Batches(x, y, 1, seed=seed), 1):
        rule(a, b)
        if step % every == 0:
            right = rule.predict(x_test).argmax(1) == y_test
            line.append(100 * right.double().mean().item())
    return line


def _ceiling(split: Bits) -> float:
    """Return the accuracy of the table that is best on the test samples themselves."""
    _, _, x, y = split
    addresses = (x * torch.tensor([8, 4, 2, 1])).sum(1)
    counts = torch.zeros(16, 3).index_put_((addresses, y), torch.ones(len(y)), accumulate=True)
    return 100 * float(counts.amax(1).sum()) / len(y)
