from collections.abc import Callable
from statistics import mean

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.nn.functional import mse_loss

from netwright.blocks.feedforward import LehmerMultiplet
from netwright.evidence import Curve, Outcome, Scale, evidence

LR, LOOKS = 3e-2, 6
PAIRS = ((8.0, 7.0), (-7.0, -8.0), (0.5, -0.5), (1.0, 0.0))
WAYS: dict[str, Callable[[], nn.Module]] = {
    # A dot product is the Lehmer mean of p = 1 with free weights: it reads what the means are.
    "Lehmer": lambda: nn.Sequential(LehmerMultiplet(2, 3), nn.Linear(12, 1)),
    "Gini": lambda: nn.Sequential(LehmerMultiplet(2, 3, PAIRS, mean="gini"), nn.Linear(12, 1)),
    "Gini with a constant": lambda: nn.Sequential(
        LehmerMultiplet(2, 2, PAIRS, mean="gini", constant=True), nn.Linear(8, 1)),
    "MLP": lambda: nn.Sequential(nn.Linear(2, 6), nn.SiLU(), nn.Linear(6, 1)),
}


@evidence(paper="003-040", claim="Two layers of multiplet neurons do exclusive or, multiply, and "
          "have analytic derivatives for weights and exponents.",
          shortfall=("open",
                     "Exclusive or and the derivatives are as claimed. A product is learnt with "
                     "an RMSE of 0.036 with Lehmer and Gini means and 0.027 with a constant; the "
                     "0.01 that were asked for is our number and not the paper's, and an MLP of "
                     "as many parameters misses it too (0.015). Lehmer and Gini means stand "
                     "still from step 200 on, so that longer training is not what they need; "
                     "with a constant it still falls a little (0.0285 to 0.0271 in the last 200 "
                     "of 600 steps). More neurons and other weights were not tried."))
def multiplet(scale: Scale) -> Outcome:
    """Learn exclusive or and a product by means, and by an MLP of about as many parameters."""
    seeds, steps = (3, 600) if scale == "desk" else (10, 6000)
    figures: dict[str, list[float]] = {}
    curves: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for seed in range(seeds):
        for way, make in WAYS.items():
            x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
            torch.manual_seed(seed)
            network = make()
            gates = x[:, :1] + x[:, 1:] - 2 * x[:, :1] * x[:, 1:]
            _trained(network, x, gates, x, gates, steps)
            with torch.no_grad():
                worst = float((network(x) - gates).abs().max())
            figures.setdefault(f"largest error of exclusive or, {way}", []).append(worst)
            torch.manual_seed(seed)
            network, x = make(), 0.1 + 0.9 * torch.rand(256, 2)
            new = 0.1 + 0.9 * torch.rand(1000, 2)
            errors = _trained(network, x, x.prod(1, keepdim=True), new, new.prod(1, keepdim=True),
                              steps)
            curves[way].append(errors)
            figures.setdefault(f"RMSE of a product, {way}", []).append(errors[-1])
            figures[f"parameters, {way}"] = [sum(p.numel() for p in network.parameters())]
    checked = [_checked("lehmer", (-2.0, 0.5, 3.0)), _checked("gini", PAIRS)]
    figures["analytic derivatives pass gradcheck, Lehmer and Gini (1: yes)"] = [
        float(c) for c in checked]
    gates_done = max(figures["largest error of exclusive or, Lehmer"]) < 0.05
    multiplies = mean(figures["RMSE of a product, Gini with a constant"]) < 0.01
    return Outcome(
        verdict="shown" if all(checked) and gates_done and multiplies else
        "partly shown" if all(checked) and (gates_done or multiplies) else "not shown",
        setting={"networks": "one layer of multiplets with positive weights, read by a dot "
                 "product; MLP: 6 SiLU units", "exclusive or": "the four points themselves",
                 "product": "x y of numbers in [0.1, 1], 256 to train, 1000 to test",
                 "training": f"Adam {LR} falling to 0, {steps} steps on all"},
        figures=figures,
        note="Shown is gradcheck, an error of exclusive or below 0.05 with Lehmer means for every "
             "seed, and a product's RMSE below 0.01 with Gini means and a constant. Means with "
             "positive weights alone leave equal inputs as they are, so that exclusive or needs "
             "the signed weights of the second layer.",
        curves={way: Curve([steps * (i + 1) / LOOKS for i in range(LOOKS)], runs)
                for way, runs in curves.items()},
        axes=("step", "RMSE of a product on new numbers"))


def _trained(network: nn.Module, x: Tensor, y: Tensor, new: Tensor, truth: Tensor,
             steps: int) -> list[float]:
    optimizer, errors = torch.optim.Adam(network.parameters(), LR), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LR * (1 - step / steps)
        optimizer.zero_grad()
        mse_loss(network(x), y).backward()
        optimizer.step()
        if (step + 1) % (steps // LOOKS) == 0:
            with torch.no_grad():
                errors.append(float(mse_loss(network(new), truth).sqrt()))
    return errors


def _checked(kind: str, exponents: tuple[float, ...] | tuple[tuple[float, float], ...]) -> bool:
    torch.manual_seed(0)
    layer = LehmerMultiplet(3, 2, exponents, mean=kind).double()  # type: ignore[arg-type]
    x = (torch.rand(4, 3, dtype=torch.double) + 0.2).requires_grad_()

    def call(x: Tensor, logits: Tensor, exponents: Tensor) -> Tensor:
        found: Tensor = functional_call(layer, {"logits": logits, "exponents": exponents}, (x,))
        return found

    return bool(gradcheck(call, (x, layer.logits, layer.exponents), raise_exception=False))
