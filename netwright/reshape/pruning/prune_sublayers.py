import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.anatomy.replacing import plain_paths, replace, standing_in, without_fused_paths
from netwright.anatomy.residual import Silent, Sublayer, Trace, trace
from netwright.catalogue.facets import method
from netwright.errors import NothingToReshape
from netwright.reshape._calibration import batches_of
from netwright.reshape._layouts import plain_silent, silent_of
from netwright.reshape.change import decided, reshape
from netwright.runtime.modes import evaluating, same_buffers
from netwright.runtime.random_state import same_random_state
from netwright.stages import call

__all__ = ["prune_sublayers", "sublayers", "without_sublayers"]

Distance = Literal["angular", "euclidean", "jensen-shannon"] | Callable[[Tensor, Tensor], Tensor]


@method(
    "reshape",
    papers=["000-012"],
    place="residual stream",
    saves=["parameters", "file size", "inference memory", "inference time"],
    needs=["calibration data"],
    keeps_function=False,
    search={"remove": [1, 2, 4], "distance": ["angular", "euclidean", "jensen-shannon"]},
    variants={"two": {"remove": 2}, "euclidean": {"remove": 1, "distance": "euclidean"}},
)
@reshape
@torch.no_grad()
def prune_sublayers(model: nn.Module, calibration: Any, remove: int = 4, *,
                    distance: Distance = "angular") -> nn.Module:
    """Return a copy without the `remove` sublayers whose absence changes the outputs least.

    s_k = argmin_s d(f(x), f_k(x)),  f_k = f without s_1, ..., s_k-1 and s.

    f gives the network's own outputs, such as logits, of the whole network before anything was
    removed; every sublayer that is left is tried at each step (the authors' program can also
    spare the first layers).

    A sublayer is a branch of a residual stream, such as attention or a feed-forward network:
    h := h + g(h) becomes h := h. They are found by watching one run, in any network whose sums
    h + g(h) are made with tensors and whose g ends in a module; g's last module and what feeds
    only it, such as the norm before it, are taken out with their weights. In a network that
    normalises after the sum, the norm stays.

    d is the angle between the output vectors over pi, averaged over positions (those of
    `attention_mask` where `calibration` has one), or `"euclidean"`, `"jensen-shannon"` of the
    softmax, or a function of (outputs, new outputs). The names of what was removed are in the
    result's `removed_sublayers`, in the order of their removal. Where a Hugging Face model
    numbers its attention layers for the key-value cache, those that stay are numbered anew.

    Args:
        model: a network with a residual stream.
        calibration: inputs that the outputs are compared on.
        remove: how many sublayers go.
        distance: d: "angular", "euclidean", "jensen-shannon" or a function of two outputs.

    Shapes: calibration is what the model takes (a tensor, a tuple of positional or a mapping of
    keyword arguments) or a list of such batches; outputs (batch, *, classes).

    Raises:
        NothingToReshape: no module's output is added to a stream that it was computed from.
        UnknownName: `distance` is none of the three.
        ValueError: `remove` is not between 1 and the number of sublayers, or `calibration` is
            empty or gives outputs that are not finite.

    Paper: Zhang, Li, Wang, Shen, Plank, Bischl, Rezaei, Kawaguchi, 2024, FinerCut: Finer-grained
    Interpretable Layer Pruning for Large Language Models.

    >>> from netwright.models import gpt
    >>> model = gpt(96, context=16, depth=3)
    >>> smaller = prune_sublayers(model, torch.randint(96, (4, 16)), remove=2)
    >>> len(smaller.removed_sublayers), smaller(torch.randint(96, (4, 16))).shape
    (2, torch.Size([4, 16, 96]))
    """
    measure = _measure(distance)
    batches = batches_of(calibration)
    found = _found(model, batches[0])
    checks.between(1, len(found.sublayers), whole=True, remove=remove,
                   advice=f"the model has {len(found.sublayers)} sublayers, {_some(found)}")
    trial = deepcopy(model)
    left, removed = list(found.sublayers), list[Sublayer]()
    with same_random_state(), evaluating(trial), same_buffers(trial), plain_paths():
        outputs = [call(trial, x) for x in batches]
        for _ in range(remove):
            moved = [_change(trial, sublayer, found, batches, outputs, measure)
                     for sublayer in left]
            if not all(map(math.isfinite, moved)):
                raise ValueError("calibration must give finite outputs with any sublayer removed, "
                                 "got nan or infinity; check the inputs and the weights")
            least = min(range(len(left)), key=moved.__getitem__)
            _take_out(trial, left[least], found)
            removed.append(left.pop(least))
    return decided(_decision(trial, removed, found, batches[0]))


