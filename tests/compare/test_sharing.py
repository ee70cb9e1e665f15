import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

import netwright as nw
from netwright.compare.compare import tasks
from netwright.compare.trials import storage_at

FILE = """
import os, signal, time
import torch
from torch import nn
import netwright as nw

class Slow(nn.Linear):
    def forward(self, x):
        time.sleep(0.003)
        return super().forward(x)

def network():
    return nn.Sequential(Slow(4, 8), nn.Tanh(), nn.Linear(8, 3))

def data():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    x = torch.randn(90, 4, generator=generator) + 3 * nn.functional.one_hot(y, 4)
    return x[:60], y[:60], x[60:], y[60:]

class Deadly(nw.rules.Backprop):
    def forward(self, x, y):
        os.kill(os.getpid(), signal.SIGKILL)

task = nw.Task("slow", network=network, data=data, epochs=12, batch_size=20)
"""


def runs(storage):
    """Return the number of finished runs by study and job."""
    found = {}
    for study in storage.get_all_studies():
        for trial in storage.get_all_trials(study._study_id):
            if trial.state == TrialState.COMPLETE:
                key = study.study_name, trial.user_attrs["job"]
                found[key] = found.get(key, 0) + 1
    return found


@pytest.fixture
def slow(tmp_path):
    file = tmp_path / "slow.py"
    file.write_text(FILE)
    return file


