"""`netwright evidence`: what was measured of the claims."""

from pathlib import Path
from typing import Annotated

import typer

from netwright.cli import app
from netwright.cli.arguments import Json, check_folder
from netwright.errors import UnknownName

evidence_app = typer.Typer(rich_markup_mode=None,
                           help="What was measured of the papers' claims.")
app.add_typer(evidence_app, name="evidence")

@evidence_app.command("list")
def evidence_list(as_json: Json = False) -> None:
    """List the experiments, with what they found."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from netwright import evidence
    results = evidence.recorded()
    if as_json:
        import json
        print(json.dumps(results, indent=1))
        return
    table = Table("name", "paper", "claim", "verdict", box=None, header_style="bold",
                  pad_edge=False)
    for name, experiment in evidence.experiments().items():
        verdict = results[name]["verdict"] if name in results else "not run"
        table.add_row(name, experiment.paper, Text(experiment.claim), verdict)
    Console().print(table)


@evidence_app.command("run")
def evidence_run(
    name: Annotated[str, typer.Argument(help="An experiment of `netwright evidence list`.")],
    scale: Annotated[str, typer.Option(help="desk (minutes on two cores) or full.")] = "desk",
    results: Annotated[Path | None, typer.Option(
        help="The folder of the results; beside the experiments by default.")] = None,
) -> None:
    """Run an experiment again and record what it finds."""
    from rich.console import Console
    from rich.table import Table

    from netwright import evidence
    from netwright.evidence.outcome import Scale
    from netwright.evidence.results import results_folder
    scales: dict[str, Scale] = {"desk": "desk", "full": "full"}
    if scale not in scales:
        raise UnknownName("scale", scale, scales)
    found, home = evidence.experiment(name), results_folder(results)
    check_folder("--results", home)
    console = Console()
    with console.status(f"{found.claim}"):
        report = evidence.run(name, scales[scale], home)
    table = Table("measured", "mean", "deviation", "seeds", box=None, header_style="bold",
                  pad_edge=False)
    for figure, spread in report["summary"].items():
        table.add_row(figure, f"{spread['mean']:.4g}", f"{spread['deviation']:.2g}",
                      str(spread["seeds"]))
    console.print(table)
    print(f"{report['verdict']}: {report['claim']}")
