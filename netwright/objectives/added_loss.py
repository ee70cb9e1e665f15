from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from netwright.catalogue.facets import method

__all__ = ["auxiliary_scale"]

_scale: list[float | Tensor] = [1.0]


def with_auxiliary(signal: Tensor, loss: Tensor) -> Tensor:
    """Return `signal` as it is; when its gradient is asked for, `loss` gets one too.

    It is how a module teaches its router in any training loop. The gradient is that of a loss of
    which backward() is called once and unscaled; see `auxiliary_scale`.

    >>> weight = torch.ones(3, requires_grad=True)
    >>> with_auxiliary(2 * weight, weight.square().sum()).sum().backward()
    >>> weight.grad
    tensor([4., 4., 4.])
    """
    taught: Tensor = _Auxiliary.apply(signal, loss)
    return taught


@method("companion")
@contextmanager
def auxiliary_scale(factor: float | Tensor) -> Iterator[None]:
    """Scale the losses that blocks add by themselves in the backward passes within.

    By the factor that the loss itself is scaled by: 1 / batches where the gradients of several
    batches are added up, `scaler.get_scale()` under a GradScaler, their product for both. It
    holds for mixtures of experts and for fast feed-forward trees.

    >>> from netwright.blocks import GLU, MixtureOfExperts
    >>> moe = MixtureOfExperts(16, lambda: GLU(16, 32), n_experts=4)
    >>> for x in torch.randn(2, 10, 16):
    ...     with auxiliary_scale(1 / 2):
    ...         (moe(x).square().mean() / 2).backward()
    """
    before = _scale[0]
    _scale[0] = factor
    try:
        yield
    finally:
        _scale[0] = before


class _Auxiliary(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(signal: Tensor, loss: Tensor) -> Tensor:
        return signal.clone()  # a view could not be changed in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.like = inputs[1].dtype, inputs[1].device

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.like
        return grads[0], torch.ones((), dtype=dtype, device=device) * _scale[0]

    @staticmethod
    def jvp(ctx: Any, signal: Tensor | None, loss: Tensor | None) -> Tensor | None:
        # The signal is what it is: in forward mode there is nothing to add a loss to.
        return None if signal is None else signal.clone()
