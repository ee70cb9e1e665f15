import torch
from torch import Tensor

from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.generative.flows import ReversibleSDESolver
from netwright.generative.flows.reversible_sde import linear_schedule

SPREAD, EVALUATIONS = 0.2, (16, 32, 64, 128)
ANGLES = torch.arange(8, dtype=torch.float64) * torch.pi / 4
CENTRES = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


@evidence(paper="001-018", claim="An algebraically reversible solver of diffusion SDEs inverts "
          "real data samples exactly into the prior distribution.",
          shortfall=("claim",
                     "The round trip is exact (5e-12), and samples are as near to the data as "
                     "other solvers' at each number of evaluations. What is encoded is not like "
                     "the prior: the second stream has a deviation of 5e5 instead of 1. "
                     "Couplings from 0.9 to 1, 16 to 256 steps, and steps in x / alpha with the "
                     "noise predicted were tried; the last comes down to hundreds, and its "
                     "samples diverge."))
def reversible_sde(scale: Scale) -> Outcome:
    """Encode and decode a mixture of eight normals, and sample from it at equal evaluations."""
    n, seeds, steps = (1500 if scale == "desk" else 5000), 3, 64
    figures: dict[str, list[float]] = {}
    curves: dict[str, list[list[float]]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        x, solver = _data(n), ReversibleSDESolver(_score, steps=steps)
        noise = torch.randn(steps, *x.shape, dtype=torch.float64)
        z = solver.encode(x, noise)
        found = {"decode(encode(x)), largest error": float((solver.decode(z, noise) - x)
                                                           .abs().max()),
                 "the same by Euler-Maruyama": _euler_error(x, noise, solver.times),
                 "deviation of encoded data, second stream (the prior's is 1)": float(z[1].std())}
        reference = _data(n)
        found["energy distance of data to data"] = _distance(_data(n), reference)
        lines: dict[str, list[float]] = {}
        for evaluations in EVALUATIONS:
            for name, samples in _samples(n, evaluations).items():
                distance = _distance(samples, reference)
                lines.setdefault(name, []).append(distance)
                found[f"energy distance, {name}, {evaluations} evaluations"] = distance
        for name, line in lines.items():
            curves.setdefault(name, []).append(line)
        for name, value in found.items():
            figures.setdefault(name, []).append(value)
    error, naive, deviation = list(figures.values())[:3]
    exact = max(error) <= 1e-10 and min(naive) >= 1e-3
    prior = all(abs(value - 1) <= 0.1 for value in deviation)
    mean = {name: [sum(column) / seeds for column in zip(*lines, strict=True)]
            for name, lines in curves.items()}
    ours = mean.pop("reversible")
    good = all(a <= b + 0.003 for line in mean.values() for a, b in zip(ours, line, strict=True))
    return Outcome(
        verdict="shown" if exact and prior and good else "partly shown" if exact else "not shown",
        setting={"data": f"eight normals of deviation {SPREAD} on a circle of radius 2, float64, "
                 "the score in closed form", "diffusion": "variance-preserving, rates 0.1 to 20, "
                 "t from 1 to 0.001", "steps of the round trip": str(steps), "samples": str(n)},
        figures=figures,
        note="Shown where the round trip is within 1e-10 and Euler-Maruyama's is not within 1e-3, "
             "the encoded data have the prior's deviation within a tenth, and the mean energy "
             "distance of samples is at most 0.003 above that of every other solver at each "
             "number of evaluations. Encoded data do not look like the prior: what tells the two "
             "streams apart shrinks towards the data, so it grows on the way to the prior. "
             "Couplings from 0.9 to 1, 16 to 256 steps, and the same steps in x / alpha with the "
             "noise predicted were tried: the last brings the deviation down to hundreds, and its "
             "samples diverge.",
        curves={name: Curve(list(EVALUATIONS), lines) for name, lines in curves.items()},
        axes=("evaluations of the score", "energy distance to data"))


def _score(x: Tensor, t: Tensor) -> Tensor:
    alpha, sigma = linear_schedule(t.double())
    variance = (alpha * SPREAD) ** 2 + sigma ** 2
    away = alpha * CENTRES - x[:, None]
    weight = (-away.square().sum(2) / (2 * variance)).softmax(1)
    return (weight[..., None] * away).sum(1) / variance


def _data(n: int) -> Tensor:
    return CENTRES[torch.randint(8, (n,))] + SPREAD * torch.randn(n, 2, dtype=torch.float64)


def _rate(t: Tensor) -> Tensor:
    return 0.1 + 19.9 * t


def _drift(x: Tensor, t: Tensor) -> Tensor:
    return _rate(t) * (x / 2 + _score(x, t))


def _samples(n: int, evaluations: int) -> dict[str, Tensor]:
    """Return samples of each solver; the reversible one takes half the steps of the others."""
    z = torch.randn(n, 2, dtype=torch.float64)
    noise = torch.randn(evaluations, n, 2, dtype=torch.float64)
    half = ReversibleSDESolver(_score, steps=evaluations // 2)
    whole = ReversibleSDESolver(_score, steps=evaluations)
    return {"reversible": half.decode(z, noise[:evaluations // 2]),
            "Euler-Maruyama, even in log r": _euler(z, noise, whole.times),
            "Euler-Maruyama, even in t": _euler(z, noise, torch.linspace(
                1, 1e-3, evaluations + 1, dtype=torch.float64)),
            "exponential Euler, even in log r": _exponential(z, noise, whole)}


def _euler(x: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    for t, step, draw in zip(times[:-1], -times.diff(), noise, strict=True):
        x = x + step * _drift(x, t) + (_rate(t) * step).sqrt() * draw
    return x


def _euler_error(x: Tensor, noise: Tensor, times: Tensor) -> float:
    """Go back as one does without a reversible solver, by the drift where the step ended."""
    z, steps = x, -times.diff()
    for n in reversed(range(len(steps))):
        t = times[n + 1]
        z = z - steps[n] * _drift(z, t) - (_rate(times[n]) * steps[n]).sqrt() * noise[n]
    return float((_euler(z, noise, times) - x).abs().max())


def _exponential(z: Tensor, noise: Tensor, solver: ReversibleSDESolver) -> Tensor:
    """Take the reversible solver's steps on one stream, which cannot be undone."""
    alpha, sigma = linear_schedule(solver.times)
    ratio, scale = (alpha / sigma) ** 2, sigma ** 2 / alpha
    stream = z / scale[0]
    for n, h in enumerate(ratio.diff()):
        stream = stream + h * solver.guess(stream, solver.times[n]) + h.sqrt() * noise[n]
    return stream * scale[-1]


def _distance(a: Tensor, b: Tensor) -> float:
    """Return the energy distance between two sets of points."""
    a = a.nan_to_num(1e6, 1e6, -1e6)
    between = torch.cdist(a, b).mean()
    return float(2 * between - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())
