"""`netwright inspect`: where a network's parameters, bytes, operations, time and memory go."""

import json
from pathlib import Path
from typing import Annotated

import typer

from netwright.cli import app
from netwright.cli.arguments import Json, Network, Shape, Text, check_file, named_network


@app.command()
def inspect(
    network: Network,
    shape: Shape = None,
    text: Text = None,
    report: Annotated[Path | None, typer.Option(
        help="Where a page with a treemap and bars goes.")] = None,
    as_json: Json = False,
) -> None:
    """Show where a network's parameters, bytes, operations, time and memory go, and what helps."""
    from netwright import report as reports
    from netwright.advise import applicable
    from netwright.advise.inspect import inspect as look
    if report is not None:
        check_file("--report", report)
    module, example = named_network(network, shape, text)
    if example is None:
        raise ValueError(f"where the time of {network} goes is seen by watching it run; give the "
                         "shape of an input, such as --shape 1,3,32,32")
    found, changes = look(module, example), applicable(module, example)
    if report is not None:
        reports.inspection(found, report, changes)
    if as_json:
        print(json.dumps({**found.rows(), "applicable": changes.names}, indent=1))
        return
    print(found)
    print(f"\n{len(changes)} changes apply; `netwright applicable {network}` lists them.")
    if report is not None:
        print(f"The page is {report}.")
