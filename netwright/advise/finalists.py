"""The finalists: saved, loaded again, and measured beside the original on data not used before."""

import json
import math
import shutil
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from netwright.advise.candidates import about
from netwright.advise.figures import figures, layers, ratio_interval, times
from netwright.advise.laboratory import Laboratory, TimeUp, limited, loaded
from netwright.advise.material import first_rows
from netwright.advise.quality import interval, original_value, targets_of
from netwright.advise.question import Question
from netwright.advise.search import Failed, Search, Tried, key_of, text_of
from netwright.compare.recipe import Recipe
from netwright.compare.trials import Job, Ledger
from netwright.errors import CorruptCheckpoint, NetwrightError
from netwright.reshape import save
from netwright.runtime.written import plain

LEAST, TURNS = 3, 21  # of the final timing
MOST = 6  # finalists, unless none of them meets what is asked


class Finals:
    """What finalists are measured with; each is measured once, and its checkpoint kept."""

    def __init__(self, laboratory: Laboratory, ledger: Ledger, folder: Path, *, rows: int,
                 turns: int) -> None:
        self.laboratory, self.ledger, self.folder = laboratory, ledger, folder
        self.turns = min(max(turns, LEAST), TURNS)
        self.part = first_rows(laboratory.material.final, rows)
        self.targets = targets_of(laboratory.judge, self.part)
        self.forgiven = ledger.last()
        self.failed: dict[str, Failed] = {}
        self.points: dict[str, dict[str, Any]] = {}
        before = ledger.trials()
        self._measured_before = {key for key, trials in before.items()
                                 if any("point" in trial.user_attrs for trial in trials)}
        self.spent = sum(trial.user_attrs.get("point", {}).get("seconds", 0.0)
                         for trials in before.values() for trial in trials)
        self._reference: Any = None
        self._original: dict[str, Any] = {}

    @property
    def reference(self) -> Any:
        """The original's outputs on the last part of the data."""
        if self._reference is None:
            self._reference = self.laboratory.judge.outputs(self.laboratory.model, self.part)
        return self._reference

    def original(self) -> dict[str, Any]:
        """Return the original as a point beside which the others stand."""
        if not self._original:
            attributes = self.ledger.storage.get_study_user_attrs(self.ledger.study)
            if "original" not in attributes:
                self.ledger.storage.set_study_user_attr(self.ledger.study, "original",
                                                        self._measure_original())
                attributes = self.ledger.storage.get_study_user_attrs(self.ledger.study)
            self._original = dict(attributes["original"])
        return self._original

    def _measure_original(self) -> dict[str, Any]:
        held = dict(self.laboratory.original)
        folder = self.folder / "original"
        save(self.laboratory.model, folder)
        held["size"] = float(_size(folder))
        shutil.rmtree(folder)
        value = original_value(self.laboratory.judge, self.reference, self.targets)
        return {"figures": held, "value": value}

    def known(self, key: str) -> bool:
        """Return whether a finalist was measured before."""
        return key in self._measured_before and (self.folder / key).is_dir()

    def measure(self, tried: Tried, seconds: float) -> dict[str, Any] | None:
        """Return a finalist's point as plain data, None where it failed or time was short."""
        key = tried.key
        standing = self.ledger.standing([key], self.forgiven, self.ledger.trials())[key]
        if standing.done is not None and (self.folder / key).is_dir():
            self.points[key] = standing.done.user_attrs["point"]
            return self.points[key]
        if standing.failed is not None:
            self.failed[key] = Failed(text_of(tried.recipe), standing.failure, 0.0)
            return None
        mine = self.ledger.claim(Job(key if standing.done is None else f"{key} again", {}))
        if mine is None:
            return None
        start = time.perf_counter()
        try:
            with self.ledger.beating(mine), limited(seconds), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                point = self._measured(tried, key)
        except KeyboardInterrupt:
            self.ledger.fail(mine, "")
            raise
        except TimeUp:
            self.laboratory.forget()
            self.ledger.fail(mine, "")
            self.failed[key] = Failed(text_of(tried.recipe), "the time was over before it was "
                                      "measured", time.perf_counter() - start)
            return None
        except OSError as error:
            self.ledger.fail(mine, "")
            raise OSError(f"{self.folder} could not be written: {error}; what was found so far is "
                          "kept, and the same call goes on from it") from error
        except Exception as error:  # whatever it is, it is said with its name
            self.laboratory.forget()
            said = str(error) if isinstance(error, (NetwrightError, ValueError)) else \
                f"{type(error).__name__}: {error}"
            self.ledger.fail(mine, plain(said)[:300], diverged=True)
            self.failed[key] = Failed(text_of(tried.recipe), plain(said)[:300],
                                      time.perf_counter() - start)
            return None
        point["seconds"] = time.perf_counter() - start
        self.spent += point["seconds"]
        self.ledger.complete(mine, point["quality"]["value"], {"point": point})
        self.points[key] = point
        return point

    def _measured(self, tried: Tried, key: str) -> dict[str, Any]:
        lab = self.laboratory
        changed = lab.carry_out(tried.recipe)
        shutil.rmtree(self.folder / key, ignore_errors=True)
        save(changed, self.folder / key)
        before = lab.judge.outputs(changed, self.part[:1])
        lab.forget()
        del changed
        again = loaded(self.folder / key, lab.model)
        outputs = lab.judge.outputs(again, self.part)
        if not before[0].equal(outputs[0]):
            raise CorruptCheckpoint("it is another model once it is saved and loaded")
        quality = interval(lab.judge, self.reference, outputs, self.targets, seed=lab.seed)
        if not math.isfinite(quality.value):
            raise ValueError("its outputs on the data kept for the end are not finite")
        value = original_value(lab.judge, outputs, self.targets) \
            if lab.judge.metric is not None else quality.value
        spent = times([lab.model, again], lab.x, self.turns)
        median, low, high = ratio_interval(spent, seed=lab.seed)
        original = self.original()["figures"]
        held = figures(again, lab.x)
        held["size"] = float(_size(self.folder / key))
        held["inference_time"] = statistics.median(spent[1])
        shares = {name: value / original[name] for name, value in held.items()
                  if original.get(name)}
        shares["inference_time"] = median
        became = layers(lab.model, again)
        return {
            "recipe": text_of(tried.recipe), "plain": tried.recipe.plain(), "key": key,
            "quality": {"value": quality.value, "low": quality.low, "high": quality.high,
                        "metric": value, "screened": tried.quality},
            "figures": held, "shares": shares, "time": {"median": median, "low": low, "high": high,
                                                        "turns": self.turns},
            "loads": _loads(self.folder / key), "layers": became,
            "untouched": [{"name": layer["name"], "bytes": layer["bytes"],
                           "share": layer["share"]} for layer in became
                          if layer["became"] == "untouched"],
            "plain_dtype": bool(tried.found["plain_dtype"]),
            "steps": [{"text": str(step)[:160], "name": step.name, **about(step)}
                      for step in tried.recipe.network]}


