"""`netwright advise` and `netwright apply`: what to change in a model, and changing it."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from netwright.cli import app
from netwright.cli.arguments import (
    Json,
    Text,
    check_file,
    check_folder,
    is_folder,
    named_network,
    named_task,
    written,
)
from netwright.runtime.written import plain

Model = Annotated[str, typer.Argument(
    metavar="MODEL", help="A folder of save_pretrained or netwright.save, a task file, or "
    "package.module:name of a module or of what builds one.")]
Weights = Annotated[Path | None, typer.Option(
    help="A .safetensors file with the state of what package.module:name or a task builds.")]
Data = Annotated[str | None, typer.Option(
    help="A folder of images, a task file, or a built-in task whose inputs the model takes.")]


@app.command()
def advise(
    model: Model,
    text: Text = None,
    data: Data = None,
    weights: Weights = None,
    want: Annotated[list[str] | None, typer.Option(
        "--want", "-w", help="A limit, such as size=0.5, size=40MB or inference_time=5ms; may be "
        "repeated.")] = None,
    keep: Annotated[float, typer.Option(help="The least quality; 1 is the original's.")] = 0.98,
    budget: Annotated[str, typer.Option(help="The time, such as 90s, 10m or 1h.")] = "10m",
    metric: Annotated[str | None, typer.Option(
        help="The metric of the task's targets that is kept, such as accuracy; without one the "
        "original's own outputs are.")] = None,
    fidelity: Annotated[str | None, typer.Option(
        help="How outputs are compared with the original's: distribution, agreement, pairwise, "
        "cosine or explained.")] = None,
    also: Annotated[list[str] | None, typer.Option(
        help="A recipe that is tried besides; may be repeated.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples of the answer that is timed.")] = 16,
    folder: Annotated[Path, typer.Option(
        "--out", "-o", help="Where the advice and the changed models go.")] = Path("advice"),
    storage: Annotated[str | None, typer.Option(
        help="An Optuna storage URL that several machines share; a file by default.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1,
                                      help="Where everything random starts.")] = 0,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Find what makes a trained model smaller or faster within limits, and give it."""
    import netwright as nw
    from netwright import report
    from netwright.advise.wants import seconds, wanted
    wanted(want or [])  # what is wrong with these is said before anything is loaded
    seconds(budget)
    check_folder("--out", folder)
    network, samples = _material(model, text, data, weights, metric)
    found = nw.advise(
        network, samples, want=want or [], keep=keep, budget=budget, metric=metric,
        fidelity=fidelity, also=[written(entry) for entry in also or []], batch=batch,
        folder=folder, storage=storage, seed=seed,
        source=model if is_folder(model) else None, progress=not quiet)
    page = report.advice(found.plain, folder / "index.html")
    _note(folder, model, text, data, weights)
    if as_json:
        print(json.dumps(found.plain, indent=1))
        return
    show(found)
    print(f"The changed models, with recipes and cards, are in {folder}.")
    print(f"The page is {page}.")


@app.command()
def apply(
    recipe: Annotated[str, typer.Argument(
        help="A recipe, such as 'prune_sublayers(remove=2)', or a JSON file that holds one.")],
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder that the changed model goes into.")],
    text: Text = None,
    data: Data = None,
    weights: Weights = None,
) -> None:
    """Change a model as a recipe says, and save the result.

    A recipe of an advice is carried out on the data of that advice, unless others are given.
    """
    import netwright as nw
    from netwright.advise.giving import beside
    from netwright.advise.material import material
    found = nw.recipe(written(recipe))
    check_folder("OUT", out)
    if out.exists() and is_folder(model) and out.resolve() == Path(model).resolve():
        raise ValueError(f"OUT {out} is the model itself, which stays as it is; name another")
    if text is None and data is None:
        text, data, weights = _noted(recipe, weights)
    network, samples = _material(model, text, data, weights, None)
    parts = material(network, samples, labels=False, batch=16)
    changed = nw.apply(found, network.eval(), parts.inputs)
    nw.save(changed, out)
    beside(Path(model) if is_folder(model) else None, out)
    print(f"{plain(found)} of {plain(model)} is in {out}.")


