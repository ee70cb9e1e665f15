import json

import pytest

from netwright.errors import UnknownName
from netwright.evidence import Curve, Outcome, evidence, experiment, experiments, recorded, run
from netwright.evidence.experiments import _known


@pytest.fixture
def toy():
    @evidence(paper="000-012", claim="two is more than one")
    def toy_experiment(scale):
        return Outcome("shown", {"scale": scale}, {"accuracy %": [1.0, 3.0]},
                       curves={"toy": Curve([0, 1], [[0.0, 1.0]])}, axes=("epoch", "accuracy"))
    yield "toy_experiment"
    del _known["toy_experiment"]


def test_run_writes_what_it_found(toy, tmp_path):
    report = run(toy, "desk", tmp_path)
    assert json.loads((tmp_path / "toy_experiment.json").read_text()) == report
    assert report["summary"]["accuracy %"] == {"mean": 2.0, "seeds": 2,
                                               "deviation": pytest.approx(2 ** 0.5)}
    assert report["paper"] == "000-012"
    assert report["setting"] == {"scale": "desk"}
    assert recorded(tmp_path) == {toy: report}


def test_a_failing_experiment_leaves_the_last_result(toy, tmp_path):
    before = run(toy, "desk", tmp_path)

    @evidence(paper="000-012", claim="breaks")
    def toy_experiment(scale):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run(toy, "desk", tmp_path)
    assert recorded(tmp_path) == {toy: before}


def test_an_unknown_name_gets_the_nearest(toy):
    with pytest.raises(UnknownName, match="toy_experiment"):
        experiment("toy_experimen")


def test_the_committed_results_are_of_experiments_that_exist():
    known = experiments()
    for name, result in recorded().items():
        assert known[name].paper == result["paper"]
        assert result["claim"] == known[name].claim
        assert result["verdict"] in ("shown", "partly shown", "not shown")
        assert result["figures"]
        assert result["setting"]
