"""What a model costs to use, and what of it a change has left as it was."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from netwright.measure.cost import cost
from netwright.runtime.modes import evaluating
from netwright.signals import apply

Figures = dict[str, float]


def figures(model: nn.Module, x: Any) -> Figures:
    """Return the figures of a model that are the same on every run, for one answer to `x`."""
    found = cost(model, (x, None), repeats=1, warmup=0)
    return {"size": float(stored(model)), "flops": float(found.flops),
            "inference_memory": float(found.peak_bytes), "parameters": float(found.parameters)}


def stored(model: nn.Module) -> int:
    """Return the bytes of a model's tensors, each once.

    >>> stored(nn.Linear(2, 3))
    36
    """
    held = {id(t): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    return sum(held.values())


def times(models: Sequence[nn.Module], x: Any, turns: int) -> list[list[float]]:
    """Return the seconds of an answer of each model, measured in turns."""
    found: list[list[float]] = [[] for _ in models]
    for turn in range(turns + 1):
        for model, spent in zip(models, found, strict=True):
            seconds = once(model, x)
            if turn:  # the first sets up what stays
                spent.append(seconds)
    return found


def once(model: nn.Module, x: Any) -> float:
    """Return the seconds of one answer."""
    on_cuda = any(p.is_cuda for p in model.parameters())
    with evaluating(model), torch.inference_mode():
        start = time.perf_counter()
        apply(model, x)
        if on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def ratio(spent: Sequence[Sequence[float]]) -> float:
    """Return how long the second model takes beside the first: least beside least."""
    return min(spent[1]) / min(spent[0])


def ratio_interval(spent: Sequence[Sequence[float]], *, seed: int = 0
                   ) -> tuple[float, float, float]:
    """Return the median of the ratios of neighbouring turns, with its bootstrap interval."""
    ratios = torch.tensor([after / before for before, after in zip(*spent, strict=True)],
                          dtype=torch.double)
    draw = torch.Generator().manual_seed(seed)
    index = torch.randint(len(ratios), (400, len(ratios)), generator=draw)
    medians = ratios[index].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return statistics.median(ratios.tolist()), low, high


def layers(original: nn.Module, changed: nn.Module) -> list[dict[str, Any]]:
    """Return what became of each layer that holds weights, as plain data.

    >>> before, after = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2).bfloat16())
    >>> layers(before, after)[0]["became"]
    'kept in bfloat16'
    """
    whole = max(stored(original), 1)
    after = dict(changed.named_modules())
    found = []
    for name, module in original.named_modules():
        held = {key: t for key, t in [*module._parameters.items(), *module._buffers.items()]
                if t is not None}
        size = sum(t.nbytes for t in held.values())
        if not size:
            continue
        now = after.get(name)
        found.append({
            "name": name, "kind": type(module).__name__, "bytes": size, "share": size / whole,
            "bytes_after": 0 if now is None else stored(now),
            "became": _became(held, now)})
    return found


def _became(held: Mapping[str, torch.Tensor], now: nn.Module | None) -> str:
    if now is None:
        return "removed"
    after = dict([*now.named_parameters(), *now.named_buffers()])
    if held.keys() == after.keys() and all(
            t.shape == after[key].shape for key, t in held.items()):
        if any(t.dtype != after[key].dtype for key, t in held.items()):
            return "kept in " + _dtypes(after)
        same = all(torch.equal(t, after[key]) for key, t in held.items())
        return "untouched" if same else "other weights"
    if not after:
        return "removed"
    return f"{type(now).__name__} of " + ", ".join(
        f"{tuple(t.shape)}" for t in list(after.values())[:2]) + f" in {_dtypes(after)}"


def _dtypes(tensors: Mapping[str, torch.Tensor]) -> str:
    return " and ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}))


def only_dtype(original: nn.Module, changed: nn.Module) -> bool:
    """Return whether nothing but the type of numbers differs, and no type has whole numbers.

    >>> only_dtype(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16())
    True
    """
    before, after = dict(_tensors(original)), dict(_tensors(changed))
    return before.keys() == after.keys() and all(
        t.shape == after[name].shape for name, t in before.items()) and {
        t.dtype for t in before.values()} != {t.dtype for t in after.values()} and all(
        after[name].is_floating_point() == t.is_floating_point() for name, t in before.items())


def dtypes(model: nn.Module) -> list[str]:
    """Return the types of numbers that a model holds."""
    return sorted({str(t.dtype).removeprefix("torch.") for _, t in _tensors(model)})


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
