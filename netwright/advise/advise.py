"""The main job: what to change in a network, found within limits and a time, and given away."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from netwright import checks
from netwright.advise import giving
from netwright.advise.advice import FORMAT, Advice
from netwright.advise.candidates import Aside, Option, asked, options
from netwright.advise.figures import once
from netwright.advise.finalists import Finals, best_of, measure_all
from netwright.advise.laboratory import Laboratory, digest
from netwright.advise.material import Material, joined, length, material, rows
from netwright.advise.quality import judge_for
from netwright.advise.question import Question, check_limits
from netwright.advise.search import Search, text_of
from netwright.advise.showing import Show
from netwright.advise.wants import seconds, wanted
from netwright.compare.trials import Ledger, storage_at
from netwright.compare.urls import url_of
from netwright.runtime.files import Busy, alone_in
from netwright.runtime.machine import machine
from netwright.runtime.version import __version__

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

__all__ = ["advise"]

WORK = ".work"  # the folder, in that of the advice, of what is kept between questions
SEARCHING = 0.7  # of the time; the rest measures the finalists
SHARE = 0.02  # of the time that one look at the samples for screening, or for the end, may take
JUDGING = 768  # samples that finalists are judged by, at most
CALIBRATION = 256  # samples that steps look at, at most
ANSWERS = 80  # of the original that the least budget holds


@checks.annotated
def advise(model: nn.Module, data: Any, *, want: Any = (), keep: float = 0.98,
           budget: float | str = "10m", metric: Any = None, higher_is_better: bool | None = None,
           fidelity: str | None = None, also: Any = (), batch: int = 16,
           folder: str | Path = "advice", storage: "str | Path | BaseStorage | None" = None,
           seed: int = 0, source: str | Path | None = None, progress: bool = True) -> Advice:
    """Return which changes make a trained model meet limits, measured, with the changed models.

    What applies to the model is tried within the budget, the cheapest first: every method that
    saves what is wanted, with its defaults, then more settings of those that did well, then
    several of them together, each step on the result of those before. What comes nearest is saved
    into `folder`, loaded again, and measured beside the original on samples that no choice has
    seen. Every try is kept in the folder: a second question about the same model and data, or the
    same one after a kill, goes on from there, and the budget counts what was spent before.

    quality = metric of the changed model / metric of the original, or without a metric the
    fidelity to the original's own outputs, for which no labels are needed: exp(-KL) of logits,
    correlation of pairwise cosine similarities of embeddings, share of variance kept of others.

    Args:
        model: a trained module; it is left as it is.
        data: what the model takes: a tensor, a tuple or a mapping of tensors with a row each
            sample, batches of those (a list, a DataLoader) or a Task. With `metric` each batch is
            a pair of inputs and targets.
        want: limits, as "size=0.5", {"inference_time": "5ms"} or a list of those; shares of the
            original or absolute. Without any the front of quality against size, time and memory.
        keep: the least quality, 1 being the original's.
        budget: the time, in seconds or as "10m".
        metric: the name of a metric or a function of predictions and targets.
        higher_is_better: whether more of `metric` is better.
        fidelity: "distribution", "agreement", "pairwise", "cosine" or "explained"; found where it
            is not given.
        also: recipes that are tried besides.
        batch: samples of the answer whose time and memory count.
        folder: where the advice and the changed models go.
        storage: an Optuna storage that several machines share; a file in the folder by default.
        seed: where everything random starts.
        source: the folder that the model is from, whose tokenizer goes with the changed models.
        progress: whether a terminal shows how far it is.

    Raises:
        UnknownName: a resource, a metric, a fidelity or a recipe is none of those known.
        ValueError: a limit is met already, limits contradict one another, the budget is too short
            for one candidate, the model cannot take the data, or there are too few of them.
        OSError: the folder cannot be written; what was found so far is kept.

    >>> import torch
    >>> from tempfile import mkdtemp
    >>> from netwright.models import gpt
    >>> model, tokens = gpt(96, context=16), torch.randint(96, (64, 16))
    >>> found = advise(model, tokens, want="size=0.9", keep=0.5, budget=4, folder=mkdtemp(),
    ...                progress=False)
    >>> found.met, found.recommended["shares"]["size"] < 0.9
    (True, True)
    """
    begun = time.monotonic()
    wants, allowed = wanted(want), seconds(budget)
    checks.between(0, 1, ends=(False, True), keep=keep,
                   advice="it is a share of the original's quality, such as 0.98")
    checks.count(1, batch=batch)
    if isinstance(storage, (str, Path)):
        url_of(storage)
    extra = asked(also) if also else []
    folder = _writable(folder)
    parts = material(model, data, labels=metric is not None, batch=batch)
    judge = judge_for(model, parts.screening, metric=metric, higher_is_better=higher_is_better,
                      fidelity=fidelity)
    answer = _answer(model, parts, batch, allowed)
    work = folder / WORK
    (work / "steps").mkdir(parents=True, exist_ok=True)
    (work / "finalists").mkdir(exist_ok=True)
    name = f"advise/{digest(model)}/{parts.digest()}/{judge.name}/{batch}/{seed}/{__version__}"
    with storage_at(storage if storage is not None else work / "search.db") as opened:
        ledger, last = (Ledger(opened, part, maximize=True, attributes={})
                        for part in (name, f"{name}/final"))
        looked = _rows(ledger, parts, answer, batch, allowed)
        laboratory = Laboratory(model, parts, judge, folder=work / "steps", batch=batch, seed=seed,
                                screening=looked[0], calibration=looked[2])
        check_limits(wants, keep, laboratory.original)
        question = Question(tuple(wants), keep, laboratory.original)
        found, aside = options(model, parts.inputs[0], wants)
        with Show(question, allowed, on=progress) as show:
            search = Search(laboratory, ledger, found, extra, question, show,
                            seconds=allowed)
            finals = Finals(laboratory, last, work / "finalists", rows=looked[1],
                            turns=int(SHARE * allowed / answer / 2))
            left = max(0.0, allowed - search.spent - finals.spent)
            search.run(begun + SEARCHING * left)
            deadline = begun + max(left, (1 - SEARCHING) * allowed)
            finals.original()
            measured = measure_all(search, finals, question, deadline,
                                   hurried=left == 0)
        return _given(search, finals, measured, found, aside, folder,
                      source=None if source is None else Path(source), budget=allowed,
                      seconds=time.monotonic() - begun, answer=laboratory.x)


def _writable(folder: str | Path) -> Path:
    folder = Path(folder)
    there = next(part for part in [folder, *folder.absolute().parents] if part.exists())
    if not there.is_dir():
        raise ValueError(f"folder must be a folder, got {folder}, where {there} is a file")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"folder {folder} may not be written; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _answer(model: nn.Module, parts: Material, batch: int, allowed: float) -> float:
    """Return the seconds of one answer; raise where the budget is too short for a candidate."""
    x = joined(parts.screening, batch)
    once(model, x)
    spent = min(once(model, x) for _ in range(2))
    least = ANSWERS * spent + 1
    if allowed < least:
        raise ValueError(f"budget must be at least {least:.0f} s to try and to measure one "
                         f"candidate, since one answer takes {spent:.3g} s, got {allowed:g} s; "
                         "give more, or a smaller batch")
    return spent


def _rows(ledger: Ledger, parts: Material, answer: float, batch: int, allowed: float
          ) -> tuple[int, int, int]:
    """Return how many samples screen, judge and calibrate: what was settled before, if anything."""
    known = ledger.storage.get_study_user_attrs(ledger.study).get("rows")
    if known is None:
        most = max(4, int(SHARE * allowed / max(answer, 1e-6))) * batch
        known = [min(rows(parts.screening), most), min(rows(parts.final), most, JUDGING),
                 min(rows(parts.calibration), max(2 * batch, most // 4), CALIBRATION)]
        ledger.storage.set_study_user_attr(ledger.study, "rows", known)
    return known[0], known[1], known[2]


def _given(search: Search, finals: Finals, measured: Sequence[Any], found: Sequence[Option],
           aside: Sequence[Aside], folder: Path, *, source: Path | None, budget: float,
           seconds: float, answer: Any) -> Advice:
    """Put all that was found into an advice, and the changed models into the folder."""
    question, judge = search.question, search.laboratory.judge
    points = [_original(finals), *(point for _, point in measured)]
    best = best_of(points, question)
    _stand(points, question, best)
    met = points[best]["meets"] and (best > 0 or not question.wants)
    content = {
        "format": FORMAT, "netwright": __version__, "machine": machine(),
        "model": _about(search, source), "data": _data(search, finals, answer),
        "quality": {"name": judge.name, "means": judge.means, "labels": judge.metric is not None,
                    "original": finals.original()["value"]},
        "wants": [{"resource": want.resource, "written": str(want), "share": question.limit(want),
                   "absolute": want.absolute(question.original[want.resource])}
                  for want in question.wants],
        "keep": question.keep, "resources": [*question.resources],
        "budget": budget, "seconds": seconds, "spent": search.spent + finals.spent,
        "points": points, "recommended": best, "met": met,
        "verdict": _verdict(points, best, met, question),
        "tried": _tried(search), "methods": [option.plain() for option in found],
        "failed": [one.plain() for one in [*search.failed.values(), *finals.failed.values()]],
        "aside": [entry.plain() for entry in aside]}
    advice = Advice(content, folder)
    try:
        with alone_in(folder):
            giving.give(points, finals.folder, folder, source, content["quality"])
            advice.write(folder)
    except Busy:
        raise ValueError(f"{folder} is being written by another process; ask again when it is "
                         "done, or name another folder") from None
    return advice


def _original(finals: Finals) -> dict[str, Any]:
    held = finals.original()
    return {"recipe": "the original", "plain": {}, "key": "",
            "quality": {"value": 1.0, "low": 1.0, "high": 1.0, "metric": held["value"],
                        "screened": 1.0},
            "figures": held["figures"], "shares": dict.fromkeys(held["figures"], 1.0),
            "time": {"median": 1.0, "low": 1.0, "high": 1.0, "turns": 0}, "loads": "",
            "layers": [], "untouched": [], "plain_dtype": False, "steps": []}


def _stand(points: list[dict[str, Any]], question: Question, best: int) -> None:
    """Number the points and say of each how it stands."""
    on = question.front([(point["quality"]["value"], point["shares"]) for point in points])
    for number, (point, is_on) in enumerate(zip(points, on, strict=True)):
        misses = question.misses(point["quality"]["low"], point["shares"])
        point.update(number=number, misses=misses, meets=not misses,
                     recommended=number == best, dominated=not is_on,
                     slower=number > 0 and point["time"]["low"] > 1,
                     folder=str(number) if number else "")


def _verdict(points: Sequence[dict[str, Any]], best: int, met: bool, question: Question) -> str:
    point = points[best]
    asked_for = ", ".join([*map(str, question.wants), f"keep={question.keep:g}"])
    if met and best == 0:
        return f"Nothing that was tried is better than the original at keep={question.keep:g}."
    if met:
        return f"{best} ({point['recipe']}) meets {asked_for}."
    lacks = " and ".join(
        f"{miss['resource'].replace('_', ' ')} is {miss['is']:.4g} and not {miss['limit']:.4g}"
        for miss in point["misses"])
    left = sorted((layer for layer in point["untouched"] if layer["share"] >= 0.01),
                  key=lambda layer: -layer["share"])[:2]
    stands = "" if not left else "; most of what it leaves as it was is " + " and ".join(
        f"{layer['name'] or 'the network itself'} ({layer['share']:.0%} of the bytes)"
        for layer in left)
    return (f"Nothing met {asked_for}. The nearest is {best} ({point['recipe']}): {lacks}"
            f"{stands}.")


def _about(search: Search, source: Path | None) -> dict[str, Any]:
    model = search.laboratory.model
    return {"class": type(model).__name__, "name": source.resolve().name if source else
            type(model).__name__, "figures": dict(search.laboratory.original),
            "dtypes": search.dtypes}


def _data(search: Search, finals: Finals, answer: Any) -> dict[str, Any]:
    return {"calibration": sum(map(length, search.laboratory.inputs)),
            "screening": rows(search.laboratory.screening),
            "final": rows(finals.part), "batch": length(answer)}


def _tried(search: Search) -> list[dict[str, Any]]:
    """Return what was screened, the nearest to what is asked first."""
    front = {one.key for one in search.front()}
    return [{"recipe": text_of(one.recipe), "steps": [step.name for step in one.recipe.network],
             "quality": one.quality, "shares": dict(one.shares),
             "seconds": one.found["seconds"], "front": one.key in front}
            for one in search.best()]
