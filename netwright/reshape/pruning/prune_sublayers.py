import math
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from netwright import checks
from netwright.anatomy.replacing import plain_paths, replace, without_fused_paths
from netwright.anatomy.residual import Silent, Sublayer, Trace, trace
from netwright.catalogue.facets import method
from netwright.errors import NothingToReshape
from netwright.reshape._calibration import batches_of, few
from netwright.reshape._layouts import plain_silent, silent_of
from netwright.reshape.change import decided, reshape
from netwright.reshape.pruning._distances import Distance, Distances
from netwright.reshape.pruning._progress import Found
from netwright.reshape.pruning._trials import Trials, fitting, sharing, stubs
from netwright.runtime.modes import evaluating, same_buffers
from netwright.runtime.progress import Tries
from netwright.runtime.random_state import same_random_state
from netwright.stages import call

__all__ = ["prune_sublayers", "sublayers", "without_sublayers"]


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
                    distance: Distance = "angular",
                    resume: str | Path | None = None) -> nn.Module:
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

    A sublayer is tried by running on from the stage that it is in, where `nw.stages` reads the
    model, so that a try costs half a pass; what the stages take is held in memory, and no second
    model but the result. A terminal shows a bar with the time left and the best so far.

    Args:
        model: a network with a residual stream.
        calibration: inputs that the outputs are compared on.
        remove: how many sublayers go.
        distance: d: "angular", "euclidean", "jensen-shannon" or a function of two outputs.
        resume: a folder where what was tried is kept. A call that was broken off goes on from
            there.

    Shapes: calibration is what the model takes (a tensor, a tuple of positional or a mapping of
    keyword arguments) or a list of such batches; outputs (batch, *, classes).

    Raises:
        NothingToReshape: no module's output is added to a stream that it was computed from.
        UnknownName: `distance` is none of the three.
        CorruptCheckpoint: what `resume` holds cannot be read, or is another call's.
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
    distances = Distances(distance)
    batches = batches_of(calibration)
    trial = sharing(model)
    found = found_in(trial, few(batches[0]))
    checks.between(1, len(found.sublayers), whole=True, remove=remove,
                   advice=f"the model has {len(found.sublayers)} sublayers, {_some(found)}")
    with same_random_state(), evaluating(trial), same_buffers(trial), plain_paths():
        trials = Trials(trial, found, batches, distances)
        known = Found(resume, {"distance": distance, "model or data": None
                                   if resume is None else trials.digest()})
        for name in known.removed[:remove]:
            trials.take_out(trials.named(name))
        count = sum(len(trials.left) - k for k in range(remove - len(trials.removed)))
        with Tries("prune_sublayers", count) as tries:
            while len(trials.removed) < remove:
                trials.take_out(_least(trials, known, tries))
                known.remove(trials.removed[-1].name)
    return decided(decision_of(trial, trials.removed, found, few(batches[0])))


def _least(trials: Trials, known: Found, tries: Tries) -> Sublayer:
    """Return the sublayer without which the outputs move least."""
    moved: dict[Sublayer, float] = {}
    best = float("inf")
    for sublayer in list(trials.left):
        trying, distance = (sublayer, known.tried[sublayer.name]) if (
            sublayer.name in known.tried) else trials.distance(sublayer)
        if trying is None:  # the model does not run without it
            continue
        if not math.isfinite(distance):
            raise ValueError("calibration must give finite outputs with any sublayer removed, "
                             "got nan or infinity; check the inputs and the weights")
        moved[trying], best = distance, min(best, distance)
        known.note(trying.name, distance)
        tries.step(f"best {best:.3g}")
    if not moved:
        raise NothingToReshape(f"{type(trials.model).__name__} does not run without any further "
                               f"sublayer; remove={len(trials.removed)} at most")
    return min(moved, key=moved.__getitem__)


@method("companion")
@torch.inference_mode(False)
def sublayers(model: nn.Module, example: Any) -> list[str]:
    """Return the names of the sublayers that `prune_sublayers` could remove, first to last.

    >>> from netwright.models import gpt
    >>> sublayers(gpt(96, context=16, depth=2), torch.zeros(1, 16, dtype=torch.long))
    ['1.attention_out', '1.mlp_out', '2.attention_out', '2.mlp_out']
    """
    return [sublayer.name for sublayer in found_in(sharing(model), example).sublayers]


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
    trial = sharing(model)
    found = found_in(trial, example)
    known = {sublayer.name: sublayer for sublayer in found.sublayers}
    for name in names:
        checks.one_of(known, sublayer=name)
    removed = []
    for name in dict.fromkeys(names):
        with same_random_state(), evaluating(trial), same_buffers(trial), plain_paths():
            sublayer = fitting(trial, known[name], found, example)
        if sublayer is None:
            raise NothingToReshape(f"{type(model).__name__} does not run without {name}; name "
                                   "another sublayer")
        removed.append(sublayer)
        for part, stub in stubs(trial, sublayer, found).items():
            replace(trial, part, stub)
    return decided(decision_of(trial, removed, found, example))


@prune_sublayers.applies
@without_sublayers.applies
def taken_out(model: nn.Module, decision: Mapping[str, Any]) -> nn.Module:
    """Take the sublayers out of `model`, and the layers that nothing is left of."""
    pruned: Any = model
    for name, said in decision["silent"].items():
        replace(pruned, name, silent_of(said))
    without_fused_paths(pruned)
    number_anew(pruned)
    if decision["layers"]:
        _without_layers(pruned, decision["layers"])
    pruned.removed_sublayers = (*getattr(pruned, "removed_sublayers", ()), *decision["removed"])
    return pruned


def decision_of(trial: nn.Module, removed: list[Sublayer], found: Trace,
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
    shorter = sharing(trial)
    without_fused_paths(trial)
    number_anew(trial)
    number_anew(shorter)
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


def found_in(model: nn.Module, x: Any) -> Trace:
    if hasattr(model, "_orig_mod"):
        raise NothingToReshape("model was compiled by torch.compile, which hides its parts; give "
                               "the module that was compiled, and compile the result")
    with same_random_state():
        found = trace(model, x)
    if not found.sublayers:
        raise NothingToReshape(
            f"{type(model).__name__} has no sublayer: no module's output was added to a tensor "
            "that it was computed from (h + g(h)); a plain chain of layers has none to remove")
    return found


def _some(found: Trace) -> str:
    names = [sublayer.name for sublayer in found.sublayers]
    return ", ".join(names if len(names) < 5 else [*names[:2], "...", names[-1]])


def number_anew(model: Any) -> None:
    """Number the attention layers that stay, which a key-value cache expects without gaps.

    An encoder, a decoder and what the decoder reads of the encoder have caches apart.
    """
    if _cached_by_kind(getattr(model, "config", None)):
        return
    caches: dict[Any, list[Any]] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            stack = takewhile(lambda part: not part.isdecimal(), name.split("."))
            crosses = any(said in name.rpartition(".")[2].lower() for said in ("cross", "enc"))
            caches.setdefault((*stack, crosses), []).append(module)
    for numbered in caches.values():
        order = {index: i for i, index in enumerate(sorted({m.layer_idx for m in numbered}))}
        for module in numbered:
            module.layer_idx = order[module.layer_idx]


def _cached_by_kind(config: Any) -> bool:
    """Return whether a cache of several kinds goes by the layers' own numbers."""
    return len(set(getattr(config, "layer_types", None) or ())) > 1
