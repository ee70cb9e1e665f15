"""How good a changed model is: by the user's metric, or by its fidelity to the original."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.advise.material import Batch
from netwright.objectives.metrics import is_mean_over_targets
from netwright.runtime.modes import evaluating
from netwright.runtime.random_state import same_random_state
from netwright.signals import apply, tensor_of, tensors
from netwright.tasks.task import METRICS

__all__ = ["FIDELITIES"]

DRAWS = 400  # of a bootstrap
FEW = 8  # samples below which pairs of them say little

Rows = list[Tensor]  # of each batch what its samples give
Compare = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Judge:
    """What quality is: a name, what it means, and how it is computed.

    `look` makes of a model's outputs for a batch what is kept of them, `value` makes one number of
    what is kept of the original and of a changed model for some samples; 1 is the original's.
    """

    name: str
    means: str
    look: Callable[[Any, Any], Tensor]
    value: Callable[[Rows, Rows, Rows], float]
    metric: Any = None

    def outputs(self, model: nn.Module, part: Sequence[Batch]) -> Rows:
        """Return what is kept of a model's outputs, batch by batch."""
        with evaluating(model), torch.inference_mode(False), torch.no_grad(), same_random_state():
            return [self.look(apply(model, x), x) for x, _ in part]


@dataclass(frozen=True)
class Score:
    """A quality with the interval in which 95 of 100 draws of the same number of samples lie."""

    value: float
    low: float
    high: float


def score(judge: Judge, original: Rows, changed: Rows, targets: Rows) -> float:
    """Return the quality of a changed model, 1 where it is as good as the original."""
    for before, after in zip(original, changed, strict=True):
        if before.shape != after.shape:
            raise ValueError(f"the changed model gives {tuple(after.shape)} where the original "
                             f"gives {tuple(before.shape)}")
    return judge.value(original, changed, targets)


def interval(judge: Judge, original: Rows, changed: Rows, targets: Rows, *,
             seed: int = 0) -> Score:
    """Return the quality with a bootstrap interval over samples."""
    rows = [[torch.cat(part)] if len({t.shape[1:] for t in part}) == 1 else
            [row[None] for t in part for row in t] for part in (original, changed)]
    labels = [torch.cat(targets)] if targets and len({t.shape[1:] for t in targets}) == 1 else [
        row[None] for t in targets for row in t]
    count = sum(map(len, original))
    draw = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(DRAWS):
        index = torch.randint(count, (count,), generator=draw)
        drawn.append(judge.value(_taken(rows[0], index), _taken(rows[1], index),
                                 _taken(labels, index)))
    finite = torch.tensor([value for value in drawn if math.isfinite(value)] or [math.nan])
    low, high = finite.double().quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return Score(score(judge, original, changed, targets), low, high)


def _taken(part: Rows, index: Tensor) -> Rows:
    if not part:
        return []
    if len(part) == 1:
        return [part[0][index]]
    return [part[i] for i in index.tolist()]


def judge_for(model: nn.Module, part: Sequence[Batch], *, metric: Any = None,
              higher_is_better: bool | None = None, fidelity: str | None = None) -> Judge:
    """Return how this model's changed forms are judged.

    Raises:
        UnknownName: no fidelity or metric has that name.
        ValueError: the metric, or the model, gives other numbers at a second call, or none that
            are finite.
    """
    if fidelity is not None:
        checks.one_of(FIDELITIES, fidelity=fidelity)
        if metric is not None:
            raise ValueError("fidelity compares with the original's outputs and metric with "
                             "targets; give one of them")
    judge = _by_metric(metric, higher_is_better) if metric is not None else FIDELITIES[
        fidelity or _kind(model, part)]
    _check_steady(judge, model, part[:2])
    return judge


def targets_of(judge: Judge, part: Sequence[Batch]) -> Rows:
    """Return the targets of a part, or which positions of its samples are real."""
    if judge.metric is not None:
        return [y for _, y in part if y is not None]
    masks = [_mask(x) for x, _ in part]
    return [mask for mask in masks if mask is not None] if None not in masks else []


def original_value(judge: Judge, rows: Rows, targets: Rows) -> float:
    """Return the metric of the original itself, 1 for a fidelity."""
    return judge.metric(rows, targets) if judge.metric is not None else 1.0


def _check_steady(judge: Judge, model: nn.Module, part: Sequence[Batch]) -> None:
    first, second = judge.outputs(model, part), judge.outputs(model, part)
    targets = targets_of(judge, part)
    if any(not bool(torch.isfinite(rows).all()) for rows in first):
        raise ValueError("the original's outputs for the data must be finite, got nan or infinity; "
                         "check the weights and the inputs")
    if judge.metric is None:
        if any(not torch.allclose(a, b, rtol=1e-3, atol=1e-4)
               for a, b in zip(first, second, strict=True)):
            raise ValueError("the model must give the same outputs for the same inputs in eval "
                             "mode, got others at the second call; make what draws depend on "
                             "training")
        return
    values = [judge.metric(first, targets), judge.metric(second, targets)]
    if not all(map(math.isfinite, values)) or not math.isclose(*values, rel_tol=1e-3,
                                                               abs_tol=1e-6):
        raise ValueError("metric must give the same finite number for the same model, got "
                         f"{values[0]:.6g} and {values[1]:.6g} at two calls; give one that depends "
                         "on predictions and targets alone")


