from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.anatomy.exchanging import feedforward_weights, write_feedforward
from netwright.anatomy.feedforwards import FeedForwardLayer, feedforwards
from netwright.anatomy.layers import is_linear, linear_sizes
from netwright.anatomy.replacing import plain_paths
from netwright.catalogue.facets import method
from netwright.errors import NothingToReshape
from netwright.reshape._calibration import batches_of
from netwright.reshape._layers import layer_of, plain_layer
from netwright.reshape.change import decided, reshape
from netwright.reshape.feedforward.swap_feedforward import choose
from netwright.runtime.modes import evaluating, rehearsing
from netwright.signals import apply

__all__ = ["Bricks", "find_bricks", "keep_bricks"]


class Bricks(NamedTuple):
    """Groups of hidden units of a feed-forward layer: `units[i]` are the units of brick i."""

    layer: FeedForwardLayer
    units: tuple[Tensor, ...]


@method("companion", papers=["000-017"], needs=["calibration data"])
@torch.inference_mode(False)
@torch.no_grad()
def find_bricks(model: nn.Module, calibration: Any, bricks: int = 8, *,
                layers: Sequence[str] | None = None) -> list[Bricks]:
    """Return, for each feed-forward layer, groups of hidden units that are active together.

    c_ij = max(0, corr(|a_i|, |a_j|)) over the calibration data's positions, a_i being what unit i
    gives to the layer's way out;  the groups are the spectral clusters of c.

    The paper surveys how neurons group and leaves the method open; this choice needs no labels
    and no random draw, and takes gated units as they are (a_i is gate times value). Units that
    never change are like none and join any group. A layer of n units takes n^2 numbers and the
    time of an eigendecomposition of that size.

    Args:
        model: any module with layers that `feedforwards` finds; a classifier of two linear layers
            counts where the model has none on a residual stream.
        calibration: what the model takes, or a list of such batches.
        bricks: how many groups a layer is cut into; it may be fewer where groups are empty.
        layers: the names of the layers to look at; all where none are given.

    Shapes: each `units[i]` (units of the brick,) of int64, ascending; together they are all units.

    Raises:
        NothingToReshape: the model has no feed-forward layer that can be read.
        UnknownName: no feed-forward layer is called that.
        ValueError: `bricks` is not between 1 and a layer's hidden units, `calibration` is empty,
            gives fewer than two positions or activations that are not finite.

    Paper: Xiao, Zhang, Song, Jiang, Yao, Han, Wang, Wang, Huang, Lin, Zhao, Zhao, Tu, Zhong,
    Zhang, Si, Moo, Zhao, Chen, Lin, Liu, Shang, Sun, 2024, Configurable Foundation Models:
    Building LLMs from a Modular Perspective.

    >>> model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
    >>> (found,) = find_bricks(model, torch.randn(50, 8), bricks=3)
    >>> sorted(int(i) for units in found.units for i in units) == list(range(12))
    True
    """
    batches = batches_of(calibration)
    try:
        found = feedforwards(model, batches[0])
    except NothingToReshape:
        found = feedforwards(model, batches[0], square=False)
    chosen = [layer for layer in choose(found, layers) if layer.down is not None]
    if not chosen:
        raise NothingToReshape("the model's feed-forward layers are blocks of experts, which are "
                               "bricks already; prune them as experts")
    for layer in chosen:
        checks.between(1, layer.hidden, whole=True, bricks=bricks,
                       advice=f"{layer.down!r} has {layer.hidden} hidden units")
    return [Bricks(layer, _clusters(_co_activation(model, layer, batches), bricks))
            for layer in chosen]


