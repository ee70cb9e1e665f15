"""The command line: `netwright compare | fit | stages | papers | evidence`."""

import os
import sys
import traceback
from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer

from netwright.errors import CannotStage, NetwrightError, UnknownName

app = typer.Typer(add_completion=False, rich_markup_mode=None,
                  pretty_exceptions_enable=False,
                  help="Change how a network is built, trained and run; measure each change.")
evidence_app = typer.Typer(rich_markup_mode=None,
                           help="What was measured of the papers' claims.")
app.add_typer(evidence_app, name="evidence")


# Typer brings its own copy of click in newer releases: the errors of either are found this way.
ClickException: Any = typer.BadParameter.__mro__[2]


STOPPED = "stopped; run the same command again to go on where it stopped"


def main() -> None:
    """Run the command line; bad input gets one line and exit status 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        if status == 130:  # how some releases of Typer return from Ctrl-C
            status = _refuse(STOPPED, status)
    except ClickException as error:
        status = _refuse(error.format_message())
    except (typer.Abort, KeyboardInterrupt):
        status = _refuse(STOPPED, 130)
    except (NetwrightError, ValueError, OSError, ImportError) as error:
        status = _refuse(str(error) or type(error).__name__)
    except Exception as error:  # what the user's own code raises, and netwright's own mistakes
        if os.environ.get("NETWRIGHT_TRACEBACK"):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        status = _refuse(f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno};"
                         " NETWRIGHT_TRACEBACK=1 shows how it came to that)")
    sys.exit(status if isinstance(status, int) else 0)


def _refuse(message: str, status: int = 2) -> int:
    print("netwright: " + " ".join(message.split()), file=sys.stderr)
    return status


def _file(option: str, path: Path) -> None:
    """Raise before a long run what would keep its result from being written."""
    if path.is_dir():
        raise ValueError(f"{option} must be a file, got the folder {path}; try "
                         f"{path / (option.strip('-') + '.html')}")
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path} is in the folder {path.parent}, which does not exist; "
                         "make it, or name another file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{option} {path} may not be written; name another file")


def _folder(option: str, path: Path) -> None:
    """Raise where a folder cannot be made or written into."""
    there = next(part for part in [path, *path.absolute().parents] if part.exists())
    if not there.is_dir():
        raise ValueError(f"{option} must be a folder, got {path}, where {there} is a file")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{option} {path} may not be written; name another folder")


Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def compare(
    tasks: Annotated[list[str] | None, typer.Argument(
        metavar="[TASK]...", help="Built-in tasks, or files that define one; "
        "digits-mlp and digits-cnn by default.")] = None,
    task: Annotated[list[str] | None, typer.Option(
        "--task", "-t", help="The same as TASK; may be repeated.")] = None,
    change: Annotated[list[str] | None, typer.Option(
        "--change", "-c", help="A rule to compare; may be repeated.")] = None,
    all_rules: Annotated[bool, typer.Option(
        "--all-rules", help="Compare every rule, and each CHANGE besides.")] = False,
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
    named = [*(tasks or []), *(task or [])]
    _file("--report", report)
    changes = change
    if all_rules:
        changes = [name for name in rules.__all__ if name != "Rule"]
        changes += [name for name in change or [] if name not in changes]
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


@app.command()
def fit(
    task: Annotated[str, typer.Argument(help="A built-in task, or a file that defines one.")],
    rule: Annotated[str, typer.Option(help="The learning rule.")] = "Backprop",
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data.")] = None,
    learning_rate: Annotated[float | None, typer.Option(
        "--lr", help="The learning rate; the task's own by default.")] = None,
    seed: Annotated[int, typer.Option(
        min=0, max=2**63 - 1, help="Where everything random starts.")] = 0,
    checkpoint: Annotated[Path | None, typer.Option(
        help="A folder to keep checkpoints in; a run that was stopped goes on from it.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the learning curve, as HTML.")] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="A folder for TensorBoard.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Train a task's network under one rule."""
    import torch

    from netwright import fit as run
    from netwright.compare.recipe import changes
    from netwright.tasks.ready import check_ready
    found = _task(task)
    rate = found.learning_rate if learning_rate is None else learning_rate
    if not 0 < rate < float("inf"):
        raise ValueError(f"--lr must be above 0, got {rate}; try {found.learning_rate}")
    if plot:
        _file("--plot", plot)
    for option, path in (("--checkpoint", checkpoint), ("--tensorboard", tensorboard)):
        if path is not None:
            _folder(option, path)
    change, = changes([rule])
    check_ready(found)
    torch.manual_seed(seed)
    trained = change.build(found.network(), found, {})
    parts = found.parts(seed)
    history = run(trained, parts.train, epochs=epochs or found.epochs,
                  optimizer=lambda parameters: found.optimize(parameters, rate),
                  validation=parts.test, metric=found.score,
                  higher_is_better=found.maximize, checkpoint=checkpoint,
                  tensorboard=tensorboard, progress=not quiet)
    print(f"{found.metric_name} on the test set: {history.epochs[-1].metric:.4g} "
          f"after {len(history)} epochs")
    if plot:
        history.plot(plot)
        print(f"The learning curve is {plot}.")


def _task(name: str) -> Any:
    from netwright.tasks import TASKS, load_tasks, task
    if name in TASKS or not name.endswith(".py"):
        return task(name)
    found = load_tasks(name)
    if len(found) > 1:
        raise ValueError(f"{name} defines {len(found)} tasks, {', '.join(t.name for t in found)}; "
                         "keep one in the file")
    return found[0]


