"""Every rule trains around DistributedDataParallel as in one process, or says what to write."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.workers import worker as load_worker

pytestmark = [
    pytest.mark.check,  # real processes, for every rule
    pytest.mark.skipif(not torch.distributed.is_available(),
                       reason="PyTorch was built without torch.distributed")]


worker = load_worker(__file__, "processes_worker")


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


@pytest.fixture(scope="module")
def one() -> dict[str, dict[str, torch.Tensor]]:
    found, _ = worker.outcomes()
    return found


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    names = {name.replace("module.", "") for name in a}
    assert names == set(b)
    return max(float((a[name] - b[name.replace("module.", "")]).abs().max()) for name in a)


def test_all_processes_end_with_the_same_weights(two: list[dict[str, Any]]) -> None:
    for name, weights in two[0]["found"].items():
        assert all(torch.equal(w, two[1]["found"][name][key]) for key, w in weights.items()), name


def test_two_processes_train_as_one_does_with_both_shares(two: list[dict[str, Any]],
                                                          one: dict[str, Any]) -> None:
    alike = [name for name, how in worker.WAYS.items()
             if name in two[0]["found"] and worker.build(*how).same_in_shares]
    assert len(alike) > 20
    for name in [*alike, "MonoForward, accumulated"]:
        assert apart(two[0]["found"][name], one[name]) < 1e-8, name


def test_what_is_not_trained_says_what_to_write(two: list[dict[str, Any]]) -> None:
    assert {*two[0]["found"]} | {*two[0]["said"]} >= {*worker.WAYS}
    for name, said in two[0]["said"].items():
        assert "changes the weights itself" in said or "is not needed" in said, name
    said = two[0]["refusals"]
    assert "write MonoForward(DistributedDataParallel(network), ...)" in said["DDP of a rule"]
    assert "write Backprop(fully_shard(network))" in said["shards of a rule"]
    assert "write MonoForward(DistributedDataParallel(network), ...)" in said["rule of shards"]
    assert "MonoForward(DistributedDataParallel(network), ...)" in said["rule, then shards"]
    assert "give example=" in said["sizes unknown"]


def test_backprop_trains_a_network_that_is_cut_up(two: list[dict[str, Any]]) -> None:
    assert apart(two[0]["shards"], worker.of_shards(whole=True)) < 1e-8