@method(
    "reshape",
    papers=["000-017"],
    place="feedforward",
    saves=["parameters", "file size", "inference memory", "inference time"],
    needs=["dense feed-forward layers"],
    keeps_function=False,
    variants={"one of two": {"keep": [[1]], "found": [Bricks(
        FeedForwardLayer("", "0", "2", None, nn.ReLU(), 8, 12, 3),
        (torch.arange(4), torch.arange(4, 12)))]}},
    network=lambda: nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)),
    batch=lambda: torch.randn(5, 8),
)
@reshape
@torch.no_grad()
def keep_bricks(model: nn.Module, found: Sequence[Bricks],
                keep: Sequence[Sequence[int]]) -> nn.Module:
    """Return a copy whose feed-forward layers have the hidden units of some bricks alone.

    y = sum over the kept units of down[:, i] a_i, and the bias: the network computes what it would
    if the other units gave zero, with smaller matrices.

    Args:
        model: what `find_bricks` was given.
        found: what `find_bricks` returned, or some of it; the other layers stay whole.
        keep: for each entry of `found`, the numbers of the bricks that stay.

    Raises:
        ValueError: `keep` has another length than `found`, names a brick that is not there, or
            keeps none of a layer's.

    Paper: Xiao, Zhang, Song, Jiang, Yao, Han, Wang, Wang, Huang, Lin, Zhao, Zhao, Tu, Zhong,
    Zhang, Si, Moo, Zhao, Chen, Lin, Liu, Shang, Sun, 2024, Configurable Foundation Models:
    Building LLMs from a Modular Perspective.

    >>> model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
    >>> found = find_bricks(model, torch.randn(50, 8), bricks=3)
    >>> part = keep_bricks(model, found, [[0, 2]])
    >>> part[0].out_features == 12 - len(found[0].units[1])
    True
    """
    if len(keep) != len(found):
        raise ValueError(f"keep must have an entry for each of the {len(found)} layers in found, "
                         f"got {len(keep)}")
    for (layer, units), numbers in zip(found, keep, strict=True):
        if not numbers or not all(0 <= number < len(units) for number in numbers):
            raise ValueError(f"keep must name some of the bricks 0 to {len(units) - 1} of "
                             f"{layer.down!r}, got {list(numbers)}; to remove a whole layer, use "
                             "prune_sublayers")
    known = dict(model.named_modules())
    for layer, _ in found:
        into = layer.hidden * (1 if layer.packed is None else 2)
        for name, size in ((layer.up, into), (layer.gate, into), (layer.down, layer.out)):
            if name is None:
                continue
            if name not in known or not is_linear(known[name]):
                raise NothingToReshape(f"model has no linear layer {name!r}, which found names; "
                                       "give what find_bricks found in this model")
            if linear_sizes(known[name])[1] != size:
                raise ValueError(f"found must be of this model, but {name!r} gives "
                                 f"{linear_sizes(known[name])[1]} features, and {size} in found; "
                                 "find the bricks anew")
    kept = [torch.cat([units[number] for number in dict.fromkeys(numbers)]).sort().values
            for (_, units), numbers in zip(found, keep, strict=True)]
    return decided({"layers": [{"layer": plain_layer(layer, model), "units": units.tolist()}
                               for (layer, _), units in zip(found, kept, strict=True)]})


@keep_bricks.applies
@torch.no_grad()
def _kept(model: nn.Module, decision: Mapping[str, Any]) -> nn.Module:
    for said in decision["layers"]:
        layer = layer_of(said["layer"], model)
        write_feedforward(model, layer, feedforward_weights(model, layer).units(said["units"]))
    return model


def _co_activation(model: nn.Module, layer: FeedForwardLayer, batches: list[Any]) -> Tensor:
    """Return the correlation of the sizes of all pairs of hidden units' activations."""
    sizes: list[Tensor] = []

    def before(_: nn.Module, args: Any) -> None:
        sizes.append(args[0].detach().abs().double().reshape(-1, layer.hidden))

    watched = deepcopy(model)
    watched.get_submodule(str(layer.down)).register_forward_pre_hook(before)
    with evaluating(watched), plain_paths(), rehearsing(watched):
        for x in batches:
            apply(watched, x)
    active = torch.cat(sizes)
    if len(active) < 2 or not active.isfinite().all():
        raise ValueError("calibration must give two positions or more and finite activations, "
                         f"got {len(active)} in {layer.down!r}"
                         + ("" if active.isfinite().all() else ", some of them not finite"))
    active = active - active.mean(0)
    length = active.norm(dim=0)
    active = active / length.where(length > 1e-12 * len(active), torch.inf)
    return (active.T @ active).clamp(min=0)


def _clusters(likeness: Tensor, bricks: int) -> tuple[Tensor, ...]:
    """Return the spectral clusters of units, each ascending, by their first unit."""
    from sklearn.cluster import SpectralClustering
    if bricks == 1:
        return (torch.arange(len(likeness)),)
    joined = likeness.cpu() + 1e-6  # so that no unit is apart from all others
    labels = torch.as_tensor(SpectralClustering(
        bricks, affinity="precomputed", assign_labels="cluster_qr", random_state=0).fit_predict(
        joined.numpy()))
    groups = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
    return tuple(sorted(groups, key=lambda units: int(units[0])))