@method("companion")
@torch.inference_mode(False)
def sublayers(model: nn.Module, example: Any) -> list[str]:
    """Return the names of the sublayers that `prune_sublayers` could remove, first to last.

    >>> from netwright.models import gpt
    >>> sublayers(gpt(96, context=16, depth=2), torch.zeros(1, 16, dtype=torch.long))
    ['1.attention_out', '1.mlp_out', '2.attention_out', '2.mlp_out']
    """
    return [sublayer.name for sublayer in _found(model, example).sublayers]


@method("companion")
@reshape
@torch.no_grad()
def without_sublayers(model: nn.Module, example: Any, names: list[str]) -> nn.Module:
    """Return a copy without the sublayers called `names`, by a choice of one's own.

    Raises:
        UnknownName: a name is not among `sublayers(model, example)`.

    >>> from netwright.models import gpt
    >>> x = torch.zeros(1, 16, dtype=torch.long)
    >>> without_sublayers(gpt(96, context=16), x, ["1.mlp_out"]).removed_sublayers
    ('1.mlp_out',)
    """
    found = _found(model, example)
    known = {sublayer.name: sublayer for sublayer in found.sublayers}
    for name in names:
        checks.one_of(known, sublayer=name)
    trial = deepcopy(model)
    removed = [known[name] for name in dict.fromkeys(names)]
    for sublayer in removed:
        _take_out(trial, sublayer, found)
    return decided(_decision(trial, removed, found, example))


@prune_sublayers.applies
@without_sublayers.applies
def taken_out(model: nn.Module, decision: Mapping[str, Any]) -> nn.Module:
    """Take the sublayers out of `model`, and the layers that nothing is left of."""
    pruned: Any = model
    for name, said in decision["silent"].items():
        replace(pruned, name, silent_of(said))
    without_fused_paths(pruned)
    _number_anew(pruned)
    if decision["layers"]:
        _without_layers(pruned, decision["layers"])
    pruned.removed_sublayers = (*getattr(pruned, "removed_sublayers", ()), *decision["removed"])
    return pruned


def _decision(trial: nn.Module, removed: list[Sublayer], found: Trace,
              example: Any) -> dict[str, Any]:
    """Return what is taken out, plainly; `trial` is the model without it."""
    gone = [name for sublayer in removed for name in (sublayer.name, *sublayer.feeders)]
    return {"removed": [sublayer.name for sublayer in removed],
            "silent": {name: plain_silent(found.silent[name]) for name in gone},
            "layers": _empty_layers(trial, example)}


def _empty_layers(trial: Any, example: Any) -> list[int]:
    """Return the layers that nothing is left of, where the model's config counts them."""
    layers = _counted_layers(trial)
    empty = [i for i, layer in enumerate(layers) if _is_empty(layer)]
    if not empty:
        return []
    shorter = deepcopy(trial)
    without_fused_paths(trial)
    _number_anew(trial)
    _number_anew(shorter)
    _without_layers(shorter, empty)
    with same_random_state(), evaluating(trial), evaluating(shorter), same_buffers(trial):
        same = torch.equal(call(trial, example), call(shorter, example))
    return empty if same else []


def _counted_layers(model: Any) -> nn.ModuleList:
    """Return the one list of layers whose number a Hugging Face model's config has."""
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = [part for part in model.modules()
             if isinstance(part, nn.ModuleList) and len(part) == count]
    return lists[0] if len(lists) == 1 else nn.ModuleList()


def _is_empty(layer: nn.Module) -> bool:
    return (any(isinstance(part, Silent) for part in layer.modules())
            and not any(True for _ in layer.parameters()))