@app.command()
def stages(
    network: Annotated[str, typer.Argument(
        metavar="NETWORK", help="A built-in task, a file that defines one, or package.module:name "
        "of a module or of what builds one.")],
    shape: Annotated[str | None, typer.Option(
        help="The shape of an example input of module:name, such as 1,3,32,32.")] = None,
    cut: Annotated[list[str] | None, typer.Option(
        help="Where a stage begins, by a module's name; may be repeated.")] = None,
) -> None:
    """Show the chain of stages that a network is."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from netwright import stages as chain
    module, example = _network(network, shape)
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
        table.add_row(str(i), Text(row["name"]), Text(", ".join(row["modules"])),
                      f"{row['parameters']:,}", shape_of or "")
    Console().print(table)
    total = sum(p.numel() for p in module.parameters())
    print(f"{len(found)} stages, {total:,} parameters")


def _network(name: str, shape: str | None) -> tuple[Any, Any]:
    """Return the network that a task, a file or package.module:name stands for, and an input."""
    import importlib

    import torch
    from torch import nn
    package, colon, attribute = name.partition(":")
    if not colon:
        if shape is not None:
            raise ValueError(f"--shape goes with package.module:name; task {name} has inputs")
        task = _task(name)
        return task.network(), task.first
    if not package or not attribute:
        raise ValueError(f"NETWORK must be a task, a file or package.module:name, got {name!r}")
    sizes = _sizes(shape)
    sys.path.insert(0, os.getcwd())  # as `python -m` does, so that a user's own package is found
    try:
        holder = importlib.import_module(package)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{package} could not be imported: {type(error).__name__}: {error}"
                         ) from error
    if not hasattr(holder, attribute):
        raise UnknownName(f"part of {package}", attribute,
                          (part for part in vars(holder) if not part.startswith("_")))
    network = getattr(holder, attribute)
    if not isinstance(network, nn.Module):
        try:
            network = network()
        except (Exception, SystemExit) as error:
            raise ValueError(f"{name} could not be called without arguments "
                             f"({type(error).__name__}: {error}); give a module, or a function "
                             "that builds one") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name} must be a module or build one, got {type(network).__name__}")
    return network, None if sizes is None else torch.zeros(sizes)


def _sizes(shape: str | None) -> list[int] | None:
    try:
        sizes = None if shape is None else [int(size) for size in shape.split(",")]
    except ValueError:
        sizes = []
    if sizes is not None and (not sizes or min(sizes) < 1 or prod(sizes) > 2**28):
        raise ValueError("--shape must be whole numbers with commas between them, such as "
                         f"1,3,32,32, of at most {2**28:,} elements, got {shape!r}")
    return sizes


@app.command()
def papers(
    words: Annotated[list[str] | None, typer.Argument(
        metavar="[WORDS]...", help="Words that an entry must hold.")] = None,
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    missing: Annotated[bool, typer.Option(help="Only what is not implemented.")] = False,
    as_json: Json = False,
) -> None:
    """Search the catalogue of papers."""
    from netwright.catalogue.papers import FAMILIES, find
    found = find(" ".join(words or []), family=family, missing=missing)
    if as_json:
        import json
        from dataclasses import asdict
        print(json.dumps([asdict(entry) for entry in found], indent=1))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    if not found:
        print("No paper fits; try fewer words.")
        return
    if len(found) == 1:
        _describe(found[0])
        return
    table = Table("id", "paper", "family", "here", box=None, header_style="bold", pad_edge=False)
    for entry in found:
        table.add_row(entry.id, Text(entry.title), FAMILIES[entry.family],
                      Text(", ".join([*entry.names, *entry.evidence])))
    Console().print(table)
    done = sum(bool(entry.names) for entry in found)
    print(f"{len(found)} papers, {done} implemented.")


def _describe(entry: Any) -> None:
    from rich.console import Console
    from rich.markup import escape

    from netwright.catalogue.papers import FAMILIES
    lines = {"family": FAMILIES[entry.family], "does": entry.gist, "claims": entry.claim,
             "experiment": entry.experiment, "names": ", ".join(entry.names) or "none yet",
             "evidence": ", ".join(entry.evidence) or "none yet"}
    console = Console()
    console.print(f"[bold]{escape(entry.title)}[/] ({entry.id})", highlight=False)
    for key, value in lines.items():
        console.print(f"[dim]{key}[/] {escape(value)}", highlight=False)


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
        help="The folder that the result is written to; the package's own by default.")] = None,
) -> None:
    """Run an experiment again and record what it finds."""
    from rich.console import Console
    from rich.table import Table

    from netwright import evidence
    from netwright.evidence.evidence import RESULTS, Scale
    scales: dict[str, Scale] = {"desk": "desk", "full": "full"}
    if scale not in scales:
        raise UnknownName("scale", scale, scales)
    found = evidence.experiment(name)
    _folder("--results", results or RESULTS)
    console = Console()
    with console.status(f"{found.claim}"):
        report = evidence.run(name, scales[scale], results or RESULTS)
    table = Table("measured", "mean", "deviation", "seeds", box=None, header_style="bold",
                  pad_edge=False)
    for figure, spread in report["summary"].items():
        table.add_row(figure, f"{spread['mean']:.4g}", f"{spread['deviation']:.2g}",
                      str(spread["seeds"]))
    console.print(table)
    print(f"{report['verdict']}: {report['claim']}")


if __name__ == "__main__":
    main()
