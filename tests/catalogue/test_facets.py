import inspect
from typing import ClassVar

import pytest
from torch import nn

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
