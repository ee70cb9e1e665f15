"""What decides a training, so that its checkpoint is told from that of another."""

import hashlib
from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_leaves

from netwright.rules.rule import Rule
from netwright.runtime.distributed import gather, world
from netwright.runtime.fingerprint import code_fingerprint, is_foreign
from netwright.training.arguments import stepped
from netwright.training.batches import first_batch, generators, parts

if TYPE_CHECKING:
    from netwright.training.run import Run

HEAD = 4  # samples that data are told by


def description(run: "Run") -> dict[str, Any]:
    """Return what a checkpoint must agree with to be this training's."""
    options, optimizer = run.options, run.optimizer
    return {
        "rule": type(run.rule).__name__,
        "weights": {name: str(value.dtype) if name in run.rule.resized
                    else f"{value.dtype} {tuple(value.shape)}"
                    for name, value in run.rule.state_dict().items()
                    if isinstance(value, Tensor)},
        "loss": _named(getattr(run.rule, "loss", None)),
        "code": _code(run.rule),
        "optimizer": {"type": type(optimizer).__name__,
                      **{key: repr(value) for key, value in
                         (optimizer.defaults if optimizer else {}).items()
                         if value is not None and value is not False}},
        "optimized parameters": len(stepped(optimizer)),
        "scheduler": type(run.scheduler).__name__,
        **settings(run),
        "scheduler_unit": options.scheduler_unit,
        "train": _data(run.train, run.batches),
        "validation": None if run.validation is None else _data(run.validation, None),
        "metric": run.history.metric, "higher_is_better": options.higher_is_better,
        "patience": options.patience, "accumulate": options.accumulate, "clip": options.clip,
        "autocast": str(options.autocast), "seed": options.seed, "processes": run.world,
        "generators": len(run.generators),
    }


def settings(run: "Run") -> dict[str, Any]:
    """Return the part of it that a training may change itself, such as counts and rates."""
    return {"modules": {name or "rule": {"type": _kind(module), **_plain(module, vars(module))}
                        for name, module in run.rule.named_modules()},
            "parameter groups": _groups(run.optimizer, run.rule),
            "schedule": _schedule(run.scheduler)}


def drifted(there: Any, here: Any, path: tuple[str, ...] = ()) -> list[list[str]]:
    """Return the paths to what differs between two nested dictionaries.

    >>> drifted({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})
    [['a', 'c']]
    """
    if isinstance(there, dict) and isinstance(here, dict):
        return [way for key in {**there, **here}
                for way in drifted(there.get(key), here.get(key), (*path, key))]
    return [] if there == here else [list(path)]


def difference(there: Any, here: Any, but: list[list[str]]) -> str | None:
    """Return in words the first difference between two nested dictionaries, None if none.

    What `but` leads to may differ.
    """
    ways = [way for way in drifted(there, here) if way not in but]
    if not ways:
        return None
    for key in ways[0]:
        there, here = (value.get(key) if isinstance(value, dict) else None
                       for value in (there, here))
    return f"its {'.'.join(ways[0])} is {there}, here it is {here}"


def _kind(module: nn.Module) -> str:
    return type(module).__qualname__


def _plain(owner: Any, values: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the settings among attributes: numbers, words, functions, and configurations."""
    found: dict[str, str | None] = {}
    for name, value in values.items():
        if name.startswith("_") or name == "training":
            continue
        if _is_plain(value):
            found[name] = repr(value)
        elif isinstance(value, (FunctionType, BuiltinFunctionType)):
            found[name] = _named(value)
        elif callable(getattr(value, "to_dict", None)) and isinstance(owner, nn.Module):
            found[name] = _digest([value.to_dict()])
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return len(value) < HEAD * HEAD and all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def _code(rule: Rule) -> dict[str, str]:
    """Return digests of the code of classes that are no library's."""
    kinds = {type(module) for module in rule.modules()}
    own = {kind for kind in kinds if not is_foreign(kind) and not _ours(kind)}
    return {kind.__qualname__: code_fingerprint(kind)
            for kind in sorted(own, key=lambda kind: kind.__qualname__)}


def _ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "netwright"


def _named(function: Any) -> str | None:
    """Return a function's name, with a digest of its code where it is no library's."""
    if function is None or isinstance(function, nn.Module):  # told by its settings as a module
        return None if function is None else f"{_kind(function)} {_buffers(function)}".strip()
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{name} {code_fingerprint(function)}"


def _buffers(module: nn.Module) -> str:
    buffers = list(module.buffers()) if is_foreign(type(module)) else []
    return _digest(buffers) if buffers else ""


def _groups(optimizer: Optimizer | None, rule: Rule) -> dict[str, Any]:
    names = {id(p): name for name, p in rule.named_parameters()}
    groups = [] if optimizer is None else optimizer.param_groups
    return {str(i): {
        "parameters": {str(j): names.get(id(p), "another's")
                       for j, p in enumerate(group["params"])},
        **{key: repr(value) for key, value in group.items()
           if key not in ("params", "param_names") and _is_plain(value)}}
        for i, group in enumerate(groups)}


def _schedule(scheduler: LRScheduler | None) -> dict[str, Any]:
    """Return a schedule's settings, and those of schedules in it."""
    if scheduler is None:
        return {}
    found: dict[str, Any] = {}
    for name, value in vars(scheduler).items():
        if isinstance(value, (list, tuple)) and any(
                isinstance(part, (LRScheduler, FunctionType)) for part in value):
            found[name] = {str(i): _schedule(part) if isinstance(part, LRScheduler)
                           else _named(part) for i, part in enumerate(value)}
        elif isinstance(value, (FunctionType, MethodType)):
            if name not in ("step", "optimizer"):
                found[name] = _named(value)
        elif _is_plain(value) or (isinstance(value, dict) and all(map(_is_plain, value.values()))):
            found[name] = repr(value)
    return found


def _data(data: Any, batches: int | None) -> dict[str, Any]:
    told: dict[str, Any] = {"type": type(data).__name__, "batches": batches}
    told |= {key: getattr(data, key) for key in ("batch_size", "seed", "shuffle")
             if isinstance(getattr(data, key, None), int)}
    # Each process has a share of its own; what decides is known by the first one's.
    head = _head(data)
    return told | {"head": head if world() == 1 else gather(head)[0]}


def _head(data: Any) -> str | None:
    """Return a digest of the first samples, None where they are not the same when read again."""
    drawing = generators(parts(data))
    read: Callable[[], Any] = lambda: first_batch(data, drawing)  # noqa: E731
    first, again = read(), read()
    if first is None:
        return None
    digests = {_digest(tree_leaves(batch)) for batch in (first, again)}
    return digests.pop() if len(digests) == 1 else None


def _digest(values: list[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
            head = value.detach()[:HEAD] if value.ndim else value.detach()
            digest.update(f"{value.dtype} {tuple(value.shape[1:])}".encode())
            digest.update(head.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, numpy.ndarray) and not value.dtype.hasobject:
            digest.update(f"{value.dtype} {value.shape[1:]}".encode())
            digest.update(value[:HEAD].tobytes() if value.ndim else value.tobytes())
        elif _is_plain(value) or isinstance(value, dict):
            digest.update(repr(value).encode())
        else:
            digest.update(type(value).__qualname__.encode())
    return digest.hexdigest()[:12]
