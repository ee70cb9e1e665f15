"""`netwright stages`: the chain that a network is."""

from typing import Annotated

import typer

from netwright.cli import app
from netwright.cli.arguments import Network, Shape, Text, named_network
from netwright.errors import CannotStage
from netwright.runtime.written import plain


@app.command()
def stages(
    network: Network,
    shape: Shape = None,
    text: Text = None,
    cut: Annotated[list[str] | None, typer.Option(
        help="Where a stage begins, by a module's name; may be repeated.")] = None,
) -> None:
    """Show the chain of stages that a network is."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text as Cell

    from netwright import stages as chain
    module, example = named_network(network, shape, text)
    try:
        found = chain(module, example, cuts=cut)
    except CannotStage as error:
        if example is not None or "example=" not in str(error):
            raise
        raise CannotStage(f"the stages of {network} are found by watching it run; give the shape "
                          "of an input, such as --shape 1,3,32,32") from error
    table = Table("", "stage", "modules", "parameters", "output", box=None, header_style="bold",
                  pad_edge=False)
    rows = found.table(example)
    for i, row in enumerate(rows):
        shape_of = row["shape"] and "x".join(map(str, row["shape"]))
        table.add_row(str(i), Cell(plain(row["name"])), Cell(", ".join(row["modules"])),
                      f"{row['parameters']:,}", shape_of or "")
    Console().print(table)
    total = sum(p.numel() for p in module.parameters())
    print(f"{len(found)} stages, {total:,} parameters")
