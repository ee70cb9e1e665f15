"""What was measured of a method: its evidence, and what it costs. All is read once a build."""

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from handbook.pages import ROOT, Page, cell, link, pages, said
from netwright import evidence, papers
from netwright.catalogue.facets import Method
from netwright.compare.results import Comparison, Row

EVIDENCE = "measured/evidence.md"
COMPARISON = "measured/comparison.md"
BENCHMARKS = "measured/benchmarks.md"


@cache
def results() -> Mapping[str, Mapping[str, Any]]:
    """Return the results of the evidence by name."""
    return evidence.recorded()


@cache
def ages() -> Mapping[str, str]:
    """Return for each result whether it is of the code that there is now."""
    return evidence.ages()


@cache
def comparison() -> Comparison:
    """Return the recorded comparison of the rules."""
    return Comparison.load(ROOT / "docs/comparison.json")


@cache
def rows() -> Mapping[tuple[str, str], Row]:
    """Return the comparison's rows that have figures, by task and rule."""
    return {(row.task, row.change): row for row in comparison().rows if row.scores}


@cache
def homes() -> Mapping[str, str]:
    """Return the page that shows each result in full.

    That is the page of a file which implements the paper: the file that has the result's name, else
    one with a text of its own. A result of none of them stands on the page of all evidence.
    """
    found = {}
    for name, result in results().items():
        showing = [page for page in pages() if result["paper"] in _papers(page)]
        showing.sort(key=lambda page: (page.module.rpartition(".")[2] != name, not page.text))
        found[name] = showing[0].uri if showing else EVIDENCE
    return found


def _papers(page: Page) -> set[str]:
    return {paper for entry in page.methods.values() for paper in entry.facets.papers}


def evidence_of(papers_shown: Iterable[str]) -> list[str]:
    """Return the names of the results that are about one of these papers."""
    wanted = set(papers_shown)
    return [name for name, result in results().items() if result["paper"] in wanted]


def verdict(entry: Method) -> str:
    """Return the verdicts on a method's papers, in words for a table."""
    found = [results()[name]["verdict"] for name in evidence_of(entry.facets.papers)]
    return ", ".join(sorted(set(found), key=ORDER.index)) or "–"


ORDER = ("shown", "partly shown", "not shown", "–")


def evidence_section(page: Page) -> list[str]:
    """Return what was measured of the papers of a page: in full here, or where it stands."""
    names = evidence_of(_papers(page))
    if not names:
        return []
    parts = ["## Evidence", ""]
    for name in names:
        if homes()[name] == page.uri:
            parts += shown_in_full(name, page.uri)
        else:
            parts += [f"`{name}`: {results()[name]['claim']} **{_capital(verdict_of(name))}** "
                      f"([what was run]({link(page.uri, homes()[name])}#evidence-{name})).", ""]
    return parts


def shown_in_full(name: str, uri: str) -> list[str]:
    """Return the section about a result: claim, verdict, picture, figures and setting."""
    result = results()[name]
    machine = result["machine"]
    parts = [f"### {_capital(name.replace('_', ' '))} {{ #evidence-{name} }}", "",
             f"**Claim.** {result['claim']}", "",
             f"**Verdict: {verdict_of(name)}.** {result['note']}", "",
             *_claims(result.get("claims", [])), *_shortfall(name),
             f"![What was measured for {name}]({link(uri, f'pictures/{name}.svg')})", "",
             "??? abstract \"Every figure, and how it was measured\"", "",
             "    | measured | mean | deviation | seeds |", "    |---|---:|---:|---:|"]
    parts += [f"    | {cell(figure)} | {number(spread['mean'], 4)} | "
              f"{number(spread['deviation'], 2) if spread['seeds'] > 1 else '–'} | "
              f"{spread['seeds']} |" for figure, spread in result["summary"].items()]
    parts += ["", *(f"    - {key}: {in_words(value)}" for key, value in result["setting"].items()),
              f"    - run: scale {result['scale']}, {result['seconds']:.0f} s on "
              f"{machine['device']} (cores: {machine['cores']}, threads: {machine['threads']}), "
              f"PyTorch {machine['torch']}, {result['date']}",
              f"    - code: {_code(name)}",
              f"    - again: `netwright evidence run {name}`", ""]
    return parts


