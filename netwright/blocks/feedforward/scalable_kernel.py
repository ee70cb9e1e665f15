from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import linear, relu

from netwright import checks
from netwright.catalogue.facets import method
from netwright.errors import NothingToReshape, UnknownName

__all__ = ["SNNK", "RandomFeatures", "Sine", "bundle", "solve_ridge"]

Spectrum = tuple[Sequence[float], Sequence[complex]]
Function = Literal["sin", "cos", "relu"] | Spectrum

_SPECTRA: dict[str, Spectrum] = {"sin": ([1.0], [-1j]), "cos": ([1.0], [1.0])}


@method("block", place="activation")
class Sine(nn.Module):
    """The sine, as an activation.

    >>> Sine()(torch.zeros(3))
    tensor([0., 0., 0.])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return sin(x)."""
        return x.sin()


@method(
    "block",
    papers=["000-022"],
    place="embedding",
    takes=("dim", "n_features"),
    search={"function": ["sin", "cos", "relu"], "scale": (0.1, 10.0)},
    variants={"plain": {}, "cosine": {"function": "cos"}, "ReLU": {"function": "relu"}},
)
class RandomFeatures(nn.Module):
    """Fixed random features of inputs and of weights, whose product is a layer on average.

    E[phi(x) . psi(w, b)] = s(w . x + b) for s(z) = Re sum_k c_k exp(i f_k z):
    phi_j(x) = exp(h_j g_j . x - i f_j |x|^2 / 2),
    psi_j(w, b) = exp(h_j g_j . w - i f_j |w|^2 / 2 + i f_j b) C c_j / |c_j| / n,
    g_j ~ N(0, I), h_j = sqrt(i f_j), f_j drawn with chance |c_j| / C, C = sum_k |c_k|.
    "relu": phi_j = max(g_j . (x, 1), 0) / sqrt(n), psi alike of (w, b), whose product is on average
    the arc-cosine kernel of (x, 1) and (w, b): |u| |v| (sin t + (pi - t) cos t) / (2 pi), t the
    angle between them.

    Real and imaginary parts are features of their own, n of each. The variance grows with
    exp(f |x + w|^2), so that inputs and weights should be of norm 1 or so; `scale` moves norm from
    one to the other, phi(scale x) . psi(w / scale).

    Args:
        dim: size of the last axis of x.
        n_features: how many features; an even number, but for "relu".
        function: "sin", "cos", "relu" or frequencies f_k and complex coefficients c_k.
        scale: what x is multiplied by.
        generator: draws g and f.

    Shapes: x (*, dim), phi (*, n_features); w (out, dim), b (out,), psi (out, n_features).

    Raises:
        ValueError: a size is below 1 or odd, `scale` is not above 0, or frequencies and
            coefficients are not equally many.
        UnknownName: no function is called that.

    Paper: Sehanobish, Choromanski, Zhao, Dubey, Likhosherstov, 2024, Scalable Neural Network
    Kernels.

    >>> features = RandomFeatures(4, 10_000, "sin")
    >>> x, w, b = torch.ones(1, 4) / 4, torch.ones(1, 4) / 4, torch.ones(1)
    >>> (features(x) @ features.of_weights(w, b).T - (x @ w.T + b).sin()).abs().item() < 0.1
    True
    """

    directions: Tensor
    frequencies: Tensor
    coefficients: Tensor

    def __init__(self, dim: int, n_features: int, function: Function = "sin", *,
                 scale: float = 1.0, generator: Generator | None = None) -> None:
        super().__init__()
        checks.count(1, dim=dim, n_features=n_features)
        checks.above(0, scale=scale)
        if isinstance(function, str) and function not in ("relu", *_SPECTRA):
            raise UnknownName("function", function, ("relu", *_SPECTRA))
        self.dim, self.n_features, self.scale = dim, n_features, scale
        self.rectified = isinstance(function, str) and function == "relu"
        if self.rectified:
            draws = torch.randn(n_features, dim + 1, generator=generator)
            self.register_buffer("directions", draws)
            return
        if n_features % 2:
            raise ValueError(f"n_features must be even, since real and imaginary parts are "
                             f"features of their own, got {n_features}")
        frequencies, coefficients = _SPECTRA[function] if isinstance(function, str) else function
        if len(frequencies) != len(coefficients) or not len(frequencies):
            raise ValueError("function must have as many frequencies as coefficients, at least "
                             f"one, got {len(frequencies)} and {len(coefficients)}")
        n, c = n_features // 2, torch.tensor(coefficients, dtype=torch.complex64)
        chosen = torch.multinomial(c.abs(), n, replacement=True, generator=generator)
        kept = (c / c.abs().clamp(min=1e-30))[chosen] * c.abs().sum()
        self.register_buffer("directions", torch.randn(n, dim, generator=generator))
        self.register_buffer("frequencies", torch.tensor(frequencies)[chosen])
        self.register_buffer("coefficients", torch.view_as_real(kept).clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return phi(x)."""
        self._check(x, "x")
        x = x * self.scale
        if self.rectified:
            one = torch.full_like(x[..., :1], self.scale)  # so that the bias is scaled back alike
            return self._rectify(torch.cat([x, one], -1))
        size, angle = self._parts(x)
        return torch.cat([size.exp() * angle.cos(), size.exp() * angle.sin()], -1)

    def of_weights(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return psi of each row of `weight` and entry of `bias`."""
        self._check(weight, "weight")
        bias = weight.new_zeros(weight.shape[:-1]) if bias is None else bias
        if self.rectified:
            return self._rectify(torch.cat([weight, bias[..., None]], -1) / self.scale)
        size, angle = self._parts(weight / self.scale)
        angle = angle + self.frequencies * bias[..., None]
        real, imaginary = size.exp() * angle.cos(), size.exp() * angle.sin()
        a, b = self.coefficients.unbind(-1)
        n = len(self.frequencies)
        # Re(phi psi) = Re phi Re psi - Im phi Im psi.
        return torch.cat([real * a - imaginary * b, -real * b - imaginary * a], -1) / n

    def _rectify(self, x: Tensor) -> Tensor:
        return relu(linear(x, self.directions)) / self.n_features ** 0.5

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithm of the size of the exponential, and its angle."""
        f = self.frequencies
        along = linear(x, self.directions) * (f.abs() / 2).sqrt()  # sqrt(i f) is (1 +- i) of that
        square = x.square().sum(-1, keepdim=True)
        return along, torch.where(f < 0, -along, along) - f * square / 2

    def _check(self, x: Tensor, name: str) -> None:
        if not x.ndim or x.shape[-1] != self.dim:
            raise ValueError(f"{name} must be (*, {self.dim}), since dim={self.dim}, "
                             f"got {tuple(x.shape)}")


@method(
    "block",
    papers=["000-022"],
    place="linear",
    takes=("dim_in", "dim_out"),
    saves=["parameters", "file size"],
    search={"n_features": [16, 64, 256]},
    variants={"plain": {"n_features": 6}},
)
class SNNK(nn.Module):
    """A layer s(W x + b) by random features: what is trained meets the input in one dot product.

    y = Psi phi(x);  phi the fixed features, Psi (out, n_features) trained, at the start psi(W, b).

    On average over the draws y is s(W x + b) at the start, or the arc-cosine kernel for "relu"; see
    `RandomFeatures`. Training Psi itself reaches functions that are not of that form. It has fewer
    parameters than the layer where n_features < dim_in.

    Args:
        dim_in: size of the last axis of x.
        dim_out: size of the last axis of y.
        n_features: how many features.
        function: "sin", "cos", "relu" or a spectrum, as in `RandomFeatures`.
        layer: the W and b to start from, a new linear layer where none is given.
        scale: what x is multiplied by, and W divided.
        generator: draws the features.

    Shapes: x (*, dim_in), y (*, dim_out).

    Raises:
        ValueError: a size is below 1, or `layer` has others.

    Paper: Sehanobish, Choromanski, Zhao, Dubey, Likhosherstov, 2024, Scalable Neural Network
    Kernels.

    >>> SNNK(16, 8, n_features=32)(torch.zeros(2, 5, 16)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, dim_in: int, dim_out: int, n_features: int, function: Function = "sin", *,
                 layer: nn.Linear | None = None, scale: float = 1.0,
                 generator: Generator | None = None) -> None:
        super().__init__()
        checks.count(1, dim_in=dim_in, dim_out=dim_out)
        features = RandomFeatures(dim_in, n_features, function, scale=scale, generator=generator)
        layer = nn.Linear(dim_in, dim_out) if layer is None else layer
        if (layer.in_features, layer.out_features) != (dim_in, dim_out):
            raise ValueError(f"layer must be of dim_in={dim_in} and dim_out={dim_out}, got "
                             f"{layer.in_features} and {layer.out_features}")
        self.features = features.to(layer.weight)
        with torch.no_grad():
            self.weight = nn.Parameter(self.features.of_weights(layer.weight, layer.bias))

    def forward(self, x: Tensor) -> Tensor:
        """Return Psi phi(x)."""
        return linear(self.features(x), self.weight)


@method("companion", papers=["000-022"], saves=["parameters", "file size"])
@torch.no_grad()
def bundle(mlp: nn.Sequential, n_features: int, example: Tensor | None = None, *,
           generator: Generator | None = None) -> nn.Sequential:
    """Return a network of fixed feature maps and one linear layer that approximates `mlp`.

    W_2 s(W_1 x + b_1) = (W_2 Psi_1) phi_1(x), and so on through the layers: each hidden layer's
    weights go into the next one's, and all of them into the last. What is left to train is one
    matrix, for which `solve_ridge` has the optimum of the squared error in closed form.

    Args:
        mlp: linear layers with `Sine` or `nn.ReLU` between them, the last one linear.
        n_features: how many features each hidden layer becomes.
        example: inputs by which the norms of signals and weights are balanced in layers with a
            sine; none where they are of norm 1 or so.
        generator: draws the features.

    Shapes: example (samples, inputs).

    Raises:
        NothingToReshape: `mlp` is no such chain.
        ValueError: `n_features` is below 1, or odd where there is a sine.

    Paper: Sehanobish, Choromanski, Zhao, Dubey, Likhosherstov, 2024, Scalable Neural Network
    Kernels.

    >>> mlp = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
    ...                     nn.Linear(64, 3))
    >>> bundled = bundle(mlp, n_features=32)
    >>> [type(part).__name__ for part in bundled], sum(p.numel() for p in bundled.parameters())
    (['RandomFeatures', 'RandomFeatures', 'Linear'], 99)
    """
    layers: list[Any] = list(mlp)[::2]
    between = list(mlp)[1::2]
    if (len(layers) < 2 or len(layers) != len(between) + 1
            or not all(isinstance(layer, nn.Linear) for layer in layers)
            or not all(isinstance(act, (Sine, nn.ReLU)) for act in between)):
        raise NothingToReshape("mlp must be linear layers with Sine or nn.ReLU between them, got "
                               f"{', '.join(type(part).__name__ for part in mlp) or 'nothing'}")
    parts: list[nn.Module] = []
    weight, x = layers[0].weight, example
    for layer, act, after in zip(layers, between, layers[1:], strict=False):
        scale = 1.0
        if x is not None and isinstance(act, Sine):
            norms = [float(rows.norm(dim=-1).mean()) for rows in (weight, x)]
            scale = (norms[0] / norms[1]) ** 0.5 if min(norms) > 0 else 1.0
        features = RandomFeatures(weight.shape[1], n_features,
                                  "sin" if isinstance(act, Sine) else "relu", scale=scale,
                                  generator=generator).to(weight)
        weight = after.weight @ features.of_weights(weight, layer.bias)
        x = None if x is None else features(x)
        parts.append(features)
    last = nn.Linear(n_features, layers[-1].out_features, bias=layers[-1].bias is not None,
                     device=weight.device, dtype=weight.dtype)
    last.weight.copy_(weight)
    if layers[-1].bias is not None:
        last.bias.copy_(layers[-1].bias)
    return nn.Sequential(*parts, last).train(mlp.training)


@method("companion", papers=["000-022"])
@torch.no_grad()
def solve_ridge(network: nn.Sequential, x: Tensor, y: Tensor, penalty: float = 1e-3) -> (
        nn.Sequential):
    """Return a copy whose last linear layer is the best for the squared error, in closed form.

    W = Y^T F (F^T F + penalty n I)^-1 of features F and targets Y less their means;
    b = mean(y) - W mean(f), where the layer has a bias.

    Shapes: x (n, inputs), y (n, outputs) of floating point.

    Raises:
        ValueError: the last part is no linear layer, y does not fit, or `penalty` is not above 0.

    Paper: Sehanobish, Choromanski, Zhao, Dubey, Likhosherstov, 2024, Scalable Neural Network
    Kernels.

    >>> network = nn.Sequential(RandomFeatures(4, 32, "relu"), nn.Linear(32, 1))
    >>> x = torch.randn(50, 4)
    >>> solved = solve_ridge(network, x, x.norm(dim=1, keepdim=True))
    >>> bool((solved(x) - x.norm(dim=1, keepdim=True)).abs().mean() < 0.2)
    True
    """
    last = network[-1] if len(network) else None
    if not isinstance(last, nn.Linear):
        raise ValueError(f"network must end in a linear layer, got {type(last).__name__}")
    if not y.is_floating_point() or y.shape != (len(x), last.out_features) or not len(x):
        raise ValueError(f"y must be ({len(x)}, {last.out_features}) of floating point, one row "
                         f"at least, got {tuple(y.shape)} of {y.dtype}; use one_hot(y).float()")
    checks.above(0, penalty=penalty)
    solved: Any = deepcopy(network)
    f, target = solved[:-1](x).double(), y.double()
    middle, center = f.mean(0), target.mean(0)
    if last.bias is None:
        middle, center = torch.zeros_like(middle), torch.zeros_like(center)
    f, target = f - middle, target - center
    gram = f.T @ f + penalty * len(x) * torch.eye(f.shape[1], dtype=f.dtype, device=f.device)
    weight = torch.linalg.solve(gram, f.T @ target).T
    solved[-1].weight.copy_(weight)
    if last.bias is not None:
        solved[-1].bias.copy_(center - weight @ middle)
    copy: nn.Sequential = solved
    return copy