def _kind(model: nn.Module, part: Sequence[Batch]) -> str:
    """Return the fidelity that goes with what a model returns."""
    x = part[0][0]
    with evaluating(model), torch.no_grad(), same_random_state():
        output = apply(model, x)
    tensor = tensor_of(output)
    if not isinstance(output, Tensor) and _named(output, "logits") is not None:
        return "distribution"
    if _named(output, "last_hidden_state") is not None and not isinstance(output, Tensor):
        return "pairwise" if sum(len(_first(x)) for x, _ in part) >= FEW else "cosine"
    given = _first(x)
    if tensor.ndim >= 2 and tensor.shape[-1] > 1 and (
            not given.is_floating_point() or (given.ndim > 2 and tensor.ndim == 2)):
        return "distribution"
    return "explained"


def _named(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _first(x: Any) -> Tensor:
    return tensors(dict(x) if isinstance(x, Mapping) else x)[0]


def _mask(x: Any) -> Tensor | None:
    mask = x.get("attention_mask") if isinstance(x, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _plain(output: Any, x: Any) -> Tensor:
    return tensor_of(output).detach().float().cpu()


def _logits(output: Any, x: Any) -> Tensor:
    """Return log-probabilities over the last axis."""
    return _plain(output, x).log_softmax(-1)


def _pooled(output: Any, x: Any) -> Tensor:
    """Return one vector a sample: the mean over its real positions."""
    h = _plain(output, x)
    if h.ndim < 3:
        return h
    mask = _mask(x)
    if mask is not None and mask.shape == h.shape[:2]:
        real = mask.to(h)[..., None]
        return (h * real).sum(1) / real.sum(1).clamp_min(1)
    return h.flatten(1, -2).mean(1)


def _per_sample(compare: Callable[[Tensor, Tensor], Tensor]
                ) -> Callable[[Rows, Rows, Rows], float]:
    """Return the mean over samples of what `compare` gives at each of their real positions."""
    def value(original: Rows, changed: Rows, masks: Rows) -> float:
        total, count = 0.0, 0.0
        for i, (before, after) in enumerate(zip(original, changed, strict=True)):
            found = compare(before, after)
            if masks and masks[i].shape == found.shape:
                found = found[masks[i]]
            total, count = total + float(found.double().sum()), count + found.numel()
        return total / max(count, 1.0)
    return value


def _divergence(before: Tensor, after: Tensor) -> Tensor:
    return (before.exp() * (before - after)).nan_to_num(posinf=math.inf).sum(-1)


def _likeness(original: Rows, changed: Rows, masks: Rows) -> float:
    return math.exp(-max(0.0, _per_sample(_divergence)(original, changed, masks)))


def _pairs(original: Rows, changed: Rows, _: Rows) -> float:
    """Return the correlation of the similarities of all pairs, a sample with itself left out."""
    found = []
    for part in (original, changed):
        vectors = nn.functional.normalize(torch.cat(part).double(), dim=1)
        found.append(vectors @ vectors.T)
    upper = torch.triu(torch.ones_like(found[0], dtype=torch.bool), 1) & (found[0] < 1 - 1e-9)
    both = torch.stack([similar[upper] for similar in found])
    if both.shape[1] < 2 or not bool(torch.isfinite(both).all()):
        return math.nan
    return float(torch.corrcoef(both)[0, 1])


def _explained(original: Rows, changed: Rows, masks: Rows) -> float:
    before, after = (torch.cat([t.flatten() for t in part]).double()
                     for part in (original, changed))
    spread = float((before - before.mean()).square().sum())
    missed = float((before - after).square().sum())
    return 1 - missed / spread if spread > 0 else float(missed == 0)


FIDELITIES: Mapping[str, Judge] = {judge.name: judge for judge in [
    Judge("distribution", "exp(-KL) of the changed model's distribution from the original's",
          _logits, _likeness),
    Judge("agreement", "share of answers whose likeliest class is the original's", _plain,
          _per_sample(lambda a, b: (a.argmax(-1) == b.argmax(-1)).double())),
    Judge("pairwise", "correlation of all pairs' cosine similarities with the original's",
          _pooled, _pairs),
    Judge("cosine", "cosine of the features with the original's", _plain,
          _per_sample(lambda a, b: torch.cosine_similarity(a, b, dim=-1))),
    Judge("explained", "share of the original outputs' variance that is kept", _plain,
          _explained),
]}


def _by_metric(metric: Any, higher_is_better: bool | None) -> Judge:
    if isinstance(metric, str):
        checks.one_of(METRICS, metric=metric)
        function, known = METRICS[metric]
        better = known if higher_is_better is None else higher_is_better
    elif callable(metric):
        function = metric
        if higher_is_better is None and not is_mean_over_targets(metric):
            raise ValueError("higher_is_better must be given with a metric of your own; use "
                             "higher_is_better=True where more is better")
        better = True if higher_is_better is None else higher_is_better
    else:
        raise ValueError("metric must be a name or a function of predictions and targets, got "
                         f"{checks.seen(metric)}")
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")

    def of(rows: Rows, targets: Rows) -> float:
        return float(function(torch.cat(rows), torch.cat(targets)))

    def value(original: Rows, changed: Rows, targets: Rows) -> float:
        return _share(of(original, targets), of(changed, targets), better)
    return Judge(name.replace("_", " "), f"{name.replace('_', ' ')}, as a share of the original's",
                 _plain, value, metric=of)


def _share(before: float, after: float, higher_is_better: bool) -> float:
    """Return how good a metric is beside the original's, 1 where it is the same."""
    gain = after - before if higher_is_better else before - after
    if before > 0 and after > 0:
        return after / before if higher_is_better else before / after
    return math.exp(gain / max(abs(before), 1.0))


