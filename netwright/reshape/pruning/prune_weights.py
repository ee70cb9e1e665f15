from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.calibration import InputStatistics, observe, stream
from netwright.catalogue.facets import method
from netwright.errors import CannotStage, NothingToReshape
from netwright.masks import Masks
from netwright.reshape._calibration import batches_of
from netwright.reshape.change import changes, decided, reshape
from netwright.reshape.pruning._ratios import least_distortion
from netwright.reshape.pruning._weight_criteria import CRITERIA, Criterion, Pattern, Seen
from netwright.reshape.pruning._weights import (
    Layers,
    by_channel,
    channels_in,
    matrix,
    weight_layers,
    write,
)
from netwright.runtime.progress import say

__all__ = ["prune_weights", "weight_masks"]


@method(
    "reshape",
    papers=["004-045"],
    place="whole network",
    saves=["file size"],
    needs=["calibration data"],
    keeps_function=False,
    search={"sparsity": [0.3, 0.5, 0.7], "criterion": ["magnitude", "wanda", "sparsegpt"]},
    variants={"wanda": {"criterion": "wanda"}, "magnitude": {"sparsity": 0.3},
              "2:4": {"criterion": "sparsegpt", "pattern": (2, 4)},
              "distortion": {"ratios": "distortion"}},
)
@reshape
@torch.no_grad()
def prune_weights(model: nn.Module, calibration: Any, sparsity: float | None = None, *,
                  criterion: str = "magnitude", pattern: Pattern | None = None,
                  ratios: str | Mapping[str, float] = "uniform",
                  layers: Collection[str] | None = None) -> nn.Module:
    """Return a copy in which a share of the single weights of each layer is zero.

    W is the weight of a layer, (outputs, inputs), X what it takes on the calibration data, and
    zeroed are the weights whose score is least: `"magnitude"` |W_ij| in the whole layer;
    `"wanda"` |W_ij| ‖X_j‖ in each row; `"sparsegpt"` W_ij² / [U]_jj² among 128 columns at a time,
    H⁻¹ = Uᵀ U, H = X Xᵀ, where the weights of later columns make up for what was zeroed
    (`netwright.obs.sweep`) and each stage takes what the pruned ones before it make.

    With `pattern=(n, m)` at most n of each m weights side by side stay, along the channels in a
    convolution. With `ratios="distortion"` layers lose different shares p_l, all together as much:

    min Σ_l d_l(p_l)  with  Σ_l p_l size_l = sparsity Σ_l size_l,  d_l(p) = E‖f(x) − f_l,p(x)‖²,

    f_l,p being the model with layer l alone pruned to p; twenty p are measured for each layer,
    made to rise with p, and the sum is least by dynamic programming.

    Pruned are linear layers and convolutions, all but a last layer that reads out a vocabulary and
    what is tied to an embedding. Names, shapes and ties stay, so that plain `from_pretrained` loads
    the result; it takes as much room and time as before. `netwright.save(..., compress=True)`
    stores what is not zero. Which weights are zero `weight_masks` tells, to be held while training
    goes on.

    Args:
        model: any network.
        calibration: inputs that layers are watched on; None will do for uniform magnitudes.
        sparsity: the share of weights that become zero, 0.5 or what `pattern` says by default.
        criterion: "magnitude", "wanda" or "sparsegpt".
        pattern: (n, m), how many weights of how many side by side stay.
        ratios: "uniform", "distortion", or a share for each layer's name.
        layers: the names of the layers that are pruned, see above for the default.

    Shapes: calibration is what the model takes, or a list of such batches.

    Raises:
        NothingToReshape: there is no layer whose weights can be pruned.
        UnknownName: `criterion`, `ratios` or one of `layers` is none that is known.
        ValueError: `sparsity` is not above 0 and below 1 or contradicts `pattern`, `pattern` does
            not divide a layer's inputs, `calibration` is missing or gives numbers that are not
            finite, or a weight is not finite.

    Paper: Xu, Wang, Geng, Chen, Zhao, Zhou, 2023, Efficient Joint Optimization of Layer-Adaptive
    Weight Pruning in Deep Neural Networks. Sun, Liu, Bair, Kolter, 2024, A Simple and Effective
    Pruning Approach for Large Language Models (Wanda). Frantar, Alistarh, 2023, SparseGPT: Massive
    Language Models Can Be Accurately Pruned in One-Shot.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> sparse = prune_weights(model, torch.randn(32, 8), 0.5, criterion="wanda")
    >>> weight_masks(sparse)
    Masks of 2 parameters, 50.0% kept
    """
    share = _share(sparsity, pattern)
    checks.one_of(CRITERIA, criterion=criterion)
    _check_ratios(ratios, pattern)
    how = CRITERIA[criterion]
    batches = [] if _needs_no_data(how, ratios, calibration) else batches_of(calibration)
    pruned = deepcopy(model)
    found, left = weight_layers(pruned, layers)
    _check_pattern(found, pattern)
    shares = _shares(pruned, found, batches, share, how, ratios)
    left |= _prune(pruned, found, batches, how, shares, pattern)
    done = {name: layer for name, layer in found.items() if name not in left}
    if not done:
        raise NothingToReshape(f"{type(model).__name__} has layers, such as {next(iter(left))}, "
                               "but none runs on calibration where it can be watched; choose by "
                               "criterion='magnitude', which needs no data")
    note = _note(pruned, done)
    say(f"prune_weights: {note}")
    return decided(
        {"layers": list(done), "left": left, "note": note},
        weights={name: cast(Any, layer).weight.detach() for name, layer in done.items()})


