import inspect
import json
from pathlib import Path

import pytest

import netwright
from netwright.catalogue import measurements as measured
from netwright.errors import UnknownName
from netwright.evidence import (
    Curve,
    Outcome,
    ages,
    evidence,
    experiment,
    experiments,
    figure,
    recorded,
    run,
)
from netwright.evidence.claims import judged
from netwright.evidence.experiments import _known
from netwright.evidence.folder import VARIABLE
from netwright.runtime.version import __version__

TOY = """
from netwright.evidence import Outcome, evidence, figure

@evidence(paper="000-012", claim="two is more than one",
          shown=[figure("two") > figure("one") + 0.5])
def small_toy(scale):
    return Outcome(setting={"scale": scale}, figures={"one": [1.0], "two": [TWO]})
"""


@pytest.fixture
def toy():
    @evidence(paper="000-012", claim="two is more than one")
    def toy_experiment(scale):
        return Outcome(verdict="shown", setting={"scale": scale},
                       figures={"accuracy %": [1.0, 3.0]},
                       curves={"toy": Curve([0, 1], [[0.0, 1.0]])}, axes=("epoch", "accuracy"))
    yield "toy_experiment"
    del _known["toy_experiment"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder of one experiment, in place of the checkout's."""
    (tmp_path / "small.py").write_text(TOY.replace("TWO", "2.0"))
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


def test_run_writes_what_it_found(toy, tmp_path):
    report = run(toy, "desk", tmp_path)
    assert json.loads((tmp_path / "toy_experiment.json").read_text()) == report
    assert report["summary"]["accuracy %"] == {"mean": 2.0, "seeds": 2,
                                               "deviation": pytest.approx(2 ** 0.5)}
    assert report["paper"] == "000-012"
    assert report["setting"] == {"scale": "desk"}
    assert report["version"] == __version__
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


def test_the_verdict_follows_from_the_declared_claims(home):
    report = run("small_toy")
    assert report["verdict"] == "shown"
    assert report["claims"] == [{"claim": "two > one + 0.5", "holds": True, "left": 2.0,
                                 "right": 1.5}]
    assert recorded()["small_toy"] == report


def test_a_verdict_is_declared_or_returned_and_not_both(toy, tmp_path):
    for options in ({"shown": [figure("one") > 0], "verdict": "shown"},
                    {"shown": [], "verdict": None}):
        @evidence(paper="000-012", claim="unclear", shown=options["shown"])
        def toy_experiment(scale, verdict=options["verdict"]):
            return Outcome(verdict=verdict, setting={}, figures={"one": [1.0]})
        with pytest.raises(ValueError, match="not both"):
            run(toy, "desk", tmp_path)


def test_a_result_is_older_than_its_code_once_that_changes(home):
    assert ages() == {"small_toy": "not run"}
    run("small_toy")
    assert ages() == {"small_toy": "of this code"}
    (home / "small.py").write_text(TOY.replace("TWO", "3.0"))
    assert ages() == {"small_toy": "older than its code"}
    assert run("small_toy")["figures"]["two"] == [3.0]
    path = home / "results" / "small_toy.json"
    old = {key: value for key, value in json.loads(path.read_text()).items()
           if key != "fingerprint"}
    path.write_text(json.dumps(old))
    assert ages() == {"small_toy": "not known"}


def test_results_are_read_once_and_again_when_they_change(home):
    run("small_toy")
    assert recorded()["small_toy"] is recorded()["small_toy"]
    path = home / "results" / "small_toy.json"
    path.write_text(json.dumps({"another": "result"}))
    assert recorded()["small_toy"] == {"another": "result"}


def test_a_folder_takes_the_place_of_the_checkouts_and_gives_it_back(home, monkeypatch):
    assert list(experiments()) == ["small_toy"]
    monkeypatch.delenv(VARIABLE)
    there = experiments()
    assert "mono_forward" in there
    assert "small_toy" not in there


def test_results_never_go_into_the_package(toy):
    inside = Path(netwright.__file__).parent / "evidence"
    with pytest.raises(ValueError, match="outside of the package"):
        run(toy, "desk", inside)


def test_without_a_checkout_it_says_where_the_experiments_are(tmp_path, monkeypatch):
    monkeypatch.setattr("netwright.evidence.folder.checkout", lambda: None)
    with pytest.raises(FileNotFoundError, match=VARIABLE):
        experiments()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="none"):
        experiments()


def test_the_committed_results_are_of_experiments_that_exist():
    known = experiments()
    for name, result in recorded().items():
        assert known[name].paper == result["paper"]
        assert result["claim"] == known[name].claim
        assert result["verdict"] in ("shown", "partly shown", "not shown")
        assert result["figures"]
        assert result["setting"]


def test_the_committed_verdicts_follow_from_the_figures():
    results = recorded()
    declared = {name: found for name, found in experiments().items() if found.shown}
    assert len(declared) >= 10
    for name, found in declared.items():
        verdict, claims = judged(found.shown, results[name]["figures"], partly=found.partly)
        assert (results[name]["verdict"], results[name]["claims"]) == (verdict, claims)


def test_what_is_not_shown_says_why():
    known, results = experiments(), recorded()
    short = [name for name, result in results.items() if result["verdict"] != "shown"]
    assert [name for name in short if known[name].shortfall is None] == []
    unexplained = [name for name in short if known[name].shortfall[0] == "open"]
    assert len(unexplained) <= 0.1 * len(results)


def test_an_installed_package_says_in_short_what_the_checkout_measured(tmp_path, monkeypatch):
    here = measured.measurements()
    assert set(here) == set(recorded())
    assert set(here["mono_forward"]) == {*measured.SAID, "summary"}
    (tmp_path / "netwright" / "catalogue").mkdir(parents=True)
    (tmp_path / "evidence").symlink_to(Path(netwright.__file__).parents[1] / "evidence")
    measured.ship(tmp_path)
    monkeypatch.setattr(measured, "SHIPPED", tmp_path / "netwright/catalogue/evidence.json")
    monkeypatch.setattr(measured, "checkout", lambda: None)
    assert measured.measurements.__wrapped__() == here


def test_stacks_can_be_looked_at_after_experiments_were_found():
    experiments()
    assert any(frame.filename == __file__ for frame in inspect.stack())
