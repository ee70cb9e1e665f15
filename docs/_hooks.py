"""Makes the pages and pictures that come from the catalogue and the measured evidence."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from netwright import evidence, papers
from netwright.results import Comparison

HERE = Path(__file__).parent
MARK = "<!-- measured comparison -->"

sys.path.insert(0, str(HERE))
from _pictures import draw  # noqa: E402 - it stands beside this file, which is no package


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    results = evidence.recorded()
    pages = {"evidence.md": _evidence(results), "papers.md": _papers()}
    pages |= {f"pictures/{name}.svg": draw(result) for name, result in results.items()}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the recorded comparison where a page asks for it."""
    if MARK not in markdown:
        return markdown
    return markdown.replace(MARK, _comparison(Comparison.load(HERE / "comparison.json")))


def _comparison(found: Comparison) -> str:
    """Return a table of every rule's figures, as multiples of backprop's where they are costs."""
    shared = found.settings
    parts = [f"`netwright compare` with its defaults: {shared['trials']} tuning trials and "
             f"{len(shared['seeds'])} seeds for each; costs are multiples of backprop's on the same "
             "network.", ""]
    for task in dict.fromkeys(row.task for row in found.rows):
        rows = [row for row in found.rows if row.task == task]
        base = next(row for row in rows if row.change == "Backprop")
        parts += [f"**{task}**", "", "| rule | accuracy % | step time | peak memory | "
                  "saved for backward | parameters | FLOPs a step |",
                  "|---|---:|---:|---:|---:|---:|---:|"]
        parts += [f"| `{row.change}` | {100 * row.mean:.1f} ± {100 * row.spread:.1f} | "
                  + " | ".join(f"{getattr(row, name) / getattr(base, name):.2f}" for name in
                               ("step_time", "peak_bytes", "saved_bytes", "parameters", "flops"))
                  + " |" for row in rows]
        parts.append("")
    return "\n".join([*parts, "![accuracy against memory and time](../comparison.svg)"])


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
                  f"**Claim.** {result['claim']}", "", f"**Verdict: {result['verdict']}.** "
                  f"{result['note']}", "", "| measured | mean | deviation | seeds |",
                  "|---|---:|---:|---:|"]
        parts += [f"| {figure} | {spread['mean']:.4g} | {spread['deviation']:.2g} | "
                  f"{spread['seeds']} |" for figure, spread in result["summary"].items()]
        parts += ["", f"![what was measured for {name}](pictures/{name}.svg)", "",
                  "**Setting.** " + "; ".join(f"{key}: {value}" for key, value
                                              in result["setting"].items())
                  + f". Scale {result['scale']}, {result['seconds']} s on {machine['device']} "
                  f"({machine['cores']} cores, {machine['threads']} threads), "
                  f"PyTorch {machine['torch']}, {result['date']}."]
    return "\n".join(parts) + "\n"


def _papers() -> str:
    """Return the page of the whole catalogue, by family."""
    entries = papers.papers()
    done = [entry for entry in entries if entry.names]
    parts = ["# Papers", "", f"{len(entries)} papers, of which {len(done)} are implemented. "
             "`netwright papers WORDS` searches them.", ""]
    for family, whole in sorted(papers.FAMILIES.items(), key=lambda item: item[1]):
        members = [entry for entry in entries if entry.family == family]
        parts += [f"## {whole.capitalize()} ({family})", "", "| id | paper | what it does | here |",
                  "|---|---|---|---|"]
        parts += [f"| {entry.id} | {_cell(entry.title)} | {_cell(entry.gist)} | {_here(entry)} |"
                  for entry in members]
        parts.append("")
    return "\n".join(parts)


def _here(entry: papers.Paper) -> str:
    names = [f"`{name}`" for name in entry.names]
    return ", ".join(names + [f"[{name}](evidence.md#{name})" for name in entry.evidence])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
