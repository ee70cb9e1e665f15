from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from netwright.anatomy.exchanging import (
    FeedForwardWeights,
    feedforward_weights,
    write_feedforward,
)
from netwright.anatomy.feedforwards import FeedForwardLayer, feedforwards
from netwright.anatomy.replacing import plain_paths, without_fused_paths
from netwright.anatomy.residual import Sublayer, trace
from netwright.catalogue.facets import method
from netwright.errors import NothingToReshape
from netwright.reshape._calibration import batches_of
from netwright.reshape._layers import layer_of, plain_layer
from netwright.reshape._layouts import plain_silent
from netwright.reshape.change import decided, reshape
from netwright.reshape.feedforward.swap_feedforward import choose
from netwright.reshape.pruning.prune_sublayers import taken_out
from netwright.runtime.modes import evaluating, rehearsing
from netwright.runtime.padding import read_padding, real_rows
from netwright.runtime.random_state import same_random_state
from netwright.signals import apply

__all__ = ["FeedForwardRun", "feedforward_runs", "fuse_feedforward"]


class FeedForwardRun(NamedTuple):
    """Feed-forward layers that follow one another on a stream, with nothing between them.

    `dependence[i, j]` is how much what layer j adds changes when layer i adds nothing: the cosine
    distance 1 - cos, averaged over positions; zero for j <= i.
    """

    layers: tuple[str, ...]
    dependence: Tensor


@dataclass
class _Branch:
    """A feed-forward layer as a branch of the stream: its norm, and what takes it out."""

    layer: FeedForwardLayer
    sublayer: Sublayer
    norm: str | None


@method(
    "reshape",
    papers=["003-177"],
    place="feedforward",
    saves=["inference time"],
    needs=["feed-forward layers in a row"],
    keeps_function=False,
    search={"dependence": (0.01, 1.0)},
    variants={"all": {"dependence": 2.0}},
    network=lambda: nn.Sequential(*(Residual(8) for _ in range(3))),
    batch=lambda: torch.randn(2, 5, 8),
)
@reshape
@torch.no_grad()
def fuse_feedforward(model: nn.Module, calibration: Any, layers: Sequence[str] | None = None, *,
                     dependence: float = 0.1) -> nn.Module:
    """Return a copy in which runs of feed-forward layers are each one wide feed-forward layer.

    h := h + f_1(n_1(h));  h := h + f_2(n_2(h)); ...   becomes   h := h + sum_i f_i(n_i(h)),

    and the sum is one layer: the rows of `up` (and `gate`) of all f_i under one another, the
    columns of `down` beside one another, their biases summed.

    That layer equals the sum to rounding, norms included: norms of one kind differ only by scale
    and shift, n_i(h) = g_i z(h) + b_i, which go into the matrices (W_i diag(g_i), W_i b_i); the
    first layer's norm keeps z alone. What is lost is that f_2 does not see what f_1 added. (The
    paper gives the sum of layers that read the same input, and does not say what it does with the
    scales of their norms.)

    A run is what stays when the attention between feed-forward layers has been taken out, as
    `prune_sublayers` does, or was never there. Which of a run are fused is chosen by dependence,
    measured as the paper does: d_ij = 1 - cos(c_j, c_j without i), c_j being what layer j adds.
    From the first on, a layer joins those before it while none of its d_ij exceeds `dependence`
    (a rule of this function: the paper chooses by eye from the matrix and by trying).

    Args:
        model: a residual network.
        calibration: what it takes, or batches of that; the dependence is measured on it, so give
            some hundred tokens.
        layers: the names of those to fuse, where they follow one another, whatever their
            dependence; all that depend little where None is given.
        dependence: how much a layer may depend on one that it is fused with, between 0 and 2.

    Raises:
        NothingToReshape: no two feed-forward layers follow one another, or none depends little
            enough.
        UnknownName: no feed-forward layer is called that.
        ValueError: layers of a run differ in their size, gate or activation, or their norms in
            kind.

    Paper: Bercovich, Dabbah, Puny, Galil, Geifman, Geifman, Golan, Karpas, Levy, Moshe, Nabwani,
    Ronen, Schen, Segal, Shahaf, Tropp, Zilberstein, El-Yaniv, 2025, FFN Fusion: Rethinking
    Sequential Computation in Large Language Models.

    >>> from netwright.models import gpt
    >>> from netwright.reshape.pruning import without_sublayers
    >>> model, x = gpt(96, context=16, depth=3), torch.randint(96, (4, 16))
    >>> fewer = without_sublayers(model, x, ["2.attention_out", "3.attention_out"])
    >>> fused = fuse_feedforward(fewer, x, ["1", "2", "3"])
    >>> fused[1].mlp_in.out_features, fused.fused_feedforward
    (768, (('1.mlp_out', '2.mlp_out', '3.mlp_out'),))
    """
    batches = batches_of(calibration)
    branches = _branches(model, batches[0])
    groups = _groups(model, batches[0], branches)
    if layers is not None:
        wanted = choose([b.layer for b in branches], layers)
        groups = [[b for b in group if b.layer in wanted] for group in groups]
        groups = [group for group in groups if len(group) > 1]
        if not groups:
            raise NothingToReshape(f"layers={list(layers)} names no two feed-forward layers that "
                                   "follow one another with nothing between them")
    else:
        groups = [part for group in groups
                  for part in _independent(group, _dependence(model, batches, group), dependence)]
        if not groups:
            raise NothingToReshape(
                f"no feed-forward layer depends on the one before it by dependence={dependence:g} "
                "or less; see feedforward_runs for what was measured, and allow more")
    for group in groups:
        _check(model, group)
    with same_random_state(), torch.enable_grad():
        silent = trace(deepcopy(model), batches[0]).silent
    gone = [branch.sublayer for group in groups for branch in group[1:]]
    return decided({
        "groups": [[{"layer": plain_layer(branch.layer, model), "norm": branch.norm}
                    for branch in group] for group in groups],
        "removed": [sublayer.name for sublayer in gone], "layers": [],
        "silent": {name: plain_silent(silent[name]) for sublayer in gone
                   for name in (sublayer.name, *sublayer.feeders)}})


