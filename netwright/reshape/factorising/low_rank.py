from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from netwright import checks
from netwright.anatomy.layers import beyond_weights, is_transposed
from netwright.anatomy.replacing import linear_weight, replace, without_fused_paths
from netwright.calibration import InputStatistics
from netwright.catalogue.facets import method
from netwright.errors import NothingToReshape, UnknownName
from netwright.reshape._calibration import batches_of
from netwright.reshape._streaming import show_statistics
from netwright.reshape.change import decided, reshape

__all__ = ["low_rank"]

DAMPING = 1e-2  # of the mean diagonal: what the data do not show still counts a little


class Factors(NamedTuple):
    """A matrix as `second @ first`, (outputs, rank) and (rank, inputs), and the bias."""

    first: Tensor
    second: Tensor
    bias: Tensor | None


@method(
    "reshape",
    place="linear",
    saves=["parameters", "file size", "inference memory", "inference time"],
    needs=["calibration data"],
    keeps_function=False,
    search={"energy": (0.9, 0.999)},
    variants={"energy": {"energy": 0.9}, "rank": {"rank": 4},
              "without data": {"calibration": None, "rank": 4}},
)
@reshape
@torch.no_grad()
def low_rank(model: nn.Module, calibration: Any, rank: int | None = None, *,
             energy: float = 0.99, layers: Sequence[str] | None = None) -> nn.Module:
    """Return a copy whose linear layers and convolutions are each two thin ones in a row.

    W := U Uᵀ W,  b := b + (I − U Uᵀ) W μ,  U = the first `rank` left singular vectors of W L,
    L Lᵀ = the covariance of what the layer takes, μ its mean: no other matrix of that rank comes
    closer to the layer's outputs on the calibration data. A layer without a bias gets none: L Lᵀ
    is then the mean of x xᵀ. Without data, L = I and μ = 0, the truncated singular value
    decomposition of the weights alone, which moves the outputs more.

    Stages of the model are gone through in order, so that each layer is fitted to what it takes
    when those before it are of low rank. Only layers that get smaller are changed,
    rank · (inputs + outputs) < inputs · outputs; a convolution's inputs are its patches, and it
    becomes one with `rank` channels, with another of a single point after it. Layers whose
    weights are shared, parametrized or hooked are left as they are, and so are grouped and
    transposed convolutions.

    Args:
        model: any module.
        calibration: what it takes, or batches of that, some hundred rows of each layer at least;
            None for the plain decomposition.
        rank: how many numbers are left between the two parts, the same in every layer.
        energy: without `rank`, the share of the variance of a layer's outputs that is kept; each
            layer gets the smallest rank that keeps it.
        layers: names of layers, or of modules all of whose layers are meant; all if None.

    Shapes: W (outputs, inputs), U (outputs, rank), L (inputs, inputs), μ (inputs,).

    Raises:
        NothingToReshape: no layer gets smaller.
        UnknownName: no linear layer or convolution is called that.
        ValueError: `rank` is below 1, `energy` not above 0 and below 1, or `calibration` is empty
            or gives activations that are not finite.

    Paper: Chen, Yu, Dhillon, Hsieh, 2021, DRONE: Data-aware Low-rank Compression for Large NLP
    Models.

    >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))
    >>> thin = low_rank(model, torch.randn(64, 16), rank=4)
    >>> sum(p.numel() for p in thin[0].parameters()), sum(p.numel() for p in model[0].parameters())
    (224, 544)
    """
    checks.count(1, optional=True, rank=rank, advice="the rank is what is left between two layers")
    checks.between(0, 1, ends=(False, False), energy=energy)
    fit = _Fit(rank, energy, _chosen(model, layers))
    if calibration is None:
        for name, layer in fit.layers.items():
            fit.add(name, layer, None)
    else:
        trial = deepcopy(model)
        show_statistics(trial, batches_of(calibration), lambda taken: fit.visit(trial, taken),
                        ("gram", "mean"))
    if not fit.found:
        raise NothingToReshape(
            f"no layer of {type(model).__name__} gets smaller by "
            + (f"rank={rank}" if rank is not None else f"energy={energy:g}") + f": {fit.reasons()}"
            "; ask for less")
    return decided({"ranks": {name: len(made.first) for name, made in fit.found.items()}},
                   factors=fit.found)


