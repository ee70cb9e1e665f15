"""The two losses that networks are boosted on, and the best step along a direction."""

import torch
from torch import Tensor


def loss(scores: Tensor, y: Tensor, squared: bool) -> Tensor:
    """Return the mean over samples of ½|y - scores|², or of the cross-entropy.

    Shapes: scores (samples, outputs); y alike, ones and zeros where they are classes.
    """
    if squared:
        return (y - scores).square().sum(1).mean() / 2
    return (torch.logsumexp(scores, 1) - (y * scores).sum(1)).mean()


def residual(scores: Tensor, y: Tensor, squared: bool) -> Tensor:
    """Return what each sample's loss falls along the steepest: y less the prediction."""
    return y - (scores if squared else torch.softmax(scores, 1))


def best_step(scores: Tensor, direction: Tensor, y: Tensor, squared: bool) -> float:
    """Return the step along `direction` with the least loss; 0 where there is no slope.

    In closed form for the squared loss. For the cross-entropy by Newton's method, halved until
    the loss falls: it is convex in the step.
    """
    if squared:
        length = direction.square().sum()
        return float((direction * (y - scores)).sum() / length) if length > 0 else 0.0
    step, value = 0.0, loss(scores, y, False)
    for _ in range(50):
        p = torch.softmax(scores + step * direction, 1)
        slope = ((p - y) * direction).sum(1).mean()
        mean = (p * direction).sum(1, keepdim=True)
        curvature = (p * (direction - mean).square()).sum(1).mean()
        if slope.abs() < 1e-9 or curvature <= 1e-12:
            break
        change = float(-slope / curvature)
        while (lower := loss(scores + (step + change) * direction, y, False)) > value:
            change /= 2
            if abs(change) < 1e-9:
                return step
        step, value = step + change, lower
    return step