@fuse_feedforward.applies
@torch.no_grad()
def _fused(model: nn.Module, decision: Mapping[str, Any]) -> nn.Module:
    groups = [[(layer_of(said["layer"], model), said["norm"]) for said in group]
              for group in decision["groups"]]
    for group in groups:
        _write(model, group)
    result: Any = taken_out(model, decision)
    without_fused_paths(result)
    result.fused_feedforward = tuple(tuple(str(layer.down) for layer, _ in group)
                                     for group in groups)
    return result


@method("companion")
@torch.inference_mode(False)
@torch.no_grad()
def feedforward_runs(model: nn.Module, calibration: Any) -> list[FeedForwardRun]:
    """Return the runs of feed-forward layers, with how much each depends on those before it.

    Raises:
        NothingToReshape: no two feed-forward layers follow one another.

    >>> stack = nn.Sequential(*(Residual(8) for _ in range(3)))
    >>> [run.layers for run in feedforward_runs(stack, torch.randn(5, 8))]
    [('0.mlp', '1.mlp', '2.mlp')]
    """
    batches = batches_of(calibration)
    groups = _groups(model, batches[0], _branches(model, batches[0]))
    return [FeedForwardRun(tuple(b.layer.name if b.layer.whole else str(b.layer.down)
                                 for b in group), _dependence(model, batches, group))
            for group in groups]


class Residual(nn.Module):
    """h + mlp(norm(h)), the smallest residual feed-forward layer.

    >>> Residual(8)(torch.zeros(2, 8)).shape
    torch.Size([2, 8])
    """

    def __init__(self, dim: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, h: Tensor) -> Tensor:
        """Return `h` with what the layer adds."""
        added: Tensor = self.mlp(self.norm(h))
        return h + added


