"""Which methods `netwright compare` can run by their bare names, and why it cannot run the others.

    python benchmarks/nameable.py [--all] [NAME ...]

Each method is built on the built-in tasks that need no download, until one takes it, and makes one
step there. `--all` shows those that run as well.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Sequence

import torch

from netwright.catalogue.facets import Method, methods
from netwright.compare.cells import message_of, rehearse
from netwright.compare.changes import changes
from netwright.errors import Diverged, MissingData, NothingToReshape
from netwright.tasks import TASKS, Task


def local_tasks() -> list[Task]:
    """Return the built-in tasks whose data are here."""
    found = []
    for task in TASKS.values():
        try:
            task.parts(0)
        except MissingData:
            continue
        found.append(task)
    return found


def tried(method: Method, tasks: Sequence[Task]) -> tuple[str, str]:
    """Return the task that `method` runs on, or "" and the reason why it runs on none."""
    reasons: dict[str, str] = {}
    for task in tasks:
        try:
            change, = changes(method.name)
        except ValueError as error:
            return "", message_of(error)
        try:
            rehearse(task, change, change.proposals(task, 1)[0], "cpu")
        except Diverged:
            return task.name, ""
        except NothingToReshape as error:
            reasons.setdefault(message_of(error), "no place")
        except Exception as error:
            reasons[message_of(error)] = task.name
        else:
            return task.name, ""
    telling = [reason for reason, kind in reasons.items() if kind != "no place"] or [*reasons]
    return "", telling[0]


def main() -> None:
    """Print a line for each method that cannot run, and the counts by kind."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    wanted = [word for word in sys.argv[1:] if word != "--all"]
    tasks = local_tasks()
    run, every = Counter[str](), Counter[str]()
    for name, method in methods().items():
        if wanted and name not in wanted and name.rpartition(".")[2] not in wanted:
            continue
        task, reason = tried(method, tasks)
        every[method.facets.kind] += 1
        run[method.facets.kind] += bool(task)
        if reason or "--all" in sys.argv:
            print(f"{method.facets.kind:<11} {name}: {reason or 'runs on ' + task}", flush=True)
    for kind, number in every.items():
        print(f"{kind}: {run[kind]} of {number}")
    print(f"in all: {sum(run.values())} of {sum(every.values())}")


if __name__ == "__main__":
    main()
