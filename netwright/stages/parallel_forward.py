"""Forward evaluation as a system of equations, solved for all layers or time steps at once."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from netwright import checks
from netwright.catalogue.facets import method
from netwright.numerics.fixed_point import check_iterations, settled
from netwright.runtime.modes import evaluating
from netwright.stages._sequential import SequentialStage
from netwright.stages.find import stages
from netwright.stages.stage import Stage, Stages

__all__ = ["parallel_forward", "parallel_recurrence"]

Method = Literal["jacobi", "gauss_seidel", "hybrid"]
METHODS = ("jacobi", "gauss_seidel", "hybrid")


@method(
    "execution",
    papers=["003-015"],
    saves=["inference time"],
    needs=["a chain of stages"],
    keeps_function=True,
)
@torch.no_grad()
def parallel_forward(network: nn.Module | Stages, x: Any, *, example: Any = None,
                     method: Method = "jacobi", blocks: int = 1, residual: bool = False,
                     tolerance: float = 0.0, max_iterations: int | None = None,
                     stacked: bool = True) -> tuple[Tensor, int]:
    """Return the network's output and the steps that it took, one after another.

    h_i = f_i(h_{i-1}), i = 1..m, is solved for all i at once:  h_i^0 = h_0;
    h_i^{k+1} = f_i(h_{i-1}^k) in `method="jacobi"`. After k steps h_1..h_k are what running the
    stages in turn gives, and are left alone; so m steps are always enough, and as many give the
    network's output to rounding. Fewer do where no h_i moves more than `tolerance`, or after
    `max_iterations`, which gives an approximation.

    With `residual`, what each stage adds is solved for:  h_i^{k+1} = h_0 + sum_{j<=i}
    (f_j(h_{j-1}^k) - h_{j-1}^k), which takes few steps where stages are the identity and a little
    more, and the form above takes all. Where stages forget what they were given, the form above
    takes fewer.

    `"gauss_seidel"` cuts the stages into `blocks` and solves one after another, each beginning
    with what the one before ended with. `"hybrid"` runs all blocks at once, the stages of each in
    turn, so that an iteration takes as many steps as a block has stages.

    What is solved is each run of stages that are alike (the same modules, weights of the same
    shapes) and keep the signal's shape; every other stage is run in its turn, a step each. Alike
    stages of an `nn.Sequential` are evaluated together, by one operation for all where
    `stacked` is True; False evaluates them one by one, for stages that `torch.vmap` cannot take.
    The network is in eval mode, and no graph is kept.

    Args:
        network: what is run.
        x: its input.
        example: an input to find the stages by, where they cannot be read off the network.
        method: "jacobi", "gauss_seidel" or "hybrid".
        blocks: that the stages are cut into, for the last two.
        residual: whether what each stage adds is solved for.
        tolerance: the most that a number may still move at the end.
        max_iterations: after which the output is taken as it is.
        stacked: whether alike stages are evaluated by one operation.

    Shapes: x as the network takes it; h_i (batch, *size), equal in a run.

    Raises:
        UnknownName: `method` is none of those above.
        ValueError: `blocks` or `max_iterations` is below 1, or `tolerance` is negative.

    Paper: Song, Meng, Liao, Ermon, 2021, Accelerating Feedforward Computation via Parallel
    Nonlinear Equation Solving.

    >>> layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(30)]
    >>> network, x = nn.Sequential(*layers), torch.randn(5, 8)
    >>> y, steps = parallel_forward(network, x, tolerance=1e-6)
    >>> torch.allclose(y, network(x), atol=1e-5), steps < 30
    (True, True)
    """
    _check(method, blocks, tolerance, max_iterations)
    net = stages(network, example)
    with evaluating(net.model):
        context, h, steps, i = net.context(x), x, 0, 0
        while i < len(net):
            run = _run_from(net, i)
            h_next = net[i](h, context)
            steps, i = steps + 1, i + 1
            if len(run) > 2 and isinstance(h, Tensor) and h.shape == h_next.shape:
                # The first is done; the others begin with what it gave.
                rest = run[1:]
                update = _together(rest) if stacked and all(
                    isinstance(stage, SequentialStage) for stage in rest) else _in_turn(
                        rest, context)
                states = torch.stack([h_next] * len(rest))
                states, taken = _solve(update, h_next, states, method, blocks, residual, tolerance,
                                       max_iterations)
                h_next, steps, i = states[-1], steps + taken, i + len(rest)
            h = h_next
    return h, steps


@method(
    "execution",
    papers=["003-015"],
    saves=["inference time"],
    needs=["a recurrent network"],
    keeps_function=True,
)
@torch.no_grad()
def parallel_recurrence(cell: Callable[[Tensor, Any], Any], x: Tensor, start: Any, *,
                        method: Method = "jacobi", blocks: int = 1, residual: bool = False,
                        tolerance: float = 0.0,
                        max_iterations: int | None = None) -> tuple[Any, int]:
    """Return a recurrent cell's states at all time steps, and the steps that it took.

    h_t = cell(x_t, h_{t-1}), t = 1..T, is solved for all t at once, as `parallel_forward` solves a
    run of stages: all times are rows of one call of the cell, in eval mode where it is a module.

    Args:
        cell: of (x_t, h_{t-1}), returns h_t.
        x: the inputs of all times.
        start: the state before the first.
        method: "jacobi", "gauss_seidel" or "hybrid".
        blocks: that the times are cut into, for the last two.
        residual: whether what each time adds is solved for.
        tolerance: the most that a number may still move at the end.
        max_iterations: after which the states are taken as they are.

    Shapes: x (T, batch, inputs); start, or each of its tensors, (batch, units); the states
    (T, batch, units), in a tuple where `start` is one, as an `nn.LSTMCell` has it.

    Raises:
        UnknownName: `method` is none of those of `parallel_forward`.
        ValueError: `blocks` or `max_iterations` is below 1, or `tolerance` is negative.

    Paper: that of `parallel_forward`.

    >>> cell, x = nn.GRUCell(4, 8), torch.randn(50, 2, 4)
    >>> states, steps = parallel_recurrence(cell, x, torch.zeros(2, 8), tolerance=1e-6)
    >>> states.shape, steps < 50
    (torch.Size([50, 2, 8]), True)
    """
    _check(method, blocks, tolerance, max_iterations)
    single = isinstance(start, Tensor)
    parts = [start] if single else list(start)
    sizes = [part.shape[-1] for part in parts]

    def update(before: Tensor, first: int) -> Tensor:
        rows = before.flatten(0, 1)
        state = rows if single else tuple(rows.split(sizes, -1))
        found = cell(x[first:first + len(before)].flatten(0, 1), state)
        return (found if single else torch.cat(list(found), -1)).unflatten(0, before.shape[:2])

    begin = torch.cat(parts, -1)
    with evaluating(cell if isinstance(cell, nn.Module) else nn.Identity()):
        states, steps = _solve(update, begin, begin.expand(len(x), *begin.shape).clone(), method,
                               blocks, residual, tolerance, max_iterations)
    return (states if single else tuple(states.split(sizes, -1))), steps


# What returns the states after stages first, first + 1, ..., given those before them.
_Update = Callable[[Tensor, int], Tensor]


def _check(method: str, blocks: int, tolerance: float, max_iterations: int | None) -> None:
    checks.one_of(METHODS, method=method)
    checks.count(1, blocks=blocks)
    check_iterations(tolerance, max_iterations)


def _solve(update: _Update, start: Tensor, states: Tensor, method: str, blocks: int,
           residual: bool, tolerance: float, max_iterations: int | None) -> tuple[Tensor, int]:
    """Return the states that solve the chain which `start` begins, and the steps one by one."""
    n = len(states)
    ends = [*range(0, n, -(-n // blocks)), n]  # blocks of one size, the last one of what is left
    if method == "hybrid":
        return _blocks_at_once(update, start, states, ends, residual, tolerance, max_iterations)
    if method == "jacobi":
        ends = [0, n]
    steps = 0
    for begin, end in pairwise(ends):
        before = start if begin == 0 else states[begin - 1]
        if begin:
            states[begin:end] = before
        for k in range(min(end - begin, max_iterations or n)):
            # Those before begin + k have their last values.
            known = before if k == 0 else states[begin + k - 1]
            above = torch.cat([known.unsqueeze(0), states[begin + k:end - 1]])
            found = update(above, begin + k)
            if residual:
                found[1:] = found[0] + (found - above)[1:].cumsum(0)
            still = settled(found, states[begin + k:end], tolerance)
            states[begin + k:end] = found
            steps += 1
            if still:
                break
    return states, steps


def _blocks_at_once(update: _Update, start: Tensor, states: Tensor, ends: Sequence[int],
                    residual: bool, tolerance: float,
                    max_iterations: int | None) -> tuple[Tensor, int]:
    steps = 0
    for k in range(min(len(ends) - 1, max_iterations or len(states))):
        before, length = states.clone(), max(b - a for a, b in pairwise(ends[k:]))
        for j in range(length):
            # Together on a machine with room for all blocks; each by itself here.
            for begin, end in pairwise(ends[k:]):
                i = begin + j
                if i < end:
                    above = start if i == 0 else before[i - 1] if i == begin else states[i - 1]
                    states[i:i + 1] = update(above.unsqueeze(0), i)
        steps += length
        shift = torch.zeros_like(start)
        for begin, end in pairwise(ends[k:]):
            if residual:
                if begin > ends[k]:  # its start moves to where the block before now ends
                    shift = states[begin - 1] - before[begin - 1]
                states[begin:end] += shift
        if settled(states, before, tolerance):
            break
    return states, steps


def _run_from(net: Stages, i: int) -> list[Stage]:
    """Return stage `i` and those after it that are alike, in order."""
    run = [net[i]]
    for j in range(i + 1, len(net)):
        a, b = net[i], net[j]
        if type(a) is not type(b) or len(a.modules) != len(b.modules) or a.loose or b.loose \
                or not all(map(_alike, a.modules, b.modules)):
            break
        run.append(b)
    return run


def _alike(a: nn.Module, b: nn.Module) -> bool:
    """Return whether two modules differ in the values of their weights and buffers alone."""
    def plain(module: nn.Module) -> dict[str, Any]:
        return {name: value for name, value in vars(module).items() if not name.startswith("_")}

    if type(a) is not type(b) or repr(plain(a)) != repr(plain(b)):
        return False
    tensors, others = ({name: None if t is None else (t.shape, t.dtype) for name, t in
                        [*m._parameters.items(), *m._buffers.items()]} for m in (a, b))
    inside, other_inside = dict(a.named_children()), dict(b.named_children())
    return tensors == others and inside.keys() == other_inside.keys() and all(
        _alike(inside[name], other_inside[name]) for name in inside)


def _in_turn(run: Sequence[Stage], context: Any) -> _Update:
    def update(before: Tensor, first: int) -> Tensor:
        return torch.stack([stage(h, context) for stage, h in
                            zip(run[first:], before, strict=False)])
    return update


def _together(run: Sequence[Stage]) -> _Update:
    """Return what evaluates alike stages by one operation for all."""
    parts = [nn.Sequential(*stage.modules) for stage in run]
    weights, buffers = stack_module_state(parts)

    def one(weights: dict[str, Tensor], buffers: dict[str, Tensor], h: Tensor) -> Tensor:
        out: Tensor = functional_call(parts[0], {**weights, **buffers}, (h,))
        return out

    every = vmap(one)

    def update(before: Tensor, first: int) -> Tensor:
        last = first + len(before)
        return every({name: w[first:last] for name, w in weights.items()},
                     {name: b[first:last] for name, b in buffers.items()}, before)
    return update
