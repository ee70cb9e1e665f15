from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.anatomy.exchanging import feedforward_weights, write_feedforward
from netwright.anatomy.feedforwards import FeedForwardLayer
from netwright.anatomy.layers import is_linear, linear_sizes
from netwright.catalogue.facets import method
from netwright.errors import NothingToReshape
from netwright.reshape._calibration import Stream, layers_in, show_inputs
from netwright.reshape._layers import layer_of, plain_layer
from netwright.reshape._resuming import Finished
from netwright.reshape.change import decided, reshape
from netwright.reshape.feedforward.swap_feedforward import choose
from netwright.runtime.padding import real_rows
from netwright.runtime.progress import Bar

__all__ = ["Bricks", "find_bricks", "keep_bricks"]


class Bricks(NamedTuple):
    """Groups of hidden units of a feed-forward layer: `units[i]` are the units of brick i."""

    layer: FeedForwardLayer
    units: tuple[Tensor, ...]


@method("companion", papers=["000-017"], needs=["calibration data"])
@torch.inference_mode(False)
@torch.no_grad()
def find_bricks(model: nn.Module, calibration: Any, bricks: int = 8, *,
                layers: Sequence[str] | None = None, progress: bool = True,
                resume: str | Path | None = None) -> list[Bricks]:
    """Return, for each feed-forward layer, groups of hidden units that are active together.

    c_ij = max(0, corr(|a_i|, |a_j|)) over the calibration data's positions, padding apart, a_i
    being what unit i gives to the layer's way out;  the groups are the spectral clusters of c.

    The paper surveys how neurons group and leaves the method open; this choice needs no labels
    and no random draw, and takes gated units as they are (a_i is gate times value). Units that
    never change are like none and join any group. A layer of n units takes n^2 numbers and the
    time of an eigendecomposition of that size.

    Args:
        model: any module with layers that `feedforwards` finds; a classifier of two linear layers
            counts where the model has none on a residual stream.
        calibration: what the model takes, or batches of it, such as a loader, of which one is in
            memory at a time.
        bricks: how many groups a layer is cut into; it may be fewer where groups are empty.
        layers: the names of the layers to look at; all where none are given.
        progress: whether to show a bar in a terminal where it takes more than two seconds.
        resume: a folder where each layer's groups are kept. A call that was broken off goes on
            from there when it is made again with the same arguments.

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
    stream = Stream(calibration)
    try:
        found = layers_in(model, stream.first)
    except NothingToReshape:
        found = layers_in(model, stream.first, square=False)
    chosen = [layer for layer in choose(found, layers) if layer.down is not None]
    if not chosen:
        raise NothingToReshape("the model's feed-forward layers are blocks of experts, which are "
                               "bricks already; prune them as experts")
    for layer in chosen:
        checks.between(1, layer.hidden, whole=True, bricks=bricks,
                       advice=f"{layer.down!r} has {layer.hidden} hidden units")
    seen = {str(layer.down): _CoActivation(layer.hidden) for layer in chosen}
    finished = Finished(resume, {"function": "find_bricks", "bricks": bricks,
                                 "data": stream.first, "weights": model.state_dict()})
    bar = Bar(len(chosen), None, "", unit="layer")
    if progress:
        bar.start(after=2.0)
    groups = []
    try:
        show_inputs(model, list(seen), stream, lambda name, x: seen[name].add(real_rows(x)), bar)
        for number, (name, co_activation) in enumerate(seen.items()):
            known = finished.get(name)
            units = list(known[1].values()) if known is not None else _clusters(
                co_activation.likeness(name), bricks)
            groups.append(tuple(units))
            if known is None:
                finished.put(name, {}, {f"{i:08}": part for i, part in enumerate(units)})
            bar.epoch(number, float("nan"), float("nan"))
    finally:
        bar.stop()
    return [Bricks(layer, units) for layer, units in zip(chosen, groups, strict=True)]


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


class _CoActivation:
    """How the sizes of hidden units' activations go together, summed over the positions so far."""

    def __init__(self, units: int) -> None:
        self.units, self.positions = units, 0
        self.sum: Any = 0.0
        self.products: Any = 0.0
        self.near: Tensor | None = None  # the first batch's mean, beside which sums stay exact

    def add(self, hidden: Tensor) -> None:
        """Take in what the units gave at some positions, (positions, units)."""
        if not len(hidden):
            return
        sizes = hidden.abs().double()
        self.near = sizes.mean(0) if self.near is None else self.near
        sizes = sizes - self.near
        self.sum, self.products = self.sum + sizes.sum(0), self.products + sizes.T @ sizes
        self.positions += len(sizes)

    def likeness(self, name: str) -> Tensor:
        """Return the correlations of all pairs of units, 0 where they are below."""
        finite = self.positions and bool(self.products.isfinite().all())
        if self.positions < 2 or not finite:
            raise ValueError("calibration must give two positions or more that are no padding and "
                             f"finite activations, got {self.positions} in {name!r}"
                             + (", some of them not finite" if self.positions and not finite
                                else ""))
        products = self.products - self.sum[:, None] * self.sum / self.positions
        length = products.diagonal().clamp(min=0).sqrt()
        length = length.where(length > 1e-12 * self.positions, torch.inf)
        return (products / length / length[:, None]).clamp(min=0)


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