def start(file, storage, **options):
    """Start a process that compares, as on a machine of its own."""
    settings = {"seeds": 2, "trials": 3, "workers": 1, "progress": False, **options}
    script = (f"import netwright as nw\nnw.compare({str(file)!r}, ['Backprop', "
              f"'DirectFeedbackAlignment'], storage={str(storage)!r}, **{settings!r})")
    return subprocess.Popen([sys.executable, "-c", script],
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for(condition, seconds=60):
    for _ in range(seconds * 50):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen")


def running(storage, process):
    return any(trial.user_attrs["worker"]["process"] == process.pid
               for study in storage.get_all_studies()
               for trial in storage.get_all_trials(study._study_id, states=[TrialState.RUNNING]))


@pytest.fixture
def storage(tmp_path):
    with storage_at(tmp_path / "a.db") as opened:
        yield opened


@pytest.mark.check
def test_a_killed_run_goes_on_where_it_stopped(slow, storage, tmp_path):
    url = tmp_path / "a.db"
    process = start(slow, url)
    wait_for(lambda: len(runs(storage)) >= 2 and running(storage, process))
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = runs(storage)
    assert 2 <= len(before) < 10
    with torch.random.fork_rng():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        found = nw.compare(slow, ["Backprop", "DirectFeedbackAlignment"], storage=url, seeds=2,
                           trials=3, workers=1, progress=False)
        whole = nw.compare(slow, ["Backprop", "DirectFeedbackAlignment"], seeds=2, trials=3,
                           storage=InMemoryStorage(), progress=False)
        torch.set_num_threads(threads)
    after = runs(storage)
    assert len(after) == 10
    assert set(after.values()) == {1}
    assert [row.scores for row in found.rows] == [row.scores for row in whole.rows]
    assert [row.hyperparameters for row in found.rows] == [
        row.hyperparameters for row in whole.rows]


def test_several_processes_share_the_runs(slow, storage, tmp_path, capfd):
    url = tmp_path / "a.db"
    found = nw.compare(slow, ["Backprop", "DirectFeedbackAlignment"], storage=url, seeds=2,
                       trials=2, epochs=8, workers=2, progress=True)
    assert [row.failure for row in found.rows] == ["", ""]
    done = runs(storage)
    assert len(done) == 8
    assert set(done.values()) == {1}
    processes = {trial.user_attrs["worker"]["process"] for study in storage.get_all_studies()
                 for trial in storage.get_all_trials(study._study_id)}
    assert len(processes) == 2
    assert os.getpid() not in processes
    shown = capfd.readouterr().err
    assert "slow · Backprop: done" in shown
    assert "slow · DirectFeedbackAlignment: done" in shown


@pytest.mark.check
def test_a_rule_that_kills_its_process_is_given_up(slow, tmp_path):
    module = tasks(slow)[0]
    deadly = sys.modules[module.network.__module__].Deadly
    failed, fine = nw.compare(module, [deadly, "Backprop"], storage=tmp_path / "a.db", seeds=1,
                              trials=1, epochs=2, workers=2, progress=False).rows
    assert failed.failure == "its process died again and again"
    assert fine.failure == ""
    assert len(fine.scores) == 1


def binaries():
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"),
                   key=lambda path: float(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


@pytest.fixture(scope="module")
def server():
    """A PostgreSQL of the test's own on loopback; the URL of its database."""
    programs = binaries()
    if programs is None:
        if os.environ.get("NETWRIGHT_REQUIRE_POSTGRES"):
            pytest.fail("no PostgreSQL: install Debian's package postgresql")
        pytest.skip("no PostgreSQL found; install Debian's package postgresql")
    pytest.importorskip("psycopg", reason="needs the extra distributed")
    folder = Path(tempfile.mkdtemp(prefix="netwright-postgres-"))
    # The server refuses to run as root.
    as_user: dict = {}
    if os.geteuid() == 0:
        as_user = {"user": "postgres", "group": "postgres", "extra_groups": ()}
        shutil.chown(folder, "postgres", "postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def call(program, *arguments):
        subprocess.run([programs / program, *arguments], check=True, cwd=folder, timeout=60,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **as_user)

    call("initdb", "-D", folder / "data", "-U", "postgres", "--auth=trust", "--no-sync")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    call("pg_ctl", "-D", folder / "data", "-o", options, "-w", "-l", folder / "log", "start")
    try:
        yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
    finally:
        call("pg_ctl", "-D", folder / "data", "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder)


@pytest.mark.check
@pytest.mark.postgres
def test_two_machines_share_a_database_and_lose_nothing_when_one_is_killed(server, tmp_path):
    file = tmp_path / "slow.py"
    file.write_text(FILE)
    options = {"seeds": 2, "trials": 4}
    changes = ["Backprop", "DirectFeedbackAlignment"]
    with storage_at(server) as storage:
        doomed, other = start(file, server, **options), start(file, server, **options)
        try:
            wait_for(lambda: len(runs(storage)) >= 2 and running(storage, doomed)
                     and running(storage, other))
            doomed.kill()
            doomed.wait()
            before = runs(storage)
            assert other.wait(timeout=120) == 0
        finally:
            for process in (doomed, other):
                process.kill()
                process.wait()
        after = runs(storage)
        assert len(before) < 12 == len(after)
        assert set(after.values()) == {1}
        assert set(before) <= set(after)

        shared = nw.recorded(server)
        alone = nw.compare(file, changes, storage=InMemoryStorage(), progress=False, **options)
        again = nw.compare(file, changes, storage=server, progress=False, **options)
        assert runs(storage) == after  # nothing was run again
    assert again.rows == shared.rows
    assert [row.scores for row in shared.rows] == [row.scores for row in alone.rows]
    assert [row.hyperparameters for row in shared.rows] == [
        row.hyperparameters for row in alone.rows]


@pytest.mark.check
@pytest.mark.postgres
def test_processes_of_one_machine_share_a_database(server, tmp_path):
    file = tmp_path / "quick.py"
    file.write_text(FILE.replace("time.sleep(0.003)", "pass").replace('"slow"', '"quick"'))
    row, = nw.compare(file, ["Backprop"], storage=server, seeds=2, trials=2, epochs=2, workers=2,
                      progress=False).rows
    assert row.failure == ""
    assert len(row.scores) == 2


@pytest.mark.check
@pytest.mark.postgres
def test_a_database_that_is_gone_says_so(server):
    script = ("import netwright as nw; nw.compare('digits-mlp', ['Backprop'], "
              f"storage={server.removesuffix('postgres') + 'nothing'!r})")
    failed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert failed.returncode
    assert "could not be opened" in failed.stderr.splitlines()[-1]
