"""Two processes train as one does, for every rule for which that is true in theory."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.workers import worker as load_worker

worker = load_worker(__file__, "distributed_worker")
SAME_IN_SHARES = [name for name, how in worker.WAYS.items() if worker.build(*how).same_in_shares]
OWN_IN_SHARES = [name for name in worker.WAYS if name not in SAME_IN_SHARES]
pytestmark = pytest.mark.check  # a minute and more of processor time, which all of them share
torch_distributed = pytest.mark.skipif(not torch.distributed.is_available(),
                                       reason="PyTorch was built without torch.distributed")


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return worker.outcomes()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    work = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
               worker.__file__, str(work)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return [torch.load(work / f"{rank}.pt", weights_only=True) for rank in range(2)]


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return the largest difference between two outcomes, relative where they are large."""
    assert a.keys() == b.keys()
    return max(float(((a[name] - b[name]).abs() / (1 + b[name].abs())).max()) for name in a)


def test_both_kinds_of_rules_are_here() -> None:
    assert SAME_IN_SHARES
    assert OWN_IN_SHARES
    assert worker.ALONE


@torch_distributed
@pytest.mark.parametrize("name", SAME_IN_SHARES)
def test_two_processes_train_as_one(name: str, one: dict, two: list[dict]) -> None:
    assert apart(two[0]["outcomes"][name], one[name]) < 1e-8


@torch_distributed
@pytest.mark.parametrize("rule", sorted({worker.WAYS[name][0] for name in OWN_IN_SHARES}))
def test_a_rule_that_says_so_does_not(rule: str, one: dict, two: list[dict]) -> None:
    """The control: the comparison can tell trainings apart, by one of the rule's variants."""
    names = [name for name in OWN_IN_SHARES if worker.WAYS[name][0] == rule]
    assert max(apart(two[0]["outcomes"][name], one[name]) for name in names) > 1e-6


@torch_distributed
@pytest.mark.parametrize("name", [case.__name__ for case in worker.SAME])
def test_options_do_the_same_in_two_processes(name: str, one: dict, two: list[dict]) -> None:
    assert apart(two[0]["outcomes"][name], one[name]) < 1e-5


@torch_distributed
def test_all_processes_end_with_the_same_weights(two: list[dict]) -> None:
    for name, outcome in two[0]["outcomes"].items():
        assert apart(outcome, two[1]["outcomes"][name]) == 0, name


@torch_distributed
def test_resumed_processes_end_as_uninterrupted_ones(two: list[dict]) -> None:
    found = two[0]["outcomes"]
    assert apart(found["resumed"], found["uninterrupted"]) == 0


@torch_distributed
def test_what_cannot_train_together_is_said(two: list[dict]) -> None:
    for rank in range(2):
        assert "[(False, 1), (False, 2)]" in two[rank]["errors"]["uneven"]
        for rule in worker.ALONE:
            assert f"{rule} changes the weights itself" in two[rank]["errors"][rule]
        for rule in (rule for rule, entry in worker.RULES.items() if entry.value.together):
            assert "1 had none at epoch 1, step 3" in two[rank]["errors"][f"{rule}, no share"]
    assert "in another process" in two[0]["errors"]["diverged"]
    assert "x holds infinity in sample 3" in two[1]["errors"]["diverged"]
