"""`netwright fit`: one recipe on one task."""

from pathlib import Path
from typing import Annotated

import typer

from netwright.cli import app
from netwright.cli.arguments import Text, check_file, check_folder, named_task, written
from netwright.runtime.written import plain


@app.command()
def fit(
    task: Annotated[str, typer.Argument(
        help="A built-in task, a file that defines one, or a Hugging Face folder with --text.")],
    text: Text = None,
    rule: Annotated[str, typer.Option(help="The learning rule.")] = "Backprop",
    recipe: Annotated[str | None, typer.Option(
        "--recipe", "-c", help="What is changed, such as 'GLU + MonoForward', in place of RULE; "
        "or a JSON file that holds it.")] = None,
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
    """Train a task's network under one rule or one recipe."""
    import torch

    from netwright import fit as run
    from netwright.compare.changes import changes
    from netwright.tasks.ready import check_ready
    found = named_task(task, text)
    if learning_rate is not None and not 0 < learning_rate < float("inf"):
        raise ValueError(f"--lr must be above 0, got {learning_rate}; try {found.learning_rate}")
    if plot:
        check_file("--plot", plot)
    for option, path in (("--checkpoint", checkpoint), ("--tensorboard", tensorboard)):
        if path is not None:
            check_folder(option, path)
    change, = changes([written(recipe or rule)])
    check_ready(found)
    # None where the optimizer takes no rate, or the recipe sets it.
    rate = learning_rate or change.rate(found) or found.learning_rate
    torch.manual_seed(seed)
    trained = change.build(found.network(), found, {})
    found = change.task(found)
    parts = found.parts(seed)
    history = run(trained, parts.train, epochs=epochs or found.epochs,
                  optimizer=lambda parameters: found.optimize(parameters, rate),
                  validation=parts.test, metric=found.score,
                  higher_is_better=found.maximize, checkpoint=checkpoint,
                  tensorboard=tensorboard, progress=not quiet)
    print(f"{plain(found.metric_name)} on the test set: {history.epochs[-1].metric:.4g} "
          f"after {len(history)} epochs")
    if plot:
        history.plot(plot)
        print(f"The learning curve is {plot}.")