def _without_layers(model: Any, empty: list[int]) -> None:
    """Take whole layers out, and say so in the config."""
    layers, config = _counted_layers(model), model.config
    count = len(layers)
    kept = [i for i in range(count) if i not in empty]
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == count:  # a kind of each layer
            setattr(config, name, type(value)(value[i] for i in kept))
    for i in sorted(empty, reverse=True):
        del layers[i]
    config.num_hidden_layers = len(kept)
    if _cached_by_kind(config):
        for i, layer in enumerate(layers):
            for part in layer.modules():
                if isinstance(getattr(part, "layer_idx", None), int):
                    part.layer_idx = i  # type: ignore[assignment]


def _found(model: nn.Module, x: Any) -> Trace:
    if hasattr(model, "_orig_mod"):
        raise NothingToReshape("model was compiled by torch.compile, which hides its parts; give "
                               "the module that was compiled, and compile the result")
    with same_random_state():
        found = trace(deepcopy(model), x)
    if not found.sublayers:
        raise NothingToReshape(
            f"{type(model).__name__} has no sublayer: no module's output was added to a tensor "
            "that it was computed from (h + g(h)); a plain chain of layers has none to remove")
    return found


def _some(found: Trace) -> str:
    names = [sublayer.name for sublayer in found.sublayers]
    return ", ".join(names if len(names) < 5 else [*names[:2], "...", names[-1]])


def _change(model: nn.Module, sublayer: Sublayer, found: Trace, batches: list[Any],
            outputs: list[Tensor], measure: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Return how far the outputs move when `sublayer` is taken out for once."""
    total = positions = 0.0
    with standing_in(model, _stubs(model, sublayer, found)):
        for x, output in zip(batches, outputs, strict=True):
            distances = measure(output, call(model, x))
            counted = _counted(x, distances)
            total += float(distances[counted].sum())
            positions += int(counted.sum())
    return total / max(positions, 1)


def _counted(x: Any, distances: Tensor) -> Tensor:
    mask = x.get("attention_mask") if isinstance(x, Mapping) else None
    if mask is not None and mask.shape == distances.shape:
        return mask.bool()
    return torch.ones_like(distances, dtype=torch.bool)


def _stubs(model: nn.Module, sublayer: Sublayer, found: Trace) -> dict[str, nn.Module]:
    """Return what stands for the parts of `sublayer` that are not silent yet, by their names."""
    names = [name for name in (sublayer.name, *sublayer.feeders)
             if not isinstance(model.get_submodule(name), Silent)]
    return {name: deepcopy(found.silent[name]).train(model.get_submodule(name).training)
            for name in names}


def _take_out(model: nn.Module, sublayer: Sublayer, found: Trace) -> None:
    """Put `Silent` modules in the place of `sublayer`."""
    for name, stub in _stubs(model, sublayer, found).items():
        replace(model, name, stub)


def _number_anew(model: Any) -> None:
    """Number the attention layers that stay, which a key-value cache expects without gaps."""
    if _cached_by_kind(getattr(model, "config", None)):
        return
    numbered: list[Any] = [m for m in model.modules()
                           if isinstance(getattr(m, "layer_idx", None), int)]
    order = {index: i for i, index in enumerate(sorted({m.layer_idx for m in numbered}))}
    for module in numbered:
        module.layer_idx = order[module.layer_idx]


def _cached_by_kind(config: Any) -> bool:
    """Return whether a cache of several kinds goes by the layers' own numbers."""
    return len(set(getattr(config, "layer_types", None) or ())) > 1


def _measure(distance: Distance) -> Callable[[Tensor, Tensor], Tensor]:
    if callable(distance):
        return lambda old, new: torch.atleast_1d(torch.as_tensor(distance(old, new)))
    known = {"angular": _angular, "euclidean": _euclidean, "jensen-shannon": _jensen_shannon}
    checks.one_of(known, distance=distance)
    return known[distance]


def _angular(old: Tensor, new: Tensor) -> Tensor:
    u = nn.functional.normalize(old.double(), dim=-1)
    v = nn.functional.normalize(new.double(), dim=-1)
    # Half the angle by its tangent, since the arc cosine loses the small angles.
    return 2 / torch.pi * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))


def _euclidean(old: Tensor, new: Tensor) -> Tensor:
    return (old.double() - new.double()).norm(dim=-1)


def _jensen_shannon(old: Tensor, new: Tensor) -> Tensor:
    p, q = old.double().log_softmax(-1), new.double().log_softmax(-1)
    middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, dtype=torch.float64))
    return ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1)) / 2
