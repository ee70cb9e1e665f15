"""Memory of a step against depth, for every rule.

    python benchmarks/test_memory.py

An MLP of 8 and of 32 stages, all 64 wide, batch 256. What is compared is `working_bytes` (the most
that a step holds besides parameters, inputs and gradients) and `saved_bytes`, as ratios of the deep
network to the shallow one. Both figures are the same on every run.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from netwright import rules
from netwright.catalogue.facets import methods
from netwright.contracts.checks import offered
from netwright.measure import Cost, cost
from netwright.rules import Rule
from netwright.runtime.machine import machine

BATCH, WIDTH, CLASSES, SHALLOW, DEEP = 256, 64, 10, 8, 32
LOCAL = ["ForwardForward", "MonoForward"]
RESULTS = Path(__file__).parent / "results" / "memory.json"


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(BATCH, WIDTH), torch.randint(CLASSES, (BATCH,))


def rule(name: str, stages: int) -> Rule:
    """Return a rule on the network, with a smooth activation for those that take no ReLU.

    Raises:
        ValueError: it trains other networks than classifiers of vectors.
    """
    kind = getattr(rules, name)
    options = offered(kind, num_classes=CLASSES)
    for activation in (nn.ReLU, nn.Tanh):
        torch.manual_seed(0)
        hidden = [part for _ in range(stages - 1)
                  for part in (nn.Linear(WIDTH, WIDTH), activation())]
        try:
            return kind(nn.Sequential(*hidden, nn.Linear(WIDTH, CLASSES)), batch()[0], **options)
        except ValueError as error:
            refused = error
    raise refused


def measured(name: str) -> tuple[Cost, Cost]:
    return tuple(cost(rule(name, stages), batch(), repeats=1, warmup=0)
                 for stages in (SHALLOW, DEEP))


@pytest.mark.parametrize("name", LOCAL)
def test_memory_of_local_rules_does_not_grow_with_depth(name):
    shallow, deep = measured(name)
    assert deep.working_bytes <= 1.15 * shallow.working_bytes
    assert deep.saved_bytes <= 1.15 * shallow.saved_bytes


def test_memory_of_backprop_grows_with_depth():
    shallow, deep = measured("Backprop")
    assert deep.working_bytes > 3 * shallow.working_bytes


def main() -> None:
    found = {}
    print(f"{'rule':26}{'working, 8':>12}{'32 stages':>12}{'ratio':>7}{'saved, 8':>12}"
          f"{'32 stages':>12}{'ratio':>7}")
    for name in (entry.value.__name__ for entry in methods().values()
                 if entry.facets.kind == "rule"):
        try:
            shallow, deep = measured(name)
        except ValueError as other:  # what trains denoisers, circuits, graphs, recurrent networks
            print(f"{name:26}{str(other)[:90]}")
            continue
        found[name] = {
            "working_bytes": [shallow.working_bytes, deep.working_bytes],
            "working_ratio": deep.working_bytes / shallow.working_bytes,
            "saved_bytes": [shallow.saved_bytes, deep.saved_bytes],
            "saved_ratio": deep.saved_bytes / shallow.saved_bytes if shallow.saved_bytes else None}
        saved = f"{found[name]['saved_ratio']:7.2f}" if shallow.saved_bytes else "      –"
        print(f"{name:26}{shallow.working_bytes:12,}{deep.working_bytes:12,}"
              f"{found[name]['working_ratio']:7.2f}{shallow.saved_bytes:12,}"
              f"{deep.saved_bytes:12,}{saved}")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"stages": [SHALLOW, DEEP], "width": WIDTH, "batch": BATCH,
                                   "rules": found, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
