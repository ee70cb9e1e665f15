"""What an advice leaves behind: for each point a folder with checkpoint, recipe and card."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from netwright.advise.wants import shown
from netwright.catalogue.papers import paper
from netwright.errors import UnknownName
from netwright.runtime.written import write_text

TOKENIZER = ("token*", "vocab*", "merges*", "special_tokens_map.json", "*sentence*.json",
             "modules.json", "preprocessor_config.json")


def give(points: Sequence[Mapping[str, Any]], kept: Path, folder: Path, source: Path | None,
         judge: Mapping[str, Any]) -> None:
    """Put the checkpoints of `points` into folders by their numbers, and away those of before."""
    for old in folder.iterdir():
        if old.name.isdigit() and (old / "recipe.json").is_file():
            shutil.rmtree(old)
    for point in points:
        if point["number"]:
            made = folder / f".{point['number']}.partial"
            shutil.rmtree(made, ignore_errors=True)
            shutil.copytree(kept / point["key"], made, copy_function=_link)
            beside(source, made)
            write_text(made / "recipe.json", json.dumps(point["plain"], indent=1))
            write_text(made / "README.md", card(point, judge))
            os.replace(made, folder / str(point["number"]))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def beside(source: Path | None, folder: Path) -> None:
    """Copy what goes with a model, such as its tokenizer, where the model does not bring it."""
    if source is None or not source.is_dir():
        return
    for pattern in TOKENIZER:
        for path in source.glob(pattern):
            if path.is_file() and not (folder / path.name).exists():
                shutil.copy2(path, folder / path.name)


def card(point: Mapping[str, Any], judge: Mapping[str, Any]) -> str:
    """Return what was done to a model, with its figures, as a page of text."""
    quality = point["quality"]
    lines = [f"# {point['recipe']}", "", "What was done, in order:", ""]
    for number, step in enumerate(point["steps"], 1):
        lines.append(f"{number}. `{step['text']}`: {step['gist']}")
        lines += [f"   - {_title(id)}" for id in step["papers"]]
    lines += ["", f"Quality is the {judge['means']}: {quality['value']:.4f} "
              f"({quality['low']:.4f} to {quality['high']:.4f} in 95 of 100 draws of the samples), "
              "on samples that no choice has seen.", "",
              "| | this model | of the original |", "|---|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {shown(name, value)} | "
              f"{point['shares'].get(name, float('nan')):.3f} |"
              for name, value in point["figures"].items()]
    left = point["untouched"][:8]
    if left:
        lines += ["", "Left as they were: " + ", ".join(
            f"{layer['name']} ({layer['share']:.1%} of the bytes)" for layer in left)
            + (" and others." if len(point["untouched"]) > len(left) else ".")]
    lines += ["", f"It is loaded by `{point['loads']}`. The original is untouched: to undo the "
              "change, use it. `recipe.json` makes the same change again, by "
              "`netwright apply recipe.json MODEL OUT`.", ""]
    return "\n".join(lines)


def _title(id: str) -> str:
    try:
        return f"{paper(id).title} ({id})"
    except UnknownName:  # of a method of the user's own
        return id
