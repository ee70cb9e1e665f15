"""Trainings that are killed and started again, run by test_checkpoints.py in a process apart.

Every training runs in a child that is forked before PyTorch has started a thread, so that one
can be killed and the next started within milliseconds. Prints one line of JSON for each case.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import torch
from torch import Generator, nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

import netwright as nw
from netwright.catalogue.facets import methods
from netwright.contracts.check_rule import ordinary_network
from netwright.contracts.checks import variants
from netwright.data import Batches
from netwright.rules import Backprop, Rule

X = torch.randn(44, 6, generator=Generator().manual_seed(1))
Y = (X[:, :3].argmax(1) + (X[:, 3] > 1)) % 3
WIDE = torch.randn(44, 20, generator=Generator().manual_seed(2))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3),
                         nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))


class Jitter(Rule):
    """Backpropagation of inputs with noise from the rule's own generator."""

    def forward(self, x, y):
        noise = torch.randn(x.shape, generator=self.generator)
        return Backprop(self.network)(x + 0.1 * noise, y)


class Augmented(Dataset):
    """Samples changed at random by all three libraries."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i] * random.uniform(0.8, 1.2) + torch.rand(()) + numpy.random.rand(), Y[i]


def backprop(**keep):
    return nw.fit(network(), Batches(X, Y, 10, seed=5), epochs=3,
                  validation=Batches(X, Y, 20, shuffle=False), patience=1,
                  scheduler=lambda o: OneCycleLR(o, 0.02, total_steps=15), scheduler_unit="step",
                  seed=3, checkpoint_every=1, **keep)


def loader(**keep):
    return nw.fit(network(), DataLoader(torch.utils.data.TensorDataset(X, Y), 8, shuffle=True),
                  epochs=3, optimizer=lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True),
                  validation=DataLoader(torch.utils.data.TensorDataset(X, Y), 16),
                  scheduler=lambda o: ReduceLROnPlateau(o, mode="max", patience=0),
                  accumulate=2, clip=1.0, checkpoint_every=1, **keep)


def augmented(**keep):
    sampler = WeightedRandomSampler([1.0, 2.0] * 22, 44, generator=Generator().manual_seed(2))
    train = DataLoader(Augmented(), 10, sampler=sampler, generator=Generator().manual_seed(3))
    return nw.fit(network(), train, epochs=2, optimizer=torch.optim.RMSprop, checkpoint_every=2,
                  scheduler=lambda o: StepLR(o, 1, 0.5), **keep)


def jitter(**keep):
    rule = Jitter(network(), generator=Generator().manual_seed(4))
    return nw.fit(rule, Batches(X, Y, 10), epochs=2, optimizer=torch.optim.AdamW,
                  checkpoint_every=1, **keep), rule


def lbfgs(**keep):
    rule = Backprop(network())
    return nw.fit(rule, Batches(X, Y, 22), epochs=2, checkpoint_every=1,
                  optimizer=lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3), **keep)


def forgetful(**keep):
    """The control: a training that takes up everything but the random states."""
    nw.training.run.set_every_random_state = lambda *_: None
    nw.training.resuming.set_every_random_state = lambda *_: None
    return jitter(**keep)


def rule_case(rule: Any, label: str) -> Callable:
    def case(**keep):
        said, generator = rule.facets, Generator().manual_seed(6)
        train = Batches(WIDE, Y, 15) if said.batch is None else [said.batch()] * 3
        example = WIDE[:4] if said.batch is None else train[0][0]
        made = rule.value((said.network or ordinary_network)(), example=example,
                          generator=generator, **variants(rule.value)[label])
        return nw.fit(made, train, epochs=2, checkpoint_every=1, **keep)
    return case


def cases() -> dict[str, Callable]:
    """Return the cases above, each rule's first variant, and all of those that remember."""
    found = {case.__name__: case for case in OWN}
    for rule in (entry for entry in methods().values() if entry.facets.kind == "rule"):
        labels = list(variants(rule.value))
        for label in labels if rule.value.remembers else labels[:1]:
            found[f"{rule.name} {label}".strip()] = rule_case(rule, label)
    return found


OWN = (backprop, loader, augmented, jitter, lbfgs, forgetful)


def in_child(case: Callable, folder: Path, result: Path, *, die_at: int = -1,
             die_after: float = 0.0) -> bool:
    """Run `case` in a child, killed at its event `die_at` or after a time; return if it ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run_and_report(case, folder, result, die_at)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if die_after:
        time.sleep(die_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{case} failed")
    return True


def run_and_report(case: Callable, folder: Path, result: Path, die_at: int) -> None:
    resumed = (folder / "checkpoint.json").exists()
    seed = 1000 + os.getpid() if resumed else 0  # a resumed training must not depend on it
    for seeder in (torch.manual_seed, random.seed, numpy.random.seed):
        seeder(seed)
    if die_at >= 0:
        die_at_event(die_at)
    weights: dict[str, torch.Tensor] = {}
    original = nw.training.run.Run.all

    def watched(self):
        history = original(self)
        weights.update(self.rule.state_dict())
        weights["losses"] = torch.tensor([(e.loss, e.metric, e.learning_rate)
                                          for e in history.epochs], dtype=torch.float64)
        return history

    nw.training.run.Run.all = watched
    case(checkpoint=folder, progress=False)
    digest = hashlib.sha256()
    for name, value in weights.items():
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    result.write_text(digest.hexdigest())


def die_at_event(n: int) -> None:
    """Kill this process just before the nth thing that it does to the disk."""
    done = 0

    def dying(function):
        def call(*args, **kwargs):
            nonlocal done
            done += 1
            if done > n:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call

    def half(tensors, path):  # a file that is written in part, and safetensors' own beside it
        path.write_bytes(b"half")
        path.with_name(".tmpx1Y2z3").write_bytes(b"half")

    save_file = safetensors.torch.save_file
    safetensors.torch.save_file = lambda *a: (half(*a), dying(save_file)(*a))
    os.replace, os.fsync = dying(os.replace), dying(os.fsync)
    Path.unlink = dying(Path.unlink)


def check(case: Callable, work: Path, *, events: int, kills: int, draw: random.Random) -> dict:
    folder, result = work / "kept", work / "result"
    start = time.perf_counter()
    assert in_child(case, work / "reference", result)
    duration = time.perf_counter() - start
    expected, died = result.read_text(), 0
    endings = set()
    for event in range(events):  # each time one event later in the writing, then to the end
        shutil.rmtree(folder, ignore_errors=True)
        died += not in_child(case, folder, result, die_at=8 + event)
        while not in_child(case, folder, result):
            pass
        endings.add(result.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    for _ in range(kills):  # one training, killed again and again
        ended = in_child(case, folder, result, die_after=duration * draw.uniform(0.05, 0.9))
        died += not ended
    assert in_child(case, folder, result)
    endings.add(result.read_text())
    left = sorted(path.suffix for path in folder.iterdir())
    return {"same": endings == {expected}, "died": died, "left": left, "seconds": duration}


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    work, draw = Path(sys.argv[1]), random.Random(0)
    for name, case in cases().items():
        (work / name).mkdir()
        own = case in OWN
        report = check(case, work / name, events=16 if name == "backprop" else 3 if own else 1,
                       kills=6 if own else 3, draw=draw)
        print(json.dumps({"case": name, **report}), flush=True)


if __name__ == "__main__":
    main()
