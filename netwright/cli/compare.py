"""`netwright compare`: several changes on the same task."""

from pathlib import Path
from typing import Annotated, Any

import typer

from netwright.cli import app
from netwright.cli.arguments import Text, check_file, is_folder, named_task, written


@app.command()
def compare(
    tasks: Annotated[list[str] | None, typer.Argument(
        metavar="[TASK]...", help="Built-in tasks, or files that define one; "
        "a Hugging Face folder with --text; digits-mlp and digits-cnn by default.")] = None,
    task: Annotated[list[str] | None, typer.Option(
        "--task", "-t", help="The same as TASK; may be repeated.")] = None,
    change: Annotated[list[str] | None, typer.Option(
        "--change", "-c", help="A recipe to compare, such as MonoForward, GLU or "
        "'prune_sublayers(remove=2) + MonoForward', or a JSON file that holds one; may be "
        "repeated.")] = None,
    all_rules: Annotated[bool, typer.Option(
        "--all-rules", help="Compare every rule, and each CHANGE besides.")] = False,
    text: Text = None,
    seeds: Annotated[int, typer.Option(min=1, help="Final runs of each change.")] = 3,
    trials: Annotated[int | None, typer.Option(min=1, help="Tuning runs of each change.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of each run.")] = None,
    storage: Annotated[str | None, typer.Option(
        help="An Optuna storage URL, shared by many machines; one SQLite file by default.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes on this machine.")] = None,
    report: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("report.html"),
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Train a task's network under several changes, and report what each costs and gives."""
    from rich.console import Console

    from netwright import compare as run
    from netwright import report as reports
    from netwright import rules
    named: list[Any] = [*(tasks or []), *(task or [])]
    if text is not None and not any(map(is_folder, named)):
        raise ValueError("--text goes with a folder among the tasks, got " + (
            ", ".join(named) or "none"))
    named = [named_task(name, text) if is_folder(name) else name for name in named]
    check_file("--report", report)
    changes: list[Any] | None = [written(entry) for entry in change] if change else None
    if all_rules:
        changes = [name for name in rules.__all__ if name != "Rule"]
        changes += [written(entry) for entry in change or [] if entry not in changes]
    options: dict[str, Any] = {"trials": trials, "epochs": epochs, "storage": storage,
                               "workers": workers}
    given = {key: value for key, value in options.items() if value is not None}
    found = run(named or None, changes, seeds=seeds, progress=not quiet, **given)
    Console().print(reports.table(found))
    if not any(row.scores for row in found.rows):
        first = found.rows[0]
        raise ValueError(f"no change could be run, so that {report} is not written; {first.change} "
                         f"on {first.task} failed: {first.failure}")
    reports.html(found, report)
    print(f"The page is {report}.")
