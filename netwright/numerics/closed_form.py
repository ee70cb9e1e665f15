"""Linear maps in closed form, and what boosting along the gradient of a representation needs."""

import torch
from torch import Tensor, nn


def loss(scores: Tensor, y: Tensor, squared: bool) -> Tensor:
    """Return the mean over samples of ½|y - scores|², or of the cross-entropy.

    Shapes: scores (samples, outputs); y alike, ones and zeros where they are classes.
    """
    if squared:
        return (y - scores).square().sum(1).mean() / 2
    return (torch.logsumexp(scores, 1) - (y * scores).sum(1)).mean()


def pseudo_residual(scores: Tensor, y: Tensor, squared: bool) -> Tensor:
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


def ridge_solution(f: Tensor, g: Tensor, ridge: float) -> Tensor:
    """Return the D that minimises |g - f D|²/n + ridge |D|², by the smaller of its two forms.

    Shapes: f (n, p); g (n, q); D (p, q).
    """
    n, p = f.shape
    gram = f @ f.T if n < p else f.T @ f
    gram.diagonal().add_(n * ridge)
    factor = torch.linalg.cholesky(gram)
    if n < p:
        return f.T @ torch.cholesky_solve(g, factor)
    return torch.cholesky_solve(f.T @ g, factor)


def boosted_map(f: Tensor, scores: Tensor, W: Tensor, y: Tensor, squared: bool,
                ridge: float) -> Tensor:
    """Return the D by which f D moves a representation so that its scores lose the most.

    With G = residual W, scaled to mean square 1, D minimises |G - f D|²/n + ridge |D|², and is
    then as long as the best step along it makes it. The loss with `scores` + f D W^T is no larger.

    Shapes: f (n, p); scores and y (n, outputs); W (outputs, width); D (p, width).
    """
    G = pseudo_residual(scores, y, squared) @ W
    G = G / G.square().sum(1).mean().sqrt().clamp_min(torch.finfo(G.dtype).tiny)
    D = ridge_solution(f, G, ridge)
    return D * best_step(scores, f @ D @ W.T, y, squared)


@torch.no_grad()
def linear_readout(phi: Tensor, y: Tensor, squared: bool, ridge: float,
                   before: nn.Linear | None = None, *, bias: bool = True) -> nn.Linear:
    """Return the layer of phi with the least loss plus ridge |W|², halved where it is squared.

    Ridge regression, or logistic regression by L-BFGS, from `before` where that is given.

    Shapes: phi (n, width); y (n, outputs).
    """
    readout = nn.utils.skip_init(nn.Linear, phi.shape[1], y.shape[1], bias=bias, dtype=phi.dtype,
                                 device=phi.device)
    if squared:
        mean = phi.mean(0) if bias else torch.zeros_like(phi[0])
        readout.weight.copy_(ridge_solution(phi - mean, y, ridge).T)
        if bias:
            readout.bias.copy_(y.mean(0) - readout.weight @ mean)
        return readout
    if before is not None:
        readout.load_state_dict(before.state_dict())
    else:
        readout.weight.zero_()
        if bias:  # as often as each class is there; one that is not has half a sample
            readout.bias.copy_(y.mean(0).clamp_min(0.5 / len(y)).log())
    fit_logistic(readout, phi, y, ridge)
    return readout


@torch.enable_grad()
def fit_logistic(readout: nn.Linear, phi: Tensor, y: Tensor, ridge: float) -> None:
    """Minimise the cross-entropy of the readout plus ridge |W|², from where it stands."""
    optimizer = torch.optim.LBFGS(readout.parameters(), max_iter=100, tolerance_grad=1e-5,
                                  line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(readout(phi), y, False) + ridge * readout.weight.square().sum()
        value.backward()
        return value
    optimizer.step(closure)
    readout.zero_grad()
