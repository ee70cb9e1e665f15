"""`netwright anatomy`: what is inside a network."""

from typing import Annotated

import typer

from netwright.cli import app
from netwright.cli.arguments import named_network


@app.command()
def anatomy(
    network: Annotated[str, typer.Argument(
        metavar="NETWORK", help="A built-in task, a file that defines one, or package.module:name "
        "of a module or of what builds one.")],
    shape: Annotated[str | None, typer.Option(
        help="The shape of an example input of module:name, such as 1,3,32,32.")] = None,
) -> None:
    """Show what is inside a network: streams, attention, feed-forward layers and other parts."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from netwright import anatomy as look
    module, example = named_network(network, shape)
    if example is None:
        raise typer.BadParameter(f"what is inside {network} is found by watching it run; give the "
                                 "shape of an input, such as --shape 1,3,32,32")
    table = Table("part", "name", "sizes", box=None, header_style="bold", pad_edge=False)
    for row in look(module, example).table():
        table.add_row(row["part"], Text(row["name"]), Text(row["sizes"]))
    Console().print(table)