def _material(model: str, text: Path | None, data: str | None, weights: Path | None,
              metric: str | None) -> tuple[Any, Any]:
    """Return the model and samples of what it takes."""
    from netwright.advise.reading import PICKLED, images, model_in, texts
    if text is not None and data is not None:
        raise ValueError("--text and --data are both given; keep one")
    if Path(model).suffix in PICKLED:
        model_in(model)
    _quiet()
    if is_folder(model) or (":" not in model and not model.endswith(".py") and "/" in model):
        network = model_in(model)
        if data is None:
            return network, texts(network, model, text)
        if Path(data).is_dir():
            return network, images(network, data, model)
        return network, _of_task(data, metric)
    if text is not None:
        raise ValueError(f"--text goes with a folder, got {model}")
    if data is not None and Path(data).is_dir():
        network, example = named_network(model, None)
        side = None if example is None else int(example.shape[-1])
        return _filled(network, weights), images(network, data, size=side)
    if ":" in model and data is None:
        raise ValueError(f"--data must be given with {model}: a task file or a built-in task "
                         "whose inputs it takes, or a folder of images")
    network, _ = named_network(model, None)
    if weights is None and ":" not in model:
        raise ValueError(f"--weights must be given with {model}, whose network is untrained: a "
                         ".safetensors file of its state")
    return _filled(network, weights), _of_task(data or model, metric)


def _quiet() -> None:
    """Keep transformers from drawing bars while it loads and saves."""
    with suppress(ImportError):
        from transformers.utils import logging
        logging.disable_progress_bar()


def _of_task(name: str, metric: str | None) -> Any:
    """Return the samples of a task, with targets where a metric judges."""
    task = named_task(name)
    held = task.parts(0).test
    return held if metric is not None else [x for x, _ in held]


def _filled(network: Any, weights: Path | None) -> Any:
    """Return a network with the weights of a file."""
    from netwright.advise.reading import PICKLED, pickled
    if weights is None:
        return network.eval()
    if weights.suffix in PICKLED:
        raise ValueError(pickled(weights))
    check_file("--weights", weights)
    if not weights.is_file():
        raise ValueError(f"--weights must be a .safetensors file, and {weights} does not exist")
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        network.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError) as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"--weights {weights} could not be read into "
                         f"{type(network).__name__}: {said}") from error
    return network.eval()


def _note(folder: Path, model: str, text: Path | None, data: str | None,
          weights: Path | None) -> None:
    """Write down what the advice was about, for `apply`."""
    from netwright.runtime.written import write_text
    said = {"model": model, "text": text, "data": data, "weights": weights}
    write_text(folder / "asked.json", json.dumps(
        {name: str(Path(value).resolve()) if Path(value).exists() else str(value)
         for name, value in said.items() if value is not None}, indent=1))


def _noted(recipe: str, weights: Path | None) -> tuple[Path | None, str | None, Path | None]:
    """Return the data that the advice was found on whose recipe this is."""
    from netwright.runtime.written import read_json
    path = Path(recipe).resolve().parent.parent / "asked.json"
    if not recipe.endswith(".json") or not path.is_file():
        return None, None, weights
    said = read_json(path, "what an advice was about")
    text = said.get("text")
    return (None if text is None else Path(text), said.get("data"),
            weights or (Path(said["weights"]) if "weights" in said else None))


def show(found: Any) -> None:
    """Print an advice: its front, what was recommended, and what failed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text as Cell
    rows = found.rows()
    table = Table(*rows[0], box=None, header_style="bold", pad_edge=False)
    for row, point in zip(rows, found.points, strict=True):
        style = "bold" if point["recommended"] else "dim" if point["dominated"] else ""
        table.add_row(*(Cell(plain(word), style) for word in row.values()))
    console = Console()
    console.print(table)
    shown = found.plain
    console.print(Cell(f"Quality is the {shown['quality']['means']}."))
    console.print(Cell(plain(found.verdict), "bold"))
    for one in shown["failed"][:8]:
        console.print(Cell(f"failed: {plain(one['recipe'])}: {plain(one['reason'])}", "dim"))
    console.print(Cell(f"{len(shown['tried'])} recipes were tried, {len(shown['failed'])} failed, "
                       f"{len(shown['aside'])} methods were set aside.", "dim"))
