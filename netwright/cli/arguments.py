"""What several commands take: files, tasks, networks."""

import importlib
import os
import sys
from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer

from netwright.errors import UnknownName

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Network = Annotated[str, typer.Argument(
    metavar="NETWORK", help="A built-in task, a file that defines one, a Hugging Face folder, or "
    "package.module:name of a module or of what builds one.")]
Shape = Annotated[str | None, typer.Option(
    help="The shape of an example input of module:name, such as 1,3,32,32.")]
Text = Annotated[Path | None, typer.Option(
    help="A file of text that a model in a folder reads or learns.")]


def check_file(option: str, path: Path) -> None:
    """Raise before a long run what would keep its result from being written."""
    if path.is_dir():
        raise ValueError(f"{option} must be a file, got the folder {path}; try "
                         f"{path / (option.strip('-') + '.html')}")
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path} is in the folder {path.parent}, which does not exist; "
                         "make it, or name another file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{option} {path} may not be written; name another file")


def check_folder(option: str, path: Path) -> None:
    """Raise where a folder cannot be made or written into."""
    there = next(part for part in [path, *path.absolute().parents] if part.exists())
    if not there.is_dir():
        raise ValueError(f"{option} must be a folder, got {path}, where {there} is a file")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{option} {path} may not be written; name another folder")


def is_folder(name: str) -> bool:
    """Return whether a task's or a network's name is that of a folder, and of nothing else."""
    from netwright.tasks import TASKS
    return name not in TASKS and Path(name).is_dir()


def named_task(name: str, text: Path | None = None) -> Any:
    """Return the built-in task of this name, the one that a file defines, or a folder's model's."""
    from netwright.tasks import TASKS, load_tasks, task, text_task
    if is_folder(name):
        if text is None:
            raise ValueError(f"--text must be given with the folder {name}: a file of text that "
                             "its model learns; or write a task file for it")
        return text_task(name, text)
    if name in TASKS or not name.endswith(".py"):
        return task(name)
    found = load_tasks(name)
    if len(found) > 1:
        raise ValueError(f"{name} defines {len(found)} tasks, {', '.join(t.name for t in found)}; "
                         "keep one in the file")
    return found[0]


def named_network(name: str, shape: str | None, text: Path | None = None) -> tuple[Any, Any]:
    """Return the network that a task, a file, a folder or module:name stands for, and an input."""
    import torch
    from torch import nn

    from netwright.tasks import example_of, pretrained
    package, colon, attribute = name.partition(":")
    if is_folder(name):
        if shape is not None:
            raise ValueError(f"--shape goes with package.module:name; the model in {name} is given "
                             "tokens of --text, or an image")
        network = pretrained(name)
        return network, example_of(network, name, text)
    if text is not None:
        raise ValueError(f"--text goes with a folder, got {name}")
    if not colon:
        if shape is not None:
            raise ValueError(f"--shape goes with package.module:name; task {name} has inputs")
        task = named_task(name)
        return task.network(), task.first
    if not package or not attribute:
        raise ValueError("NETWORK must be a task, a file, a folder or package.module:name, got "
                         f"{name!r}")
    sizes = _sizes(shape)
    sys.path.insert(0, os.getcwd())  # as `python -m` does, so that a user's own package is found
    try:
        holder = importlib.import_module(package)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ValueError(f"{package} could not be imported: {type(error).__name__}: {error}"
                         ) from error
    if not hasattr(holder, attribute):
        raise UnknownName(f"part of {package}", attribute,
                          (part for part in vars(holder) if not part.startswith("_")))
    network = getattr(holder, attribute)
    if not isinstance(network, nn.Module):
        try:
            network = network()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
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


def written(recipe: str) -> Any:
    """Return a recipe as it is written, or the path of the JSON file that holds it."""
    return Path(recipe) if recipe.endswith(".json") else recipe
