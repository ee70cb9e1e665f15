from collections.abc import Callable
from statistics import mean, stdev

import torch
from sklearn.datasets import load_breast_cancer, load_wine, make_moons
from torch import Tensor, nn

from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.generative.flows import AffineCouplingTransform, Flow, KernelCoupling, Permute

TRAIN, KEPT, EVERY = 80, 20, 10
RATES = (5e-3, 2e-2)
LAYERS, POINTS, HIDDEN = 6, 16, 32
SETS = ("two moons", "Gaussian of 8 dimensions", "wine", "breast cancer")


@evidence(paper="002-108", claim="Couplings made of kernels fit densities as well as or better "
          "than those made of networks, with fewer parameters, above all from few samples.",
          shortfall=("claim",
                     "With 3 to 24 times fewer parameters, wine and breast cancer are 0.3 and "
                     "0.7 nats better and two moons 0.07, each about its standard error, but "
                     "the Gaussian of 8 dimensions is 0.4 nats worse, three times its standard "
                     "error over ten seeds. Tried twice, with three seeds and with ten, at two "
                     "learning rates for each; more points for the kernels, and fewer samples, "
                     "were not tried."))
def kernel_coupling(scale: Scale) -> Outcome:
    """Fit flows of kernels and of networks to 100 samples; compare the likelihood of others."""
    seeds, steps = (10, 300) if scale == "desk" else (20, 2000)
    makers: dict[str, Callable[[int, bool], nn.Module]] = {
        "kernels": lambda dim, flip: KernelCoupling(dim, POINTS, flip=flip),
        "networks": _network}
    figures: dict[str, list[float]] = {}
    curves: dict[str, Curve] = {}
    ahead, errors = {}, []
    for name in SETS:
        scores: dict[str, list[float]] = {}
        for kind, make in makers.items():
            runs = [_best(make, _data(name, seed), seed, steps) for seed in range(seeds)]
            scores[kind] = [run[0] for run in runs]
            figures[f"test log-likelihood, {name}, {kind} (nats)"] = scores[kind]
            figures[f"the same after the last step, {name}, {kind} (nats)"] = [
                run[1][-1] for run in runs]
            figures[f"parameters, {name}, {kind}"] = [
                float(sum(p.numel() for p in runs[0][2].parameters()))]
            if name == SETS[0]:
                curves[kind] = Curve(list(range(EVERY, steps + 1, EVERY)), [r[1] for r in runs])
            if kind == "kernels":
                x = _data(name, 0)[2].double()
                model = runs[0][2].double()
                with torch.no_grad():
                    errors.append(float((model.inverse(model(x)[0]) - x).abs().max()))
        gaps = [a - b for a, b in zip(scores["kernels"], scores["networks"], strict=True)]
        ahead[name] = mean(gaps), stdev(gaps) / len(gaps) ** 0.5
    figures["largest error of the inverse in float64"] = [max(errors)]
    fewer = all(figures[f"parameters, {name}, kernels"] < figures[f"parameters, {name}, networks"]
                for name in SETS)
    no_worse = [gap > -error for gap, error in ahead.values()]
    wins = [gap > error for gap, error in ahead.values()]
    exact = max(errors) < 1e-8
    return Outcome(
        verdict="shown" if all(no_worse) and sum(wins) >= 2 and fewer and exact else
        "partly shown" if any(wins) else "not shown",
        setting={"flow": f"{LAYERS} couplings, alternately of either half, dimensions reversed "
                 "between", "kernels": f"squared exponential, {POINTS} points", "networks":
                 f"two hidden layers of {HIDDEN}, tanh, zero at the end", "samples":
                 f"{TRAIN} to train, {KEPT} by which the step and the best of the learning rates "
                 f"{RATES} are chosen; 1000 to test, for wine 78, for breast cancer 469; scaled by "
                 "the training samples", "training": f"{steps} steps of Adam on all samples"},
        figures=figures,
        note="Shown is a mean test log-likelihood that is on no set below the networks' by more "
             "than its standard error over seeds, on two sets above by more than that, with fewer "
             "parameters on each, and an inverse off by less than 1e-8. A first version asked for "
             "more than is claimed, a mean above on all four, and had three seeds.",
        curves=curves, axes=("step", "test log-likelihood, two moons (nats)"))


def _data(name: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return training, validation and test samples, scaled by the first."""
    draw = torch.Generator().manual_seed(seed)
    if name == "two moons":
        x = torch.from_numpy(make_moons(1100, noise=0.1, random_state=seed)[0]).float()
    elif name.startswith("Gaussian"):
        root = torch.randn(8, 8, generator=torch.Generator().manual_seed(100))
        x = torch.randn(1100, 8, generator=draw) @ root.T
    else:
        x = torch.from_numpy((load_wine() if name == "wine" else load_breast_cancer()).data).float()
    x = x[torch.randperm(len(x), generator=draw)]
    x = (x - x[:TRAIN].mean(0)) / x[:TRAIN].std(0)
    return x[:TRAIN], x[TRAIN:TRAIN + KEPT], x[TRAIN + KEPT:]


def _network(dim: int, flip: bool) -> nn.Module:
    small, large = dim // 2, dim - dim // 2
    kept, changed = (small, large) if flip else (large, small)
    last = nn.Linear(HIDDEN, 2 * changed)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    net = nn.Sequential(nn.Linear(kept, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(),
                        last)
    return AffineCouplingTransform(net, (kept, changed) if flip else (changed, kept), flip=flip)


def _best(make: Callable[[int, bool], nn.Module], data: tuple[Tensor, Tensor, Tensor], seed: int,
          steps: int) -> tuple[float, list[float], Flow]:
    """Return the test score at the best step of the best rate, its curve and the flow after it."""
    found = [_trained(make, data, seed, steps, rate) for rate in RATES]
    _, test, curve, flow = max(found, key=lambda run: run[0])
    return test, curve, flow


def _trained(make: Callable[[int, bool], nn.Module], data: tuple[Tensor, Tensor, Tensor],
             seed: int, steps: int, rate: float) -> tuple[float, float, list[float], Flow]:
    train, held, test = data
    dim = train.shape[1]
    torch.manual_seed(seed)
    parts = [part for i in range(LAYERS)
             for part in (make(dim, bool(i % 2)), Permute(list(range(dim - 1, -1, -1))))]
    flow = Flow(parts, size=dim, stored=True)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(flow.parameters(), rate)
    scores = []
    for step in range(1, steps + 1):
        loss = -flow.log_prob(train).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY == 0:
            with torch.no_grad():
                scores.append((float(flow.log_prob(held).mean()),
                               float(flow.log_prob(test).mean())))
    best = max(scores)
    return best[0], best[1], [score for _, score in scores], flow
