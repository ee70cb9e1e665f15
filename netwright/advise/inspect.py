"""Where a network's parameters, bytes, operations, time and memory go."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.advise._booking import Owner, booked, saved, seconds, timed
from netwright.advise._kinds import KINDS, Kinds
from netwright.anatomy import Anatomy, anatomy
from netwright.anatomy.replacing import plain_paths
from netwright.errors import CannotStage, NothingToReshape
from netwright.runtime.modes import evaluating, rehearsing
from netwright.runtime.padding import real_positions
from netwright.runtime.units import bytes_text, count_text, seconds_text
from netwright.runtime.written import plain
from netwright.signals import apply, copied, tensors
from netwright.stages import stages
from netwright.stages._bind import bound
from netwright.stages._verify import check_example

__all__ = ["Inspection", "Share", "inspect"]

FIGURES = {"parameters": count_text, "bytes": bytes_text, "flops": count_text,
           "seconds": seconds_text, "saved_bytes": bytes_text, "peak_bytes": bytes_text}
TITLES = {"parameters": "params", "bytes": "bytes", "flops": "FLOPs", "seconds": "time",
          "saved_bytes": "saved", "peak_bytes": "peak"}
_PADDED = 0.1  # padding of a batch from which on it is worth a word
_SPARSE = 0.3  # zeros among weights, likewise


@dataclass
class Share:
    """What a part of a network takes: a kind of layer, a stage, or one module with its kind.

    `bytes` are those of its weights and buffers, `seconds` of its operations, `saved_bytes` what
    they would keep for a backward pass, and `peak_bytes` what of it is alive at the moment of a
    forward pass at which most is: its weights and what its operations have made.
    """

    name: str
    kind: str = ""
    parameters: int = 0
    bytes: int = 0
    flops: int = 0
    seconds: float = 0.0
    saved_bytes: int = 0
    peak_bytes: int = 0


@dataclass(frozen=True, repr=False)
class Inspection:
    """Where a network's resources go; what is printed is a table of it.

    Attributes:
        network: the name of its class.
        given: what it ran on, in words.
        total: of the whole network. Its time is that of a run that nobody watches.
        kinds: by what the parts are, in the anatomy's words.
        stages: by stage, or by the parts that the network is made of where it is no chain.
        parts: by module.
        said: the same in sentences.
        unusual: what one might not expect of it, in sentences.
    """

    network: str
    given: str
    total: Share
    kinds: tuple[Share, ...]
    stages: tuple[Share, ...]
    parts: tuple[Share, ...]
    said: tuple[str, ...]
    unusual: tuple[str, ...]

    def rows(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return {"network": self.network, "given": self.given, "total": vars(self.total),
                **{name: [vars(share) for share in getattr(self, name)]
                   for name in ("kinds", "stages", "parts")},
                "said": [*self.said], "unusual": [*self.unusual]}

    def __repr__(self) -> str:
        lines = [f"{self.network} on {self.given}", ""]
        lines += _table("part", self.kinds, self.total)
        if len(self.stages) > 1:
            lines += ["", *_table("stage", self.stages, None, self.total)]
        lines += ["", *_wrapped(self.said)]
        lines += ["", "Unusual:", *_wrapped(self.unusual)] if self.unusual else []
        return "\n".join(lines)


@checks.annotated
@torch.inference_mode(False)
def inspect(model: nn.Module, example: Any, *, repeats: int = 5) -> Inspection:
    """Return where the parameters, bytes, operations, time and memory of a network go.

    It is run on `example` in eval mode, watched operation by operation; what the parts are is
    what `nw.anatomy` finds. A weight of several names counts once, under the first. Bytes saved
    for backward are those of the same pass with gradients. The network stays as it is: mode,
    buffers, attributes and random state are put back, and no hook is left.

    Args:
        model: any module.
        example: what it takes: a tensor, a tuple of arguments or a mapping of keywords. Time and
            memory are those at its batch and length.
        repeats: runs of which the median time counts.

    Raises:
        CannotStage: the model cannot run on the example.
        NothingToReshape: the model was compiled by torch.compile, which hides its parts.
        ValueError: the model's weights are on the meta device, or the example is empty.

    >>> from netwright.models import gpt
    >>> found = inspect(gpt(96, context=16), torch.zeros(4, 16, dtype=torch.long))
    >>> sum(kind.parameters for kind in found.kinds) == found.total.parameters
    True
    >>> max(found.kinds, key=lambda kind: kind.flops).name
    'feed-forward'
    """
    checks.count(1, repeats=repeats)
    _check(model, example)
    check_example(model, example)
    inside = anatomy(model, example)
    example = copied(example)
    kinds = Kinds(inside)

    def run() -> Any:
        return apply(model, example)

    with evaluating(model), rehearsing(model):
        run()  # what modules set up in their first pass is no part of any
        whole = seconds(model, run, repeats)
        with plain_paths():
            book, time = booked(model, run), timed(model, run, repeats)
            kept, hindered = _saved(model, run)
    parts = _Parts(model, kinds)
    parts.weigh()
    for owner, count in book.flops.items():
        parts.of(owner).flops += count
    for owner, count in book.peak.items():
        parts.of(owner).peak_bytes += count
    for owner, taken in time.items():
        parts.of(owner).seconds += taken
    for owner, count in kept.items():
        parts.of(owner).saved_bytes += count
    shares = [share for share in parts.held.values() if any(_figures(share))]
    total = _sum(type(model).__name__, shares)
    total.seconds = whole
    total.peak_bytes += sum(t.nbytes for t in tensors(example))
    by_kind = _grouped(shares, lambda share: share.kind, KINDS)
    where = _stages(model, example)
    by_stage = _grouped(shares, lambda share: where.get(share.name, "the rest"),
                        [*dict.fromkeys(where.values()), "the rest"])
    return Inspection(type(model).__name__, _described(example), total, by_kind, by_stage,
                      tuple(shares), tuple(_said(by_kind, shares, total)),
                      (*_unusual(model, example, inside, total, book.uncounted), *hindered))


def _saved(model: nn.Module, run: Callable[[], Any]) -> tuple[dict[Owner, int], list[str]]:
    """Return what a pass with gradients keeps, or why there is none."""
    try:
        return saved(model, run), []
    except RuntimeError as error:  # weights that are changed in place, operations for answers alone
        return {}, [f"It cannot run with gradients: {plain(error)[:200]}."]


def _check(model: nn.Module, example: Any) -> None:
    if hasattr(model, "_orig_mod"):
        raise NothingToReshape("model was compiled by torch.compile, which hides its parts; give "
                               "the module that was compiled")
    held = [*model.named_parameters(), *model.named_buffers()]
    away = next((name for name, tensor in held if tensor.is_meta), None)
    if away is not None:
        raise ValueError(f"model must hold its weights, got {away} on the meta device; load them "
                         "first")
    given = tensors(example)
    if not given:
        raise ValueError(f"example must hold a tensor, got {checks.seen(example)}; give what the "
                         "model takes: a tensor, a tuple of arguments or a mapping of keywords")
    if not all(tensor.numel() for tensor in given[:1]):
        raise ValueError(f"example must hold at least one row, got {_described(example)}")


class _Parts:
    """The share of each module, split by kind where it does work of several."""

    def __init__(self, model: nn.Module, kinds: Kinds) -> None:
        self.model, self.kinds = model, kinds
        self.held: dict[tuple[str, str], Share] = {}

    def at(self, module: str, kind: str) -> Share:
        return self.held.setdefault((module, kind), Share(module, kind))

    def of(self, owner: Owner) -> Share:
        return self.at(owner.module, self.kinds.of(*owner))

    def weigh(self) -> None:
        """Count parameters and buffers, those of several names once."""
        names = {id(p) for p in self.model.parameters()}
        seen: set[int] = set()
        for name, tensor in _tensors(self.model):
            if id(tensor) in seen or nn.parameter.is_lazy(tensor):
                continue
            seen.add(id(tensor))
            share = self.at(name.rpartition(".")[0], self.kinds.of_weight(name))
            share.parameters += tensor.numel() if id(tensor) in names else 0
            share.bytes += tensor.nbytes
            share.peak_bytes += tensor.nbytes


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _stages(model: nn.Module, example: Any) -> dict[str, str]:
    """Return for each module's name the stage that it is in."""
    names = {id(module): name for name, module in model.named_modules()}
    try:
        chain = stages(model, example)
    except CannotStage:
        return {name: name.partition(".")[0] for name in names.values() if name}
    return {names[id(part)]: stage.name for stage in chain for module in stage.modules
            for part in module.modules() if id(part) in names}


