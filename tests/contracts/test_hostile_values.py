"""Values that make no sense are refused by name, before anything changes."""

import os
import signal
import time
from collections import Counter
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
from torch import nn

from netwright.catalogue.facets import methods
from tests.contracts.calls import calls, parameters, run, same, state_of

HOSTILE = {"None": None, "nan": float("nan"), "inf": float("inf"), "-1": -1, "2.5": 2.5,
           "-0.5": -0.5, "empty string": "", "string": "nonsense", "2**70": 2**70,
           "object": object(), "empty list": [], "empty mapping": {}, "bytes": b"x", "0": 0}
NAMED = 0.98  # the least share of what is refused that must name its argument
SLOW = 20


def outcomes(method, values):
    """Yield (argument, hostile value, what came of it, seconds) of a method's first variant."""
    found = calls(method)
    for name, parameter in parameters(method).items() if found else []:
        for label, bad in values.items():
            if type(bad) is type(parameter.default) and bad == parameter.default:
                continue
            call = {key: copied(value) for key, value in found[0].items()}
            before = {key: state_of(value) for key, value in call.items()}
            call[name] = bad
            start = time.perf_counter()
            what = outcome(method, call, name)
            after = {key: state_of(value) for key, value in call.items()}
            if what != "taken" and not all(same(before[key], after[key])
                                           for key in before if key != name):
                what = "changed"
            yield name, label, what, time.perf_counter() - start


def outcome(method, call, name):
    """Return what comes of a call: taken, named, or unnamed."""
    try:
        with torch.random.fork_rng(), at_most(SLOW):
            run(method, call)
    except TimeoutError:
        return "slow"
    except (ValueError, TypeError, ImportError, OSError) as error:
        said = str(error)
        return "named" if name in said or name.replace("_", " ") in said else f"unnamed: {error!r}"
    except Exception as error:
        return f"unnamed: {error!r}"
    return "taken"


@contextmanager
def at_most(seconds):
    """Raise TimeoutError in the body after some seconds."""
    def late(number, frame):
        raise TimeoutError
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def copied(value):
    """Return a value of one's own, where it is one that a call may change."""
    return deepcopy(value) if isinstance(value, (nn.Module, torch.Tensor, dict, list)) else value


def tried(values, chosen):
    """Return (method, argument, value, outcome) of every refusal, in a folder of its own."""
    found = []
    for name, method in methods().items():
        if chosen(name):
            found += [(name, argument, label, what) for argument, label, what, _ in
                      outcomes(method.value, values) if what != "taken"]
    return found


@pytest.mark.parametrize("part", range(4))
def test_what_fits_no_annotation_is_refused_by_name(part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [*methods()]
    found = tried({"object": object(), "2**70": 2**70}, lambda name: names.index(name) % 4 == part)
    wrong = [each for each in found if each[3] != "named"]
    assert len(found) > 100
    assert len(wrong) <= (1 - NAMED) * len(found), wrong
    assert not [each for each in wrong if each[3] in ("changed", "slow")]
    assert not os.listdir(tmp_path)


@pytest.mark.check
@pytest.mark.timeout(900)
def test_the_whole_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = tried(HOSTILE, lambda name: True)
    wrong = [each for each in found if each[3] != "named"]
    assert len(found) > 5000
    assert len(wrong) <= (1 - NAMED) * len(found), Counter(each[0] for each in wrong)
    assert not [each for each in wrong if each[3] in ("changed", "slow")]
    # Folders that `save` was told to write, an empty name being the one that it stands in.
    assert not {*os.listdir(tmp_path)} - {"nonsense", "kept", "changes.json", "model.safetensors"}
