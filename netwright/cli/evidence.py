"""`netwright evidence`: what was measured of the claims."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from netwright.cli import app
from netwright.cli.arguments import Json, check_folder
from netwright.errors import UnknownName

evidence_app = typer.Typer(rich_markup_mode=None,
                           help="What was measured of the papers' claims.")
app.add_typer(evidence_app, name="evidence")


@evidence_app.command("list")
def evidence_list(as_json: Json = False) -> None:
    """List the experiments, with what they found and whether it is older than their code."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from netwright import evidence
    rows, ages = _found()
    if as_json:
        import json
        print(json.dumps({name: {**row, "age": ages.get(name, "not known")}
                          for name, row in rows.items()}, indent=1))
        return
    table = Table("name", "paper", "claim", "verdict", "version", "result", box=None,
                  header_style="bold", pad_edge=False)
    claims = {name: (row["paper"], row["claim"]) for name, row in rows.items()}
    if ages:
        claims = {name: (one.paper, one.claim) for name, one in evidence.experiments().items()}
    for name, (paper, claim) in claims.items():
        row = rows.get(name, {})
        table.add_row(name, paper, Text(claim), row.get("verdict", "not run"),
                      row.get("version") or "not known", ages.get(name, "not known"))
    Console().print(table)
    old = sum(age == "older than its code" for age in ages.values())
    if old:
        print(f"{old} results are older than their code; `netwright evidence run --stale` runs "
              "them again.")


def _found() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return results and their ages; without the experiments, the summaries that are shipped."""
    from netwright import evidence
    from netwright.catalogue.measurements import measurements
    from netwright.evidence.folder import available
    if available():
        return evidence.recorded(), evidence.ages()
    return measurements(), {}


@evidence_app.command("run")
def evidence_run(
    names: Annotated[list[str] | None, typer.Argument(
        metavar="[NAME]...", help="Experiments of `netwright evidence list`.")] = None,
    stale: Annotated[bool, typer.Option(
        "--stale", help="Those whose result is older than their code.")] = False,
    unknown: Annotated[bool, typer.Option(
        "--unknown", help="Those whose result does not say which code gave it.")] = False,
    scale: Annotated[str, typer.Option(help="desk (minutes on two cores) or full.")] = "desk",
    results: Annotated[Path | None, typer.Option(
        help="The folder of the results; beside the experiments by default.")] = None,
) -> None:
    """Run experiments and record what they find, each as soon as it is done."""
    from netwright import evidence
    from netwright.evidence.outcome import Scale
    from netwright.evidence.results import results_folder
    scales: dict[str, Scale] = {"desk": "desk", "full": "full"}
    if scale not in scales:
        raise UnknownName("scale", scale, scales)
    home = results_folder(results)
    check_folder("--results", home)
    chosen = _chosen(names or [], stale, unknown)
    seconds = {name: row["seconds"] for name, row in evidence.recorded().items()}
    failures = {}
    for i, name in enumerate(chosen):
        rest = sum(seconds.get(later, 0.0) for later in chosen[i + 1:])
        try:
            with _progress(f"{name} ({i + 1} of {len(chosen)})", seconds.get(name), rest):
                report = evidence.run(name, scales[scale], home)
        except Exception as error:
            if len(chosen) == 1:
                raise
            failures[name] = f"{type(error).__name__}: {error}"
            continue
        _show(report)
    if failures:
        raise ValueError("; ".join(f"{name} failed: {why}" for name, why in failures.items()))


def _chosen(names: Sequence[str], stale: bool, unknown: bool) -> list[str]:
    from netwright import evidence
    if not (names or stale or unknown):
        raise ValueError("name an experiment of `netwright evidence list`, or give --stale")
    named = [evidence.experiment(name).name for name in names]
    if not (stale or unknown):
        return named
    ages = evidence.ages()
    wanted = {"older than its code": stale, "not run": stale, "not known": unknown}
    found = [name for name, age in ages.items() if wanted.get(age)]
    if not found:
        left = sum(age == "not known" for age in ages.values())
        print("No result is older than its code."
              + (f" {left} do not say which code gave them: --unknown." if left else ""))
    return list(dict.fromkeys([*named, *found]))


@contextmanager
def _progress(text: str, expected: float | None, rest: float) -> Iterator[None]:
    """Show how far an experiment is and how long it and the `rest` seconds after it will take.

    The share that is done is what its trainings tell, or the time of its last run.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    from netwright.evidence.train import on_progress

    class Left(ProgressColumn):
        def render(self, task: Task) -> Text:
            gone = task.elapsed or 0.0
            whole = gone / task.completed if task.completed else expected
            if whole is None:
                return Text("time left not known")
            minutes, seconds = divmod(round(max(whole - gone, 0.0) + rest), 60)
            return Text(f"{minutes}:{seconds:02} left")

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(text, highlight=False)
        yield
        return
    with Progress(TextColumn("{task.description}"), BarColumn(), Left(), console=console,
                  transient=True) as bar:
        task = bar.add_task(text, total=1.0)
        token = on_progress.set(lambda share: bar.update(task, completed=share))
        try:
            yield
        finally:
            on_progress.reset(token)


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    table = Table("measured", "mean", "deviation", "seeds", box=None, header_style="bold",
                  pad_edge=False)
    for figure, spread in report["summary"].items():
        table.add_row(figure, f"{spread['mean']:.4g}", f"{spread['deviation']:.2g}",
                      str(spread["seeds"]))
    Console().print(table)
    for claim in report["claims"]:
        print(f"{'holds' if claim['holds'] else 'does not hold'}: {claim['claim']}")
    print(f"{report['verdict']}: {report['claim']}")
