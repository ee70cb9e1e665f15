import shutil

import pytest

from netwright.evidence import code
from netwright.evidence.folder import VARIABLE

EXPERIMENT = '''
"""What it is about."""
import netwright as nw
from evidence.near import helper
from netwright.data import digits
from netwright.rules import MonoForward

__all__ = []
SIZE = 3


def experiment(scale):
    """Say what it does."""
    return helper(MonoForward, digits(), nw.models.mlp, SIZE)


@evidence(paper="003-024", claim="One.")
def another(scale):
    """Say what it does."""
'''
NEAR = '''
def helper(rule, *rest: int) -> int:
    if not rest:
        raise ValueError("there must be something")
    return inner(rest)


def inner(rest):
    return len(rest)


def other():
    return 1
'''


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "one.py").write_text(EXPERIMENT)
    (tmp_path / "near.py").write_text(NEAR)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


def digest():
    return code.fingerprints(["evidence.one"])["evidence.one"]


@pytest.mark.parametrize(("file", "old", "new", "changes"), [
    ("one.py", "SIZE = 3", "SIZE = 4", True),
    ("one.py", 'claim="One."', 'claim="One.", shortfall=("scale", "Why.")', False),
    ("one.py", 'claim="One."', 'claim="One.", shown=[1]', True),
    ("near.py", "len(rest)", "len(rest) + 1", True),
    ("near.py", "    return inner(rest)", "    return rest and inner(rest)", True),
    ("near.py", "if not rest", "if len(rest) < 1", False),  # a check lets through or raises
    ("near.py", "    return inner", "    checks.count(1, rest=len(rest))\n    return inner", False),
    ("near.py", "    return inner", "    for one in rest:\n        if one is None:\n"
     "            raise TypeError(one)\n    return inner", False),
    ("near.py", "return 1", "return 2", False),  # a function that is not used
    ("near.py", "something", "anything", False),  # what an error says
    ("near.py", "*rest: int) -> int", "*rest: str) -> object", False),
    ("one.py", "Say what it does", "Say it", False),
    ("one.py", "SIZE = 3", "SIZE = 3  # as many as there are", False),
    ("one.py", "from evidence.near import helper", "from evidence.near import helper, other",
     False),
])
def test_code_counts_and_words_do_not(home, file, old, new, changes):
    before = digest()
    text = (home / file).read_text()
    assert old in text
    (home / file).write_text(text.replace(old, new))
    assert (digest() != before) is changes


def test_a_helper_may_move(home):
    before = digest()
    shutil.move(home / "near.py", home / "far.py")
    one = home / "one.py"
    one.write_text(one.read_text().replace("evidence.near", "evidence.far"))
    assert digest() == before


def test_it_reaches_the_methods_that_are_used_and_no_others(home):
    modules = {module for module, _ in code.dependencies("evidence.one")}
    assert {"evidence.one", "evidence.near", "netwright.rules.local.mono_forward",
            "netwright.rules.rule", "netwright.data.images", "netwright.models.mlp"} <= modules
    assert not {module for module in modules if module.startswith((
        "netwright.rules.feedback", "netwright.reshape", "netwright.blocks", "netwright.catalogue",
        "netwright.evidence"))}
    assert ("netwright.data.images", "digits") in code.dependencies("evidence.one")
    assert ("netwright.data.images", "mnist") not in code.dependencies("evidence.one")


def test_a_room_that_is_asked_for_as_a_whole_counts_as_a_whole(home):
    for used in ("vars(nw.optim)", "[getattr(nw.optim, name) for name in nw.optim.__all__]"):
        (home / "one.py").write_text(f"import netwright as nw\nALL = {used}\n")
        assert {"netwright.optim.block_proximal_descent", "netwright.optim.greedy_block_descent"
                } <= {module for module, _ in code.dependencies("evidence.one")}


def test_the_trainer_counts_and_the_bookkeeping_does_not(home):
    (home / "one.py").write_text(
        "from netwright.evidence import Outcome, figure, train\n"
        "def experiment(scale):\n    return Outcome(train({}), figure)\n")
    modules = {module for module, _ in code.dependencies("evidence.one")}
    assert "netwright.evidence.train" in modules
    assert "netwright.evidence.claims" not in modules