def with_steps(point: dict[str, Any], tried: Tried, search: Search) -> dict[str, Any]:
    """Return a point with what was seen after each of its steps, where that was tried."""
    steps = []
    for count, step in enumerate(point["steps"], 1):
        known = search.tried.get(key_of(Recipe(tried.recipe.network[:count])))
        seen = {} if known is None else {"quality": known.quality, "shares": dict(known.shares),
                                         "seconds": known.found["seconds_to_make"]}
        steps.append({**step, "after": seen or None})
    return {**point, "steps": steps}


def chosen(search: Search, question: Question) -> Iterator[Tried]:
    """Yield what is to be measured at the end, what matters most first.

    That is the nearest to what is asked, the plain change of dtype, the best that keeps the
    quality in each resource, then what else comes near.
    """
    ranked = search.best()
    good = [one for one in ranked if one.quality >= question.keep]
    first = [*ranked[:1], *[one for one in ranked if one.found["plain_dtype"]][:1]]
    for name in question.resources:
        first += sorted(good, key=lambda one: (one.shares.get(name, 1.0), one.key))[:1]
    first += [one for one in search.front() if one.quality >= question.keep]
    seen: set[Any] = set()
    for one in [*first, *ranked]:
        alike = one.quality, one.shares.get("size"), one.shares.get("flops")
        if alike not in seen:  # several settings may make the same model
            seen.add(alike)
            yield one


def measure_all(search: Search, finals: Finals, question: Question, deadline: float, *,
                hurried: bool) -> list[tuple[Tried, dict[str, Any]]]:
    """Measure finalists until there are enough and the best is sure, or the time is over.

    What was measured for another question is there at once. With `hurried`, where the budget was
    spent by questions before, the first that meets the limits is enough.
    """
    found: list[tuple[Tried, dict[str, Any]]] = []
    longest = 0.0
    for one in chosen(search, question):
        left = deadline - time.monotonic()
        if len(found) >= 2 * MOST:
            break
        if not finals.known(one.key) and (left <= 0 or (found and left < longest)
                                          or _enough(found, question, hurried)):
            continue
        search.show.trying(f"measure {text_of(one.recipe)}", search.best(), deadline)
        start = time.monotonic()
        point = finals.measure(one, left)
        longest = max(longest, time.monotonic() - start)
        if point is not None:
            found.append((one, with_steps(point, one, search)))
    return found


def _enough(found: Sequence[tuple[Tried, dict[str, Any]]], question: Question, hurried: bool
            ) -> bool:
    met = any(not question.misses(point["quality"]["low"], point["shares"])
              for _, point in found)
    return met and (hurried or len(found) >= MOST)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _loads(folder: Path) -> str:
    """Return what loads a saved model."""
    config = folder / "config.json"
    if not config.is_file():
        return "netwright.load with network="
    said = json.loads(config.read_text(encoding="utf-8"))
    return "netwright.load" if "netwright" in said else "from_pretrained"


def best_of(points: Sequence[dict[str, Any]], question: Question) -> int:
    """Return the place of the point that comes nearest to what is asked, by its interval."""
    return min(range(len(points)), key=lambda i: question.order(
        points[i]["quality"]["low"], points[i]["shares"]))