def _figures(share: Share) -> list[float]:
    return [getattr(share, name) for name in FIGURES]


def _sum(name: str, shares: Iterable[Share], kind: str = "") -> Share:
    whole = Share(name, kind)
    for share in shares:
        for figure in FIGURES:
            setattr(whole, figure, getattr(whole, figure) + getattr(share, figure))
    return whole


def _grouped(shares: list[Share], key: Any, order: Iterable[str]) -> tuple[Share, ...]:
    groups: dict[str, list[Share]] = {name: [] for name in order}
    for share in shares:
        groups[key(share)].append(share)
    return tuple(_sum(name, held) for name, held in groups.items() if held)


# What is said of it.

def _said(kinds: tuple[Share, ...], parts: list[Share], total: Share) -> Iterator[str]:
    for figure, what in (("bytes", "of the bytes are"), ("flops", "of the FLOPs are"),
                         ("seconds", "of the time is"), ("peak_bytes", "of the peak memory is"),
                         ("saved_bytes", "of what training keeps for backward is")):
        whole = sum(getattr(kind, figure) for kind in kinds)
        ranked = sorted(kinds, key=lambda kind: -getattr(kind, figure))
        told = [(kind, getattr(kind, figure) / whole) for kind in ranked[:3]
                if whole and getattr(kind, figure) / whole >= 0.05]
        if not told:
            continue
        first, share = told[0]
        line = f"{_share(share)} {what} {first.name}"
        line += _alone(first, parts, figure)
        rest = " and ".join(f"{kind.name} {_share(part)}" for kind, part in told[1:])
        yield line + (f"; {rest}" if rest else "") + "."
    yield (f"A forward pass takes {seconds_text(total.seconds)} on {torch.get_num_threads()} "
           f"{'thread' if torch.get_num_threads() == 1 else 'threads'} and "
           f"{bytes_text(total.peak_bytes)} at its peak; training would keep "
           f"{bytes_text(total.saved_bytes)} for backward.")


