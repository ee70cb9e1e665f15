from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from netwright import checks
from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.mixing import Mixing
from netwright.rules.readout import without_padding
from netwright.rules.rule import Rule, chain_of, check_labels
from netwright.runtime.modes import rehearsing, same_buffers
from netwright.runtime.random_state import same_random_state
from netwright.stages import Stage, Stages

__all__ = ["LikelihoodRatio"]

Control = Literal["baseline", "antithetic"] | None


@method(
    "rule",
    papers=["002-042"],
    saves=["backpropagation", "derivatives"],
    needs=["labels"],
    search={"noise": (0.01, 1.0), "copies": [4, 16]},
    variants={"four copies": {"copies": 4},
              "antithetic": {"copies": 2, "control": "antithetic"},
              "no control": {"copies": 1, "control": None}},
)
class LikelihoodRatio(Rule):
    """Train every stage with noise on its output, times the loss that this noise led to.

    h_i = f_i(h_{i-1}) + noise e_i;  e_i ~ N(0, I);  for sample n of copy k
    dL/df_ink := (L_nk - b_nk) e_ink / noise;  dL/dw_i := mean_k sum_n (df_ink/dw_i)^T dL/df_ink.

    The mean is the gradient of E[L], the loss of the network with that noise: nothing is
    differentiated from stage to stage, and the loss not at all. Stages without trainable
    parameters get no noise. `control` says how the estimate's own noise is lowered, its mean
    being the same: "baseline", b is the mean loss of the sample's other copies; "antithetic",
    copies come in pairs with noise e and -e, and b is the mean loss of the sample's other pairs
    (0 where there is one pair): what the loss has in common in both falls out where both see the
    same input, as the first stage does, and b takes it away elsewhere; None, b = 0.

    Each copy is one forward pass without a graph, for its losses, and a second one that draws
    the same noise from its seed and differentiates each stage by itself, so that no more than
    one stage's activations are kept, however many copies and stages there are. All passes see
    the same buffers and draw the same random numbers (dropout's masks); the last is what the
    network and the global random state keep.

    `loss` may return a loss for each sample, (batch,), whose mean is meant, and each sample is
    then taught by its own; so it is with `cross_entropy`. Where it returns one number, or where
    samples depend on each other (batch norm in training, graphs), which is found out at the first
    batch in each mode, all samples are taught by the whole loss, which keeps the mean and is
    noisier.

    Args:
        noise: the standard deviation of what is added to a stage's output, above 0.
        copies: of the batch, each with noise of its own.
        control: "baseline", "antithetic" or None.

    Shapes: x as the network takes it; f_i, e_i (batch, *size_i); y as the loss takes it.

    Raises:
        ValueError: an option is not one of those above, `copies` are too few for `control`, or
            nothing in the network is trainable.

    Paper: Jiang, Zhang, Xu, Yu, Peng, 2023, One Forward is Enough for Neural Network Training via
    Likelihood Ratio Method. Its noise stands before the activation function, here behind it where
    that is part of the stage; quasi-Monte Carlo noise is not part of this rule.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> rule = LikelihoodRatio(network)
    >>> rule(torch.randn(2, 4), torch.tensor([0, 2])).requires_grad
    False
    >>> network[0].weight.grad.shape
    torch.Size([8, 4])
    """

    same_in_shares = False  # noise is drawn for each sample

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 noise: float = 0.1, copies: int = 16, control: Control = "baseline",
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        checks.above(0, noise=noise, advice="try 0.1")
        checks.one_of(["baseline", "antithetic"], control=control, optional=True)
        if copies < (1 if control is None else 2) or (control == "antithetic" and copies % 2):
            raise ValueError("copies must be at least 1, at least 2 with control='baseline', and "
                             f"even with control='antithetic', got copies={copies} with "
                             f"control={control!r}; try 16")
        self.noise, self.copies, self.control, self.loss = noise, copies, control, loss
        self.stages = chain_of(self, network, example, loss, apart=False)
        self._mixing = Mixing(self.network)

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add the estimated gradient to `.grad`; return the detached loss, with the noise."""
        if not any(p.requires_grad for p in self.network.parameters()):
            raise ValueError("network has no trainable parameters; set requires_grad on some")
        copies = self._draw_copies()
        losses = []
        for seed, sign in copies:
            with rehearsing(self.network):
                output = self._run(x, seed, sign * self.noise)
                losses.append(self._losses(output, y))
        mixes = self._mixing.found(x, lambda: self._samples_mix(x), rows=len(output))
        found = torch.stack(losses)
        teaching = found.sum(1, keepdim=True) if mixes else found
        alike = 2 if self.control == "antithetic" else 1  # copies of the same noise, but its sign
        if self.control is not None and self.copies > alike:  # less the mean of the others
            own = teaching.unflatten(0, (-1, alike)).mean(1).repeat_interleave(alike, 0)
            others = (self.copies * teaching.mean(0) - alike * own) / (self.copies - alike)
            teaching = teaching - others
        teaching = teaching / (self.noise * self.copies)
        for left, (seed, sign), signal in zip(range(len(copies))[::-1], copies, teaching,
                                              strict=True):
            with (same_buffers(self.network) if left else nullcontext(),
                  same_random_state() if left else nullcontext()):
                self._run(x, seed, sign * self.noise, sign * signal)
        return found.sum(1).mean()

    def _draw_copies(self) -> list[tuple[int, int]]:
        """Return each copy's seed and the sign of its noise."""
        signs = (1, -1) if self.control == "antithetic" else (1,)
        device = None if self.generator is None else self.generator.device
        seeds = torch.randint(2**62, (self.copies // len(signs),), generator=self.generator,
                              device=device)
        return [(seed, sign) for seed in seeds.tolist() for sign in signs]

    def _run(self, x: Any, seed: int, scale: float, signal: Tensor | None = None) -> Tensor:
        """Return the output for `x` with noise; where there is a signal, teach every stage."""
        generator, context, h = self._generator(seed), self.stages.context(x), x
        for stage in self.stages:
            out = stage(h, context)
            h = out.detach()
            if _learns(stage):
                e = _normal(h, generator)
                h = h + scale * e
                if signal is not None and out.requires_grad:
                    shape = (-1, *[1] * (e.ndim - 1))
                    out.backward(without_padding(x, e * signal.to(e.dtype).view(shape)))
        return h

    def _losses(self, output: Tensor, y: Tensor) -> Tensor:
        """Return what each sample adds to the loss, (batch,), or the whole loss, (1,)."""
        if self.loss is cross_entropy:
            check_labels(y, output.shape[-1])
            losses = functional.cross_entropy(output.flatten(0, -2), y.flatten(), reduction="none")
            return losses.view(len(output), -1).sum(1) / (y != -100).sum()
        losses = self.loss(output, y)
        return losses / len(losses) if losses.ndim else losses.view(1)

    def _samples_mix(self, x: Any) -> bool:
        """Return whether noise in every second sample changes the others' outputs."""
        outputs = []
        for scale in (0.0, self.noise):
            with rehearsing(self.network):
                generator, context, h = self._generator(0), self.stages.context(x), x
                sizes = set()
                for stage in self.stages:
                    h = stage(h, context)
                    sizes.add(len(h))
                    outputs.append(h)
                    h = h.clone()
                    h[1::2] += scale * _normal(h[1::2], generator)
        return len(sizes) > 1 or not torch.equal(outputs[len(self.stages) - 1][::2],
                                                 outputs[-1][::2])

    def _generator(self, seed: int) -> Generator:
        return Generator(next(self.network.parameters()).device).manual_seed(seed)


def _learns(stage: Stage) -> bool:
    return any(p.requires_grad for p in stage.parameters())


def _normal(like: Tensor, generator: Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
