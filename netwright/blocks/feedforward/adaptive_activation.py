import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from netwright import checks
from netwright.catalogue.facets import method

__all__ = ["AGLU", "APA"]

LEAST = 1e-4  # what lambda stays above: there the function is Gumbel's to four digits


@method("block", papers=["002-089"], place="activation")
class APA(nn.Module):
    """An activation between 0 and 1 whose steepness and skew are learnt.

    a(z) = (l exp(-k z) + 1)^(-1/l) = exp(-softplus(log l - k z) / l);  k and l are learnt.

    At l = 1 it is the sigmoid of k z, towards l = 0 the Gumbel distribution exp(-exp(-k z)). l is
    read as 1e-4 where it is below, and still gets gradients there, which can lead it back.

    Args:
        kappa: k at first.
        lam: l at first.
        channels: how many pairs are learnt, one for each entry of the last axis; 1 for a pair that
            all entries share.

    Shapes: z and a(z) (*, channels), or any shape with one pair.

    Raises:
        ValueError: `lam` is below 1e-4, `channels` below 1, or z's last axis has another size.

    Paper: Alexandridis, Deng, Nguyen, Luo, 2024, Adaptive Parametric Activation.

    >>> z = torch.randn(5)
    >>> torch.allclose(APA()(z), z.sigmoid())
    True
    """

    def __init__(self, kappa: float = 1.0, lam: float = 1.0, *, channels: int = 1) -> None:
        super().__init__()
        checks.at_least(LEAST, lam=lam)
        checks.count(1, channels=channels)
        self.kappa = nn.Parameter(torch.full((channels,), float(kappa)))
        self.lam = nn.Parameter(torch.full((channels,), float(lam)))

    def forward(self, z: Tensor) -> Tensor:
        """Return a(z)."""
        channels = len(self.kappa)
        if channels > 1 and (z.ndim < 1 or z.shape[-1] != channels):
            raise ValueError(f"z must be (*, {channels}), since channels={channels}, got "
                             f"{tuple(z.shape)}; use channels=1, or move the axis to the end")
        # 1 / l magnifies what half precision rounds off.
        wide = torch.promote_types(z.dtype, torch.float32)
        lam = self.lam.to(wide)
        lam = lam + (LEAST - lam).clamp(min=0).detach()  # unlike a clamp's, its slope is never 0
        a = torch.exp(-softplus(lam.log() - self.kappa.to(wide) * z.to(wide)) / lam)
        return a.to(z.dtype).view(z.shape)


@method("block", papers=["002-089"], place="activation")
class AGLU(APA):
    """The input times an adaptive activation of itself.

    y = z a(z);  a is `APA`.

    At k = l = 1 it is the SiLU; a large k makes it the ReLU, k = 1.702 nearly the GELU.

    Args:
        kappa: k at first.
        lam: l at first.
        channels: how many pairs are learnt, as in `APA`.

    Shapes: z and y (*, channels), or any shape with one pair.

    Raises:
        ValueError: as `APA`.

    Paper: Alexandridis, Deng, Nguyen, Luo, 2024, Adaptive Parametric Activation.

    >>> z = torch.randn(5)
    >>> torch.allclose(AGLU()(z), torch.nn.functional.silu(z))
    True
    """

    def forward(self, z: Tensor) -> Tensor:
        """Return z a(z)."""
        return z * super().forward(z)
