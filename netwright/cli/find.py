"""`netwright find` and `netwright list`: which methods there are."""

import json
from inspect import isfunction
from typing import Annotated, Any

import typer

from netwright.cli import app
from netwright.cli.arguments import Json
from netwright.errors import UnknownName


@app.command()
def find(
    words: Annotated[list[str] | None, typer.Argument(
        metavar="[WORDS]...", help="Words that a method's name, sentence or papers hold.")] = None,
    need: Annotated[list[str] | None, typer.Option(
        help="What shall be saved, such as 'inference time'; may be repeated.")] = None,
    place: Annotated[str, typer.Option(help="Where it goes, such as feedforward.")] = "",
    kind: Annotated[str, typer.Option(help="What it is, such as rule.")] = "",
    without: Annotated[list[str] | None, typer.Option(
        help="What must not be needed, such as training; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Find methods by what they save, where they go and what they are."""
    from netwright.catalogue import find as catalogue
    show(catalogue.find(" ".join(words or []), need=need or [], place=place, kind=kind,
                        without=without or []), as_json)


@app.command("list")
def list_all(
    what: Annotated[str, typer.Argument(
        help="A kind, such as rules, reshapes or blocks; or tasks, data, papers.")] = "",
    as_json: Json = False,
) -> None:
    """List the methods of a kind, the tasks, the data sets or the papers."""
    from netwright.catalogue import find as catalogue
    others = {"tasks": _tasks, "data": _data, "papers": _papers}
    if not what:
        _print(_kinds(others), as_json)
    elif what in others:
        _print(others[what](), as_json)
    else:
        try:
            found = catalogue.find(kind=what)
        except UnknownName as error:
            raise UnknownName("list", what, _kinds(others)) from error
        if as_json:
            show(found, as_json)
        else:
            _print(dict(sorted((entry.name, entry.gist) for entry in found)), as_json)


def show(found: Any, as_json: bool) -> None:
    """Print methods as records, or as JSON."""
    rows = found.rows()
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text
    if not rows:
        print("No method fits; ask for less.")
        return
    console = Console(highlight=False)
    for row in rows:
        where = f"{row['kind']}, {row['place']}" if row["place"] else row["kind"]
        console.print(Text(row["name"], "bold"), Text(f"({where})", "dim"))
        console.print(Padding(Text(row["gist"]), (0, 0, 0, 2)))
        said = [f"{what} {', '.join(row[key])}" for what, key in (
            ("saves", "saves"), ("needs", "needs"), ("claim", "measured")) if row[key]]
        if said:
            console.print(Padding(Text("; ".join(said), "dim"), (0, 0, 0, 2)))
    print(f"{len(rows)} methods." if len(rows) > 1 else "1 method.")


def _print(rows: dict[str, str], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    for name, said in rows.items():
        table.add_row(name, Text(said))
    Console().print(table)


def _kinds(others: dict[str, Any]) -> dict[str, str]:
    from netwright.catalogue.facets import KINDS
    plural = {kind: kind if kind in ("generative", "execution", "formal") else f"{kind}s"
              for kind in KINDS}
    return {**{plural[kind]: said for kind, said in KINDS.items()},
            **{name: function.__doc__ for name, function in others.items()}}


def _tasks() -> dict[str, str]:
    """What a network is trained on, to compare changes."""
    from netwright.tasks import TASKS
    return {name: f"{task.epochs} epochs, scored by {task.metric_name}"
            for name, task in TASKS.items()}


def _data() -> dict[str, str]:
    """Data sets that tasks are made of."""
    import netwright as nw
    from netwright.catalogue.facets import gist
    sets = ((name, getattr(nw.data, name)) for name in nw.data.__all__)
    return {name: gist(load) for name, load in sets if isfunction(load)}


def _papers() -> dict[str, str]:
    """What the literature holds."""
    from netwright.catalogue.papers import papers
    return {paper.id: f"{paper.title} ({paper.status})" for paper in papers()}
