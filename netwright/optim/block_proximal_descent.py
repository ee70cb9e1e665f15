import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from netwright import checks
from netwright.catalogue.facets import method

__all__ = ["BlockProximalDescent", "stationarity_gap"]

Project = Callable[[Tensor], Tensor]
Constraint = Literal["none", "nonnegative", "simplex"] | Project


@method(
    "optimizer",
    papers=["003-125"],
    search={"prox_weight": (0.1, 10.0), "inner_steps": [10, 100]},
    variants={"inexact": {"inner_steps": 5},
              "nonnegative": {"inner_steps": 5, "constraint": "nonnegative"}},
)
class BlockProximalDescent(Optimizer):
    """Minimise over one parameter after another, each held to where it was by a squared distance.

    A step is one sweep over the parameters, theta_1 to theta_m:

    theta_i <- argmin over Theta_i of f(theta_1, .., theta_m) + prox_weight/2 |theta_i - before|²

    by projected gradient steps of Barzilai and Borwein's length, shortened until the objective
    falls, until |P(theta_i - slope) - theta_i| is at most `tolerance` / (sweep + 1), with P the
    projection onto Theta_i, or `inner_steps` are done. A small tolerance makes the solves exact;
    with a large one they are inexact, but their errors can be summed up over the sweeps, which is
    what the paper asks of them. f never rises.

    `constraint` names the closed convex set Theta_i: `"none"`, `"nonnegative"`, `"simplex"` (each
    row of the last axis adds up to 1 and is not negative), or a function that projects onto it.
    Parameter groups may each have another `constraint`, `prox_weight`, `tolerance` or
    `inner_steps`; a group may also have `solve`, a function of (parameter, prox_weight) that
    returns the exact minimum. Parameters are projected when the optimizer is made.

    f may be nonconvex. With f smooth, `stationarity_gap` squared falls as 1/k: an
    epsilon-stationary point needs about 1/epsilon sweeps.

    `step(closure)` takes a function that returns the loss with its graph, without a call of
    `backward`; it returns the loss before the sweep.

    Args:
        params: what is minimised over, or groups of it.
        prox_weight: what a move from where a parameter was costs.
        constraint: "none", "nonnegative", "simplex" or a projection.
        tolerance: of the first sweep's solves.
        inner_steps: the most of a solve.

    Raises:
        ValueError: a number is out of range.
        UnknownName: `constraint` is none of those that are known.

    Paper: Kwon, Lyu, 2023, Complexity of Block Coordinate Descent with Proximal Regularization and
    Applications to Wasserstein CP-dictionary Learning. Its algorithm for Wasserstein distances,
    which works in the dual, is not here.

    >>> A, B = Parameter(torch.rand(6, 2)), Parameter(torch.rand(2, 5))
    >>> V = torch.rand(6, 2) @ torch.rand(2, 5)
    >>> loss = lambda: (V - A @ B).square().sum()
    >>> optimizer = BlockProximalDescent([A, B], constraint="nonnegative")
    >>> losses = [float(optimizer.step(loss)) for _ in range(20)]
    >>> losses[-1] < losses[0] / 10, bool((A >= 0).all())
    (True, True)
    """

    differentiates = True  # `step` is given a function that returns the loss with its graph

    def __init__(self, params: Iterable[Parameter] | Iterable[dict[str, Any]], *,
                 prox_weight: float = 1.0, constraint: Constraint = "none",
                 tolerance: float = 1e-3, inner_steps: int = 100) -> None:
        super().__init__(params, {"prox_weight": prox_weight, "constraint": constraint,
                                  "tolerance": tolerance, "inner_steps": inner_steps,
                                  "solve": None, "sweep": 0})
        for group in self.param_groups:
            _check(group)
        with torch.no_grad():
            for group in self.param_groups:
                project = _projection(group["constraint"])
                for p in group["params"]:
                    p.copy_(project(p))
                    self.state[p]["length"] = 1.0

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """Minimise over each parameter in turn and return the loss before."""
        if closure is None:
            raise ValueError("closure must be a function that returns the loss, got None; the "
                             "optimizer differentiates it itself")
        first = closure().detach()
        for group in self.param_groups:
            for p in group["params"]:
                if not p.requires_grad:
                    continue
                if group["solve"] is not None:
                    p.copy_(group["solve"](p, group["prox_weight"]))
                else:
                    self._minimise(closure, p, group)
            group["sweep"] += 1
        return first

    def _minimise(self, closure: Callable[[], Tensor], p: Parameter, group: dict[str, Any]) -> None:
        project, weight = _projection(group["constraint"]), group["prox_weight"]
        before, state = p.clone(), self.state[p]
        enough = group["tolerance"] / (group["sweep"] + 1)

        def look() -> tuple[Tensor, Tensor]:
            """Return the block's objective at p, and its slope."""
            with torch.enable_grad():
                f = closure()
                (slope,) = torch.autograd.grad(f, p, materialize_grads=True)
            gone = p - before
            return f.detach() + weight / 2 * gone.square().sum(), slope + weight * gone

        here, slope = look()
        for _ in range(group["inner_steps"]):
            start = p.clone()
            if float((project(start - slope) - start).norm()) <= enough:
                return
            d = project(start - state["length"] * slope) - start
            fall, t = (slope * d).sum(), 1.0
            # Where rounding hides the fall of f, its slope at the end has to tell.
            allowed = 8 * torch.finfo(here.dtype).eps * here.abs()
            while True:
                p.copy_(start + t * d)
                there, after = look()
                if there <= here + 1e-4 * t * fall or (
                        there <= here + allowed and (after * d).sum() <= -0.9 * fall):
                    break
                t /= 2
                if t < 1e-20:
                    p.copy_(start)
                    if there.isfinite():
                        return  # as near as the numbers come
                    raise ArithmeticError("the loss is not finite near this point; check that it "
                                          "is smooth, and the same when called again")
            curvature = float((d * (after - slope)).sum())
            state["length"] = min(1e10, max(1e-10, t * float(d.square().sum()) / curvature)
                                  ) if curvature > 0 else 1.0
            here, slope = there, after