def _alone(kind: Share, parts: list[Share], figure: str) -> str:
    """Name the one module that has nearly all of a kind's share."""
    top = max((part for part in parts if part.kind == kind.name),
              key=lambda part: getattr(part, figure), default=None)
    if top is None or not top.name or getattr(top, figure) < 0.8 * getattr(kind, figure):
        return ""
    return f" ({plain(top.name)})"


def _unusual(model: nn.Module, example: Any, inside: Anatomy, total: Share,
             uncounted: tuple[str, ...]) -> Iterator[str]:
    parameters = dict(model.named_parameters())
    yield from _ties(inside, parameters)
    yield from _dtypes(model, total)
    yield from _left_training(model)
    yield from _padding(model, example)
    yield from _unused(inside, model, total)
    frozen = sum(p.numel() for p in parameters.values() if not p.requires_grad)
    if frozen:
        yield f"{_percent(frozen, total.parameters)} of the parameters are frozen."
    if inside.repeated:
        first = inside.repeated[0]
        more = f", and {len(inside.repeated) - 1} more do" if len(inside.repeated) > 1 else ""
        yield f"{plain(first.name)} runs {first.times} times in a pass{more}."
    yield from _values(parameters)
    if uncounted:
        yield f"The FLOPs leave out {', '.join(uncounted)}, which no formula counts."


def _ties(inside: Anatomy, parameters: Mapping[str, Tensor]) -> Iterator[str]:
    for tie in inside.ties:
        first, *others = tie.names
        size = next((bytes_text(parameters[name].nbytes) for name in tie.names
                     if name in parameters), "")
        head = any(name.rpartition(".")[0] == inside.head for name in others)
        what = "the head is tied to" if head else f"{', '.join(map(plain, others))} is tied to"
        yield f"{what} {plain(first)} ({size}): a change of one is a change of both."


