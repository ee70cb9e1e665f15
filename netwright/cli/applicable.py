"""`netwright applicable`: what can be done to a network."""

import json
from typing import Annotated

import typer

from netwright.cli import app
from netwright.cli.arguments import Json, Network, Shape, Text, named_network
from netwright.runtime.written import plain


@app.command()
def applicable(
    network: Network,
    shape: Shape = None,
    text: Text = None,
    need: Annotated[list[str] | None, typer.Option(
        help="What shall be saved, such as 'inference time'; may be repeated.")] = None,
    kind: Annotated[str, typer.Option(help="Only this kind of change, such as reshape.")] = "",
    without: Annotated[list[str] | None, typer.Option(
        help="What must not be needed, such as training; may be repeated.")] = None,
    everything: Annotated[bool, typer.Option(
        "--all", help="Show what does not apply too, and why.")] = False,
    as_json: Json = False,
) -> None:
    """List what can be done to a network, by looking at what is inside it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text as Cell

    from netwright.advise import applicable as look
    module, example = named_network(network, shape, text)
    if example is None:
        raise ValueError(f"what is inside {network} is found by watching it run; give the shape of "
                         "an input, such as --shape 1,3,32,32")
    found = look(module, example, need=need or [], kind=kind, without=without or [],
                 all=everything)
    if as_json:
        print(json.dumps(found.rows(), indent=1))
        return
    table = Table("name", "where", "saves", "asks for", box=None, header_style="bold",
                  pad_edge=False)
    table.columns[0].no_wrap = True
    for row in found.rows():
        why = plain(row["why"])
        where = Cell(why) if row["applies"] else Cell(f"no: {why}", "dim")
        table.add_row(row["name"], where, ", ".join(row["saves"]), ", ".join(row["asks"]))
    Console().print(table)
    print(f"{sum(row['applies'] for row in found.rows())} changes apply.")