@method("companion", papers=["003-125"])
def stationarity_gap(closure: Callable[[], Tensor], params: Iterable[Tensor], *,
                     constraint: Constraint | Mapping[Tensor, Constraint] = "none") -> float:
    """Return how much the loss could still fall to first order within a distance of 1.

    sup <-grad f, theta' - theta> over theta' in Theta with |theta' - theta| <= 1: 0 at a stationary
    point, the norm of the gradient where nothing constrains. With t such that the projection P of
    theta - t grad f is at distance 1, or t as large as makes no difference, theta' is that point.

    `closure` returns the loss with its graph. `constraint` is one for all, or one for each.

    Paper: that of `BlockProximalDescent`.

    >>> x = Parameter(torch.tensor([0.0, 2.0]))
    >>> round(stationarity_gap(lambda: x.sum(), [x], constraint="nonnegative"), 3)  # x[1] falls
    1.0
    """
    params = list(params)
    kinds = [constraint.get(p, "none") if isinstance(constraint, Mapping) else constraint
             for p in params]
    with torch.enable_grad():
        slopes = torch.autograd.grad(closure(), params, materialize_grads=True)
    with torch.no_grad():
        projections = [_projection(kind) for kind in kinds]

        def moved(t: float) -> list[Tensor]:
            return [project(p - t * slope) - p for project, p, slope
                    in zip(projections, params, slopes, strict=True)]

        def distance(t: float) -> float:
            return math.sqrt(sum(float(d.double().square().sum()) for d in moved(t)))

        norm = math.sqrt(sum(float(slope.double().square().sum()) for slope in slopes))
        if norm == 0:
            return 0.0
        low, high = 0.0, 1 / norm  # so that without a constraint the distance is 1
        while distance(high) < 1 and high < 1e12 / norm:
            low, high = high, 4 * high
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (low, middle) if distance(middle) > 1 else (middle, high)
        return -sum(float((slope * d).sum()) for slope, d in zip(slopes, moved(high), strict=True))


def _projection(constraint: Constraint) -> Project:
    if callable(constraint):
        return constraint
    if constraint == "nonnegative":
        return lambda value: value.clamp_min(0)
    return _to_simplex if constraint == "simplex" else torch.clone


def _to_simplex(value: Tensor) -> Tensor:
    """Return the nearest point of which each row adds up to 1 and is not negative."""
    ordered = value.sort(-1, descending=True).values
    count = torch.arange(1, value.shape[-1] + 1, device=value.device, dtype=value.dtype)
    shifts = (ordered.cumsum(-1) - 1) / count
    kept = (ordered > shifts).sum(-1, keepdim=True)
    return (value - shifts.gather(-1, kept - 1)).clamp_min(0)


def _check(group: dict[str, Any]) -> None:
    kind = group["constraint"]
    if not callable(kind):
        checks.one_of(["none", "nonnegative", "simplex"], constraint=kind)
    checks.at_least(0, prox_weight=group["prox_weight"], tolerance=group["tolerance"],
                    advice="try the default")
    checks.count(1, inner_steps=group["inner_steps"],
                 advice="one is a projected gradient step for each parameter")
