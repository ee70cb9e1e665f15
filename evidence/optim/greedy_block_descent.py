import statistics
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.nn import Parameter, functional

from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.optim import GreedyBlockDescent

SAMPLES, COORDINATES, BLOCK, ENOUGH, LIMIT = 300, 100, 5, 1e-6, 10_000
PENALTY, SPREAD = 10.0, 0.5
ORDERS: dict[Literal["gradient", "matrix"], tuple[str, ...]] = {
    "gradient": ("gauss_southwell_lipschitz", "gauss_southwell", "cyclic", "random"),
    "matrix": ("gauss_southwell_quadratic", "gauss_southwell_diagonal", "gauss_southwell", "cyclic",
               "random")}


@evidence(paper="003-041", claim="On L2-regularised logistic regression the better greedy rules "
          "need no more steps than Gauss-Southwell, which needs fewer than random blocks.",
          shortfall=("claim",
                     "In the mean of both updates the order is as claimed: 1903, 1935 and 4741 "
                     "steps, and 384, 396 and 651. For every seed it is not: with the gradient "
                     "update one seed of five needs 1643 steps where Gauss-Southwell needs 1590, "
                     "with the matrix update one needs 352 and 351. An earlier problem, with a "
                     "smaller penalty, had one such seed of five too. The better rules gain 2 to "
                     "3 %, and what is the best single step is not always the best path; the "
                     "bounds are about the single step."))
def greedy_block_descent(scale: Scale) -> Outcome:
    """Count the steps to a millionth of the start's suboptimality, for each rule and update."""
    seeds = range(5 if scale == "desk" else 20)
    steps: dict[tuple[str, str], list[int]] = {}
    curves: dict[str, Curve] = {}
    every = list(range(0, 301, 10))
    for update, rules in ORDERS.items():
        for rule in rules:
            runs = [_run(update, rule, seed) for seed in seeds]
            steps[update, rule] = [len(run) for run in runs]
            if update == "matrix":
                curves[rule.replace("_", "-")] = Curve(every, [
                    [run[min(k, len(run) - 1)] for k in every] for run in runs])
    orders = [(steps[update, rules[0]], steps[update, "gauss_southwell"], steps[update, "random"])
              for update, rules in ORDERS.items()]
    each = all(a <= b <= c and b < LIMIT for order in orders
               for a, b, c in zip(*order, strict=True))
    mean = [[statistics.fmean(values) for values in order] for order in orders]
    in_mean = [a <= b <= c and b < LIMIT for a, b, c in mean]
    return Outcome(
        verdict="shown" if each else "partly shown" if any(in_mean) else "not shown",
        setting={"problem": f"logistic regression of {SAMPLES} samples on {COORDINATES} features "
                 f"of unequal scale (exp of {SPREAD} times a normal number), weight of the penalty "
                 f"{PENALTY:.0f}, labels of a sparse linear model with a tenth of them turned",
                 "blocks": f"{BLOCK} consecutive coordinates",
                 "updates": "gradient / L_b and H_bb^-1 gradient, H = A^T A / 4 + penalty",
                 "limit": f"{LIMIT} steps"},
        figures={f"{update} update, {rule}: steps to {ENOUGH:g}": [float(k) for k in values]
                 for (update, rule), values in steps.items()},
        note="Shown means that for every seed and both updates the order is: the rule made for the "
             "update (Lipschitz, quadratic) at most Gauss-Southwell at most random. In the mean of "
             "one update at least is partly shown, and Gauss-Southwell must arrive within the "
             "limit. Before, with a penalty of 1, factors twice as spread and 3000 steps, no rule "
             "arrived with the gradient update; with the matrix update the means were 1679 "
             "(quadratic), 2208 (Gauss-Southwell), 2247 (random), in this order for four seeds of "
             "five, one of them at the limit. The picture is of the matrix update, log10 of the "
             "suboptimality relative to the start's.",
        curves=curves, axes=("step", "log10 of relative suboptimality"))


def _run(update: Literal["gradient", "matrix"], rule: str, seed: int) -> list[float]:
    """Return log10 of the relative suboptimality before each step until it is small enough."""
    generator = Generator().manual_seed(seed)
    scale = torch.randn(COORDINATES, generator=generator).double().mul(SPREAD).exp()
    A = torch.randn(SAMPLES, COORDINATES, generator=generator).double() * scale
    weights = torch.randn(COORDINATES, generator=generator).double()
    weights[torch.rand(COORDINATES, generator=generator) < 0.8] = 0
    turned = torch.rand(SAMPLES, generator=generator) < 0.1
    y = torch.where(turned, -1.0, 1.0).double() * (A @ weights).sign()
    x = Parameter(torch.zeros(COORDINATES).double())

    def loss() -> Tensor:
        return functional.softplus(-y * (A @ x)).sum() + PENALTY * x.square().sum() / 2

    least = _least(A, y)
    optimizer = GreedyBlockDescent(
        [x], blocks=BLOCK, select=rule, update=update,  # type: ignore[arg-type]
        bound=A.T @ A / 4 + PENALTY * torch.eye(COORDINATES).double(), generator=generator)
    found: list[float] = []
    start = float(loss().detach()) - least
    while len(found) < LIMIT:
        gap = max((float(optimizer.step(loss)) - least) / start, 1e-16)
        found.append(float(torch.tensor(gap).log10()))
        if gap <= ENOUGH:
            break
    return found


def _least(A: Tensor, y: Tensor) -> float:
    """Return the minimum, by Newton's method on all coordinates."""
    x = Parameter(torch.zeros(A.shape[1]).double())
    optimizer = GreedyBlockDescent([x], blocks=len(x), update="newton", select="cyclic")

    def loss() -> Tensor:
        return functional.softplus(-y * (A @ x)).sum() + PENALTY * x.square().sum() / 2

    return min(float(optimizer.step(loss)) for _ in range(25))
