import importlib
import inspect
import re

import pytest

import netwright as nw
from netwright.catalogue.facets import facets
from netwright.rules import Rule
from netwright.runtime import faces

ORDER = ("Args", "Shapes", "Returns", "Yields", "Raises", "Paper")
HEAD = re.compile(r"^(Args|Shapes|Returns|Yields|Raises|Paper)s?:", re.MULTILINE)
ARGS = re.compile(r"^Args:(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
SHAPES = re.compile(r"^Shapes:(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
ELSEWHERE = re.compile(r"^Args: those of `(\w+)`", re.MULTILINE)


def definitions():
    for module, path in faces.files("netwright"):
        for name in faces.declared(path):
            value = getattr(importlib.import_module(module), name)
            if inspect.isclass(value) or inspect.isfunction(value):
                yield pytest.param(value, id=f"{module}.{name}")


def methods():
    """Return the methods that stand by themselves, and the functions of the package's own face."""
    own = [getattr(nw, name) for name in nw._names if inspect.isfunction(getattr(nw, name))]
    for entry in definitions():
        value, said = entry.values[0], facets(entry.values[0])
        if (said and said.kind != "companion") or (value in own and len(arguments(value)) > 1):
            yield entry


def arguments(value):
    """Return the names of what is passed, but for what every rule has and `Rule` tells."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [name for name, parameter in inspect.signature(value).parameters.items()
             if parameter.kind not in variable]
    if inspect.isclass(value) and issubclass(value, Rule):
        names = [name for name in names if name not in told(Rule)]
    return names


def told(value):
    """Return the arguments that a docstring tells of in its `Args:` or its `Shapes:`."""
    doc = inspect.getdoc(value)
    other = ELSEWHERE.search(doc)
    if other:
        return told(getattr(inspect.getmodule(value), other[1]))
    entries = re.findall(r"^    (\w[\w, ]*):", "".join(ARGS.findall(doc)), re.MULTILINE)
    names = {name.strip() for entry in entries for name in re.split(r",| and ", entry)}
    return names | set(re.findall(r"\w+", "".join(SHAPES.findall(doc))))


@pytest.mark.parametrize("value", definitions())
def test_it_begins_with_one_sentence(value):
    first = inspect.getdoc(value).split("\n\n")[0]
    assert "\n" not in first
    assert first.endswith((".", ":", "?"))


@pytest.mark.parametrize("value", definitions())
def test_sections_stand_in_one_order_and_the_example_last(value):
    doc = inspect.getdoc(value)
    heads = list(HEAD.finditer(doc))
    ranks = [ORDER.index(head[1]) for head in heads]
    assert ranks == sorted(set(ranks))
    if heads and ">>>" in doc:
        assert heads[-1].start() < doc.index(">>>")


@pytest.mark.parametrize("value", definitions())
def test_a_paper_that_is_named_is_cited(value):
    said = facets(value)
    if said and said.papers:
        assert "Paper" in [head[1] for head in HEAD.finditer(inspect.getdoc(value))]


@pytest.mark.parametrize("value", methods())
def test_every_argument_of_a_method_is_told_of(value):
    assert [name for name in arguments(value) if name not in told(value)] == []


def test_what_every_rule_has_is_told_once():
    assert told(Rule) == {"network", "example", "loss", "generator"}
