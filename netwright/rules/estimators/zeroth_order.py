from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import Parameter

from netwright import checks
from netwright.catalogue.facets import method
from netwright.errors import CannotStage
from netwright.objectives.losses import cross_entropy
from netwright.rules.rule import Rule, chain_of, checked, output_for, precise
from netwright.runtime.modes import rehearsing
from netwright.signals import mapped
from netwright.stages import Stages

__all__ = ["ZerothOrder"]


@method(
    "rule",
    papers=["003-030"],
    saves=["backpropagation", "derivatives", "training memory", "communication"],
    needs=["labels"],
    search={"directions": [1, 16]},
    variants={"plain": {}, "forward difference": {"difference": "forward", "directions": 3},
              "in place": {"in_place": True, "rate": 0.1}},
)
class ZerothOrder(Rule):
    """Train with differences of the loss between shifted weights, by forward passes alone.

    g = mean_k s_k z_k;  z_k ~ N(0, I), drawn again from its seed wherever it is needed;
    s_k = (L(w + epsilon z_k) - L(w - epsilon z_k)) / 2 epsilon,  or with `difference="forward"`
    s_k = (L(w + epsilon z_k) - L(w)) / epsilon, which takes directions + 1 passes, not twice
    as many as there are directions.

    E[g] is the gradient of the smoothed loss E[L(w + epsilon z)]. Its noise grows with the
    number of weights and falls with `directions`.

    The weights are never changed and changed back, which rounding would not undo: each stage
    runs on its own shifted values, which live only while it runs. So the weights are the same
    bit for bit, and the memory of a step is that of inference and the parameters of the largest
    stage; a network that is not a chain of stages (`nw.stages`; pass `example` where it must be
    watched) is one stage. The gradient itself takes as much as the weights do. With `in_place`
    there is none: w := w - rate g, one tensor of weights after the other.

    All passes of a step see the same buffers and draw the same random numbers (dropout's masks),
    and one of them is what the network and the global random state keep. The loss is taken in
    float32 at least, since its differences are small. It is the mean of L over the shifted
    weights, or L(w) with `difference="forward"`.

    For federated rounds, `seeds`, `scalars` and `replay` are the three parts of a step: whoever
    has the weights, the seeds and everybody's scalars can do the update. On CPU and CUDA the
    same seeds give other directions.

    Args:
        epsilon: the length of a shift, as a multiple of normal numbers, above 0.
        directions: that are averaged in a step.
        difference: "central" or "forward".
        in_place: whether the rule steps on the weights itself, so that no gradient is held.
        rate: of those steps; needed with `in_place`, and only there.

    Shapes: x as the network takes it; y as the loss takes it; z_k like w; s (directions,).

    Raises:
        ValueError: an option is not one of those above, or nothing in the network is trainable.

    Papers: Feng, Pang, Du, Chen, Yan, Lin, 2023, Does Federated Learning Really Need
    Backpropagation?; Malladi, Gao, Nichani, Damian, Lee, Chen, Arora, 2023, Fine-Tuning Language
    Models with Just Forward Passes (central differences, in place). The first clips every number
    of g to +-0.3, which here is the caller's to do.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> rule = ZerothOrder(network, directions=16)
    >>> x, y = torch.randn(2, 4), torch.tensor([0, 2])
    >>> rule(x, y).requires_grad
    False
    >>> seeds = rule.seeds()
    >>> rule.scalars(x, y, seeds).shape
    torch.Size([16])
    """

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 epsilon: float = 1e-3, directions: int = 1,
                 difference: Literal["central", "forward"] = "central",
                 in_place: bool = False, rate: float | None = None,
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        checks.above(0, epsilon=epsilon, advice="try 0.001")
        checks.count(1, directions=directions)
        checks.one_of(["central", "forward"], difference=difference)
        if in_place != (rate is not None):
            raise ValueError("rate must be the learning rate where in_place is True and None "
                             f"where an optimizer steps, got rate={rate} with "
                             f"in_place={in_place}; try in_place=True, rate=0.001")
        self.epsilon, self.directions, self.difference = epsilon, directions, difference
        self.updates_weights, self.rate, self.loss = in_place, rate, loss
        try:
            self.stages: Stages | None = chain_of(self, network, example, loss, apart=False)
        except CannotStage:
            self.stages = None  # it is shifted as a whole

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add the estimated gradient to `.grad`, or step in place; return the detached loss."""
        seeds = self.seeds()
        losses, scalars = self._probe(x, y, seeds)
        self.replay(seeds, scalars)
        return losses.mean()

    def seeds(self) -> list[int]:
        """Draw the seeds of as many directions as the rule has."""
        device = None if self.generator is None else self.generator.device
        return torch.randint(2**62, (self.directions,), generator=self.generator,
                             device=device).tolist()

    def scalars(self, x: Any, y: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return the loss's slope in the direction of each seed; change no weight, no gradient."""
        return self._probe(x, y, seeds)[1]

    @torch.no_grad()
    def replay(self, seeds: Sequence[int], scalars: Tensor) -> None:
        """Do the update that `scalars`, one slope for each seed, stand for."""
        if len(seeds) != len(scalars):
            raise ValueError(f"scalars must hold one slope for each of the {len(seeds)} seeds, got "
                             f"{len(scalars)}; pass what rule.scalars(x, y, seeds) returned")
        parts = scalars / len(seeds)
        for number, p in self._learning().values():
            for seed, part in zip(seeds, parts.to(p.device), strict=True):
                update = _draw(p, seed + number).mul_(part)
                if self.rate is not None:
                    p.sub_(update.mul_(self.rate))
                elif p.grad is None:
                    p.grad = update
                else:
                    p.grad.add_(update)
        if self.updates_weights:
            torch.clear_autocast_cache()  # it may hold the weights as they were

    def _learning(self) -> dict[int, tuple[int, Parameter]]:
        """Return the trainable parameters by identity, each with its number in the network."""
        found = {id(p): (i, p) for i, p in enumerate(self.network.parameters()) if p.requires_grad}
        if not found:
            raise ValueError("network has no trainable parameters; set requires_grad on some")
        return found

    @torch.no_grad()
    def _probe(self, x: Any, y: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the losses that say where the network stands, and the slopes."""
        learning, step = self._learning(), self.epsilon
        shifts = [(seed, step) for seed in seeds]
        shifts += [(seed, -step) for seed in seeds] if self.difference == "central" else [(0, 0.0)]
        losses = []
        with _no_autocast_cache():  # it would hold shifted weights
            for left, (seed, shift) in zip(range(len(shifts))[::-1], shifts, strict=True):
                with rehearsing(self.network) if left else nullcontext():
                    losses.append(self._loss(x, y, learning, seed, shift))
        found = torch.stack(losses)
        up, rest = found[:len(seeds)], found[len(seeds):]
        if self.difference == "central":
            return found, (up - rest) / (2 * step)
        return rest, (up - rest) / step

    def _loss(self, x: Any, y: Tensor, learning: dict[int, tuple[int, Parameter]], seed: int,
              shift: float) -> Tensor:
        if self.stages is None:
            with _shifted([*learning.values()], seed, shift):
                h = output_for(self.loss, self.network, x)
        else:
            context, h = self.stages.context(x), x
            for stage in self.stages:
                own = [learning[id(p)] for p in stage.parameters() if id(p) in learning]
                with _shifted(own, seed, shift):
                    h = stage(h, context)
        return checked(self.loss, mapped(h, precise), y)


@contextmanager
def _shifted(parameters: Sequence[tuple[int, Parameter]], seed: int,
             shift: float) -> Iterator[None]:
    """Let `parameters` hold w + shift z in the body, and then the very tensors that they held."""
    before = [p.data for _, p in parameters]
    try:
        if shift:
            for (number, p), w in zip(parameters, before, strict=True):
                p.data = _draw(p, seed + number).mul_(shift).add_(w)
        yield
    finally:
        for (_, p), w in zip(parameters, before, strict=True):
            p.data = w


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _draw(p: Tensor, seed: int) -> Tensor:
    generator = Generator(p.device).manual_seed(seed)
    return torch.empty_like(p.data).normal_(generator=generator)