def _branches(model: nn.Module, example: Any) -> list[_Branch]:
    """Return the feed-forward layers that write to a residual stream, in order."""
    layers = [layer for layer in feedforwards(model, example) if layer.down is not None]
    with same_random_state(), torch.enable_grad():
        sublayers = trace(deepcopy(model), example).sublayers
    modules = dict(model.named_modules())
    found = []
    for sublayer in sublayers:
        for layer in layers:
            if not _within(layer.down, sublayer.name):
                continue
            parts = {layer.up, layer.down, layer.gate}
            inner = [name for name in modules if _within(name, sublayer.name)]
            norms = [name for name in [*sublayer.feeders, *inner] if name not in parts and any(
                True for _ in modules[name].parameters(recurse=False))]
            if len(norms) < 2:
                found.append(_Branch(layer, sublayer, norms[0] if norms else None))
    return found


def _within(name: str | None, outer: str) -> bool:
    return name is not None and (name == outer or name.startswith(outer + "."))


def _groups(model: nn.Module, example: Any, branches: list[_Branch]) -> list[list[_Branch]]:
    """Return the runs of `branches`: those that read the same stream when none adds to it."""
    read: dict[int, Tensor] = {}
    copy = deepcopy(model)
    handles = []
    for number, branch in enumerate(branches):
        def before(_: nn.Module, args: Any, number: int = number) -> None:
            if args and number not in read:
                read[number] = args[0].clone()

        def after(_: nn.Module, __: Any, output: Any) -> Any:
            return torch.zeros_like(output)

        for name in (branch.sublayer.name, *branch.sublayer.feeders):
            handles.append(copy.get_submodule(name).register_forward_pre_hook(before))
        handles.append(copy.get_submodule(branch.sublayer.name).register_forward_hook(after))
    with evaluating(copy), plain_paths(), rehearsing(copy):
        apply(copy, example)
    groups: list[list[_Branch]] = []
    for number, branch in enumerate(branches):
        follows = number and number in read and number - 1 in read and torch.equal(
            read[number], read[number - 1])
        if follows:
            groups[-1].append(branch)
        else:
            groups.append([branch])
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        raise NothingToReshape(
            f"{type(model).__name__} has no two feed-forward layers that follow one another on a "
            "stream with nothing between them; take attention out first, as prune_sublayers does")
    return groups


def _dependence(model: nn.Module, batches: Sequence[Any], group: list[_Branch]) -> Tensor:
    names = [branch.sublayer.name for branch in group]
    found = torch.zeros(len(names), len(names))
    positions = 0
    for batch in batches:
        whole = _added(model, batch, names, None)
        count = len(whole[0])
        for i, name in enumerate(names[:-1]):
            without = _added(model, batch, names, name)
            for j in range(i + 1, len(names)):
                cosine = nn.functional.cosine_similarity(
                    whole[j].double(), without[j].double(), dim=-1)
                found[i, j] += float((1 - cosine).mean()) * count
        positions += count
    return found / positions


def _added(model: nn.Module, example: Any, names: list[str], silent: str | None) -> list[Tensor]:
    """Return what each layer of `names` adds when the one called `silent` adds nothing."""
    found: dict[str, Tensor] = {}
    copy = deepcopy(model)
    for name in names:
        def after(_: nn.Module, __: Any, output: Any, name: str = name) -> Any:
            found[name] = real_rows(output).clone()
            return torch.zeros_like(output) if name == silent else None
        copy.get_submodule(name).register_forward_hook(after)
    read_padding(copy)
    with evaluating(copy), plain_paths(), rehearsing(copy):
        apply(copy, example)
    return [found[name] for name in names]


def _independent(group: list[_Branch], dependence: Tensor, most: float) -> list[list[_Branch]]:
    """Cut a run where a layer depends by more than `most` on one that it would be fused with."""
    parts: list[list[int]] = [[]]
    for j in range(len(group)):
        if parts[-1] and any(not float(dependence[i, j]) <= most for i in parts[-1]):
            parts.append([])
        parts[-1].append(j)
    return [[group[j] for j in part] for part in parts if len(part) > 1]


