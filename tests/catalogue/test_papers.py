import json
from dataclasses import replace
from pathlib import Path

import pytest

import netwright
from netwright import evidence, papers
from netwright.catalogue.facets import methods
from netwright.errors import UnknownName

CATALOGUE = Path(papers.__file__).parent / "catalogue.jsonl"


def test_the_catalogue_is_whole():
    entries = [json.loads(line) for line in CATALOGUE.read_text(encoding="utf-8").splitlines()]
    assert len(entries) == len({entry["id"] for entry in entries}) == 635
    for entry in entries:
        assert entry["family"] in papers.FAMILIES
        assert all(entry[key] for key in ("title", "gist", "claim", "experiment"))
        assert not {"abstract", "names", "evidence"} & set(entry)


@pytest.mark.parametrize("paper", [p for p in papers.papers() if p.names], ids=lambda p: p.id)
def test_every_name_imports_and_is_public(paper):
    for name, found in zip(paper.names, paper.implementations(), strict=True):
        package, _, last = name.rpartition(".")
        assert found is not None
        assert last in papers.resolve(package).__all__, f"{name} is not exported"


def test_every_evidence_key_exists_and_points_back():
    known = evidence.experiments()
    for paper in papers.papers():
        for name in paper.evidence:
            assert name in known, f"{paper.id} names evidence {name}, which no function defines"
            assert paper.id == known[name].paper
    for name, found in known.items():
        assert name in papers.paper(found.paper).evidence, f"{found.paper} does not list {name}"


def test_every_experiment_has_a_committed_result():
    assert set(evidence.experiments()) == set(evidence.recorded())


def test_an_implemented_paper_has_evidence_and_is_not_left_out():
    for paper in papers.papers():
        assert paper.status == ("works" if paper.names else "left out" if paper.left_out
                                else "open")


def test_every_paper_that_a_method_names_is_in_the_catalogue():
    known = {paper.id for paper in papers.papers()}
    for method in methods().values():
        assert set(method.facets.papers) <= known, method.name


def test_a_paper_left_out_says_why():
    paper = papers.Paper("9", "A title", "rule", "gist", "claim", "experiment", left_out="no data")
    assert paper.status == "left out"
    assert replace(paper, left_out="").status == "open"
    assert replace(paper, left_out="", names=("rules.Backprop",)).status == "open"


def test_a_longer_name_resolves_too():
    assert papers.resolve("blocks.experts.WideNet") is papers.resolve("blocks.WideNet")


def test_find_by_words_family_and_missing():
    assert [p.id for p in papers.find("finercut")] == ["000-012"]
    assert len(papers.find(family="rule")) == 37
    assert papers.find(family="learning rules") == papers.find(family="rule")
    assert all(not p.names for p in papers.find(missing=True))
    assert papers.find("no such words at all") == []


def test_unknown_ids_and_families_get_the_nearest():
    with pytest.raises(UnknownName, match="003-024"):
        papers.paper("003-0244")
    with pytest.raises(UnknownName, match="rule"):
        papers.find(family="rules")


def test_the_catalogue_ships_with_the_package():
    assert CATALOGUE.is_relative_to(Path(netwright.__file__).parent)
