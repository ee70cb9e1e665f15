import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.parameter import is_lazy

from netwright import checks
from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.rule import Rule, chain_of, checked
from netwright.stages import Stages
from netwright.stages.stage import Stage

__all__ = ["SoftHebb"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


@method(
    "rule",
    papers=["003-130"],
    saves=["backpropagation", "labels"],
    needs=["a chain of stages"],
    search={"temperature": (0.1, 10.0), "anti_hebbian": [True, False]},
    variants={"plain": {},
              "Hebbian alone": {"anti_hebbian": False, "temperature": [0.5, 2.0]},
              "own initial weights": {"initial_norm": None}},
)
class SoftHebb(Rule):
    """Train hidden stages without labels: their units compete softly, and the input draws them on.

    u = W x;  y = softmax(u / temperature) over the units, times -1 for all but the largest;
    D_k = sum_n y_kn (x_n - u_kn w_k);  step_k = | |w_k| - 1 |^norm_power D_k / max |D|;
    w_k.grad -= step_k.  The last stage descends its loss.

    n counts samples and, in a convolution, positions, where x_n is a patch and the channels
    compete at each position. A unit that wins moves towards its input, and the others away from
    it; `anti_hebbian=False` moves all of them towards it. D_k pulls the length of w_k to 1 where
    the sum of y_k u_k is positive, as it is in a unit that wins, and the step vanishes there.

    No gradient passes into a hidden stage or out of the last one, and nothing of a hidden stage
    is kept. What a hidden stage has besides its weights stays as it is; a bias counts in the
    stage's output and not in u. The returned loss is the last stage's.

    The step is meant for SGD without momentum or weight decay. Adam divides it by its own size,
    and with it what makes it vanish as the lengths approach 1.

    When the rule is made it draws the hidden weights that are not frozen anew, since the method
    needs a start far outside the unit sphere: w_ki ~ N(0, initial_norm^2 / inputs). PyTorch's own
    weights have length 0.6 and settle at once, with most units silent. `initial_norm=None` leaves
    the weights as they are, for a network that has been trained.

    Args:
        temperature: of the competition, above 0; one for all hidden stages, or one for each.
        anti_hebbian: whether units that lose move away from the input.
        norm_power: how fast the step vanishes as a unit's length comes near 1.
        initial_norm: the length of the weights that are drawn at first; None draws none.

    Shapes: Linear x (*, inputs), u, y (*, units); convolutions x (batch, channels, *size).

    Raises:
        ValueError: a hidden stage has not exactly one weighted layer, or one that is no Linear or
            Conv; `temperature`, `norm_power` or `initial_norm` is out of range, or `temperature`
            has not one entry a hidden stage; `initial_norm` is not None and a layer is lazy.

    Papers: Journé, Garcia Rodriguez, Guo, Moraitis, 2023, Hebbian Deep Learning Without Feedback
    (the losers' sign, the rate by length, convolutions; max |D| is in its published code only);
    Moraitis, Toichkin, Journé, Chua, Guo, 2022, SoftHebb: Bayesian Inference in Unsupervised
    Hebbian Soft Winner-Take-All Networks (`anti_hebbian=False`, without its learned biases).

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> rule = SoftHebb(network)
    >>> rule(torch.randn(2, 4), torch.tensor([0, 2])).requires_grad
    False
    >>> network[0].weight.grad.shape, network[0].bias.grad
    (torch.Size([8, 4]), None)
    """

    same_in_shares = False  # steps are divided by the largest of the share

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 temperature: float | Sequence[float] = 1.0, anti_hebbian: bool = True,
                 norm_power: float = 0.5, initial_norm: float | None = 25.0,
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        self.stages, self.loss = chain_of(self, network, example, loss), loss
        self.layers = [_layer(stage) for stage in list(self.stages)[:-1]]
        self.temperatures = _each(temperature, len(self.layers))
        checks.at_least(0, norm_power=norm_power,
                        advice="0 is a rate that does not depend on the length")
        self.anti_hebbian, self.norm_power = anti_hebbian, norm_power
        if initial_norm is not None:
            self._draw(initial_norm)

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add the hidden stages' steps and the last one's gradient to `.grad`; return its loss."""
        context, h = self.stages.context(x), x
        steps: list[tuple[Tensor, Tensor]] = []  # kept until the labels are known to be right
        *hidden, last = self.stages
        for stage, layer, temperature in zip(hidden, self.layers, self.temperatures, strict=True):
            def learn(layer: Any, _: Any, u: Tensor, temperature: float = temperature) -> Tensor:
                if u.requires_grad and layer.weight.requires_grad:
                    steps.append((layer.weight, self._step(layer, u, temperature)))
                return u.detach()
            with layer.register_forward_hook(learn):
                h = stage(h, context).detach()
        loss = checked(self.loss, last(h, context), y)
        if loss.requires_grad:  # not so in a last stage that is frozen
            loss.backward()
        for weight, step in steps:
            weight.grad = -step if weight.grad is None else weight.grad.sub_(step)
        return loss.detach()

    def _step(self, layer: Layer, u: Tensor, temperature: float) -> Tensor:
        """Return the step of a layer's weights for its output `u`, whose graph ends there."""
        w, units = layer.weight.detach(), 1 - layer.weight.ndim
        column = (-1, *[1] * (w.ndim - 1))
        scores = u.detach()
        if layer.bias is not None:
            scores = scores - layer.bias.detach().view(column[:-1])
        y = torch.softmax(scores / temperature, units)
        if self.anti_hebbian:
            share, winner = y.max(units, keepdim=True)
            y = y.neg_().scatter_(units, winner, share)
        # The gradient of <u, y> is the sum of y x, for any padding, stride and number of groups.
        (toward,) = torch.autograd.grad(u, layer.weight, y.to(u.dtype))
        away = (y * scores).movedim(units, 0).flatten(1).sum(1)
        change = toward - away.to(w.dtype).view(column) * w
        rate = (w.flatten(1).norm(dim=1) - 1).abs() ** self.norm_power
        largest = change.abs().amax().clamp_min(torch.finfo(w.dtype).tiny)
        return rate.view(column) * (change / largest)

    @torch.no_grad()
    def _draw(self, norm: float) -> None:
        checks.above(0, initial_norm=norm, advice="give the length that the weights of a unit "
                     "shall start with, or None to leave them")
        for name, layer in zip(self.stages.names, self.layers, strict=False):
            if is_lazy(layer.weight):
                raise ValueError(f"initial_norm needs weights to draw, and stage {name} is lazy; "
                                 "run the network once before, or set initial_norm=None")
        for w in (layer.weight for layer in self.layers if layer.weight.requires_grad):
            generator = self.generator
            drawn = w if generator is None else torch.empty(
                w.shape, dtype=w.dtype, device=generator.device)
            w.copy_(drawn.normal_(0, norm / math.sqrt(w[0].numel()), generator=generator))


def _layer(stage: Stage) -> Layer:
    """Return the one layer of a hidden stage that has weights."""
    modules = {m: None for module in stage.modules for m in module.modules()}
    found = [m for m in modules if isinstance(m, _LAYERS) or any(
        not is_lazy(p) and p.ndim > 1 for p in m.parameters(recurse=False))]
    loose = sum(p.ndim > 1 for p in stage.loose)
    if len(found) == 1 and not loose and isinstance(found[0], _LAYERS):
        return found[0]
    names = [type(m).__name__ for m in found] + ["a parameter of its own"] * loose
    raise ValueError("network must have one Linear or convolution in each stage but the last, and "
                     f"stage {stage.name} has {', '.join(names) or 'none'}; cut it by hand with "
                     "stages(network, cuts=...), or use MonoForward, which takes any stage")


def _each(temperature: float | Sequence[float], stages: int) -> list[float]:
    """Return a temperature for each hidden stage."""
    given = list(temperature) if isinstance(temperature, Sequence) else [temperature] * stages
    if len(given) != stages:
        raise ValueError(f"temperature must be one number or one for each of the {stages} hidden "
                         f"stages, got {len(given)}: {given}")
    for value in given:
        checks.above(0, temperature=value, advice="towards 0 the largest unit wins all")
    return given
