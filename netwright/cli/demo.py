"""`netwright demo`: the main job from beginning to end, on data that ship with scikit-learn."""

from pathlib import Path
from typing import Annotated

import typer

from netwright.cli import app
from netwright.cli.arguments import check_folder


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(
        "--out", "-o", help="Where the advice and the changed models go.")] = Path("runs/demo"),
    budget: Annotated[str, typer.Option(help="The time for the advice.")] = "75s",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Train a small network on digits, then find what makes it a third as large and as good."""
    import torch

    import netwright as nw
    from netwright import report
    from netwright.cli.advise import show
    from netwright.tasks import task
    check_folder("--out", folder)
    digits = task("digits-mlp")
    parts = digits.parts(0)
    torch.manual_seed(0)
    model = digits.network()
    trained = nw.fit(nw.rules.Backprop(model), parts.train, epochs=digits.epochs,
                     optimizer=lambda learned: digits.optimize(learned, digits.learning_rate),
                     validation=parts.test, progress=not quiet)
    print(f"A network that knows {trained.epochs[-1].metric:.1%} of the digits it has not seen:\n")
    samples = torch.cat([x for x, _ in (*parts.train, *parts.test)])
    print(nw.inspect(model.eval(), samples[:16]))
    print("\nWhat makes its file a third as large, and leaves its answers as they are?\n")
    found = nw.advise(model, samples, want="size=0.33", keep=0.98, budget=budget, folder=folder,
                      progress=not quiet)
    show(found)
    page = report.advice(found.plain, folder / "index.html")
    print(f"The changed networks are in {folder}, the page is {page}.")
