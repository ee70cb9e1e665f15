import os
import subprocess
import sys

import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from netwright.compare import trials
from netwright.compare.trials import Job, Ledger, open_storage, storage_at, worker
from netwright.errors import UnreachableStorage

JOB = Job("trial 0", {})


@pytest.fixture(params=["memory", "file"])
def ledger(request, tmp_path):
    place = InMemoryStorage() if request.param == "memory" else tmp_path / "a.db"
    with storage_at(place) as storage:
        yield Ledger(storage, "one", maximize=True, attributes={"about": 1})


def standing(ledger, forgiven=-1):
    return ledger.standing(["trial 0"], forgiven, ledger.trials())["trial 0"]


def claim_as(ledger, monkeypatch, who):
    with monkeypatch.context() as patch:
        patch.setattr(trials, "worker", lambda: who)
        return ledger.claim(JOB)


def test_a_job_is_done_once(ledger):
    assert standing(ledger).open
    first = ledger.claim(JOB)
    assert first is not None
    assert not standing(ledger).open
    assert ledger.claim(JOB) is None
    ledger.complete(first, 0.5, {"curve": [[1, 2.0]]})
    assert standing(ledger).done.value == 0.5
    assert standing(ledger).done.user_attrs["curve"] == [[1, 2.0]]
    assert ledger.claim(JOB) is None


def test_the_oldest_of_two_claims_holds(ledger, monkeypatch):
    # Both have added their trial before either looks.
    unseen, real = [], Ledger.trials

    def look(self):
        if not unseen:
            unseen.append(None)
            unseen[0] = Ledger.claim(self, JOB)
        return real(self)
    monkeypatch.setattr(Ledger, "trials", look)
    first = ledger.claim(JOB)
    assert first is not None
    assert unseen == [None]


def test_a_dead_process_loses_its_claim(ledger, monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    other = {**worker(), "process": process.pid, "born": trials._born(process.pid)}
    assert claim_as(ledger, monkeypatch, other) is not None
    assert not standing(ledger).open
    assert ledger.claim(JOB) is None
    process.kill()
    process.communicate()
    assert standing(ledger).open
    assert ledger.claim(JOB) is not None


def test_a_process_number_that_was_given_again_is_another_process(ledger, monkeypatch):
    other = {**worker(), "process": os.getppid(), "born": "1"}
    claim_as(ledger, monkeypatch, other)
    assert standing(ledger).open


def test_a_silent_worker_elsewhere_loses_its_claim(ledger, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(trials.time, "monotonic", lambda: clock[0])
    mine = claim_as(ledger, monkeypatch, {**worker(), "machine": "elsewhere"})
    assert not standing(ledger).open
    clock[0] = trials.GRACE - 1
    assert not standing(ledger).open
    ledger.storage.set_trial_user_attr(mine, "beat", [1, 0])
    clock[0] = 2 * trials.GRACE - 2
    assert not standing(ledger).open  # it beat in between
    clock[0] = 4 * trials.GRACE
    assert standing(ledger).open
    # It was only asleep: what it brings now is not taken, and nothing breaks.
    again = ledger.claim(JOB)
    ledger.complete(mine, 0.1, {})
    ledger.complete(again, 0.9, {})
    assert standing(ledger).done.value == 0.9


def test_a_worker_beats_and_tells_its_epoch(ledger, monkeypatch):
    monkeypatch.setattr(trials, "BEAT", 0.01)
    mine = ledger.claim(JOB)
    with ledger.beating(mine) as tell:
        tell(7)
        for _ in range(500):
            beat = ledger.storage.get_trial(mine).user_attrs.get("beat", [0, 0])
            if beat[1] == 7:
                break
            trials.time.sleep(0.01)
    assert beat[0] >= 1
    assert beat[1] == 7


def test_failures_hold_until_somebody_asks_again(ledger):
    mine = ledger.claim(JOB)
    ledger.fail(mine, "no labels", traceback="...")
    assert standing(ledger).failure == "no labels"
    assert standing(ledger, forgiven=ledger.last()).open
    again = ledger.claim(JOB)
    ledger.fail(again, "loss is nan", diverged=True)
    assert standing(ledger, forgiven=ledger.last()).failure == "loss is nan"


def test_a_run_that_was_broken_off_is_open_again(ledger):
    ledger.fail(ledger.claim(JOB), "")
    assert standing(ledger).open


def test_a_job_that_kills_its_workers_is_given_up(ledger, monkeypatch):
    for _ in range(trials.LIVES):
        assert standing(ledger).open
        claim_as(ledger, monkeypatch, {**worker(), "born": "1"})
    assert standing(ledger).failure == "its process died again and again"
    assert standing(ledger, forgiven=ledger.last()).open


def test_a_study_is_made_once(ledger):
    again = Ledger(ledger.storage, "one", maximize=True, attributes={"about": 2})
    assert again.study == ledger.study
    assert ledger.storage.get_study_user_attrs(ledger.study) == {"about": 2}


def test_several_processes_do_each_job_once(tmp_path):
    script = """
import sys
from netwright.compare.trials import Job, Ledger, open_storage
ledger = Ledger(open_storage(sys.argv[1]), "one", maximize=True, attributes={})
for k in range(12):
    mine = ledger.claim(Job(f"trial {k}", {}))
    if mine is not None:
        ledger.complete(mine, float(k), {})
"""
    crew = [subprocess.Popen([sys.executable, "-c", script, tmp_path / "a.db"]) for _ in range(3)]
    assert [process.wait() for process in crew] == [0, 0, 0]
    with storage_at(tmp_path / "a.db") as storage:
        trials_of = Ledger(storage, "one", maximize=True, attributes={}).trials()
    done = {key: [t for t in found if t.state == TrialState.COMPLETE]
            for key, found in trials_of.items()}
    assert {key: len(found) for key, found in done.items()} == {f"trial {k}": 1 for k in range(12)}


@pytest.mark.parametrize(("storage", "message"), [
    ("missing/folder/a.db", "in the folder missing/folder, which does not exist"),
    ("sqlite:////missing/folder/a.db", "could not be opened: unable to open database file"),
    ("postgresql://me:secret@127.0.0.1:9/none", "could not be opened: connection failed"),
    ("nonsense://host/name", "neither a path nor a database URL"),
    ("mysql+nodriver://host/name", "neither a path nor a database URL"),
])
def test_storage_that_cannot_be_reached(storage, message, monkeypatch, tmp_path):
    if storage.startswith("postgresql"):
        pytest.importorskip("psycopg", reason="needs the extra distributed")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnreachableStorage, match=message) as caught:
        open_storage(storage)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_database(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("not a database, but long enough to be looked at" * 50)
    before = file.read_bytes()
    with pytest.raises(UnreachableStorage, match="file is not a database"):
        open_storage(file)
    assert file.read_bytes() == before


def test_a_driver_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UnreachableStorage, match=r"pip install 'netwright\[distributed\]'"):
        open_storage("postgresql+psycopg://me@127.0.0.1:9/none")


def test_a_storage_that_goes_away(monkeypatch, caplog):
    from optuna.exceptions import StorageInternalError
    slept, tries = [], []
    monkeypatch.setattr(trials.time, "sleep", slept.append)

    def gone():
        tries.append(None)
        raise StorageInternalError("the server closed the connection\nunexpectedly")
    with pytest.raises(UnreachableStorage, match="closed the connection unexpectedly; nothing"):
        trials.patient(gone)
    assert 60 <= sum(slept) < 65
    assert len(tries) == len(slept) + 1
    assert "waited for up to 60 seconds" in caplog.text
    assert trials.patient(lambda: 3) == 3
