from typing import Any

from torch import Tensor

from netwright import checks
from netwright.catalogue.facets import method
from netwright.generative.flows.flow import Transform
from netwright.reversing.engine import Regroup, Step

__all__ = ["Squeeze"]


@method("generative", place="transform", needs=["images"])
class Squeeze(Transform):
    """Make channels of the pixels of each small square of an image.

    z[c f^2 + a f + b, i, j] = x[c, f i + a, f j + b];  log_det = 0.

    Args:
        factor: The rows and columns f of a square.
        back: Whether to make squares of the channels instead.

    Shapes: x (batch, channels, height, width), z (batch, f^2 channels, height / f, width / f); the
    other way about with `back`.

    Raises:
        ValueError: the sizes cannot be divided so.

    Paper: Dinh, Sohl-Dickstein, Bengio, 2017, Density Estimation Using Real NVP.

    >>> import torch
    >>> Squeeze()(torch.randn(5, 3, 8, 8))[0].shape
    torch.Size([5, 12, 4, 4])
    """

    def __init__(self, factor: int = 2, *, back: bool = False) -> None:
        super().__init__()
        checks.count(1, factor=factor)
        self.factor, self.back = factor, back

    def steps(self, condition: Any = None) -> list[Step]:
        """Return the one step, which moves numbers and changes none."""
        there, back = (self._spread, self._gather) if self.back else (self._gather, self._spread)
        names = ("spread", self.factor), ("gather", self.factor)
        kind, undoes = names if self.back else names[::-1]
        return [Regroup("Squeeze", lambda s: [there(s[0]), *s[1:]],
                        lambda s: [back(s[0]), *s[1:]], kind=kind, undoes=undoes)]

    def _gather(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"x must be (batch, channels, height, width) with height and width "
                             f"multiples of {self.factor}, got {tuple(x.shape)}; pad the images")
        f = self.factor
        return (x.unflatten(3, (-1, f)).unflatten(2, (-1, f)).permute(0, 1, 3, 5, 2, 4)
                .flatten(1, 3))

    def _spread(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] % self.factor ** 2:
            raise ValueError(f"x must be (batch, channels, height, width) with channels a multiple "
                             f"of {self.factor ** 2}, got {tuple(x.shape)}")
        f = self.factor
        return (x.unflatten(1, (-1, f, f)).permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3))
