import pytest

import netwright as nw
from netwright.catalogue.facets import KINDS, methods
from netwright.errors import UnknownName


def test_everything_that_is_asked_for_holds():
    found = nw.find(need="inference time", place="feedforward", kind="block")
    assert {"blocks.LowRankFeedForward", "blocks.FastFeedforward"} <= set(found.names)
    for entry in found:
        assert entry.facets.kind == "block"
        assert entry.facets.place == "feedforward"
        assert "inference time" in entry.facets.saves
    both = nw.find(need=["inference time", "training time"], kind="block", place="feedforward")
    assert {*both.names} < {*found.names}


def test_nothing_asked_is_everything():
    assert set(nw.find().names) == set(methods())
    assert sorted(name for kind in KINDS for name in nw.find(kind=kind).names) == [*methods()]


def test_what_is_to_be_done_without_is_not_needed():
    every, free = nw.find(kind="reshape"), nw.find(kind="reshape", without="training")
    assert {*every.names} - {*free.names} == {
        entry.name for entry in every if "training" in entry.facets.needs}


def test_words_are_looked_for_in_the_titles_of_papers():
    assert nw.find("finercut").names == ["reshape.prune_sublayers"]
    assert nw.find("no such words at all") == []
    assert repr(nw.find("no such words at all")) == "no method fits; ask for less"


def test_the_best_shown_come_first():
    orders = [found["measured"][0] for found in nw.find(need="training time").rows()
              if found["measured"]]
    ranks = ["shown", "partly shown", "not shown"]
    assert orders == sorted(orders, key=ranks.index)
    assert len(set(orders)) > 1


def test_near_words_are_understood_and_unknown_ones_refused():
    both = {*nw.find(need="training memory").names, *nw.find(need="inference memory").names}
    assert {*nw.find(need="memory").names} == both
    assert nw.find(need="learning without backpropagation") == nw.find(need="backpropagation")
    assert nw.find(place="feed-forward") == nw.find(place="feedforward")
    assert nw.find(kind="rules") == nw.find(kind="rule")
    for asked in ({"need": "inference tim"}, {"place": "feedforwards"}, {"kind": "rulez"},
                  {"without": "trainin"}):
        with pytest.raises(UnknownName, match="did you mean"):
            nw.find(**asked)


def test_a_row_of_the_table_says_what_the_method_says():
    lines = repr(nw.find("finercut")).splitlines()
    assert len(lines) == 2
    assert lines[0].index("measured") == lines[1].index("shown")
    assert lines[1].startswith("reshape.prune_sublayers  residual stream  parameters, file size")
