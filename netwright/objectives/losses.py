from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from netwright import checks
from netwright.catalogue.facets import method
from netwright.objectives.metrics import mean_over_targets

__all__ = ["contrast_within", "cross_entropy", "mase", "normalized_distillation", "smape"]


@method("objective", needs=["classes"])
@mean_over_targets
def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy with the classes on the last axis; targets of -100 do not count.

    loss = -mean_n log softmax(logits)[n, y[n]]

    Shapes: logits (*, classes); y (*) of int64.

    >>> import torch
    >>> cross_entropy(torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.long)).shape
    torch.Size([])
    """
    if logits.ndim == 2 and y.ndim == 1:
        return functional.cross_entropy(logits, y)
    return functional.cross_entropy(logits.flatten(0, -2), y.flatten())


@method("objective", papers=["002-036"])
def normalized_distillation(students: Tensor | Sequence[Tensor],
                            teachers: Tensor | Sequence[Tensor],
                            norms: Sequence[float] | None = None) -> Tensor:
    """Squared distances of a student's features from a teacher's, none of which drowns the others.

    loss = Σ_i w_i mean_n ‖s_i,n − t_i,n‖²,  w_i = max_j ‖t_j‖² / ‖t_i‖²,  ‖t_i‖² = mean_n ‖t_i,n‖².

    The teacher learns nothing through it. A feature of zeros has the weight 1.

    Args:
        students: features of the student, or a single one.
        teachers: the same of the teacher.
        norms: ‖t_i‖² where they were measured before, once for a whole training; else those of
            this batch.

    Shapes: s_i and t_i (n, *size_i); norms as many as there are features.

    Raises:
        ValueError: students, teachers and norms do not fit each other.

    Paper: Zhang, Li, Chen, Xu, 2024, LAPTOP-Diff: Layer Pruning and Normalized Distillation for
    Compressing Diffusion Models.

    >>> import torch
    >>> small, large = torch.ones(2, 3), torch.full((2, 3), 100.0)
    >>> normalized_distillation([0.9 * small, 0.9 * large], [small, large]).round()
    tensor(600.)
    """
    ours, theirs = ([x] if isinstance(x, Tensor) else list(x) for x in (students, teachers))
    shapes = [[tuple(t.shape) for t in features] for features in (ours, theirs)]
    if not ours or shapes[0] != shapes[1] or len(norms or ours) != len(ours):
        raise ValueError("students, teachers and norms must be as many, and features of the same "
                         f"shapes, got {shapes[0]}, {shapes[1]} and {norms}; put a linear layer "
                         "behind a feature of another width")
    theirs = [t.detach() for t in theirs]
    sizes = torch.stack([_squared(t) for t in theirs]) if norms is None else torch.as_tensor(
        norms, dtype=theirs[0].dtype, device=theirs[0].device)
    weights = torch.where(sizes > 0, sizes.amax() / sizes, 1.0)
    return (weights * torch.stack([_squared(s - t) for s, t in zip(ours, theirs, strict=True)])
            ).sum()


def _squared(features: Tensor) -> Tensor:
    """Return the squared norm of a sample's features, averaged over samples."""
    return features.square().flatten(1).sum(1).mean()


@method("objective", needs=["series"])
def smape(forecast: Tensor, target: Tensor) -> Tensor:
    """Mean symmetric absolute percentage error, between 0 and 200; where both are 0 it counts 0.

    loss = 200 mean |y - f| / (|y| + |f|)

    Shapes: forecast and target of one shape.

    Raises:
        ValueError: the shapes differ.

    >>> import torch
    >>> smape(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0]))
    tensor(50.)
    """
    _same_shape(forecast, target)
    total = forecast.abs() + target.abs()
    return 200 * ((target - forecast).abs() / total.where(total > 0, 1.0)).mean()


@method("objective", needs=["series"])
def mase(forecast: Tensor, target: Tensor, history: Tensor, season: int = 1) -> Tensor:
    """Mean absolute error over that of repeating the season before, measured on the history.

    loss = mean |y - f| / mean_t |x_t - x_(t - season)|

    A history whose seasons all repeat exactly has no scale; it counts by the dtype's smallest
    normal number, so that any error is very large.

    Args:
        forecast: what was said.
        target: what came.
        history: what was known before.
        season: the steps of time after which a series repeats itself, 1 where it does not.

    Shapes: forecast and target (*, horizon); history (*, length) with length > season.

    Raises:
        ValueError: the shapes differ, or the history is not longer than a season.

    >>> import torch
    >>> mase(torch.tensor([6.0]), torch.tensor([8.0]), history=torch.tensor([1.0, 2.0, 3.0]))
    tensor(2.)
    """
    _same_shape(forecast, target)
    points = history.shape[-1]
    checks.between(1, points - 1, whole=True, season=season,
                   advice=f"the history has {points} points, and a season is shorter")
    scale = (history[..., season:] - history[..., :-season]).abs().mean(-1, keepdim=True)
    return ((target - forecast).abs() / scale.clamp(min=torch.finfo(scale.dtype).tiny)).mean()


def _same_shape(forecast: Tensor, target: Tensor) -> None:
    if forecast.shape != target.shape:
        raise ValueError(f"forecast must have the target's shape {tuple(target.shape)}, got "
                         f"{tuple(forecast.shape)}")


@method("objective", search={"temperature": (0.03, 1.0)},
        variants={"plain": {}, "cold": {"temperature": 0.03}})
def contrast_within(a: Tensor, b: Tensor, groups: Tensor | None = None,
                    temperature: float = 0.1) -> Tensor:
    """Mean cross-entropy of finding a row's partner among those of its own group.

    loss = mean_i -log softmax_j(cos(a_i, b_j) / temperature)[i], over j with groups[j] = groups[i],
    and the same with a and b exchanged.

    A row that is alone in its group adds nothing. Without groups this is InfoNCE.

    Args:
        a: rows.
        b: their partners.
        groups: the group of each row; all are one without it.
        temperature: that the cosines are divided by.

    Shapes: a and b (rows, dim), partners in the same row; groups (rows,) of int64.

    Raises:
        ValueError: a, b and groups do not fit each other.

    >>> import torch
    >>> a, groups = torch.eye(4), torch.tensor([0, 0, 1, 2])
    >>> contrast_within(a, a, groups) < contrast_within(a, a.flip(0), groups)
    tensor(True)
    """
    if a.ndim != 2 or a.shape != b.shape or (groups is not None and groups.shape != a.shape[:1]):
        raise ValueError("a and b must be (rows, dim) and groups (rows,), got "
                         f"{tuple(a.shape)}, {tuple(b.shape)} and "
                         f"{None if groups is None else tuple(groups.shape)}")
    alike = functional.normalize(a, dim=-1) @ functional.normalize(b, dim=-1).T / temperature
    if groups is not None:
        alike = alike.masked_fill(groups[:, None] != groups, float("-inf"))
    own = torch.arange(len(a), device=a.device)
    return (functional.cross_entropy(alike, own) + functional.cross_entropy(alike.T, own)) / 2
