import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from torch import nn

import netwright as nw
from netwright.catalogue.facets import KINDS, facets, method, methods, searched
from netwright.compare.changes import distribution
from netwright.errors import UnknownName

METHODS = pytest.mark.parametrize("entry", methods().values(), ids=lambda entry: entry.name)


@METHODS
def test_what_is_supplied_and_what_is_tuned_are_arguments(entry):
    arguments = inspect.signature(entry.value).parameters
    assert {*entry.facets.takes, *entry.facets.search} <= set(arguments)
    assert not {*entry.facets.takes} & {*entry.facets.search}


@METHODS
def test_every_search_is_a_space_that_can_be_drawn_from(entry):
    for values in entry.facets.search.values():
        assert distribution(values) is not None


@METHODS
def test_every_block_has_a_place_and_every_reshape_says_what_it_changes(entry):
    if entry.facets.kind in ("block", "reshape"):
        assert entry.facets.place
    if entry.facets.kind == "reshape":
        assert entry.facets.keeps_function is not None


def test_every_kind_is_in_use():
    assert {entry.facets.kind for entry in methods().values()} == set(KINDS)


def test_unknown_words_are_refused_with_the_nearest():
    with pytest.raises(UnknownName, match="feedforward"):
        method("block", place="feed-forward")
    with pytest.raises(UnknownName, match="inference time"):
        method("block", saves=["inference-time"])
    with pytest.raises(UnknownName, match="labels"):
        method("rule", needs=["label"])
    with pytest.raises(UnknownName, match="rule"):
        method("rules")


def test_facets_are_not_inherited_but_what_is_tuned_is():
    @method("block", place="linear", search={"rank": [1, 2]})
    class Narrow(nn.Module):
        pass

    class Narrower(Narrow):
        pass

    class Own(Narrow):
        search: ClassVar = {"rank": [8]}

    assert facets(Narrow).place == "linear"
    assert facets(Narrower) is None
    assert searched(Narrower) == {"rank": [1, 2]}
    assert searched(Own) == {"rank": [8]}
    assert searched(len) == {}


def test_everything_that_says_what_it_is_for_is_found():
    said = [node.name for path in Path(nw.__file__).parent.rglob("*.py")
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, (ast.ClassDef, ast.FunctionDef))
            and any(isinstance(decorator, ast.Call)
                    and getattr(decorator.func, "id", "") == "method"
                    for decorator in node.decorator_list)]
    assert sorted(said) == sorted(name.rpartition(".")[2] for name in methods())


def test_every_public_name_of_the_rules_is_a_rule():
    # `compare --all-rules` runs what stands there.
    found = {name.removeprefix("rules.") for name, entry in methods().items()
             if entry.facets.kind == "rule"}
    assert set(nw.rules.__all__) == {*found, "Rule"}


def test_methods_are_found_without_what_extras_bring():
    extras = ("cma", "peft", "psycopg", "tensorboard", "torch_geometric", "torchdiffeq",
              "transformers")
    code = (f"import sys; sys.modules.update(dict.fromkeys({extras}))\n"
            "from netwright.catalogue.facets import methods\nprint(len(methods()))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) == len(methods())