def _check(model: nn.Module, group: list[_Branch]) -> None:
    """Raise unless the layers of a run can be one."""
    first = group[0]
    h = torch.randn(7, first.layer.dim, generator=torch.Generator().manual_seed(0))
    for other in group[1:]:
        names = f"{first.layer.down!r} and {other.layer.down!r}"
        if (first.layer.dim, first.layer.gate is None) != (other.layer.dim,
                                                           other.layer.gate is None):
            raise ValueError(f"layers that are fused must have one width and all have a gate or "
                             f"none, which {names} do not")
        wide = torch.linspace(-6, 6, 97).to(feedforward_weights(model, first.layer).up)
        if not torch.equal(first.layer.activation(wide.clone()),
                           other.layer.activation(wide.clone())):
            raise ValueError(f"layers that are fused must have one activation, which {names} "
                             "do not")
        if (first.norm is None) != (other.norm is None):
            raise ValueError(f"layers that are fused must each have a norm or none, which {names} "
                             "do not")
        if first.norm is not None and other.norm is not None:
            one, two = (deepcopy(model.get_submodule(n)) for n in (first.norm, other.norm))
            _plain(one), _plain(two)
            like = next(one.parameters())
            x = h.to(like.device, like.dtype)
            if type(one) is not type(two) or not torch.equal(one(x), two(x)):
                raise ValueError(f"norms of layers that are fused must be of one kind and epsilon, "
                                 f"got {model.get_submodule(first.norm)} before "
                                 f"{first.layer.down!r} and {model.get_submodule(other.norm)} "
                                 f"before {other.layer.down!r}")


def _plain(norm: Any) -> tuple[Tensor, Tensor | None]:
    """Make `norm` scale by 1 and shift by 0, in place; return its scale and shift."""
    weight, bias = norm.weight, getattr(norm, "bias", None)
    shift = None if bias is None else bias.detach().clone()
    if bias is not None:
        bias.zero_()
    x = torch.linspace(-1, 2, weight.numel(), device=weight.device, dtype=weight.dtype)
    kept = weight.detach().clone()
    weight.zero_()
    offset = float(norm(x).abs().max() > 0)  # some models keep the scale's distance from 1
    weight.fill_(1 - offset)
    return kept + offset, shift


def _write(model: nn.Module, group: Sequence[tuple[FeedForwardLayer, str | None]]) -> None:
    """Give the first layer of a run the weights of all, in place."""
    folded = []
    for layer, norm in group:
        weights = feedforward_weights(model, layer)
        if norm is not None:
            scale, shift = _plain(model.get_submodule(norm))
            weights = _fold(weights, scale, shift)
        folded.append(weights)
    write_feedforward(model, group[0][0], FeedForwardWeights(
        torch.cat([w.up for w in folded]), torch.cat([w.down for w in folded], 1),
        _joined(folded, "gate"), _joined(folded, "up_bias"), _summed(folded),
        _joined(folded, "gate_bias")))


def _fold(weights: FeedForwardWeights, scale: Tensor, shift: Tensor | None) -> FeedForwardWeights:
    """Return the weights that read z where those given read scale * z + shift."""
    def bias(matrix: Tensor | None, old: Tensor | None) -> Tensor | None:
        if matrix is None or shift is None:
            return old
        return matrix @ shift if old is None else old + matrix @ shift
    return weights._replace(
        up=weights.up * scale, gate=None if weights.gate is None else weights.gate * scale,
        up_bias=bias(weights.up, weights.up_bias), gate_bias=bias(weights.gate, weights.gate_bias))


def _joined(folded: list[FeedForwardWeights], name: str) -> Tensor | None:
    found = [getattr(w, name) for w in folded]
    if all(t is None for t in found):
        return None
    return torch.cat([w.up.new_zeros(len(w.up)) if t is None else t
                      for w, t in zip(folded, found, strict=True)])


def _summed(folded: list[FeedForwardWeights]) -> Tensor | None:
    found = [w.down_bias for w in folded if w.down_bias is not None]
    return torch.stack(found).sum(0) if found else None
