from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.generative.flows.flow import Transform
from netwright.generative.flows.image_coupling import coupling_net
from netwright.reversing.engine import Regroup, Step, Update

__all__ = ["QuadCoupling"]


@method("generative", papers=["001-038"], place="transform", takes=("channels",), needs=["images"],
        variants={"small": {"hidden": 8}})
class QuadCoupling(Transform):
    """Scale and shift each quarter of an image's channels by what is made of the quarters before.

    z_1 = x_1;  z_i = x_i exp(c(s_i)) + t_i,  (s_i, t_i) = net_i(x_1, ..., x_{i-1}),  i = 2, 3, 4;
    c(s) = clamp tanh(s / clamp);  log_det = sum_i sum c(s_i).

    Three quarters are changed, where an ordinary coupling changes half. The inverse goes from the
    second quarter to the fourth, each by the quarters that it has found.

    The paper's scale is sigmoid(s + 2), which makes all numbers smaller at first; here that of the
    other couplings is used, which starts at 1.

    Args:
        channels: The image's channels, at least 4; where 4 does not divide them, the first
            quarters are larger by one.
        hidden: The width of the three networks, each a `coupling_net`.
        nets: Other networks in their place; the i-th takes the first i quarters and returns twice
            the next.
        clamp: What the logarithm of a scale stays below.

    Shapes: x and z (batch, channels, height, width). A condition is given to the nets as their
    second argument.

    Raises:
        ValueError: there are fewer than 4 channels, `x` has others, there are not three nets, or a
            net returns another number of channels.

    Paper: Nagar, Dufraisse, Varma, 2021, CInC Flow: Characterizable Invertible 3x3 Convolution.

    >>> coupling, x = QuadCoupling(8), torch.randn(2, 8, 4, 4)
    >>> z, log_det = coupling(x)
    >>> torch.allclose(coupling.inverse(z), x, atol=1e-6)
    True
    """

    def __init__(self, channels: int, hidden: int = 64, *, nets: Sequence[nn.Module] | None = None,
                 clamp: float = 2.0) -> None:
        super().__init__()
        checks.count(4, channels=channels,
                     advice="give one for each quarter, or put a Squeeze before the coupling")
        checks.above(0, clamp=clamp)
        checks.count(1, hidden=hidden)
        self.sizes = tuple(len(part) for part in torch.arange(channels).tensor_split(4))
        if nets is None:
            nets = [coupling_net(sum(self.sizes[:i]), 2 * self.sizes[i], hidden)
                    for i in (1, 2, 3)]
        if len(nets) != 3:
            raise ValueError(f"nets must be three networks, one for each quarter but the first, "
                             f"got {len(nets)}")
        self.nets, self.clamp = nn.ModuleList(nets), clamp

    def steps(self, condition: Any = None) -> list[Step]:
        """Return the split, the affine maps from the last quarter to the second, and the join."""
        args = () if condition is None else (condition,)
        maps: list[Step] = []
        for i in (3, 2, 1):
            step = _Affine(f"nets[{i - 1}]", self.nets[i - 1], tuple(range(i)), (i, 4), args)
            step.clamp = self.clamp
            maps.append(step)
        layout = ("quarters", self.sizes)
        return [Regroup("the split before QuadCoupling", self._split, self._join,
                        kind=("split", layout), undoes=("join", layout)),
                *maps, Regroup("the join after QuadCoupling", self._join, self._split,
                               kind=("join", layout), undoes=("split", layout))]

    def _split(self, streams: list[Tensor]) -> list[Tensor]:
        x, log_det = streams
        if x.ndim < 2 or x.shape[1] != sum(self.sizes):
            raise ValueError(f"x must have {sum(self.sizes)} channels, got {tuple(x.shape)}")
        return [*[part.contiguous() for part in x.split(list(self.sizes), 1)], log_det]

    def _join(self, streams: list[Tensor]) -> list[Tensor]:
        return [torch.cat(streams[:4], 1), streams[4]]


class _Affine(Update):
    clamp = 2.0

    def make(self, reads: Sequence[Tensor]) -> Any:
        """Return what the net makes of the quarters before."""
        assert self.module is not None
        return self.module(torch.cat(list(reads), 1), *self.args)

    def change(self, x: Sequence[Tensor], made: Tensor) -> list[Tensor]:
        """Return x exp(s) + t, and log_det + sum s."""
        s, t = self._parts(x[0], made)
        return [(x[0] * s.exp() + t).to(x[0].dtype), x[1] + s.flatten(1).sum(1)]

    def restore(self, y: Sequence[Tensor], made: Tensor) -> list[Tensor]:
        """Return (y - t) exp(-s), and log_det - sum s."""
        s, t = self._parts(y[0], made)
        return [((y[0] - t) * (-s).exp()).to(y[0].dtype), y[1] - s.flatten(1).sum(1)]

    def _parts(self, x: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        if made.shape[1] != 2 * x.shape[1]:
            raise ValueError(f"{self.name} must return {2 * x.shape[1]} channels, a scale and a "
                             f"shift for each of {x.shape[1]}, got {tuple(made.shape)}")
        s, t = made.chunk(2, 1)
        return self.clamp * torch.tanh(s / self.clamp), t