def _claims(claims: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return what was asked of the figures before the run, and what came of it."""
    lines = [f"- {'holds' if claim['holds'] else 'does not hold'}: {claim['claim']}"
             for claim in claims]
    return ["Asked before the run:", "", *lines, ""] if lines else []


WHY = {"scale": "What a desk is too small for", "claim": "Tried, and not found",
       "open": "Not yet explained"}


def _shortfall(name: str) -> list[str]:
    """Return why a result does not show all of its claim, and what was tried."""
    found = evidence.experiments()[name].shortfall
    if found is None or verdict_of(name) == "shown":
        return []
    return [f"**{WHY[found[0]]}.** {found[1]}", ""]


def _code(name: str) -> str:
    """Return which code gave a result, and whether that is the code that there is now."""
    if "fingerprint" not in results()[name]:
        return "not known"
    result = results()[name]
    return f"version {result['version']}, fingerprint {result['fingerprint']}, {ages()[name]}"


def verdict_of(name: str) -> str:
    """Return the verdict of a result."""
    return results()[name]["verdict"]


def cost_section(page: Page) -> list[str]:
    """Return a rule's figures beside backprop's, and how its memory grows with depth."""
    names = [entry.name.rpartition(".")[2] for entry in page.main if entry.facets.kind == "rule"]
    parts = []
    for name in names:
        tasks = [task for task, change in rows() if change == name]
        if tasks:
            parts += ["## Measured beside Backprop", "", *_cost(name, tasks), "",
                      f"![{name} and Backprop by epoch]"
                      f"({link(page.uri, f'pictures/digits_{name}.svg')})", ""]
    return [part.replace(COMPARISON, link(page.uri, COMPARISON)) for part in parts]


def _cost(name: str, tasks: list[str]) -> list[str]:
    parts = ["| measured on | accuracy % | Backprop's % | step time | peak memory | saved for "
             "backward | parameters | FLOPs a step |", "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for task in tasks:
        row, base = rows()[task, name], rows()[task, "Backprop"]
        parts.append(f"| {task} | {percent(row)} | {percent(base)} | {multiples(row, base)} |")
    depth = json.loads((ROOT / "benchmarks/results/memory.json").read_text("utf-8"))
    shallow, deep = depth["stages"]
    grows = {rule: depth["rules"][rule]["working_ratio"] for rule in (name, "Backprop")
             if rule in depth["rules"]}
    parts += ["", "Costs are multiples of Backprop's on the same network ([the whole comparison]"
              f"({COMPARISON}))."]
    if name in grows:
        parts.append(f"On an MLP of {deep} stages a step's working memory is {grows[name]:.2f} "
                     f"times that on {shallow} (Backprop: {grows['Backprop']:.2f}).")
    return parts


def by_epoch() -> dict[str, dict[str, Any]]:
    """Return each rule's accuracy by epoch beside backprop's, as what a picture is drawn from."""
    lines = {(task, change): {
        "x": [epoch for epoch, *_ in row.curves[0]],
        "y": [[100 * metric for *_, metric in seed] for seed in row.curves]}
        for (task, change), row in rows().items() if row.curves}
    return {rule: {"axes": ["epoch", "test accuracy (%)"], "curves": {
        f"{task}: {change}": line for (task, change), line in lines.items()
        if change in (rule, "Backprop")}} for rule in {change for _, change in lines}}


def whole_comparison() -> str:
    """Return a table of every rule's figures, as multiples of backprop's where they are costs."""
    shared = comparison().settings
    parts = [f"{shared['trials']} tuning trials and {len(shared['seeds'])} seeds for each; costs "
             "are multiples of backprop's on the same network.", ""]
    for task in dict.fromkeys(row.task for row in comparison().rows):
        there = [row for row in comparison().rows if row.task == task]
        base = next(row for row in there if row.change == "Backprop")
        parts += [f"**{task}**", "", "| rule | accuracy % | step time | peak memory | "
                  "saved for backward | parameters | FLOPs a step |",
                  "|---|---:|---:|---:|---:|---:|---:|"]
        parts += [f"| `{row.change}` | {percent(row)} | {multiples(row, base)} |" for row in there
                  if row.scores]
        parts += ["", *(f"`{row.change}` does not run here: {cell(row.failure)}.\n"
                        for row in there if not row.scores)]
    return "\n".join(parts)


def percent(row: Row) -> str:
    """Return the score with its spread over the seeds."""
    return f"{100 * row.mean:.1f} ± {100 * row.spread:.1f}"


def multiples(row: Row, base: Row) -> str:
    """Return the costs of a row over those of another, as cells."""
    return " | ".join(f"{getattr(row, name) / getattr(base, name):.2f}" for name in
                      ("step_time", "peak_bytes", "saved_bytes", "parameters", "flops"))


def evidence_page() -> str:
    """Return the page that lists every claim beside its verdict."""
    counts = {verdict: sum(result["verdict"] == verdict for result in results().values())
              for verdict in ORDER[:-1]}
    old = sum(age == "older than its code" for age in ages().values())
    parts = ["---", "hide: [toc]", "---", "", "# Evidence", "",
             "Each line is one experiment: the claim of a paper, what a run here said to it, and "
             f"the page that shows how. Of {len(results())} claims "
             f"{counts['shown']} showed in full at this scale, {counts['partly shown']} in part, "
             f"and {counts['not shown']} did not. `netwright evidence run NAME` runs one again. "
             f"{old} results are older than the code that they are about.",
             "", '<div class="filter" data-columns="verdict"></div>', "",
             "| experiment | claim | paper | verdict | run | code |",
             "|---|---|---|---|---|---|"]
    parts += [f"| [`{name}`]({link(EVIDENCE, homes()[name])}#evidence-{name}) | "
              f"{cell(result['claim'])} | {cell(papers.paper(result['paper']).title)} | "
              f"{verdict_of(name)} | {result['date']} | {ages()[name]} |"
              for name, result in results().items()]
    parts.append("")
    for name in results():
        if homes()[name] == EVIDENCE:
            parts += shown_in_full(name, EVIDENCE)
    return "\n".join(parts) + "\n"


def number(value: float, digits: int) -> str:
    """Return a number with so many significant digits, whole where it is large."""
    return f"{value:,.0f}" if abs(value) >= 10 ** digits else f"{value:.{digits}g}"


def in_words(value: Any) -> str:
    """Return a setting in words, without brackets and quotes."""
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {in_words(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(in_words, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value, 4) if isinstance(value, (int, float)) else str(value)


@cache
def benchmarks() -> Mapping[str, Mapping[str, Any]]:
    """Return what the benchmarks recorded, by name."""
    return {path.stem: json.loads(path.read_text("utf-8"))
            for path in sorted((ROOT / "benchmarks/results").glob("*.json"))}


def benchmarks_of(page: Page) -> list[str]:
    """Return a line with the benchmarks in whose figures a name of the page is measured.

    A name that is a plain word may mean something else there.
    """
    names = {name for entry in page.main if not (name := entry.name.rpartition(".")[2]).islower()
             or "_" in name}
    found = [f"[{said(name)}]({link(page.uri, BENCHMARKS)}#{name.replace('_', '-')})"
             for name in benchmarks() if names & _words(name)]
    return [f"**Benchmarks:** {', '.join(found)}.", ""] if found else []


@cache
def _words(benchmark: str) -> frozenset[str]:
    def keys(found: Any) -> Iterable[str]:
        if isinstance(found, Mapping):
            for key, part in found.items():
                yield key
                yield from keys(part)
    return frozenset(word for key in keys(benchmarks()[benchmark])
                     for word in re.findall(r"\w+", key))


def benchmarks_page() -> str:
    """Return the page of every recorded benchmark, each with the script that runs it again."""
    parts = ["# Benchmarks", "",
             "What the scripts in `benchmarks/` measured, beside plain PyTorch and the published "
             "packages of others. Times are ratios within one run, which tell more than seconds: "
             "machines and their other users differ.", ""]
    for name, found in benchmarks().items():
        script = next(script for stem in (name, f"test_{name}")
                      if (script := ROOT / f"benchmarks/{stem}.py").exists())
        what = script.read_text("utf-8").partition('"""')[2].partition("\n")[0].removesuffix('"""')
        machine = found.get("machine", {})
        parts += [f"## {said(name)} {{ #{name.replace('_', '-')} }}", "", what, "",
                  f"`python benchmarks/{script.name}`; {in_words(machine)}.", "",
                  "??? abstract \"Figures\"", "",
                  *(f"    {line}" if line else "" for line in _figures(
                      {key: part for key, part in found.items() if key != "machine"})), ""]
    return "\n".join(parts) + "\n"


def _figures(found: Any, heading: str = "") -> list[str]:
    """Return nested figures as tables: a dict of dicts of numbers is one."""
    if not isinstance(found, Mapping):
        return [f"- {cell(heading)}: {cell(in_words(found))}"]
    if all(isinstance(row, Mapping) and _flat(row) for row in found.values()) and found:
        columns = list(dict.fromkeys(column for row in found.values() for column in row))
        return ["", f"**{cell(heading)}**" if heading else "", "",
                "| | " + " | ".join(map(cell, columns)) + " |", "|---" * (len(columns) + 1) + "|",
                *(f"| {cell(name)} | " + " | ".join(
                    cell(in_words(row[column])) if column in row else "–" for column in columns)
                  + " |" for name, row in found.items()), ""]
    return [line for key, part in found.items()
            for line in _figures(part, f"{heading}, {key}" if heading else key)]


def _flat(row: Mapping[str, Any]) -> bool:
    return not any(isinstance(part, Mapping) for part in row.values())


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
