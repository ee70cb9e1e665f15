import math
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import softplus

from netwright import checks
from netwright.catalogue.facets import method
from netwright.errors import CannotReverse
from netwright.generative.flows.flow import Flow, Transform

__all__ = ["GDN", "gaussianize_layerwise"]

STEEPEST = 0.98  # what max_j alpha_ij epsilon_i stays below


@method("generative", papers=["002-139"], place="transform", takes=("channels",))
class GDN(Transform):
    """Divide each entry by a pooled activity of all entries: generalised divisive normalisation.

    z_i = x_i / s_i^e_i;  s_i = b_i + sum_j g_ij |x_j|^a_ij;  with `inverse`, z_i = x_i s_i^e_i.
    log_det = -sum_i e_i log s_i + log det(I - A);  A_ij = e_i a_ij g_ij |x_j|^a_ij / s_i.
    Inverse: x_i <- z_i s_i(x)^e_i until it stays.

    All four are learnt: b > 0, g > 0, 1 < a < 3, e > 0 and a_ij e_i < 0.98. So the rows of A add
    up to less than 0.98, wherefore the determinant is above 0 and the iteration, seen in log |x|,
    shrinks every distance by that: each z has one x. Put a `LinearTransform` before it, as the
    paper's transform has.

    Args:
        channels: The entries along dimension 1, which are normalised together.
        inverse: Whether to multiply: the layer that decodes what a GDN has encoded, up to the
            pooled activity being that of its own input.
        iterations: After how many the inverse gives up.

    Shapes: x and z (batch, channels, *); log_det (batch,).

    Raises:
        CannotReverse: the inverse does not converge.
        ValueError: `channels` is below 1, or x has another number.

    Paper: Ballé, Laparra, Simoncelli, 2016, Density Modeling of Images using a Generalized
    Normalization Transformation.

    >>> gdn, x = GDN(3), torch.randn(5, 3)
    >>> z, log_det = gdn(x)
    >>> torch.allclose(gdn.inverse(z), x, atol=1e-5), log_det.shape
    (True, torch.Size([5]))
    """

    def __init__(self, channels: int, inverse: bool = False, *, iterations: int = 3000) -> None:
        super().__init__()
        checks.count(1, channels=channels)
        self.channels, self.multiplies, self.iterations = channels, inverse, iterations
        pool = 0.01 + 0.09 * torch.eye(channels)
        self.beta = nn.Parameter(torch.full((channels,), math.log(math.e - 1)))  # b = 1
        self.gamma = nn.Parameter(pool.expm1().log())
        self.alpha = nn.Parameter(torch.zeros(channels, channels))  # a = 2
        self.epsilon = nn.Parameter(torch.zeros(channels))

    def map(self, x: Tensor, condition: Any = None) -> tuple[Tensor, Tensor]:
        """Return z and log |det dz/dx|."""
        self._check(x)
        with torch.autocast(x.device.type, enabled=False):
            h = _wide(x).movedim(1, -1)
            a, e = self._exponents()
            parts, s = self._pooled(h)
            change = -e * s.log()
            rates = parts * (e[:, None] * a) / s[..., None]
            sign = -1.0 if self.multiplies else 1.0
            inner = torch.linalg.slogdet(torch.eye(self.channels, dtype=h.dtype, device=h.device)
                                         - sign * rates)[1]
            log_det = (sign * change.sum(-1) + inner)[..., None].flatten(1).sum(1)
            z = (h * (sign * change).exp()).movedim(-1, 1)
            return z.to(x.dtype), log_det.to(x.dtype)

    @torch.no_grad()
    def inverse(self, z: Tensor, condition: Any = None) -> Tensor:
        """Return the x that the transform maps to `z`."""
        self._check(z)
        if not z.numel():
            return z
        with torch.autocast(z.device.type, enabled=False):
            y = _wide(z).movedim(1, -1)
            e = self._exponents()[1] * (-1.0 if self.multiplies else 1.0)
            rounding, before = torch.finfo(y.dtype).eps, math.inf
            power = torch.zeros_like(y)
            for _ in range(self.iterations):
                new = e * self._pooled(y * power.exp())[1].log()
                moved = float((new - power).abs().amax())
                power = new
                # In log |x| the longest step shrinks each time, down to rounding.
                if moved <= rounding or (not moved < before and moved <= rounding ** 0.5):
                    return (y * power.exp()).movedim(-1, 1).to(z.dtype)
                if not moved < before:
                    break
                before = moved
        raise CannotReverse(f"x <- z s(x)^e still moves log |x| by {moved:.2g}, where it must "
                            f"settle within {self.iterations} iterations: z must be finite; scale "
                            "it, use a wider dtype, or give more iterations")

    def _exponents(self) -> tuple[Tensor, Tensor]:
        a = 1 + 2 * torch.sigmoid(_wide(self.alpha))
        return a, STEEPEST * torch.sigmoid(_wide(self.epsilon)) / a.amax(1)

    def _pooled(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return g_ij |x_j|^a_ij and s_i."""
        a = self._exponents()[0]
        # The slope of |x|^a in a is |x|^a log |x|, which is 0 at 0 and not a number there.
        logs = h.abs().clamp(min=torch.finfo(h.dtype).tiny).log()
        parts = softplus(_wide(self.gamma)) * (a * logs[..., None, :]).exp()
        return parts, softplus(_wide(self.beta)) + parts.sum(-1)

    def _check(self, x: Tensor) -> None:
        if x.ndim < 2 or x.shape[1] != self.channels:
            raise ValueError(f"x must be (batch, {self.channels}, ...), since "
                             f"channels={self.channels}, got {tuple(x.shape)}")


@method("companion", papers=["002-139"])
def gaussianize_layerwise(layers: Iterable[Transform | Sequence[Transform]], data: Tensor, *,
                          steps: int = 1000, batch: int = 256,
                          optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
                          = lambda parameters: torch.optim.Adam(parameters, 1e-2),
                          generator: Generator | None = None) -> Flow:
    """Return a flow of copies of `layers`, each trained to make what the last ones made Gaussian.

    For each layer in turn: maximise mean log N(f(x); 0, I) + log |det df/dx|;  x <- f(x).

    That is the negentropy of what the layer returns, up to a constant.

    Args:
        layers: Each a transform, or several that are trained together.
        data: The samples.
        steps: The steps of each layer.
        batch: The samples of a step.
        optimizer: Makes a layer's optimizer of its parameters.
        generator: Draws the batches.

    Shapes: data (samples, *size).

    Raises:
        ValueError: there are no layers or no data, or `steps` or `batch` is below 1.

    Paper: Ballé, Laparra, Simoncelli, 2016, Density Modeling of Images using a Generalized
    Normalization Transformation.

    >>> from netwright.generative.flows import LinearTransform
    >>> layers = [[LinearTransform(2), GDN(2)] for _ in range(2)]
    >>> len(gaussianize_layerwise(layers, torch.randn(100, 2), steps=3).transforms)
    4
    """
    parts = [deepcopy([layer] if isinstance(layer, Transform) else list(layer))
             for layer in layers]
    if not parts or not len(data):
        raise ValueError(f"layers and data must not be empty, got {len(parts)} and {len(data)}")
    checks.count(1, steps=steps, batch=batch)
    size, x = data.shape[1:], data
    for layer in parts:
        flow = Flow(layer, size)
        optimize = optimizer(list(flow.parameters()))
        for _ in range(steps):
            chosen = torch.randint(len(x), (min(batch, len(x)),), generator=generator)
            loss = -flow.log_prob(x[chosen.to(x.device)]).mean()
            optimize.zero_grad()
            loss.backward()
            optimize.step()
        optimize.zero_grad()
        with torch.no_grad():
            x = torch.cat([flow(some)[0] for some in x.split(4096)])
    return Flow([part for layer in parts for part in layer], size)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
