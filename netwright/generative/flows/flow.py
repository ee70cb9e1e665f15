import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions import Transform as DistributionTransform

from netwright.catalogue.facets import method
from netwright.reversing.engine import Step, Update, chained, forth, run, undo
from netwright.runtime.attributes import Memo

__all__ = ["Flow", "Transform"]


@method("companion")
class Transform(nn.Module):
    """An invertible map of samples that knows how it changes volumes.

    z = forward(x);  log_det = log |det dz/dx|, one number for each sample.

    A transform of one's own defines either `map(x, condition)`, which returns z and log_det, and
    `inverse(z, condition)`; or `steps(condition)`, which are run on the streams x and log_det
    (numbers 0 and 1) and undone in the backward pass, so that nothing is computed twice but what
    the steps' modules make; log_det is a sum, which `restore` may return as it is. In a `Flow`
    neither stores its activations.

    Shapes: x and z (batch, *size); log_det (batch,); condition what the transform takes, or None.
    """

    def map(self, x: Tensor, condition: Any = None) -> tuple[Tensor, Tensor]:
        """Return z and log |det dz/dx|."""
        raise TypeError(f"{type(self).__name__} must define map(x, condition) and inverse, "
                        "or steps(condition)")

    def steps(self, condition: Any = None) -> list[Step]:
        """Return the steps from the streams x and log_det to z and the new log_det."""
        return [_Map(type(self).__name__, self, condition)]

    def forward(self, x: Tensor, condition: Any = None) -> tuple[Tensor, Tensor]:
        """Return z and log |det dz/dx| under plain autograd."""
        z, log_det = forth(self.steps(condition), [x, x.new_zeros(len(x))])
        return z, log_det

    def inverse(self, z: Tensor, condition: Any = None) -> Tensor:
        """Return the x that the transform maps to `z`."""
        return undo(self.steps(condition), [z, z.new_zeros(len(z))])[0]

    def log_det(self, x: Tensor, condition: Any = None) -> Tensor:
        """Return log |det dz/dx| for each sample."""
        return self(x, condition)[1]


class _Map(Update):
    """The step of a transform that is defined by `map` and `inverse`."""

    sums = (1,)

    def __init__(self, name: str, transform: Transform, condition: Any) -> None:
        super().__init__(name, transform, (), (0, 1), (condition,))

    def make(self, reads: Sequence[Tensor]) -> None:
        """Make nothing: the map is the change itself."""

    def change(self, x: Sequence[Tensor], made: None) -> Sequence[Tensor]:
        """Return z, and log_det with the map's added."""
        transform: Any = self.module
        z, log_det = transform.map(x[0], *self.args)
        return [z, x[1] + log_det]

    def restore(self, y: Sequence[Tensor], made: None) -> Sequence[Tensor]:
        """Return x, and log_det as it is, which nothing depends on."""
        transform: Any = self.module
        return [transform.inverse(y[0], *self.args), y[1]]


@method("generative", place="whole network", takes=("transforms", "size"),
        network=lambda: Flow([_Stretch(), _Stretch()], 4))