def _dtypes(model: nn.Module, total: Share) -> Iterator[str]:
    held: dict[torch.dtype, int] = {}
    for p in model.parameters():
        held[p.dtype] = held.get(p.dtype, 0) + p.nbytes
    wide = [dtype for dtype in held if dtype in (torch.float32, torch.float64)]
    for dtype in wide:
        half = "bfloat16 halves" if dtype is torch.float32 else "float32 halves"
        yield (f"{_percent(held[dtype], total.bytes)} of the bytes are {_name(dtype)}: {half} "
               "them.")
    if len(held) > 1:
        yield f"The weights are of several dtypes: {', '.join(map(_name, held))}."


def _left_training(model: nn.Module) -> Iterator[str]:
    dropped = [name for name, module in model.named_modules()
               if isinstance(module, nn.modules.dropout._DropoutNd) and module.training
               and module.p > 0]
    norms = [name for name, module in model.named_modules()
             if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training]
    if dropped:
        yield (f"Dropout is left on, in {plain(dropped[0])}"
               f"{f' and {len(dropped) - 1} more' if len(dropped) > 1 else ''}: model.eval() "
               "turns it off.")
    if norms:
        yield ("Batch norm follows each batch, as in training, in "
               f"{plain(norms[0])}{f' and {len(norms) - 1} more' if len(norms) > 1 else ''}: "
               "model.eval() holds it.")


def _padding(model: nn.Module, example: Any) -> Iterator[str]:
    real = real_positions(bound(model, example))
    if real is not None and real.numel():
        share = 1 - float(real.float().mean())
        if share > _PADDED:
            yield (f"{_share(share)} of the batch is padding, which takes its time all the same: "
                   "sort by length, or cut the batch to its longest row.")


def _unused(inside: Anatomy, model: nn.Module, total: Share) -> Iterator[str]:
    modules = dict(model.named_modules())
    held = {id(p): p for name in inside.unused for p in modules[name].parameters()}
    if held:
        size = sum(p.nbytes for p in held.values())
        yield (f"{', '.join(map(plain, inside.unused[:3]))}"
               f"{' and others' if len(inside.unused) > 3 else ''}: nothing reads these weights "
               f"here, {bytes_text(size)}, {_percent(size, total.bytes)} of the bytes.")


def _values(parameters: Mapping[str, Tensor]) -> Iterator[str]:
    floats = {name: p.detach() for name, p in parameters.items() if p.is_floating_point()}
    broken = [name for name, p in floats.items() if not torch.isfinite(p).all()]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        yield f"There are numbers that are not finite in {plain(broken[0])}{more}."
    matrices = [p for p in floats.values() if p.ndim > 1]
    zeros, all_ = sum(int((p == 0).sum()) for p in matrices), sum(p.numel() for p in matrices)
    if all_ and zeros / all_ > _SPARSE:
        yield (f"{_percent(zeros, all_)} of the weights are zero and stored as all others: as "
               "masks, or with their units removed, they would take less.")


# How it is printed.

def _table(title: str, shares: Iterable[Share], last: Share | None,
           whole: Share | None = None) -> list[str]:
    shares = [*shares]
    sums = _sum("", shares)
    lines = [[title, *TITLES.values()]]
    for share in shares:
        lines.append([_ending(share.name), *(_percent(getattr(share, figure), getattr(sums, figure))
                                             for figure in FIGURES)])
    if last is not None:
        lines.append(["all", *(write(getattr(last, figure)) for figure, write in FIGURES.items())])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in
                                                   zip(line[1:], widths[1:], strict=True))])
            for line in lines]


def _percent(part: float, whole: float) -> str:
    return _share(part / whole) if whole else "–"


def _share(share: float) -> str:
    """Return a share in words that no line breaks."""
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%" if share >= 0.01 or share == 0 else \
        "<1\N{NO-BREAK SPACE}%"


def _ending(name: str) -> str:
    name = plain(name) or "(itself)"
    return name if len(name) <= 22 else "…" + name[-21:]


def _wrapped(lines: Iterable[str]) -> list[str]:
    from textwrap import wrap
    return [part for line in lines for part in wrap(line, 79, initial_indent="- ",
                                                    subsequent_indent="  ")]


def _described(example: Any) -> str:
    shapes = [f"{tuple(t.shape)} {_name(t.dtype)}" for t in tensors(example)]
    return ", ".join(shapes[:3]) + (" and more" if len(shapes) > 3 else "")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
