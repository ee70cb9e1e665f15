"""Makes the pages and pictures that come from the catalogue and the measured evidence."""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from netwright import evidence, papers
from netwright.compare.results import Comparison, Row

HERE = Path(__file__).parent
MARK = "<!-- measured comparison -->"
MAP = "<!-- measured map -->"
ROW = re.compile(r"^\| \[`(\w+)`\]")
COST = re.compile(r"<!-- measured cost of (\w+) -->")
PICTURE = re.compile(r"^!\[[^]]*\]\(\.\./pictures/(\w+)\.svg\)$", re.MULTILINE)

sys.path.insert(0, str(HERE))
import _map  # noqa: E402 - these stand beside this file, which is no package
import _ranking  # noqa: E402
from _pictures import draw  # noqa: E402


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    results = evidence.recorded()
    pages = {"evidence.md": _evidence(results), "papers.md": _papers(),
             "blocks/ranking.md": _ranking.page()}
    pages |= {f"pictures/{name}.svg": draw(result) for name, result in results.items()}
    found = Comparison.load(HERE / "comparison.json")
    pages |= {f"pictures/digits_{rule}.svg": draw(curves) for rule, curves
              in _by_epoch(found).items()}
    pages |= {"pictures/map_of_signals.svg": _map.schemes(),
              "pictures/map_of_costs.svg": _map.measured(found)}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what was measured where a page asks for it, and the verdict below each picture."""
    found = Comparison.load(HERE / "comparison.json")
    if MAP in markdown:
        markdown = _mapped(markdown, found)
    if MARK in markdown:
        markdown = markdown.replace(MARK, _comparison(found))
    markdown = COST.sub(lambda asked: _cost(asked[1], found), markdown)
    return PICTURE.sub(lambda shown: f"{shown[0]}\n\n{_verdict(shown[1])}", markdown)


def _mapped(markdown: str, found: Comparison) -> str:
    """Return the page with columns of what was measured in the table below the mark."""
    before, _, after = markdown.partition(MAP)
    lines, tasks = after.splitlines(), list(_map.TASKS)
    rows = {(row.task, row.change): row for row in found.rows if row.scores}
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    for i in range(start, len(lines)):
        if not lines[i].startswith("|"):
            break
        rule = ROW.match(lines[i])
        if i == start:
            more = "accuracy % | step time | peak memory |"
        elif i == start + 1:
            more = "---:|---:|---:|"
        elif rule is None or not any((task, rule[1]) in rows for task in tasks):
            more = "– | – | – |"
        else:
            there = [(rows[task, rule[1]], rows[task, "Backprop"])
                     for task in tasks if (task, rule[1]) in rows]
            columns = ([f"{100 * row.mean:.1f}" for row, _ in there],
                       [f"{row.step_time / base.step_time:.1f}" for row, base in there],
                       [f"{row.peak_bytes / base.peak_bytes:.1f}" for row, base in there])
            more = " | ".join(", ".join(column) for column in columns) + " |"
        lines[i] += f" {more}"
    return before + "\n".join(lines)


def _cost(rule: str, found: Comparison) -> str:
    """Return a rule's figures beside backprop's, and how its memory grows with depth."""
    rows = {(row.task, row.change): row for row in found.rows}
    if not any(change == rule for _, change in rows):
        raise PluginError(f"docs/comparison.json has no run of {rule}: record it as "
                          "CONTRIBUTING.md says, or take the line that asks for it out of its page")
    parts = ["| measured on | accuracy % | Backprop's % | step time | peak memory | saved for "
             "backward | parameters | FLOPs a step |", "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for task in dict.fromkeys(row.task for row in found.rows if row.change == rule and row.scores):
        row, base = rows[task, rule], rows[task, "Backprop"]
        parts.append(f"| {task} | {_percent(row)} | {_percent(base)} | "
                     f"{_multiples(row, base)} |")
    depth = json.loads((HERE.parent / "benchmarks/results/memory.json").read_text("utf-8"))
    shallow, deep = depth["stages"]
    grows = {name: depth["rules"][name]["working_ratio"] for name in (rule, "Backprop")}
    return "\n".join([
        *parts, "", "Costs are multiples of Backprop's on the same network "
        "([the whole comparison](index.md#what-they-cost-and-how-well-they-do)). On an MLP of "
        f"{deep} stages a step's working memory is {grows[rule]:.2f} times that on {shallow} "
        f"(Backprop: {grows['Backprop']:.2f})."])


def _by_epoch(found: Comparison) -> dict[str, dict[str, Any]]:
    """Return each rule's accuracy by epoch beside backprop's, as what a picture is drawn from."""
    lines = {(row.task, row.change): {
        "x": [epoch for epoch, *_ in row.curves[0]],
        "y": [[100 * metric for *_, metric in seed] for seed in row.curves]}
        for row in found.rows if row.curves}
    return {rule: {"axes": ["epoch", "test accuracy (%)"], "curves": {
        f"{task}: {change}": line for (task, change), line in lines.items()
        if change in (rule, "Backprop")}} for rule in {change for _, change in lines}}


def _verdict(name: str) -> str:
    """Return what is claimed and what was found, to stand below a picture."""
    result = evidence.recorded().get(name)
    if result is None:
        return ""  # a picture of the comparison, or one that MkDocs says is missing
    return (f"*Claim:* {result['claim']} *Verdict:* **{result['verdict']}**. "
            f"[What was run, and every figure](../evidence.md#{name}).")


def _percent(row: Row) -> str:
    return f"{100 * row.mean:.1f} ± {100 * row.spread:.1f}"


def _multiples(row: Row, base: Row) -> str:
    return " | ".join(f"{getattr(row, name) / getattr(base, name):.2f}" for name in
                      ("step_time", "peak_bytes", "saved_bytes", "parameters", "flops"))


def _comparison(found: Comparison) -> str:
    """Return a table of every rule's figures, as multiples of backprop's where they are costs."""
    shared = found.settings
    parts = [f"`netwright compare --all-rules`: {shared['trials']} tuning trials and "
             f"{len(shared['seeds'])} seeds for each; costs are multiples of backprop's on "
             "the same network.", ""]
    for task in dict.fromkeys(row.task for row in found.rows):
        rows = [row for row in found.rows if row.task == task]
        base = next(row for row in rows if row.change == "Backprop")
        parts += [f"**{task}**", "", "| rule | accuracy % | step time | peak memory | "
                  "saved for backward | parameters | FLOPs a step |",
                  "|---|---:|---:|---:|---:|---:|---:|"]
        parts += [f"| `{row.change}` | {_percent(row)} | {_multiples(row, base)} |" for row in rows
                  if row.scores]
        parts += ["", *(f"`{row.change}` does not run here: {_cell(row.failure)}.\n" for row in rows
                        if not row.scores)]
    return "\n".join([*parts, "The rules that `netwright compare` takes by default, in a picture:",
                      "", "![accuracy against memory and time](../comparison.svg)"])


def _evidence(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page that shows each claim beside what was measured."""
    shown = sum(result["verdict"] == "shown" for result in results.values())
    parts = ["# Evidence", "",
             "Each section is one experiment: what a paper claims, what a run here measured, and "
             f"how. Of {len(results)} claims, {shown} showed in full at this scale. "
             "`netwright evidence run NAME` runs one again.", "",
             "| experiment | paper | verdict |", "|---|---|---|"]
    parts += [f"| [{name}](#{name.replace(' ', '-')}) | {papers.paper(result['paper']).title} | "
              f"{result['verdict']} |" for name, result in results.items()]
    for name, result in results.items():
        machine = result["machine"]
        parts += ["", f"## {name}", "",
                  f"*{papers.paper(result['paper']).title}* ({result['paper']})", "",
                  f"**Claim.** {result['claim']}", "", f"**Verdict: {result['verdict']}.**", "",
                  result["note"], "", "| measured | mean | deviation | seeds |",
                  "|---|---:|---:|---:|"]
        parts += [f"| {figure} | {_number(spread['mean'], 4)} | "
                  f"{_number(spread['deviation'], 2) if spread['seeds'] > 1 else '–'} | "
                  f"{spread['seeds']} |" for figure, spread in result["summary"].items()]
        parts += ["", f"![what was measured for {name}](pictures/{name}.svg)", "",
                  "**Setting.**", "", *(f"- {key}: {_said(value)}" for key, value
                                        in result["setting"].items()),
                  f"- run: scale {result['scale']}, {result['seconds']:.0f} s on "
                  f"{machine['device']} (cores: {machine['cores']}, threads: "
                  f"{machine['threads']}), PyTorch {machine['torch']}, {result['date']}"]
    return "\n".join(parts) + "\n"


