from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy

from evidence.learners._compare import difference
from netwright.data import Batches, digits
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.formal.learners import Stateful, d_stateful, delayed_trace
from netwright.measure._allocations import Allocations, peaks

HIDDEN = 12
TIMES = (16, 32, 64, 128, 256)


@evidence(paper="001-161", claim="The derivative of a stateful network is computed without "
          "unrolling it, and the chain rule and Schwartz's theorem hold.")
def causal_derivatives(scale: Scale) -> Outcome:
    """Compare the stateful derivative with autograd through the unrolled network; and memory."""
    seeds, trials, steps = (3, 20, 30) if scale == "desk" else (5, 200, 300)
    figures: dict[str, list[float]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        found = [_laws(trial) for trial in range(trials)]
        apart, accuracy, control = _train(seed, steps)
        for name, value in {
                "derivative along a direction: largest difference from autograd": max(
                    laws[0] for laws in found),
                "chain rule: largest difference": max(laws[1] for laws in found),
                "Schwartz's theorem: largest difference": max(laws[2] for laws in found),
                f"digits, {steps} steps: largest difference of a weight from BPTT": apart,
                f"digits, {steps} steps: test accuracy (%)": accuracy,
                "control, tangents of states dropped: least distance from the gradient, relative":
                    control}.items():
            figures.setdefault(name, []).append(value)
    memory = {name: [float(run(time)) for time in TIMES] for name, run in
              (("stateful derivative", _streamed), ("backpropagation through time", _unrolled))}
    for name, values in memory.items():
        figures[f"peak bytes for {TIMES[-1]} times, {name}"] = [values[-1]]
        figures[f"peak bytes for {TIMES[-1]} times over those for {TIMES[0]}, {name}"] = [
            values[-1] / values[0]]
    names = list(figures)
    exact = all(max(figures[name]) < 1e-6 for name in names[:4]) and min(figures[names[5]]) > 0.01
    flat = memory["stateful derivative"][-1] < 1.05 * memory["stateful derivative"][0]
    return Outcome(
        verdict="shown" if exact and flat else "partly shown" if exact or flat else "not shown",
        setting={"random networks": f"{trials} Elman and GRU cells of 5 units with a readout for "
                 "each seed, 4 to 19 times; for the chain rule a second one behind",
                 "digits": f"rows as time, {HIDDEN} Elman units, batches of 64, Adam at 0.01; the "
                 "gradient from one stateful derivative for each parameter, by vmap",
                 "memory": "one direction, 32 units, batch 32, outputs added up as they come",
                 "precision": "float64"},
        figures=figures,
        note="Shown if all four differences are below 1e-6, the control's gradient is off by more "
             "than 1 %, and the memory of the stateful derivative grows by less than 5 % from 16 "
             "to 256 times. A gradient asks for one direction for each parameter, so what is saved "
             "in memory is paid in arithmetic.",
        curves={name: Curve(TIMES, [[value / 1e6 for value in values]])
                for name, values in memory.items()},
        axes=("times", "peak memory (MB)"))


def _network(cell: nn.Module, readout: nn.Module, state: Tensor) -> Stateful:
    def f(a: Any, s: Any) -> tuple[Any, Any]:
        s = cell(a, s)
        return readout(s), s
    return delayed_trace(f, state)


def _random_network(trial: int, inputs: int) -> Stateful:
    cell = (nn.GRUCell if trial % 2 else nn.RNNCell)(inputs, 5).double()
    return _network(cell, nn.Linear(5, 2).double(), torch.zeros(3, 5).double())


def _laws(trial: int) -> tuple[float, float, float]:
    """Return how far a random network's derivative is from autograd's and from two theorems."""
    f, g = _random_network(trial, 3), _random_network(trial // 2, 2)
    x, u, v, none = (torch.randn(4 + trial % 16, 3, 3).double() for _ in range(4))
    d = d_stateful(f)
    weight, leaf = torch.randn_like(f(x)), x.clone().requires_grad_()
    (backward,) = torch.autograd.grad((f(leaf) * weight).sum(), leaf)
    along = (d((x, u)) * weight).sum() - (backward * u).sum()
    chain = difference(d_stateful(f >> g)((x, u)), d_stateful(g)((f(x), d((x, u)))))
    none.zero_()
    second = d_stateful(d)
    schwartz = difference(second(((x, u), (v, none))), second(((x, v), (u, none))))
    return abs(along.item()), chain, schwartz


def _train(seed: int, steps: int) -> tuple[float, float, float]:
    """Return the largest difference from BPTT, the accuracy, and how far off the control is."""
    torch.manual_seed(seed)
    split = digits()
    cell, readout = nn.RNNCell(8, HIDDEN).double(), nn.Linear(HIDDEN, 10).double()
    network = nn.ModuleDict({"cell": cell, "readout": readout})
    params = {name: p.detach().clone() for name, p in network.named_parameters()}
    ours = torch.optim.Adam(params.values(), 0.01)
    theirs = torch.optim.Adam(network.parameters(), 0.01)
    batches = Batches(split.x_train.view(-1, 8, 8).double(), split.y_train, 64, seed=seed,
                      drop_last=True)
    distances: list[float] = []
    off = []
    while len(distances) < steps:
        for x, y in batches:
            rows, start = x.transpose(0, 1), torch.zeros(len(x), HIDDEN).double()
            slopes = _gradient(network, params, rows, start, y, forget=False)
            control = _gradient(network, params, rows, start, y, forget=True)
            off.append(_distance(control, slopes))
            for name, slope in slopes.items():
                params[name].grad = slope
            ours.step()
            theirs.zero_grad()
            cross_entropy(_network(cell, readout, start)(rows)[-1], y).backward()
            theirs.step()
            distances.append(difference(params, dict(network.named_parameters())))
            if len(distances) == steps:
                break
    test = split.x_test.view(-1, 8, 8).double().transpose(0, 1)
    network.load_state_dict(params)
    scores = _network(cell, readout, torch.zeros(test.shape[1], HIDDEN).double())(test)[-1]
    accuracy = 100 * (scores.argmax(1) == split.y_test).double().mean().item()
    return max(distances), accuracy, min(off)


def _distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the distance of two gradients over the length of the second."""
    first, second = (torch.cat([part.flatten() for part in found.values()]) for found in (a, b))
    return float((first - second).norm() / second.norm())


def _gradient(network: nn.ModuleDict, params: dict[str, Tensor], rows: Tensor, start: Tensor,
              y: Tensor, forget: bool) -> dict[str, Tensor]:
    """Return the gradient from stateful derivatives, one direction for each parameter."""
    def f(a: Any, s: Any) -> tuple[Any, Any]:
        p, x = a
        cell = {name[5:]: value for name, value in p.items() if name.startswith("cell.")}
        readout = {name[8:]: value for name, value in p.items() if name.startswith("readout.")}
        s = functional_call(network["cell"], cell, (x, s))
        return functional_call(network["readout"], readout, (s,)), s

    d = d_stateful(delayed_trace(f, start))
    sizes = [p.numel() for p in params.values()]
    basis = torch.eye(sum(sizes), dtype=torch.float64).split(sizes, 1)
    directions = {name: part.unflatten(1, p.shape) for (name, p), part in
                  zip(params.items(), basis, strict=True)}

    def change(direction: dict[str, Tensor]) -> Tensor:
        state, last = d.state, torch.zeros(())
        for x in rows:
            if forget:
                state = state[0], torch.zeros_like(start)
            state, last = d.step(state, ((params, x), (direction, torch.zeros_like(x))))
        return last

    state = start
    for x in rows:
        scores, state = f((params, x), state)
    slope = torch.softmax(scores, 1)
    slope[torch.arange(len(y)), y] -= 1
    flat = torch.einsum("dnc,nc->d", vmap(change, chunk_size=128)(directions), slope / len(y))
    return {name: part.view_as(p) for (name, p), part in
            zip(params.items(), flat.split(sizes), strict=True)}


def _bench() -> tuple[nn.Module, nn.Module, Tensor]:
    return (nn.RNNCell(8, 32).double(), nn.Linear(32, 4).double(), torch.zeros(32, 32).double())


def _peak(run: Callable[[], object]) -> int:
    run()
    allocations = Allocations()
    with allocations:
        run()
    return peaks(allocations.events, set())[0]


def _streamed(time: int) -> int:
    """Return the peak bytes of the derivative of the summed output along one direction."""
    d = d_stateful(_network(*_bench()))

    def run() -> Tensor:
        state, total = d.state, torch.zeros(()).double()
        with torch.no_grad():
            for _ in range(time):
                x = torch.ones(32, 8).double()
                state, change = d.step(state, (x, x))
                total = total + change.sum()
        return total

    return _peak(run)


def _unrolled(time: int) -> int:
    """Return the peak bytes of the same number by backpropagation through time."""
    network = _network(*_bench())

    def run() -> Tensor:
        state, total, inputs = network.state, torch.zeros(()).double(), []
        for _ in range(time):
            inputs.append(torch.ones(32, 8).double().requires_grad_())
            state, output = network.step(state, inputs[-1])
            total = total + output.sum()
        slopes = torch.autograd.grad(total, inputs)
        return torch.stack([(slope * x).sum() for slope, x in zip(slopes, inputs, strict=True)])

    return _peak(run)
