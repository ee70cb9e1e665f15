"""The catalogue: what the literature holds, and what of it netwright has."""

import importlib
import json
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from netwright import checks
from netwright.catalogue.facets import methods
from netwright.catalogue.measurements import measurements
from netwright.errors import UnknownName

__all__ = ["FAMILIES", "Paper", "find", "paper", "papers", "resolve"]

FAMILIES = {
    "cl": "continual learning", "conv": "convolution and vision", "dynamic": "dynamic networks",
    "equi": "equivariance", "fed": "federated learning", "ffn": "feed-forward blocks",
    "gen": "generative models", "gnn": "graph networks", "interp": "interpretation",
    "lang": "language models", "moe": "experts", "nas": "architecture search",
    "opt": "optimisation", "other": "kin from other fields", "peft": "fine-tuning few parameters",
    "pfn": "prior-fitted networks", "prune": "pruning and sparsity", "quant": "few bits",
    "rec": "recommendation", "rev": "reversible networks", "rl": "reinforcement learning",
    "rule": "learning rules", "sci": "networks for science", "seq": "sequences",
    "signal": "signals and communication", "ssl": "self-supervision and distillation",
    "sys": "systems", "theory": "theory", "trust": "privacy and robustness",
    "weights": "weight spaces and merging",
}


@dataclass(frozen=True)
class Paper:
    """One paper: what it does, what it claims, and where netwright has it.

    `experiment` is the small run that would show the claim. `names` are the netwright names that
    implement it, as in `rules.MonoForward`, and `evidence` the experiments that were run: both
    follow from what methods and experiments say themselves. `left_out` says why netwright shall
    not have it, where that was decided.
    """

    id: str
    title: str
    family: str
    gist: str
    claim: str
    experiment: str
    left_out: str = ""
    names: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """Return "works" with a method and evidence, "left out" with a reason, else "open"."""
        if self.left_out:
            return "left out"
        return "works" if self.names and self.evidence else "open"

    def implementations(self) -> list[Any]:
        """Return what the names stand for, importing it."""
        return [resolve(name) for name in self.names]


@cache
def papers() -> tuple[Paper, ...]:
    """Return the whole catalogue, in the order of the ids; finding the names imports all methods.

    >>> len(papers())
    635
    """
    names = defaultdict(list)
    for method in methods().values():
        for id in method.facets.papers:
            names[id].append(method.name)
    entries = (json.loads(line) for line in _text("catalogue.jsonl").splitlines())
    found = (Paper(**entry, names=tuple(names[entry["id"]]), evidence=tuple(verdicts(entry["id"])))
             for entry in entries)
    return tuple(sorted(found, key=lambda paper: paper.id))


def verdicts(id: str) -> dict[str, str]:
    """Return what came of the experiments on a paper's claims, by the experiments' names.

    >>> verdicts("001-164")
    {'dual_propagation': 'shown'}
    """
    return {name: said["verdict"] for name, said in measurements().items() if said["paper"] == id}


def _text(file: str) -> str:
    return (Path(__file__).parent / file).read_text(encoding="utf-8")


@checks.annotated
def paper(id: str) -> Paper:
    """Return the paper with this id.

    Raises:
        UnknownName: the catalogue has no such id; the nearest are named.

    >>> paper("003-024").family
    'rule'
    """
    by_id = {entry.id: entry for entry in papers()}
    if id not in by_id:
        raise UnknownName("paper", id, by_id)
    return by_id[id]


@checks.annotated
def find(words: str = "", *, family: str | None = None, missing: bool = False) -> list[Paper]:
    """Return the papers whose entry holds every one of `words`, in upper or lower case.

    `family` keeps one family, by its short name or its whole one; `missing` keeps what netwright
    does not implement yet.

    Raises:
        UnknownName: no family is called that.

    >>> [entry.title for entry in find("forward-forward preliminary")]
    ['The Forward-Forward Algorithm: Some Preliminary Investigations']
    """
    if family is not None and family not in FAMILIES:
        short = {whole: name for name, whole in FAMILIES.items()}
        if family.lower() not in short:
            raise UnknownName("family", family, [*FAMILIES, *short])
        family = short[family.lower()]
    wanted = words.lower().split()

    def fits(entry: Paper) -> bool:
        text = " ".join([entry.id, entry.title, entry.gist, entry.claim, *entry.names,
                         FAMILIES[entry.family]]).lower()
        return (all(word in text for word in wanted)
                and (family is None or entry.family == family)
                and not (missing and entry.names))

    return [entry for entry in papers() if fits(entry)]


@checks.annotated
def resolve(name: str) -> Any:
    """Return what a name of the catalogue stands for, as `rules.MonoForward`; "" for netwright.

    >>> resolve("rules.Backprop").__name__
    'Backprop'
    """
    found: Any = importlib.import_module("netwright")
    for part in name.split(".") if name else ():
        found = getattr(found, part)
    return found
