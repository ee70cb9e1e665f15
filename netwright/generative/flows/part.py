from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.generative.flows.flow import Transform
from netwright.generative.flows.linear import LinearTransform
from netwright.generative.flows.squeeze import Squeeze
from netwright.reversing.engine import Regroup, Step, Stored, chained

__all__ = ["Part", "multi_scale"]


@method("generative", place="transform", takes=("transforms", "channels"),
        network=lambda: Part([LinearTransform(2)], 2))
class Part(Transform):
    """Run transforms on the first channels of a sample, and leave the others as they are.

    z = [f_n(... f_1(x[:, :channels])), x[:, channels:]];  log_det = that of the f.

    Args:
        transforms: what runs on the part, in order.
        channels: of the part, the first of a sample.

    Shapes: x and z (batch, channels + others, *); the transforms must in the end keep the shape of
    their part, a `Squeeze` among them being undone by another with `back=True`.

    Raises:
        ValueError: `x` has not more than `channels` channels.

    Paper: Dinh, Sohl-Dickstein, Bengio, 2017, Density Estimation Using Real NVP.

    >>> from netwright.generative.flows import Permute
    >>> Part([Permute([1, 0])], 2)(torch.tensor([[1., 2., 3.]]))[0]
    tensor([[2., 1., 3.]])
    """

    def __init__(self, transforms: Iterable[Transform], channels: int) -> None:
        super().__init__()
        self.transforms, self.channels = nn.ModuleList(transforms), channels

    def steps(self, condition: Any = None) -> list[Step]:
        """Return the split, the transforms' steps and the join; what is left is the last stream."""
        inner = chained([part.steps(condition) for part in self.transforms])  # type: ignore[operator]
        return [Regroup("the split before Part", self._split, self._join),
                *[_beside(step) for step in inner],
                Regroup("the join after Part", self._join, self._split)]

    def _split(self, streams: list[Tensor]) -> list[Tensor]:
        x, *more = streams
        if x.ndim < 2 or x.shape[1] <= self.channels:
            raise ValueError(f"x must have more than {self.channels} channels, since Part changes "
                             f"those only, got {tuple(x.shape)}")
        return [x[:, :self.channels].contiguous(), *more, x[:, self.channels:].contiguous()]

    def _join(self, streams: list[Tensor]) -> list[Tensor]:
        x, *more, left = streams
        if x.shape[2:] != left.shape[2:]:
            raise ValueError(f"the transforms in Part must return the size {tuple(left.shape[2:])} "
                             f"that they are given, got {tuple(x.shape[2:])}; undo a Squeeze by "
                             "Squeeze(back=True)")
        return [torch.cat([x, left], 1), *more]


@checks.annotated
def multi_scale(channels: int, levels: int,
                block: Callable[[int], Sequence[Transform]]) -> list[Transform]:
    """Return the transforms of a flow of images that works at several scales.

    At each level squares of 2 x 2 pixels become channels, `block(channels)` works on them, and the
    first half goes on to the next level; half of what is left at each level is done. The result
    has the image's own shape.

    Paper: Dinh, Sohl-Dickstein, Bengio, 2017, Density Estimation Using Real NVP.

    >>> from netwright.generative.flows import ActNorm, Flow
    >>> flow = Flow(multi_scale(3, 2, lambda channels: [ActNorm(channels)]), size=(3, 8, 8))
    >>> flow.log_prob(torch.randn(5, 3, 8, 8)).shape
    torch.Size([5])
    """
    checks.count(1, levels=levels)
    transforms: list[Transform] = [Squeeze(), *block(4 * channels)]
    if levels > 1:
        transforms.append(Part(multi_scale(2 * channels, levels - 1, block), 2 * channels))
    return [*transforms, Squeeze(back=True)]


def _beside(step: Step) -> Step:
    """Return the step with one more stream after those that it knows."""
    if isinstance(step, Regroup):
        there, back = step.there, step.back
        return Regroup(step.name, lambda s: [*there(s[:-1]), s[-1]],
                       lambda s: [*back(s[:-1]), s[-1]])
    assert not isinstance(step, Stored)
    return step
