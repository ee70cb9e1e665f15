from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from evidence.learners._compare import difference, digits_lost
from netwright.data import Batches, digits
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.formal.learners import Game, Learner, as_game, learner

RATE, BATCH = 0.2, 32


@evidence(paper="002-149", claim="Every supervised network without feedback is an open game in a "
          "canonical way, whose best responses are its gradient descent.")
def learners_as_games(scale: Scale) -> Outcome:
    """Compare the game of a network with the game that its layers' games make, and with descent."""
    seeds, trials, epochs = (3, 50, 3) if scale == "desk" else (5, 500, 20)
    figures: dict[str, list[float]] = {}
    lines = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        chains = max(_chain(2 + trial % 4) for trial in range(trials))
        beside = max(_beside() for _ in range(trials))
        line, ours, theirs = _play(seed, epochs)
        lines.append(line)
        for name, value in {
                "as_game(f >> g ...) against as_game(f) >> as_game(g) ...: largest difference":
                    chains,
                "as_game(f @ g) against as_game(f) @ as_game(g): largest difference": beside,
                f"best responses against SGD, {epochs} epochs: largest difference of a weight":
                    max(line),
                "test accuracy, best responses (%)": ours, "test accuracy, SGD (%)": theirs,
        }.items():
            figures.setdefault(name, []).append(value)
    functor, descent = [max(figures[name]) < 1e-10 for name in list(figures)[:2]], max(
        map(max, lines)) < 1e-10
    return Outcome(
        verdict="shown" if all(functor) and descent else
                "partly shown" if any(functor) or descent else "not shown",
        setting={"random games": f"{trials} chains of 2 to 5 layers of tanh for each seed and as "
                 "many pairs; the outcome depends on the play, and beside each other on both plays",
                 "compared": "play, coplay and best response", "descent": "64-32-10 on digits, the "
                 f"players of two layers answer each batch of {BATCH}; squared error",
                 "precision": "float64"},
        figures=figures,
        note="Shown if all differences are below 1e-10. A game's best response is a function here, "
             "since one step of descent is; the relation of the paper is its graph.",
        curves={"best responses against SGD": Curve(
            list(range(1, len(lines[0]) + 1)),
            [[digits_lost(value) for value in line] for line in lines])},
        axes=("step", "log10 of the largest difference of a weight"))


def _wish(wanted: Tensor, play: Tensor) -> Tensor:
    """Return the same answer to every play."""
    return wanted


def _layer(inputs: int, outputs: int) -> Learner:
    return learner(nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh()).double(), rate=RATE)


def _compare(one: Game, other: Game, strategies: Any, x: Any, r: Any, outcome: Any) -> float:
    return difference([one.play(strategies, x), one.coplay(strategies, x, r),
                       one.respond(strategies, x, outcome)],
                      [other.play(strategies, x), other.coplay(strategies, x, r),
                       other.respond(strategies, x, outcome)])


def _chain(depth: int) -> float:
    widths = [int(width) for width in torch.randint(2, 7, (depth + 1,))]
    layers = [_layer(a, b) for a, b in pairwise(widths)]
    net, game = layers[0], as_game(layers[0])
    for layer in layers[1:]:
        net, game = net >> layer, game >> as_game(layer)
    x, r = torch.randn(3, widths[0]).double(), torch.randn(3, widths[-1]).double()
    return _compare(as_game(net), game, net.params, x, r, lambda y: r + y.flip(0))


def _beside() -> float:
    f, g = _layer(3, 4), _layer(2, 5)
    both = f @ g
    x, r = ((torch.randn(3, 3).double(), torch.randn(3, 2).double()),
            (torch.randn(3, 4).double(), torch.randn(3, 5).double()))

    def outcome(y: Any) -> Any:
        return r[0] + y[1].sum(), r[1] - y[0].sum()

    return _compare(as_game(both), as_game(f) @ as_game(g), both.params, x, r, outcome)


def _play(seed: int, epochs: int) -> tuple[list[float], float, float]:
    """Return the largest difference from SGD after each step, and both accuracies in the end."""
    torch.manual_seed(seed)
    layers = [nn.Sequential(nn.Linear(64, 32), nn.Tanh()).double(), nn.Linear(32, 10).double()]
    players = [learner(layer, rate=RATE / BATCH) for layer in layers]
    game = as_game(players[0]) >> as_game(players[1])
    strategies = players[0].params, players[1].params
    whole = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(whole.parameters(), RATE / BATCH)
    split = digits()
    batches = Batches(split.x_train.flatten(1).double(), split.y_train, BATCH, seed=seed)
    line = []
    for _ in range(epochs):
        for x, y in batches:
            wanted = one_hot(y, 10).double()
            strategies = game.respond(strategies, x, partial(_wish, wanted))
            optimizer.zero_grad()
            ((whole(x) - wanted).square().sum() / 2).backward()
            optimizer.step()
            line.append(difference(strategies, list(whole.parameters())))
    x = split.x_test.flatten(1).double()
    ours, theirs = [100 * (scores.argmax(1) == split.y_test).double().mean().item()
                    for scores in (game.play(strategies, x), whole(x))]
    return line, ours, theirs