def _number(value: float, digits: int) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 ** digits else f"{value:.{digits}g}"


def _said(value: Any) -> str:
    """Return a setting in words, without brackets and quotes."""
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {_said(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_said, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _number(value, 4) if isinstance(value, (int, float)) else str(value)


def _papers() -> str:
    """Return the page of the whole catalogue, by family."""
    entries = papers.papers()
    done = [entry for entry in entries if entry.names]
    parts = ["# Papers", "", f"{len(entries)} papers, of which {len(done)} are implemented. "
             "`netwright papers WORDS` searches them.", ""]
    parts += ["## Implemented here", "", "| id | paper | claim | here |", "|---|---|---|---|"]
    parts += [f"| `{entry.id}` | {_cell(entry.title)} | {_cell(entry.claim)} | {_here(entry)} |"
              for entry in done]
    for family, whole in sorted(papers.FAMILIES.items(), key=lambda item: item[1]):
        parts += ["", f"## {whole[0].upper()}{whole[1:]} ({family})", "",
                  "| id | paper | what it does |", "|---|---|---|"]
        parts += [f"| `{entry.id}` | {_cell(entry.title)} | {_cell(entry.gist)} |"
                  for entry in entries if entry.family == family]
    return "\n".join(parts) + "\n"


def _here(entry: papers.Paper) -> str:
    names = [f"`{name}`" for name in entry.names]
    return ", ".join(names + [f"[measured](evidence.md#{name})" for name in entry.evidence])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
