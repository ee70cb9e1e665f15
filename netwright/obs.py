"""The optimal brain surgeon's sweep: columns of a weight change, and those after make up for it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from netwright import checks

__all__ = ["Swept", "sweep"]

# Of the columns from one on to the end of the block (rows, columns), the roots of their curvatures
# and the place of the first in the order: what the first of them becomes (rows,).
Become = Callable[[Tensor, Tensor, int], Tensor]


class Swept(NamedTuple):
    """A weight after the sweep, half the squared error that it makes, and the damping used.

    `note` says where more damping than asked for was needed.
    """

    weight: Tensor
    loss: float
    damping: float
    note: str


@torch.no_grad()
def sweep(weight: Tensor, hessian: Tensor, become: Become, *, block: int = 128,
          damping: float = 0.01, order: Tensor | None = None) -> Swept:
    """Change the columns of a weight one by one, the later ones making up for the error.

    H := H + damping · mean(diag H) · I;  U := upper Cholesky factor of H⁻¹;
    for each column i: q := become(w_i);  e := (w_i − q) / U_ii;  w_j := w_j − e U_ij for j > i.

    That is least in ½ tr(Δ H Δᵀ) for what each column becomes; the sum of ½‖e‖² is the loss.
    An input that is always zero has 1 on the diagonal, and no other column moves it. Damping grows
    tenfold until the factor exists. Updates reach beyond `block` columns once for each block.

    Shapes: weight (rows, columns); hessian (columns, columns), Σ x xᵀ or its mean; order (columns,)
    the columns as they are taken, from the first to the last by default.

    Raises:
        ValueError: the shapes do not fit, a number is not finite, `order` is no permutation, or no
            damping makes the matrix positive definite.

    Paper: Hassibi, Stork, 1993, Second Order Derivatives for Network Pruning: Optimal Brain
    Surgeon. Frantar, Alistarh, 2023, SparseGPT: Massive Language Models Can Be Accurately Pruned
    in One-Shot.

    >>> x = torch.randn(64, 6)
    >>> swept = sweep(torch.randn(3, 6), x.T @ x, lambda w, d, i: w[:, 0].round())
    >>> bool((swept.weight == swept.weight.round()).all())
    True
    """
    _check(weight, hessian, block, damping, order)
    columns = weight.shape[1]
    taken = torch.arange(columns) if order is None else order.cpu()
    precise = torch.float64 if weight.device.type == "cpu" else torch.float32
    w = weight.detach().to(precise)[:, taken]
    factor, used, note = _factor(hessian.to(w)[taken][:, taken], damping)
    loss = 0.0
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.zeros_like(w[:, start:end])
        for i in range(start, end):
            new = become(w[:, i:end].clone(), factor.diagonal()[i:end], i).to(w)
            error = (w[:, i] - new) / factor[i, i]
            w[:, i:end] -= error[:, None] * factor[i, i:end]
            w[:, i] = new
            errors[:, i - start] = error
            loss += float(error.square().sum()) / 2
        w[:, end:] -= errors @ factor[start:end, end:]
    swept = torch.empty_like(w)
    swept[:, taken] = w
    return Swept(swept.to(weight), loss, used, note)


def _factor(hessian: Tensor, damping: float) -> tuple[Tensor, float, str]:
    """Return the upper Cholesky factor of the inverse, and with which damping there is one."""
    dead = hessian.diagonal() == 0
    hessian = hessian + torch.diag(dead.to(hessian))
    mean = hessian.diagonal()[~dead].mean() if not bool(dead.all()) else hessian.new_ones(())
    used = damping
    for _ in range(8):
        damped = hessian + torch.diag(torch.where(dead, 0.0, used * mean))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                note = f"damping {used:g} in place of {damping:g}" if used != damping else ""
                return upper, used, note
        used = max(used * 10, 1e-8)
    raise ValueError("hessian must be positive semi-definite, got one for which a damping of "
                     f"{used / 10:g} times the mean diagonal does not do; sum x xᵀ over inputs")


def _check(weight: Tensor, hessian: Tensor, block: int, damping: float,
           order: Tensor | None) -> None:
    if weight.ndim != 2:
        raise ValueError("weight must be (rows, columns), got shape "
                         f"{tuple(weight.shape)}; flatten the inputs of a convolution")
    columns = weight.shape[1]
    if hessian.shape != (columns, columns):
        raise ValueError(f"hessian must be ({columns}, {columns}) for a weight of {columns} "
                         f"columns, got shape {tuple(hessian.shape)}")
    checks.finite(weight=weight, hessian=hessian)
    checks.count(1, block=block)
    checks.at_least(0, damping=damping)
    if order is not None and not torch.equal(order.cpu().sort().values, torch.arange(columns)):
        raise ValueError(f"order must have each of the {columns} columns once, got "
                         f"{tuple(order.shape)} with other entries; try diagonal().argsort()")
