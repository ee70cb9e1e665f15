from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.models.boosting._estimators import (
    Grown,
    GrownClassifier,
    GrownRegressor,
)
from netwright.numerics.closed_form import boosted_map, linear_readout, loss, pseudo_residual

__all__ = ["RandomFeatureBoostingClassifier", "RandomFeatureBoostingRegressor",
           "RandomFeatureNetwork"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}
DELTAS = ["gradient", "dense", "diagonal", "scalar"]


class _RandomFeatureBoosting(Grown):
    """What the regressor and the classifier share: how the network grows."""

    def __init__(self, n_blocks: int = 5, *, n_features: int = 512, width: int = 128,
                 delta: str = "gradient", shrinkage: float = 1.0, ridge: float = 0.1,
                 ridge_readout: float = 0.01, features: str = "swim", feature_scale: float = 0.5,
                 activation: str = "tanh", normalize: bool = True,
                 random_state: Any = None) -> None:
        self.n_blocks, self.n_features, self.width = n_blocks, n_features, width
        self.delta, self.shrinkage = delta, shrinkage
        self.ridge, self.ridge_readout = ridge, ridge_readout
        self.features, self.feature_scale, self.activation = features, feature_scale, activation
        self.normalize, self.random_state = normalize, random_state

    @torch.no_grad()
    def _grow(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Any, list[float]]:
        self._check()
        lift = nn.Sequential(self._draw(x, y, self.width, generator),
                             ACTIVATIONS[self.activation]())
        phi, blocks = lift(x), []
        readouts = [self._readout(phi, y, None)]
        losses = [float(loss(readouts[0](phi), y, self._squared))]
        count = self.n_features if self.delta in ("gradient", "dense") else self.width
        for _ in range(self.n_blocks):
            block = RandomFeatureBlock(self._draw(phi, y, count, generator),
                                       self._draw(x, y, count, generator), self.width,
                                       ACTIVATIONS[self.activation](), self.normalize).double()
            f = block.random_features(phi, x)
            self._fit_delta(block, f, readouts[-1], phi, y)
            phi = phi + block.delta(f)
            if block.norm is not None:
                block.norm.running_mean = phi.mean(0)
                block.norm.running_var = phi.var(0, correction=0)
                phi = block.norm.eval()(phi)
            blocks.append(block)
            readouts.append(self._readout(phi, y, readouts[-1]))
            losses.append(float(loss(readouts[-1](phi), y, self._squared)))
        return (lift, blocks, readouts), losses

    def _network(self, pieces: Any, steps: int, mean: Tensor, scale: Tensor) -> nn.Module:
        lift, blocks, readouts = deepcopy(pieces)
        with torch.no_grad():
            readouts[steps].weight.mul_(scale[:, None])
            readouts[steps].bias.mul_(scale).add_(mean)
        return RandomFeatureNetwork(lift, blocks[:steps], readouts[steps])

    def _fit_delta(self, block: "RandomFeatureBlock", f: Tensor, readout: nn.Linear, phi: Tensor,
                   y: Tensor) -> None:
        """Set the block's map of the features `f` to what brings the scores nearer to y."""
        W, scores = readout.weight, readout(phi)
        r = pseudo_residual(scores, y, self._squared)
        if self.delta in ("diagonal", "scalar"):
            f = f[:, :self.width] + f[:, self.width:]
        mean = f.mean(0)
        f = f - mean  # so that what is added has a bias of its own, which is not penalised
        if self.delta == "gradient":
            delta = boosted_map(f, scores, W, y, self._squared, self.ridge)
        elif self.delta == "dense":
            delta = dense_sandwich(f, r, W, self.ridge)
        elif self.delta == "diagonal":
            delta = diagonal_sandwich(f, r, W, self.ridge).diag()
        else:
            delta = scalar_sandwich(f, r, W, self.ridge) * torch.eye(self.width, dtype=f.dtype)
        delta = self.shrinkage * delta
        block.delta.bias.copy_(-mean @ delta)
        block.delta.weight.copy_(torch.cat([delta] * (block.delta.in_features // len(delta))).T)

    def _readout(self, phi: Tensor, y: Tensor, before: nn.Linear | None) -> nn.Linear:
        return linear_readout(phi, y, self._squared, self.ridge_readout, before)

    def _draw(self, x: Tensor, y: Tensor, count: int, generator: Generator) -> nn.Linear:
        """Return a layer of `count` random features of x."""
        layer = nn.Linear(x.shape[1], count, dtype=x.dtype)
        if self.features == "normal":
            spread = self.feature_scale / x.shape[1] ** 0.5
            layer.weight.copy_(spread * torch.randn(layer.weight.shape, generator=generator))
            layer.bias.copy_(self.feature_scale * torch.randn(count, generator=generator))
            return layer
        first = torch.arange(5 * len(x)) % len(x)
        second = (first + torch.randint(1, len(x), first.shape, generator=generator)) % len(x)
        apart = x[second] - x[first]
        squares = apart.square().sum(1).clamp_min(1e-4)
        chance = (y[second] - y[first]).norm(dim=1) / squares.sqrt()
        chance = chance if chance.sum() > 0 else torch.ones_like(chance)
        drawn = torch.multinomial(chance, count, replacement=True, generator=generator)
        weight = 2 * self.feature_scale * apart[drawn] / squares[drawn, None]
        layer.weight.copy_(weight)
        layer.bias.copy_(-(weight * x[first[drawn]]).sum(1) - self.feature_scale)
        return layer

    def _check(self) -> None:
        checks.one_of(DELTAS, way_to_find_delta=self.delta)
        checks.one_of(["swim", "normal"], kind_of_random_features=self.features)
        checks.one_of(ACTIVATIONS, activation=self.activation)
        checks.above(0, ridge=self.ridge, ridge_readout=self.ridge_readout,
                     feature_scale=self.feature_scale, advice="try 0.1")
        checks.count(0, n_blocks=self.n_blocks)
        checks.count(1, width=self.width, n_features=self.n_features)
        checks.between(0, 1, ends=(False, True), shrinkage=self.shrinkage,
                       advice="1 is the whole")
        if self.delta != "gradient" and not self._squared:
            raise ValueError(f"delta={self.delta!r} has a closed form for the squared loss alone; "
                             "leave it at 'gradient' for classes")


@method(
    "model",
    papers=["003-072"],
    place="whole network",
    saves=["training time"],
    needs=["labels"],
    search={"n_blocks": [2, 5, 10], "ridge": (0.001, 10.0)},
)
class RandomFeatureBoostingRegressor(_RandomFeatureBoosting, GrownRegressor):
    """A residual network of random features, grown greedily, block by block.

    phi_0 = features of x;  phi_{t+1} = norm(phi_t + shrinkage Delta_t f_t),
    f_t = [random features of phi_t, random features of x];  scores = W_t phi_t + b_t.

    With r the negative gradient of the loss by the scores and G = r W_t that by phi_t,
    scaled to mean square 1, `delta` says how Delta_t is found, all in closed form:

    "gradient"   Delta minimises |G - f Delta|²/n + ridge |Delta|²; then the best step along
                 it: in closed form for the squared loss, by Newton for the cross-entropy
    "dense", "diagonal", "scalar"   Delta of that shape minimises
                 |r - f Delta W_t^T|²/n + ridge |Delta|²: the greedy block itself, for the
                 squared loss only, hence for regression

    W_t is then fitted anew: ridge regression, or logistic regression by L-BFGS from W_{t-1}.
    Only Delta and W are fitted; the features are drawn.

    `features="swim"` draws each as one that tells two samples apart: its weights are the
    difference of a pair, drawn in proportion to |difference of y| / |difference of x|, so that
    it is -feature_scale at one and +feature_scale at the other before the activation.
    `"normal"` draws weights from N(0, feature_scale² / inputs), biases from N(0, feature_scale²).

    y is standardised inside, and the last layer undoes it; X should be standardised by the user
    (`sklearn.preprocessing.StandardScaler`). `losses_` is the loss on the training set with 0, 1,
    ... blocks. `network_` is the network, of the precision of X, in eval mode; `norm` is a batch
    norm that holds the training set's statistics. `truncate(t)` gives back the network of t blocks
    with the readout that it had.

    `n_features` are drawn of each of phi and x. "diagonal" and "scalar" need as many as `width`
    of each, and add them up.

    Args:
        n_blocks: residual blocks.
        n_features: random features of each block, drawn of phi and of x each.
        width: of phi.
        delta: how a block's Delta is found, "gradient", "dense", "diagonal" or "scalar".
        shrinkage: the part of each best step that is taken.
        ridge: what the size of Delta costs.
        ridge_readout: what the size of a readout costs.
        features: "swim" or "normal".
        feature_scale: of the weights that features are drawn with.
        activation: of the features.
        normalize: whether what a block returns is normalised by the training set's statistics.
        random_state: where features are drawn, as everywhere in scikit-learn.

    Shapes: X (n, inputs); phi (n, width); f (n, 2 n_features); W (outputs, width).

    Raises:
        ValueError: a number is out of range, or `delta` needs the squared loss.
        UnknownName: `delta`, `features` or `activation` is none of those that are known.

    Paper: Zozoulenko, Cass, Gonon, 2025, Random Feature Representation Boosting.

    >>> X, y = torch.rand(60, 3).numpy(), torch.rand(60).numpy()
    >>> model = RandomFeatureBoostingRegressor(2, n_features=16, width=8).fit(X, y)
    >>> model.predict(X).shape, model.network_(torch.tensor(X)).shape
    ((60,), torch.Size([60, 1]))
    """


@method(
    "model",
    papers=["003-072"],
    place="whole network",
    saves=["training time"],
    needs=["labels"],
    search={"n_blocks": [2, 5, 10], "ridge": (0.001, 10.0)},
)
class RandomFeatureBoostingClassifier(_RandomFeatureBoosting, GrownClassifier):
    """A residual network of random features, grown greedily, block by block.

    As `RandomFeatureBoostingRegressor`, with the cross-entropy for a loss: y holds
    classes of any type, and the network returns a score for each.

    Args: those of `RandomFeatureBoostingRegressor`; `delta` is "gradient" alone for this loss.

    Paper: that of `RandomFeatureBoostingRegressor`.

    >>> X, y = torch.rand(60, 3).numpy(), ["yes", "no"] * 30
    >>> model = RandomFeatureBoostingClassifier(2, n_features=16, width=8).fit(X, y)
    >>> model.predict(X).shape, model.network_(torch.tensor(X)).shape
    ((60,), torch.Size([60, 2]))
    """


class RandomFeatureBlock(nn.Module):
    """A residual block: norm(phi + Delta [act(A phi + a), act(B x + b)] + c)."""

    def __init__(self, of_phi: nn.Linear, of_x: nn.Linear, width: int, activation: nn.Module,
                 normalize: bool) -> None:
        super().__init__()
        self.of_phi, self.of_x, self.activation = of_phi, of_x, activation
        self.delta = nn.Linear(of_phi.out_features + of_x.out_features, width)
        self.norm = nn.BatchNorm1d(width, affine=False) if normalize else None

    def random_features(self, phi: Tensor, x: Tensor) -> Tensor:
        """Return the features of the representation and of the input, side by side."""
        return self.activation(torch.cat([self.of_phi(phi), self.of_x(x)], 1))

    def forward(self, phi: Tensor, x: Tensor) -> Tensor:
        """Return the next representation."""
        phi = phi + self.delta(self.random_features(phi, x))
        return phi if self.norm is None else self.norm(phi)


class RandomFeatureNetwork(nn.Module):
    """What the boosting of random features grows: an ordinary network, all of it trainable.

    phi = lift(x);  phi = block(phi, x) for each block;  scores = readout(phi).
    """

    def __init__(self, lift: nn.Module, blocks: list[nn.Module], readout: nn.Linear) -> None:
        super().__init__()
        self.lift, self.blocks, self.readout = lift, nn.ModuleList(blocks), readout

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of x (batch, inputs)."""
        phi = self.lift(x)
        for block in self.blocks:
            phi = block(phi, x)
        return self.readout(phi)


def dense_sandwich(f: Tensor, r: Tensor, W: Tensor, ridge: float) -> Tensor:
    """Return the D that minimises |r - f D W^T|²/n + ridge |D|².

    With f = U S V^T and W^T = P T Q^T it is V M P^T, where M_ij = S_i T_j (U^T r Q)_ij /
    (S_i² T_j² + n ridge).

    Shapes: f (n, p); r (n, q); W (q, width); D (p, width).
    """
    U, S, Vt = torch.linalg.svd(f, full_matrices=False)
    P, T, Qt = torch.linalg.svd(W.T, full_matrices=False)
    both = S[:, None] * T
    return Vt.T @ (both * (U.T @ r @ Qt.T) / (both.square() + len(f) * ridge)) @ P.T


def diagonal_sandwich(f: Tensor, r: Tensor, W: Tensor, ridge: float) -> Tensor:
    """Return the d that minimises |r - f diag(d) W^T|²/n + ridge |d|², f (n, width)."""
    n = len(f)
    A = (f.T @ f) * (W.T @ W) / n
    A.diagonal().add_(ridge)
    return torch.linalg.solve(A, (f * (r @ W)).sum(0) / n)


def scalar_sandwich(f: Tensor, r: Tensor, W: Tensor, ridge: float) -> Tensor:
    """Return the number d that minimises |r - d f W^T|²/n + ridge d², f (n, width)."""
    scores = f @ W.T
    return (r * scores).sum() / (scores.square().sum() + len(f) * ridge)
