from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Generator, Tensor, nn

from netwright import checks
from netwright.blocks.kan.selectable import SelectableKANLinear
from netwright.catalogue.facets import method

__all__ = ["KANAutoencoder"]


@method(
    "block",
    papers=["003-176"],
    place="whole network",
    takes=("sizes",),
    search={"grid": [3, 5, 8]},
    variants={"small": {"sizes": (8, 4, 2)}},
)
class KANAutoencoder(nn.Module):
    """An autoencoder of Kolmogorov-Arnold layers: a narrow code of x, and x again.

    code = E_n(... E_1(x));  y = D_1(... D_n(code)),  D_i from sizes[i] to sizes[i - 1].

    A layer adds a SiLU and B-splines on each edge. The first grid lies over `input_range`, the
    others over (-2, 2), where the layers' outputs begin. With `last="sigmoid"` y is between 0 and
    1, as pixels are.

    Args:
        sizes: from the inputs to the code, such as (64, 32, 8).
        grid: intervals of the grids.
        order: degree of the B-splines.
        input_range: where x lies.
        last: what y goes through.
        generator: draws the weights.

    Shapes: x and y (*, sizes[0]); the code (*, sizes[-1]).

    Raises:
        ValueError: fewer than two sizes, one below 1, or another `last`; x has another last axis.

    Paper: Moradi, Panahi, Bollt, Lai, 2024, Kolmogorov-Arnold Network Autoencoders.

    >>> import torch
    >>> autoencoder = KANAutoencoder((64, 16, 4))
    >>> autoencoder.encoder(torch.rand(5, 64)).shape, autoencoder(torch.rand(5, 64)).shape
    (torch.Size([5, 4]), torch.Size([5, 64]))
    """

    def __init__(self, sizes: Sequence[int], *, grid: int = 5, order: int = 3,
                 input_range: tuple[float, float] = (0.0, 1.0),
                 last: Literal["sigmoid", "identity"] = "sigmoid",
                 generator: Generator | None = None) -> None:
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError("sizes must be those of the inputs, of any layers and of the code, "
                             f"each at least 1, got {tuple(sizes)}; try (64, 32, 8)")
        checks.one_of(["sigmoid", "identity"], last_activation=last)

        def layer(before: int, after: int, first: bool = False) -> nn.Module:
            return SelectableKANLinear(before, after, ("silu", "bspline"), "sum", grid=grid,
                                       order=order, grid_range=input_range if first else (-2, 2),
                                       generator=generator)

        self.encoder = nn.Sequential(*[layer(before, after, first=i == 0) for i, (before, after)
                                       in enumerate(pairwise(sizes))])
        self.decoder = nn.Sequential(*[layer(before, after) for before, after in
                                       pairwise(list(sizes)[::-1])])
        self.decoder.append(nn.Sigmoid() if last == "sigmoid" else nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """Return what the decoder makes of the code of x."""
        y: Tensor = self.decoder(self.encoder(x))
        return y