@low_rank.applies
@torch.no_grad()
def _factored(model: nn.Module, decision: Mapping[str, Any],
              factors: Mapping[str, Factors] | None = None) -> nn.Module:
    for name, rank in decision["ranks"].items():
        layer: Any = model.get_submodule(name)
        thin: Any = Thin(*_parts(layer, rank)).to(layer.weight)
        thin.requires_grad_(layer.weight.requires_grad)
        if factors is not None:
            first, second, bias = factors[name]
            thin[0].weight.copy_(first.view_as(thin[0].weight))
            thin[1].weight.copy_(second.view_as(thin[1].weight))
            if bias is not None:
                thin[1].bias.copy_(bias)
        if layer.bias is not None:
            thin[1].bias.requires_grad_(layer.bias.requires_grad)
        replace(model, name, thin)
    without_fused_paths(model)
    return model


class Thin(nn.Sequential):
    """Two layers in the place of one; it says of itself what the one said to those who look.

    >>> thin = Thin(nn.Linear(5, 2, bias=False), nn.Linear(2, 3))
    >>> thin.weight.shape, thin.bias.shape
    (torch.Size([3, 5]), torch.Size([3]))
    """

    @property
    def weight(self) -> Tensor:
        """The product, laid out as the layer's own weight was."""
        parts: Any = self
        first, second = parts[0].weight, parts[1].weight
        return (second.flatten(1) @ first.flatten(1)).view(len(second), *first.shape[1:])

    @property
    def bias(self) -> Tensor | None:
        """The second layer's bias."""
        last: Any = self[1]
        return last.bias


class _Fit:
    """The factors of the layers that get smaller, and why others do not."""

    def __init__(self, rank: int | None, energy: float,
                 chosen: tuple[dict[str, nn.Module], dict[str, str]]) -> None:
        self.rank, self.energy = rank, energy
        self.layers, self.left = chosen
        self.found: dict[str, Factors] = {}

    def visit(self, trial: nn.Module, taken: Mapping[str, InputStatistics]) -> None:
        """Fit the layers of a stage, and let `trial` go on with them."""
        for name, seen in taken.items():
            if name not in self.layers or name in self.found or not seen.rows:
                continue
            layer: Any = trial.get_submodule(name)
            self.add(name, layer, seen)
            if name in self.found:
                first, second, bias = self.found[name]
                weight = linear_weight(layer)
                weight.copy_((second @ first).view_as(weight))
                if bias is not None:
                    layer.bias.copy_(bias)

    def add(self, name: str, layer: Any, seen: InputStatistics | None) -> None:
        """Fit a layer to what it takes, to anything where that is not known."""
        weight = linear_weight(layer).detach().flatten(1).to(
            torch.float32 if layer.weight.device.type == "mps" else torch.float64)
        if not bool(weight.isfinite().all()):
            raise ValueError(f"model must have finite weights, but {name!r} has others; load it "
                             "again, or name the layers to change by layers=")
        mean = None if seen is None or layer.bias is None else seen.mean
        root = _root(name, seen, mean)
        u, strengths = _directions(weight if root is None else weight @ root.to(weight))
        kept = self.rank if self.rank is not None else _enough(strengths, self.energy)
        outputs, inputs = weight.shape
        if kept * (inputs + outputs) >= inputs * outputs:
            self.left[name] = f"rank {kept} of {outputs} x {inputs} saves nothing"
            return
        second = u[:, :kept]
        first = second.T @ weight
        bias = layer.bias
        if mean is not None:
            gone = mean.to(weight)
            bias = bias + (weight @ gone - second @ (first @ gone)).to(bias)
        self.found[name] = Factors(first.to(layer.weight), second.to(layer.weight), bias)

    def reasons(self) -> str:
        """Return why layers are left as they are."""
        told = [f"{name!r}: {why}" for name, why in self.left.items()]
        never = [name for name in self.layers if name not in self.found and name not in self.left]
        told += [f"{name!r} took no input" for name in never]
        return "; ".join([*told[:3], *(["..."] if len(told) > 3 else [])]) or (
            "there is no linear layer or convolution in it")


