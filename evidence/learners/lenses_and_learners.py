import random
from typing import Any

import torch
from torch import Tensor, nn

from evidence.learners._compare import difference
from netwright.evidence import Outcome, Scale, evidence
from netwright.formal.learners import Learner, Lens, learner, learner_to_symmetric, lens_to_learner

WIDTH = 6


@evidence(paper="002-111", claim="Asymmetric lenses embed in learners, and learners in symmetric "
          "lenses, by identity-on-objects symmetric monoidal functors.")
def lenses_and_learners(scale: Scale) -> Outcome:
    """Compare both embeddings of composites with composites of the embedded, on random ones."""
    trials, walks = (200, 40) if scale == "desk" else (2000, 400)
    seeds = range(5)
    found: dict[str, list[float]] = {}
    for seed in seeds:
        torch.manual_seed(seed)
        draw = random.Random(seed)
        into = [_into_learners() for _ in range(trials)]
        onward = [_into_symmetric(draw) for _ in range(walks)]
        values = {
            "lens to learner: largest difference, >>": max(chain for chain, _, _ in into),
            "lens to learner: largest difference, @": max(beside for _, beside, _ in into),
            "lens to learner: least difference of two lenses": min(other for *_, other in into),
            "learner to symmetric lens: largest difference, >>": max(a for a, _, _ in onward),
            "learner to symmetric lens: largest difference between the sides of the middle":
                max(b for _, b, _ in onward),
            "control, middle not read off again: least difference": min(c for *_, c in onward)}
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    names = list(found)
    exact = all(max(found[names[i]]) < 1e-10 for i in (0, 1, 3, 4))
    told_apart = min(found[names[2]]) > 1e-3 and min(found[names[5]]) > 1e-6
    return Outcome(
        verdict="shown" if exact and told_apart else "partly shown" if exact else "not shown",
        setting={"lenses": "get(a) = tanh(a G), put(a, b) = a P + b Q with random matrices, "
                 f"{WIDTH} wide, which keep no lens law",
                 "learners": "linear layer and tanh, rate 0.1, two in a row",
                 "walks": "20 random inputs, two from the right, then from either side",
                 "trials": f"{trials} pairs of lenses and {walks} pairs of learners for each seed",
                 "precision": "float64"},
        figures=found,
        note="Shown if both embeddings of a composite are within 1e-10 of the composite of the "
             "embedded, different lenses give learners that differ by more than 1e-3 (faithful), "
             "and the control differs. Where a learner has been changed from the right, what lies "
             "between two of them must be computed again for the composite to be the learner's: "
             "the control leaves it as it is.")


def _random_lens() -> Lens:
    G, P, Q = (torch.randn(WIDTH, WIDTH, dtype=torch.float64) / WIDTH ** 0.5 for _ in range(3))
    return Lens(lambda a: torch.tanh(a @ G), lambda a, b: a @ P + b @ Q)


def _point() -> Tensor:
    return torch.randn(WIDTH, dtype=torch.float64)


def _behaviour(net: Learner, a: Any, b: Any) -> tuple[Any, Any]:
    return net(a), net.request(net.params, a, b)


def _into_learners() -> tuple[float, float, float]:
    f, g = _random_lens(), _random_lens()
    a, b = _point(), _point()
    F, G = lens_to_learner(f), lens_to_learner(g)
    chain = difference(_behaviour(lens_to_learner(f >> g), a, b), _behaviour(F >> G, a, b))
    pair, wanted = (a, _point()), (b, _point())
    beside = difference(_behaviour(lens_to_learner(f @ g), pair, wanted),
                        _behaviour(F @ G, pair, wanted))
    return chain, beside, difference(_behaviour(F, a, b), _behaviour(G, a, b))


def _into_symmetric(draw: random.Random) -> tuple[float, float, float]:
    f, g = _layer(), _layer()
    a = _point()
    whole = learner_to_symmetric(f >> g)
    first, second = learner_to_symmetric(f), learner_to_symmetric(g)
    parts = first >> second
    head: Any = ((f.params, g.params), a)
    heads: Any = ((f.params, a), (g.params, f(a)))
    stale: Any = heads
    moves = [("backward", _point()), ("backward", _point())]  # where the control must differ
    moves += [(draw.choice(["forward", "backward"]), _point()) for _ in range(18)]
    seen, same, other = [], [], []
    for way, value in moves:
        head, found = getattr(whole, way)(head, value)
        seen.append(found)
        heads, found = getattr(parts, way)(heads, value)
        same.append(found)
        if way == "forward":
            stale, found = parts.forward(stale, value)
        else:
            t, b = second.backward(stale[1], value)
            s, found = first.backward(stale[0], b)
            stale = s, t
        other.append(found)
    middle = difference(heads[1][1], f.implement(*heads[0]))
    return difference(seen, same), middle, difference(seen, other)


def _layer() -> Learner:
    return learner(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double())
