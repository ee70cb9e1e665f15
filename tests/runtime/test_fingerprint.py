import copy
import subprocess
import sys
from functools import partial
from typing import NamedTuple

import torch

import netwright as nw
from netwright.runtime.fingerprint import fingerprint


def defined(source, name="f"):
    space = {"__name__": "somewhere"}
    exec(compile(source, "somewhere.py", "exec"), space)
    return space[name]


def test_code_counts_and_layout_does_not():
    plain = fingerprint(defined("def f(x):\n    return x + 1\n"))
    assert plain == fingerprint(defined("\n\ndef f(x):  # more\n    return x + 1\n"))
    assert plain != fingerprint(defined("def f(x):\n    return x + 2\n"))


def test_helpers_constants_and_enclosed_values_count():
    template = "width = {}\ndef g(x):\n    return x * {}\ndef f(x):\n    return g(x) + width\n"
    assert len({fingerprint(defined(template.format(*values)))
                for values in ((1, 1), (1, 2), (2, 1), (1, 1))}) == 3

    def enclosing(value):
        return lambda: value
    assert fingerprint(enclosing(1)) != fingerprint(enclosing(2))
    assert fingerprint(enclosing(1)) == fingerprint(enclosing(1))


def test_methods_and_bases_count():
    template = "class A:\n    def g(self):\n        return {}\nclass f(A):\n    x = {}\n"
    assert len({fingerprint(defined(template.format(*values)))
                for values in ((1, 1), (1, 2), (2, 1), (1, 1))}) == 3


def test_values_count():
    tensor = torch.arange(6.).to(torch.bfloat16)
    changed = tensor.clone()
    changed[3] = 9
    assert fingerprint(tensor) == fingerprint(tensor.clone()) != fingerprint(changed)
    assert fingerprint({"a": 1}) != fingerprint({"a": 2}) != fingerprint({"b": 2})
    assert fingerprint(partial(int, base=2)) != fingerprint(partial(int, base=3))


def test_the_same_in_another_process():
    script = ("from netwright.runtime.fingerprint import fingerprint; import netwright as nw\n"
              "from netwright.tasks import task\n"
              "def f(x): return x in {'a', 'b', 'c', 'd'}\n"
              "print(fingerprint(f, {'q', 'r', 's'}, task('digits-cnn'),\n"
              "                  [getattr(nw.rules, name) for name in nw.rules.__all__]))")
    found = {subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                            check=True, env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
                            ).stdout for seed in ("1", "2")}
    assert len(found) == 1


def test_use_does_not_change_a_rule():
    before = {name: fingerprint(getattr(nw.rules, name)) for name in nw.rules.__all__}
    assert len(set(before.values())) == len(before)
    rule = nw.rules.DirectFeedbackAlignment(torch.nn.Sequential(torch.nn.Linear(4, 3)),
                                            torch.zeros(2, 4))
    for _ in range(20):
        rule(torch.randn(2, 4), torch.tensor([0, 1]))
    for _ in range(3):
        assert before == {name: fingerprint(getattr(nw.rules, name)) for name in nw.rules.__all__}


def test_copies_do_not_change_a_class():
    class Pair(NamedTuple):
        left: int
    before = fingerprint(Pair)
    copy.deepcopy(Pair(1))
    assert hasattr(Pair, "__slotnames__")  # Python's note for itself
    assert fingerprint(Pair) == before