class Flow(nn.Module):
    """A density: a simple one, seen through transforms that can be undone.

    log p(x) = log p_base(z) + log |det dz/dx|,  z = f_n(... f_1(x)).

    Training by `-flow.log_prob(x).mean()` stores nothing between the transforms: the backward pass
    reconstructs what each was given from what it returned, so that memory does not grow with their
    number. `stored=True` keeps all activations, as plain autograd does.

    Args:
        transforms: From data to base, each a `Transform`.
        size: The size of a sample.
        base: A distribution of samples of that size, the standard normal one by default. It follows
            the flow to another dtype or device, as a copy.
        stored: Whether activations are kept.
        exact: Whether the rounding error of each reconstruction is kept, about one byte for each
            number of a sample and transform: where transforms squeeze much, as many splines do,
            what a float32 sample was cannot be told from what it became.

    Shapes: x and z (batch, *size); log_prob and log_det (batch,).

    Raises:
        CannotReverse: a transform is not undone by its inverse.
        ValueError: `x` has not the size of a sample.

    Paper: Dinh, Krueger, Bengio, 2015, NICE: Non-linear Independent Components Estimation.

    >>> from netwright.generative.flows import Permute
    >>> flow = Flow([Permute([1, 0])], size=2)
    >>> flow.log_prob(torch.zeros(3, 2)).shape, flow.sample(5).shape
    (torch.Size([3]), torch.Size([5, 2]))
    """

    def __init__(self, transforms: Iterable[Transform], size: int | Sequence[int],
                 base: Distribution | None = None, *, stored: bool = False,
                 exact: bool = False) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(transforms)
        self.size = torch.Size([size] if isinstance(size, int) else size)
        self.base, self.stored, self.exact = base, stored, exact
        self._seen = Memo()

    def steps(self, condition: Any = None) -> list[Step]:
        """Return the steps of all transforms, on the streams x and log_det."""
        parts: list[list[Step]] = []
        for number, part in enumerate(self.transforms):
            parts.append(part.steps(condition))  # type: ignore[operator]
            for step in parts[-1]:
                step.place = f"transform {number}"
        return chained(parts)

    def forward(self, x: Tensor, condition: Any = None) -> tuple[Tensor, Tensor]:
        """Return z and log |det dz/dx|."""
        self._check(x)
        if self.stored:
            log_det = x.new_zeros(len(x))
            for part in self.transforms:
                x, change = part(x, condition)
                log_det = log_det + change
            return x, log_det
        # What is looked at in the first pass may be another in the first of training.
        kind = torch.is_grad_enabled(), self.training
        z, log_det = run(self.steps(condition), [x, x.new_zeros(len(x))], exact=self.exact,
                         first=kind not in self._seen)
        self._seen.add(kind)
        return z, log_det

    def inverse(self, z: Tensor, condition: Any = None) -> Tensor:
        """Return the x that the transforms map to `z`."""
        self._check(z)
        for part in reversed(self.transforms):
            z = part.inverse(z, condition)  # type: ignore[operator]
        return z

    def log_det(self, x: Tensor, condition: Any = None) -> Tensor:
        """Return log |det dz/dx| for each sample."""
        return self(x, condition)[1]

    def log_prob(self, x: Tensor, condition: Any = None) -> Tensor:
        """Return log p(x) for each sample."""
        z, log_det = self(x, condition)
        return self._base_log_prob(z) + log_det

    @torch.no_grad()
    def sample(self, n: int, condition: Any = None, *,
               generator: torch.Generator | None = None) -> Tensor:
        """Return `n` samples; a condition must have `n` rows.

        A base of one's own draws from PyTorch's default generators, which a given `generator`
        seeds for the time of the draw.
        """
        if self.base is not None:
            with _seeded(generator):
                z = self.base.sample(torch.Size([n]))
            return self.inverse(z, condition)
        like = next(self.parameters(), torch.zeros(()))
        z = torch.randn(n, *self.size, generator=generator, dtype=like.dtype, device=like.device)
        return self.inverse(z, condition)

    def _base_log_prob(self, z: Tensor) -> Tensor:
        if self.base is not None:
            found = self.base.log_prob(z)
            return found.flatten(1).sum(1) if found.ndim > 1 else found
        return -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Flow":
        super()._apply(fn, recurse)
        self.base = _carried(self.base, fn)
        return self

    def _check(self, x: Tensor) -> None:
        if x.shape[1:] != self.size:
            raise ValueError(f"x must be (batch, {', '.join(map(str, self.size))}), since the "
                             f"flow's size is {tuple(self.size)}, got {tuple(x.shape)}")


@contextmanager
def _seeded(generator: torch.Generator | None) -> Iterator[None]:
    """Let what draws from the default generators draw what `generator` decides."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2 ** 62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _carried(part: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Return a distribution with `fn` of every tensor that it, or one inside it, holds."""
    if isinstance(part, Tensor):
        return fn(part.detach()).requires_grad_(part.requires_grad)
    if isinstance(part, list | tuple) and not isinstance(part, torch.Size):
        return type(part)(_carried(item, fn) for item in part)
    if not isinstance(part, Distribution | DistributionTransform):
        return part
    moved = copy(part)
    for name, value in vars(part).items():
        setattr(moved, name, _carried(value, fn))
    return moved


class _Stretch(Transform):
    """Scales and shifts every entry of four, as the least of transforms that learn."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.log_scale = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def map(self, x: Tensor, condition: Any = None) -> tuple[Tensor, Tensor]:
        z = x * self.log_scale.exp() + self.shift
        return z, self.log_scale.sum().expand(len(x))

    def inverse(self, z: Tensor, condition: Any = None) -> Tensor:
        return (z - self.shift) * (-self.log_scale).exp()
