"""`netwright anatomy`: what is inside a network."""

from netwright.cli import app
from netwright.cli.arguments import Network, Shape, Text, named_network
from netwright.runtime.written import plain


@app.command()
def anatomy(
    network: Network,
    shape: Shape = None,
    text: Text = None,
) -> None:
    """Show what is inside a network: streams, attention, feed-forward layers and other parts."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text as Cell

    from netwright import anatomy as look
    module, example = named_network(network, shape, text)
    if example is None:
        raise ValueError(f"what is inside {network} is found by watching it run; give the shape of "
                         "an input, such as --shape 1,3,32,32")
    table = Table("part", "name", "sizes", box=None, header_style="bold", pad_edge=False)
    for row in look(module, example).table():
        table.add_row(row["part"], Cell(plain(row["name"])), Cell(row["sizes"]))
    Console().print(table)
