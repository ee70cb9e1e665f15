"""`netwright inspect`: where a network's parameters, bytes, operations, time and memory go."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from netwright.cli import app
from netwright.cli.arguments import Json, Network, Shape, Text, check_file, named_network


@app.command()
def inspect(
    network: Network,
    shape: Shape = None,
    text: Text = None,
    batch: Annotated[int, typer.Option(
        min=1, help="Sentences of --text, or windows of it, that are looked at together.")] = 16,
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
    module, example = _given(network, shape, text, batch)
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


def _given(name: str, shape: str | None, text: Path | None, batch: int) -> tuple[Any, Any]:
    """Return the network and what it is run on: of a text as many rows as a batch has."""
    from netwright.advise.reading import PICKLED, model_in, texts
    from netwright.cli.arguments import is_folder
    if Path(name).suffix in PICKLED or (is_folder(name) and shape is None):
        model = model_in(name)  # which says how a pickled checkpoint is converted
        if text is not None:
            return model, _batch(texts(model, name, text)[0], batch)
    return named_network(name, shape, text)


def _batch(rows: dict[str, Any], size: int) -> dict[str, Any]:
    """Return the first rows, without columns in which all of them are padding."""
    first = {name: part[:size] for name, part in rows.items()}
    mask = first.get("attention_mask")
    return first if mask is None else {name: part[:, mask.any(0)] for name, part in first.items()}
