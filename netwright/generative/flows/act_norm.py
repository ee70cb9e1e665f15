from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.generative.flows.flow import Transform
from netwright.reversing.engine import Step, Update
from netwright.runtime.distributed import summed

__all__ = ["ActNorm"]


@method("generative", place="transform", takes=("channels",))
class ActNorm(Transform):
    """Shift and scale each channel, at first so that the first batch has mean 0 and deviation 1.

    z = (x + b) exp(s);  log_det = pixels * sum s;
    on the first batch in training mode:  b = -mean(x),  s = -log std(x), over batch and pixels.

    With `torch.distributed` the first batch is that of all processes together. A channel that is
    constant in it is not scaled. `ready` says whether the first
    batch has been seen; it is kept in the `state_dict`, so that a flow that is loaded is not
    started again. Later it is an ordinary layer with parameters b and s.

    Args:
        channels: The entries of dimension 1.

    Shapes: x and z (batch, channels, *); b and s (channels,).

    Raises:
        ValueError: `x` has other channels, or is empty while the layer waits for its first batch.

    Paper: Kingma, Dhariwal, 2018, Glow: Generative Flow with Invertible 1x1 Convolutions.

    >>> z, log_det = ActNorm(3)(5 + 2 * torch.randn(64, 3, 4, 4))
    >>> torch.allclose(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    True
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        checks.count(1, channels=channels)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        # Not a buffer: those are put back as they were while a step runs again.
        self.ready = False

    def steps(self, condition: Any = None) -> list[Step]:
        """Return the one step."""
        return [_Normalise("ActNorm", self, (), (0, 1))]

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Set bias and scale by the batch `x`."""
        if x.numel() < 1:
            raise ValueError(f"x must hold a sample for ActNorm to start from, got "
                             f"{tuple(x.shape)}")
        channels = x.detach().to(self.bias.dtype).transpose(0, 1).flatten(1)
        number = summed(channels.new_tensor(channels.shape[1]))
        mean = summed(channels.sum(1)) / number
        deviation = (summed((channels - mean[:, None]).square().sum(1)) / number).sqrt()
        tiny = torch.finfo(self.bias.dtype).eps * mean.abs().clamp(min=1)
        self.bias.copy_(-mean)
        self.log_scale.copy_(torch.where(deviation > tiny, -deviation.log(), 0.0))
        self.ready = True

    def get_extra_state(self) -> Tensor:
        """Return what the `state_dict` holds of `ready`."""
        return torch.tensor(self.ready)

    def set_extra_state(self, state: Tensor) -> None:
        """Take `ready` from a `state_dict`."""
        self.ready = bool(state)


class _Normalise(Update):

    def make(self, reads: Sequence[Tensor]) -> None:
        """Make nothing."""

    def change(self, x: Sequence[Tensor], made: None) -> list[Tensor]:
        """Return (x + b) exp(s) and the new log-determinant."""
        layer: Any = self.module
        if x[0].ndim < 2 or x[0].shape[1] != len(layer.bias):
            raise ValueError(f"x must be (batch, {len(layer.bias)}, *) for ActNorm, got "
                             f"{tuple(x[0].shape)}")
        if layer.training and not layer.ready:
            layer.start(x[0])
        bias, log_scale = _beside(layer, x[0])
        return [((x[0] + bias) * log_scale.exp()).to(x[0].dtype), x[1] + self._volume(x[0])]

    def restore(self, y: Sequence[Tensor], made: None) -> list[Tensor]:
        """Return z exp(-s) - b and the old log-determinant."""
        bias, log_scale = _beside(self.module, y[0])
        return [(y[0] * (-log_scale).exp() - bias).to(y[0].dtype), y[1] - self._volume(y[0])]

    def _volume(self, x: Tensor) -> Tensor:
        layer: Any = self.module
        return layer.log_scale.sum() * x.shape[2:].numel()


def _beside(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    shape = (-1, *[1] * (x.ndim - 2))
    return layer.bias.view(shape), layer.log_scale.view(shape)
