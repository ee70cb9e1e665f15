from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from netwright import checks
from netwright.anatomy.layers import is_linear
from netwright.anatomy.replacing import (
    plain_paths,
    replace,
    standing_in,
    without_fused_paths,
)
from netwright.anatomy.residual import Given, Place, Silent, Trace, trace
from netwright.anatomy.residual_blocks import runs_of
from netwright.catalogue.facets import method
from netwright.errors import CannotStage, NothingToReshape, UnknownName
from netwright.reshape._calibration import batches_of, few
from netwright.reshape._layouts import layout_of, plain_layout
from netwright.reshape.change import decided, reshape
from netwright.reshape.pruning._distances import Distance, Distances
from netwright.reshape.pruning.prune_sublayers import number_anew
from netwright.runtime.modes import evaluating, rehearsing, same_buffers
from netwright.runtime.padding import read_padding, real_rows
from netwright.runtime.progress import Tries
from netwright.runtime.random_state import same_random_state
from netwright.signals import apply, at, call, tensors

__all__ = ["replace_by_linear"]

RIDGES = tuple(10.0 ** k for k in range(-6, 3))  # of the mean square of an input
HELD_OUT = 5  # one position of so many tells how strongly the map is held back


class LinearMap(nn.Module):
    """Stands where a part stood: a linear map of each position of its first input.

    y = A h + b along `axis`; `layout` is what the part returned, `Place.STREAM` where y goes.

    Shapes: h (*, inputs, *) with the inputs at `axis`, y alike with the outputs.

    >>> LinearMap(4, 4, -1, Place.STREAM)(torch.zeros(2, 5, 4)).shape
    torch.Size([2, 5, 4])
    """

    batch_first = False  # PyTorch's encoder looks for it

    def __init__(self, inputs: int, outputs: int, axis: int, layout: Any,
                 words: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.map, self.axis, self.layout = nn.Linear(inputs, outputs), axis, layout
        for name, value in (words or {}).items():
            setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return A h + b in the form in which the part returned its output."""
        h = tensors((args, kwargs))[0]
        y = self.map(h.movedim(self.axis, -1)).movedim(-1, self.axis)
        return tree_map(lambda leaf: y if leaf is Place.STREAM else
                        at((args, kwargs), leaf.path) if isinstance(leaf, Given) else leaf,
                        self.layout)


class Found(NamedTuple):
    """A part with the map that comes closest to it."""

    name: str
    axis: int
    weight: Tensor
    bias: Tensor
    layout: Any


@method(
    "reshape",
    place="residual block",
    saves=["parameters", "file size", "inference memory", "inference time"],
    needs=["calibration data"],
    keeps_function=False,
    search={"layers": [1, 2, 3]},
    variants={"one": {"layers": 1}, "two": {"layers": 2}},
)
@reshape
@torch.no_grad()
def replace_by_linear(model: nn.Module, calibration: Any, layers: int | Sequence[str] = 1, *,
                      distance: Distance = "angular") -> nn.Module:
    """Return a copy with layers replaced by the linear maps that come closest to them.

    A, b = argmin Σ ‖A h + b − f(h)‖² + λ ‖A − P‖²  over the positions of the calibration data,
    h being what a layer f takes; P = I for what passes its input on, 0 otherwise, whichever does
    better, and λ by a fifth of the positions that are held out.

    Each position is mapped by itself, so that what an attention layer in f looked up elsewhere is
    lost; what the positions have in common is not, which is why this keeps more than leaving the
    layer out. Nothing is trained.

    Where `layers` is a number, the residual blocks of the model (or, where it has none, its
    sublayers of more than a single linear layer) are all tried, and the one whose map moves the
    outputs least is taken; then the maps of the others are fitted again, and so on.

    Args:
        model: any module; for a number of layers, one with a residual stream.
        calibration: what it takes, or batches of that, at least as many positions as a layer has
            inputs; padding is left out.
        layers: names of modules, or how many layers.
        distance: what tells which one moves the outputs least, as in `prune_sublayers`.

    Shapes: h (positions, inputs), f(h) (positions, outputs), A (outputs, inputs), b (outputs,).

    Raises:
        NothingToReshape: there is no residual block and no sublayer, or a named part is called
            several times, or gives other positions than it takes.
        UnknownName: no module is called that.
        ValueError: `layers` is no number that there are, or `calibration` is empty or gives
            activations that are not finite.

    >>> from netwright.models import gpt
    >>> model, x = gpt(96, context=16, depth=3), torch.randint(96, (8, 16))
    >>> linear = replace_by_linear(model, x, ["2"])
    >>> linear[2].map
    Linear(in_features=64, out_features=64, bias=True)
    """
    batches, trial = batches_of(calibration), deepcopy(model)
    with same_random_state(), torch.enable_grad():
        found = trace(deepcopy(model), few(batches[0]))
    with (same_random_state(), evaluating(trial), same_buffers(trial), plain_paths()):
        if isinstance(layers, int):
            made = _least(trial, batches, found, layers, Distances(distance))
        else:
            made = _each(trial, batches, found, layers)
    return decided({"maps": {one.name: {
        "inputs": one.weight.shape[1], "outputs": one.weight.shape[0], "axis": one.axis,
        "layout": plain_layout(one.layout)} for one in made}},
        maps={one.name: one for one in made})


@replace_by_linear.applies
@torch.no_grad()
def _replaced(model: nn.Module, decision: Mapping[str, Any],
              maps: Mapping[str, Found] | None = None) -> nn.Module:
    for name, said in decision["maps"].items():
        part = model.get_submodule(name)
        stand = _empty(part, said["inputs"], said["outputs"], said["axis"],
                       layout_of(said["layout"]))
        if maps is not None:
            _write(stand, maps[name])
        model = replace(model, name, stand)
    without_fused_paths(model)
    number_anew(model)
    return model


def _each(trial: nn.Module, batches: Sequence[Any], found: Trace,
          layers: Sequence[str]) -> list[Found]:
    """Return the maps of the parts called `layers`, each fitted with those before it in place."""
    names = dict(trial.named_modules())
    for name in layers:
        if name not in names:
            raise UnknownName("module of the model", name, names)
        if name not in found.silent:
            raise NothingToReshape(f"{name!r} has no output of the positions that it takes, or is "
                                   "called more or less than once; name another part")
    chosen = list(dict.fromkeys(layers))
    for name in chosen:
        inside = next((other for other in chosen if name.startswith(f"{other}.")), None)
        if inside is not None:
            raise ValueError(f"layers must not name {name!r} beside {inside!r}, which holds it")
    if not chosen:
        raise ValueError("layers must name at least one module, or be a number, got none")
    made = []
    for name in chosen:
        (one,) = _fitted(trial, batches, found, [name])
        made.append(one)
        replace(trial, name, _stand(trial, one))
    return made


def _least(trial: nn.Module, batches: Sequence[Any], found: Trace, count: int,
           distances: Distances) -> list[Found]:
    """Return the maps of the parts whose replacement moves the outputs least, one after another."""
    left = _candidates(trial, batches[0], found)
    checks.between(1, len(left), whole=True, layers=count, advice=f"there are {', '.join(left)}")
    kept = [distances.prepared(x, call(trial, x)) for x in batches]
    made: list[Found] = []
    with Tries("replace_by_linear", sum(len(left) - k for k in range(count))) as tries:
        while len(made) < count:
            moved: dict[float, Found] = {}
            for one in _fitted(trial, batches, found, left):
                far = _moved(trial, one, batches, kept, distances)
                if far is not None:
                    moved.setdefault(far, one)
                tries.step(f"best {min(moved, default=float('nan')):.3g}")
            if not moved:
                raise NothingToReshape(
                    f"{type(trial).__name__} does not run with a linear map in any of "
                    f"{', '.join(left)}; layers={len(made)} at most")
            best = moved[min(moved)]
            made.append(best)
            left.remove(best.name)
            replace(trial, best.name, _stand(trial, best))
    return made


def _candidates(trial: nn.Module, example: Any, found: Trace) -> list[str]:
    """Return the residual blocks, or the sublayers where there are none."""
    try:
        with rehearsing(trial):
            rows = runs_of(trial, few(example), found, alone=True)
    except CannotStage:
        rows = []
    names = [block.name for row in rows for block in row if block.name in found.silent]
    names = names or [s.name for s in found.sublayers
                      if s.name in found.silent and not is_linear(trial.get_submodule(s.name))]
    if not names:
        raise NothingToReshape(f"{type(trial).__name__} has no residual block and no sublayer of "
                               "more than a linear layer; name parts of it by layers=")
    return names


def _moved(trial: nn.Module, one: Found, batches: Sequence[Any], kept: Sequence[Any],
           distances: Distances) -> float | None:
    """Return how far the outputs move with a map in its place, None where it does not run."""
    total = positions = 0.0
    for x, before in zip(batches, kept, strict=True):
        with standing_in(trial, {one.name: _stand(trial, one)}):
            try:
                output = call(trial, x)
            except Exception:  # whatever the model raises that looks for the part
                return None
        moved, counted = distances.between(x, before, output)
        total, positions = total + moved, positions + counted
    return total / max(positions, 1)


class _Sums:
    """What a part takes and gives, summed: products of inputs and targets, and of inputs."""

    def __init__(self, axis: int) -> None:
        self.axis, self.rows = axis, 0
        self.products: list[Any] = [0.0, 0.0]  # of what is fitted, and of what is held out
        self.targets: list[Any] = [0.0, 0.0]
        self.squares = [0.0, 0.0]
        self.sizes = (0, 0)

    def add(self, h: Tensor, y: Tensor) -> None:
        """Take in rows; the last of each call are held out."""
        wide = torch.float32 if h.device.type == "mps" else torch.float64
        h, y = (real_rows(t.movedim(self.axis, -1)).to(wide) for t in (h, y))
        self.sizes = h.shape[1], y.shape[1]
        self.rows += len(h)
        h = torch.cat([h, torch.ones_like(h[:, :1])], 1)
        held = len(h) // HELD_OUT
        for side, (a, b) in enumerate(((h[:len(h) - held], y[:len(h) - held]),
                                       (h[len(h) - held:], y[len(h) - held:]))):
            self.products[side] = self.products[side] + a.T @ a
            self.targets[side] = self.targets[side] + a.T @ b
            self.squares[side] += float(b.square().sum())

    def solved(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the weight and the bias of the map that comes closest."""
        if not self.rows:
            raise NothingToReshape(f"{name!r} took no position that is not padding; name another "
                                   "part")
        if not all(bool(t.isfinite().all()) for t in (*self.products, *self.targets)):
            raise ValueError(f"calibration must give finite activations, got others at {name!r}; "
                             "check the inputs and the weights")
        inputs, outputs = self.sizes
        empty = self.products[0].new_zeros(inputs + 1, outputs)
        goals = [empty, torch.eye(inputs + 1, outputs).to(empty)][:2 if inputs == outputs else 1]
        _, ridge, goal = min(((self._error(a), ridge, k) for k, goal in enumerate(goals)
                              for ridge, a in self._path(goal, self.products[0], self.targets[0])),
                             key=lambda tried: tried[0])
        ((_, a),) = self._path(goals[goal], sum(self.products), sum(self.targets), [ridge])
        return a[:-1].T, a[-1]

    def _error(self, a: Tensor) -> float:
        """Return the squared error on what is held out."""
        return self.squares[1] + float((a * (self.products[1] @ a - 2 * self.targets[1])).sum())

    def _path(self, goal: Tensor, products: Tensor, targets: Tensor,
              ridges: Sequence[float] = RIDGES) -> Iterable[tuple[float, Tensor]]:
        """Yield the solutions for some ridges, which hold the map to `goal`."""
        values, vectors = torch.linalg.eigh(products)
        size = products.diagonal()[:-1].mean().clamp_min(torch.finfo(products.dtype).tiny)
        rest = vectors.T @ (targets - products @ goal)
        for ridge in ridges:
            yield ridge, goal + vectors @ (rest / (values.clamp_min(0) + ridge * size)[:, None])


def _fitted(trial: nn.Module, batches: Sequence[Any], found: Trace,
            names: Sequence[str]) -> list[Found]:
    """Return the parts with their maps, from one pass of the data."""
    sums = {name: _Sums(_axis(trial.get_submodule(name))) for name in names}

    def seeing(name: str) -> Any:
        def see(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            sums[name].add(tensors((args, kwargs))[0], _stream(found.silent[name], output))
        return see
    handles: list[Any] = [trial.get_submodule(name).register_forward_hook(
        seeing(name), with_kwargs=True) for name in names]
    handles += read_padding(trial)
    try:
        with rehearsing(trial):
            for batch in batches:
                apply(trial, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [Found(name, made.axis, *made.solved(name), found.silent[name].layout)
            for name, made in sums.items()]


def _stream(silent: Silent, output: Any) -> Tensor:
    """Return what goes to the stream of what a part returned."""
    said: list[Tensor] = []
    tree_map(lambda leaf, value: said.append(value) if leaf is Place.STREAM else None,
             silent.layout, output)
    return said[0]


def _axis(part: nn.Module) -> int:
    """Return where the features are: channels come second in what convolutions take."""
    return 1 if any(isinstance(m, nn.modules.conv._ConvNd) for m in part.modules()) else -1


def _stand(trial: nn.Module, one: Found) -> LinearMap:
    outputs, inputs = one.weight.shape
    return _write(_empty(trial.get_submodule(one.name), inputs, outputs, one.axis, one.layout),
                  one)


def _empty(part: nn.Module, inputs: int, outputs: int, axis: int, layout: Any) -> LinearMap:
    """Return a map for the place of `part`, with what it said of itself in numbers and words."""
    words = {name: value for name, value in vars(part).items() if not name.startswith("_")
             and isinstance(value, (bool, int, float, str)) and name not in ("training", "axis")}
    stand = LinearMap(inputs, outputs, axis, layout, words)
    parameters = list(part.parameters())
    like = next((p for p in parameters if p.is_floating_point()), None)
    if like is not None:
        stand.to(like.device, like.dtype)
    stand.requires_grad_(any(p.requires_grad for p in parameters))
    return stand


def _write(stand: LinearMap, one: Found) -> LinearMap:
    stand.map.weight.copy_(one.weight)
    stand.map.bias.copy_(one.bias)
    return stand
