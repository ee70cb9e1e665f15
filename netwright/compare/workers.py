"""The processes that do a comparison's runs: this one, or several of its own."""

import gc
import json
import os
import pickle
import pickletools
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import replace
from typing import IO, Any, Union

import torch

from netwright import errors
from netwright.compare.cells import Cell, Plan, cells_of, message_of, work
from netwright.compare.display import Display
from netwright.compare.trials import let_go, storage_at
from netwright.errors import NetwrightError


def here(cells: list[Cell], display: Display) -> None:
    """Do the jobs in this process while a thread shows how they stand."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(1.0):
            try:
                display.show([cell.look().status for cell in cells])
            except NetwrightError:
                break  # the work itself meets the same error, and raises it
        cells[0].tune.storage.remove_session()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        work(cells)
    finally:
        stop.set()
        watcher.join()


def elsewhere(cells: list[Cell], payload: bytes, workers: int, display: Display) -> None:
    """Let other processes do the jobs, and show how they stand."""
    with tempfile.TemporaryFile() as log:
        let_go(cells[0].tune.storage)
        crew: list[Worker] = []
        for _ in range(workers):
            crew.append(_hire(payload, log, crew))
        deaths = 0
        try:
            while True:
                looks = [cell.look() for cell in cells]
                display.show([look.status for look in looks])
                if all(look.finished for look in looks):
                    return
                for i, process in enumerate(crew):
                    if process.poll() is not None:
                        deaths += 1
                        _inquire(process, log, deaths)
                        _dismiss(process)
                        let_go(cells[0].tune.storage)
                        crew[i] = _hire(payload, log, crew)
                time.sleep(0.3)
        finally:
            for process in crew:
                process.terminate()
            for process in crew:
                _dismiss(process)


def payload_of(plan: Plan, url: Any, forgiven: list[tuple[int, int]]) -> bytes | None:
    """Return the plan for other processes, None where they could not read it."""
    if url is None:
        return None
    try:
        data = pickle.dumps((plan, str(url), forgiven))
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    # What the main script defines cannot be imported by another process.
    return None if any(arg == "__main__" for _, arg, _ in pickletools.genops(data)) else data


def why_not(plan: Plan, url: Any) -> str:
    """Return why `payload_of` gave None."""
    if url is None:
        return "a storage that is not a URL or a file cannot be shared"
    alone = [(task.name, replace(plan, tasks=[task], changes=[])) for task in plan.tasks]
    alone += [(change.label, replace(plan, tasks=[], changes=[change])) for change in plan.changes]
    for name, part in alone:
        if payload_of(part, url, []) is None:
            return (f"{name!r} has a function that another process cannot import (a lambda, or "
                    "one of the main script); put it into a module or a task file")
    return "the plan cannot be sent to another process"


def _hire(payload: bytes, log: Any, crew: "list[Worker]") -> "Worker":
    """Start a worker: by a fork, which has all imports, where that is safe."""
    if sys.platform == "linux" and not torch.cuda.is_available():
        return _Forked(payload, log, crew)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
                   "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    serving = "from netwright.compare.workers import serve; serve()"
    process = subprocess.Popen([sys.executable, "-c", serving], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=log, env=environment)
    assert process.stdin is not None
    # The pipe stays open: when this process dies the worker sees its end, and ends too.
    try:
        process.stdin.write(len(payload).to_bytes(8, "big") + payload)
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it died at once, which the next look at it tells
    return process


class _Forked:
    """A worker that is a fork of this process; it is asked as `subprocess.Popen` is.

    Its thread pools are this process's own, of which none is in it: it uses one thread. Nothing of
    this process's that others see, such as its output or a storage's connections, is used there.
    """

    def __init__(self, payload: bytes, log: Any, crew: "list[Worker]") -> None:
        source, lifeline = os.pipe()
        answers, answer = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for other in crew:  # or a pipe of theirs would stay open when this process dies
                    for pipe in (other.stdin, other.stdout):
                        if pipe is not None and not pipe.closed:
                            os.close(pipe.fileno())
                os.close(lifeline)
                os.close(answers)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY))
                sys.stdout = sys.stderr = os.fdopen(os.dup(2), "w", 1, encoding="utf-8",
                                                    errors="replace")
                _do(payload, os.fdopen(source, "rb", 0), answer)
            except KeyboardInterrupt:
                os._exit(130)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(source)
        os.close(answer)
        self.stdin: IO[bytes] | None = os.fdopen(lifeline, "wb", 0)
        self.stdout: IO[bytes] | None = os.fdopen(answers, "rb")

    def poll(self) -> int | None:
        """Return its status once it has ended, None before."""
        return self._waited(os.WNOHANG)

    def wait(self) -> int | None:
        """Return its status when it has ended."""
        return self._waited(0)

    def terminate(self) -> None:
        """Ask it to end."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def _waited(self, how: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


Worker = Union["subprocess.Popen[bytes]", _Forked]


def _dismiss(process: "Worker") -> None:
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _inquire(process: "Worker", log: Any, deaths: int) -> None:
    """Raise what ended a worker, unless it was killed and another may take its place."""
    assert process.stdout is not None
    said = process.stdout.read()
    if said:
        report = json.loads(said)
        kind = getattr(errors, report["error"], RuntimeError)
        if kind is not errors.UnknownName:
            raise kind(report["message"])
        raise RuntimeError(report["message"])
    if process.returncode == 0:
        return
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    if (process.returncode or 0) > 0 or deaths > 10:
        raise RuntimeError(f"a worker process ended with status {process.returncode}: "
                           f"{lines[-1] if lines else 'it said nothing'}; "
                           "workers=1 runs everything in this process")


def serve() -> None:
    """Do the jobs of the plan that comes on standard input; what a worker process runs."""
    source, answer = sys.stdin.buffer, os.dup(1)
    os.dup2(2, 1)  # what a task prints goes to the log
    try:
        _do(source.read(int.from_bytes(source.read(8), "big")), source, answer)
    except KeyboardInterrupt:
        sys.exit(130)


def _do(payload: bytes, source: Any, answer: int) -> None:
    """Do the jobs of a plan; end when `source` ends; say on `answer` what went wrong."""
    def end_with_parent() -> None:
        source.read(1)
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    gc.freeze()  # the imported libraries stay: measuring memory need not search them each time
    try:
        plan, url, forgiven = pickle.loads(payload)
        with storage_at(url, wait=True) as storage:
            work(cells_of(plan, storage, forgiven))
        # The last look of the one who started this worker ends it.
        threading.Event().wait()
    except Exception as error:
        traceback.print_exc()
        os.write(answer, json.dumps({"error": type(error).__name__,
                                     "message": message_of(error)}).encode())
        sys.exit(1)