def _chosen(model: nn.Module,
            layers: Sequence[str] | None) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the layers that can be made thin by name, and why others cannot."""
    kinds = {name: module for name, module in model.named_modules()
             if type(module) in (nn.Linear, nn.Conv2d) or is_transposed(module)
             or (is_parametrized(module) and isinstance(module, (nn.Linear, nn.Conv2d)))}
    wanted = dict.fromkeys(kinds) if layers is None else _named(kinds, layers)
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    left = {name: why for name in wanted if (why := _why_not(kinds[name], owners))}
    return {name: kinds[name] for name in wanted if name not in left}, left


def _named(kinds: Mapping[str, nn.Module], layers: Sequence[str]) -> dict[str, None]:
    found: dict[str, None] = {}
    for name in layers:
        inside = [known for known in kinds if known == name or known.startswith(f"{name}.")]
        if not inside:
            raise UnknownName("linear layer or convolution", name, kinds)
        found |= dict.fromkeys(inside)
    return found


def _why_not(layer: Any, owners: Mapping[int, int]) -> str:
    if is_parametrized(layer):
        return "its weight is parametrized"
    if odd := beyond_weights(layer):
        return f"it has {odd}"
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return "its channels are in groups"
    return "its weight is shared" if owners[id(layer.weight)] > 1 else ""


def _root(name: str, seen: InputStatistics | None, mean: Tensor | None) -> Tensor | None:
    """Return L with L Lᵀ the covariance around `mean`, damped until there is one."""
    if seen is None:
        return None
    assert seen.gram is not None
    gram = seen.gram if mean is None else seen.gram - mean[:, None] * mean
    if not bool(gram.isfinite().all()):
        raise ValueError(f"calibration must give finite activations, got others before {name!r}; "
                         "check the inputs and the weights")
    size = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    one = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    damping = DAMPING
    while True:
        root, failed = torch.linalg.cholesky_ex(gram + damping * size * one)
        if not failed:
            return root
        damping *= 10


def _directions(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return the left singular vectors of `a` and its squared singular values, largest first."""
    if len(a) <= a.shape[1]:
        squares, u = torch.linalg.eigh(a @ a.T)
        return u.flip(1), squares.flip(0).clamp_min(0)
    squares, v = torch.linalg.eigh(a.T @ a)
    return torch.linalg.qr(a @ v.flip(1)).Q, squares.flip(0).clamp_min(0)


def _enough(strengths: Tensor, energy: float) -> int:
    """Return how many of the largest make up a share of the sum, at least one."""
    shares = strengths.cumsum(0) / strengths.sum().clamp_min(torch.finfo(strengths.dtype).tiny)
    return min(int((shares < energy).sum()) + 1, len(strengths))


def _parts(layer: Any, rank: int) -> tuple[nn.Module, nn.Module]:
    """Return two empty layers that stand for `layer`."""
    bias = layer.bias is not None
    if isinstance(layer, nn.Conv2d):
        said: dict[str, Any] = {name: getattr(layer, name) for name in (
            "kernel_size", "stride", "padding", "dilation", "padding_mode")}
        return (nn.Conv2d(layer.in_channels, rank, bias=False, **said),
                nn.Conv2d(rank, layer.out_channels, 1, bias=bias))
    outputs, inputs = linear_weight(layer).shape
    return nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias)