@prune_weights.applies
@torch.no_grad()
def with_weights(model: nn.Module, decision: Mapping[str, Any],
                 weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Give the layers of `model` their pruned weights, which are loaded where there are none."""
    for name, weight in (weights or {}).items():
        layer: Any = model.get_submodule(name)
        layer.weight.copy_(weight)
    return model


@method("companion")
def weight_masks(model: nn.Module) -> Masks:
    """Return masks of what is not zero in the layers that `prune_weights` has pruned.

    `weight_masks(model).hold(model, optimizer)` keeps the rest at zero in training.

    >>> model = prune_weights(nn.Sequential(nn.Linear(8, 4)), None, 0.25)
    >>> weight_masks(model)
    Masks of 1 parameters, 75.0% kept
    """
    parameters = dict(model.named_parameters())
    names = {f"{name}.weight".lstrip(".") for change in changes(model)
             if change.name == "prune_weights" for name in change.decision["layers"]}
    return Masks({name: parameters[name] != 0 for name in sorted(names) if name in parameters})


def _share(sparsity: float | None, pattern: Pattern | None) -> float:
    checks.between(0, 1, ends=(False, False), optional=True, sparsity=sparsity,
                   advice="it is the share of weights that become zero; try 0.5")
    if pattern is None:
        return 0.5 if sparsity is None else sparsity
    checks.pair(pattern=pattern, advice="(n, m) keeps n of each m weights; try (2, 4)")
    n, m = pattern
    checks.count(2, m=m)
    checks.between(1, m - 1, whole=True, n=n)
    if sparsity is not None and abs(sparsity - (1 - n / m)) > 1e-6:
        raise ValueError(f"sparsity must be {1 - n / m:g} where pattern is ({n}, {m}), or left "
                         f"out, got {sparsity}")
    return 1 - n / m


def _check_ratios(ratios: str | Mapping[str, float], pattern: Pattern | None) -> None:
    if isinstance(ratios, str):
        checks.one_of(("uniform", "distortion"), ratios=ratios)
    if pattern is not None and ratios != "uniform":
        raise ValueError(f"ratios must be 'uniform' where pattern={pattern} says how many weights "
                         f"each layer keeps, got {ratios!r}; leave one of the two out")


def _needs_no_data(how: Criterion, ratios: str | Mapping[str, float], calibration: Any) -> bool:
    return calibration is None and not how.statistics and ratios != "distortion"


def _check_pattern(layers: Layers, pattern: Pattern | None) -> None:
    if pattern is None:
        return
    for name, layer in layers.items():
        if channels_in(layer) % pattern[1]:
            raise ValueError(f"pattern must divide the inputs of each layer, got {pattern} for the "
                             f"{channels_in(layer)} of {name}; choose another m, or name the other "
                             "layers by layers=")


def _shares(model: nn.Module, layers: Layers, batches: list[Any], share: float, how: Criterion,
            ratios: str | Mapping[str, float]) -> dict[str, float]:
    """Return the share of zeros for each layer."""
    if isinstance(ratios, Mapping):
        for name, value in ratios.items():
            checks.one_of(layers, layer=name)
            checks.between(0, 1, ends=(True, False), share=value,
                           advice=f"ratios gives {name} a share of zeros")
        return {name: ratios.get(name, 0.0) for name in layers}
    if ratios == "uniform":
        return dict.fromkeys(layers, share)
    single = CRITERIA["wanda"] if how.cascade else how  # a sweep for each level would take long
    seen = {name: _seen(layers[name], taken)
            for name, taken in observe(model, batches, statistics=single.statistics).items()
            if name in layers}
    watched = {name: layer for name, layer in layers.items() if name in seen}
    return least_distortion(model, watched, batches, share, lambda name, weight, level:
                            single.prune(weight, seen[name], level, None))


def _prune(model: nn.Module, layers: Layers, batches: list[Any], how: Criterion,
           shares: Mapping[str, float], pattern: Pattern | None) -> dict[str, str]:
    """Prune the layers of `model` in place; return those that are left, with the reason."""
    done: set[str] = set()

    def change(_: Any, taken: Mapping[str, InputStatistics]) -> None:
        for name in taken:
            if name in shares and name not in done:
                done.add(name)
                _change(name, layers[name], taken[name], how, shares[name], pattern)

    if not how.statistics:
        change(None, dict.fromkeys(layers, InputStatistics(())))
    elif how.cascade:
        _go_through(model, batches, change, how)
    else:
        change(None, observe(model, batches, statistics=how.statistics))
    return dict.fromkeys((name for name in layers if name not in done),
                         "what it takes could not be watched")


def _go_through(model: nn.Module, batches: list[Any], change: Any, how: Criterion) -> None:
    """Change stage after stage; a model that is no chain of stages is one."""
    try:
        stream(model, batches, change, statistics=how.statistics)
    except CannotStage:
        change(None, observe(model, batches, statistics=how.statistics))


def _change(name: str, layer: nn.Module, taken: InputStatistics, how: Criterion, share: float,
            pattern: Pattern | None) -> None:
    seen = _seen(layer, taken)
    for statistic in seen:
        if statistic is not None and not bool(statistic.isfinite().all()):
            raise ValueError(f"calibration must give finite numbers in every layer, got nan or "
                             f"infinity in what {name} takes; check the inputs and the weights")
    write(layer, how.prune(matrix(layer), seen, share, pattern))


def _seen(layer: nn.Module, taken: InputStatistics) -> Seen:
    return Seen(*(None if statistic is None else by_channel(layer, statistic)
                  for statistic in (taken.square, taken.gram)))


def _note(model: nn.Module, layers: Layers) -> str:
    """Return what gets smaller, and what does not."""
    weights: list[Tensor] = [cast(Any, layer).weight for layer in layers.values()]
    total = sum(w.numel() for w in weights)
    gone = [w.numel() - int(w.count_nonzero()) for w in weights]
    size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    packed = size + sum(w.numel() // 8 - zero * w.element_size()
                        for w, zero in zip(weights, gone, strict=True))
    return (f"{sum(gone) / total:.1%} of {total:,} weights in {len(layers)} layers are zero; "
            f"size on disk unchanged ({size / 1e6:.3g} MB); packed: {packed / 1e6:.3g} MB, by "
            "netwright.save(..., compress=True)")
