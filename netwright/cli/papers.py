"""`netwright papers`: what the literature holds."""

from typing import Annotated, Any

import typer

from netwright.cli import app
from netwright.cli.arguments import Json


@app.command()
def papers(
    words: Annotated[list[str] | None, typer.Argument(
        metavar="[WORDS]...", help="Words that an entry must hold.")] = None,
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    missing: Annotated[bool, typer.Option(help="Only what is not implemented.")] = False,
    as_json: Json = False,
) -> None:
    """Search the catalogue of papers."""
    from netwright.catalogue.papers import FAMILIES, find
    found = find(" ".join(words or []), family=family, missing=missing)
    if as_json:
        import json
        from dataclasses import asdict
        print(json.dumps([{**asdict(entry), "status": entry.status} for entry in found], indent=1))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    if not found:
        print("No paper fits; try fewer words.")
        return
    if len(found) == 1:
        _describe(found[0])
        return
    table = Table("id", "paper", "family", "here", box=None, header_style="bold", pad_edge=False)
    for entry in found:
        table.add_row(entry.id, Text(entry.title), FAMILIES[entry.family],
                      Text(", ".join([*entry.names, *entry.evidence])))
    Console().print(table)
    done = sum(bool(entry.names) for entry in found)
    print(f"{len(found)} papers, {done} implemented.")


def _describe(entry: Any) -> None:
    from rich.console import Console
    from rich.markup import escape

    from netwright.catalogue.papers import FAMILIES
    status = f"left out: {entry.left_out}" if entry.left_out else entry.status
    lines = {"family": FAMILIES[entry.family], "status": status, "does": entry.gist,
             "claims": entry.claim, "experiment": entry.experiment,
             "names": ", ".join(entry.names) or "none yet",
             "evidence": ", ".join(entry.evidence) or "none yet"}
    console = Console()
    console.print(f"[bold]{escape(entry.title)}[/] ({entry.id})", highlight=False)
    for key, value in lines.items():
        console.print(f"[dim]{key}[/] {escape(value)}", highlight=False)
