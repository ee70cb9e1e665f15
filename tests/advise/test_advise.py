import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.advise import finalists
from netwright.advise.advice import Advice
from netwright.advise.candidates import options, settings
from netwright.advise.laboratory import Laboratory, TimeUp, limited
from netwright.advise.wants import wanted
from netwright.errors import UnknownName
from netwright.models import gpt
from tests.advise.made_up import halve_hidden

# A try may be told to end while the collector runs, whose errors go nowhere but into a warning.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def few_methods(monkeypatch):
    """Let three methods be known, so that a question takes seconds; the other tests have all."""
    asking = sys.modules[nw.advise.__module__]

    def some(*given):
        found, aside = options(*given)
        return [option for option in found if option.name.endswith(
            ("halve_hidden", "prune_sublayers", "cast"))], aside
    monkeypatch.setattr(asking, "options", some)


def network(seed=0):
    """A network whose hidden units are mostly of no use."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3))
    with torch.no_grad():
        model[0].weight[16:] *= 1e-3
        model[2].weight[:, 16:] *= 1e-3
    return model.eval()


def samples(count=96):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1))


def asked(folder, **options):
    return nw.advise(network(), samples(), folder=folder, progress=False,
                     **{"want": "size=0.9", "keep": 0.9, "budget": 15, **options})


def test_a_made_up_reshape_is_proposed_by_its_facets():
    found, _ = options(network(), samples(4), wanted("size=0.5"))
    mine = next(option for option in found if option.name.endswith("halve_hidden"))
    assert [step.arguments for step in mine.steps] == [{}, {"keep": 0.75}]
    assert "linear layers" in mine.where
    others, aside = options(network(), samples(4), wanted("inference_time=0.5"))
    assert not any(option.name.endswith("halve_hidden") for option in others)
    assert any(entry.name.endswith("halve_hidden") and "it saves file size" in entry.why
               for entry in aside)


def test_settings_are_defaults_then_the_search_then_variants():
    found = settings(nw.reshape.prune_sublayers)
    assert found[0].arguments == {}
    assert {"remove": 1} in [step.arguments for step in found]
    assert len({str(step) for step in found}) == len(found)


def test_advice_is_measured_saved_and_loads(tmp_path):
    model, before = network(), {name: t.clone() for name, t in network().state_dict().items()}
    found = nw.advise(model, samples(), want="size=0.9", keep=0.9, budget=15, folder=tmp_path,
                      progress=False)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())
    best = found.recommended
    assert found.met
    assert best["meets"]
    assert "halve_hidden" in best["recipe"]
    assert best["shares"]["size"] <= 0.9
    assert best["quality"]["low"] >= 0.9
    folder = tmp_path / best["folder"]
    loaded = nw.load(folder, network())
    assert loaded[0].out_features in (32, 48)
    held = sum(path.stat().st_size for path in folder.iterdir()
               if path.name not in ("recipe.json", "README.md"))
    assert held == best["figures"]["size"]
    assert best["recipe"] in (folder / "README.md").read_text()
    assert json.loads((folder / "recipe.json").read_text()) == best["plain"]
    original = found.points[0]
    assert (original["number"], original["dominated"]) == (0, False)
    again = Advice.read(tmp_path)
    assert again.plain == json.loads(json.dumps(found.plain))
    assert "* " not in repr(found).splitlines()[1]
    assert found.verdict in repr(found)


def test_layers_that_stay_are_named_with_their_share(tmp_path):
    found = asked(tmp_path)
    layers = found.recommended["layers"]
    assert [layer["name"] for layer in layers] == ["0", "2"]
    assert sum(layer["share"] for layer in layers) == pytest.approx(1.0)
    assert found.recommended["untouched"] == []


def test_a_second_question_uses_what_is_there(tmp_path, monkeypatch):
    first = asked(tmp_path)
    tries = len(first.plain["tried"])

    def refuse(*_):
        raise AssertionError("tried again")
    monkeypatch.setattr(Laboratory, "tried", refuse)
    second = asked(tmp_path, want="size=0.75", keep=0.5)
    assert second.met
    assert second.recommended["shares"]["size"] <= 0.75
    assert len(second.plain["tried"]) == tries


def test_nothing_met_the_limits_is_an_answer(tmp_path):
    found = asked(tmp_path, want="size=0.01", keep=1.0)
    assert not found.met
    assert found.verdict.startswith("Nothing met size=0.01, keep=1")
    assert found.recommended["misses"]
    assert found.points[0]["recipe"] == "the original"


def test_without_limits_there_is_a_front(tmp_path):
    found = asked(tmp_path, want=())
    assert found.plain["resources"] == ["size", "inference_time", "inference_memory"]
    assert found.points[0] in found.front
    assert found.recommended["quality"]["low"] >= 0.9


def test_labels_and_a_metric_judge(tmp_path):
    x = samples()
    y = network()(x).argmax(-1)
    found = nw.advise(network(), nw.data.Split(x, y, x, y), want="size=0.9", keep=0.8, budget=15,
                      metric="accuracy", folder=tmp_path, progress=False)
    assert found.plain["quality"]["labels"]
    assert found.plain["quality"]["original"] == 1.0
    assert found.recommended["quality"]["metric"] == pytest.approx(
        found.recommended["quality"]["value"])


def test_what_fails_is_listed_with_its_reason(tmp_path):
    def breaks(model):
        raise RuntimeError("no luck")
    found = asked(tmp_path, also=[breaks])
    failed = next(entry for entry in found.plain["failed"] if "breaks" in entry["recipe"])
    assert failed["reason"] == "RuntimeError: no luck"
    assert found.met
    assert found.plain["aside"]
    assert all(entry["why"] for entry in found.plain["aside"])


def nothing(model, calibration):
    return nn.Sequential(*model)


def test_a_recipe_of_ones_own_is_tried_and_what_changes_nothing_is_no_gain(tmp_path):
    found = asked(tmp_path, also=[nothing])
    tried = next(entry for entry in found.plain["tried"] if entry["recipe"] == "nothing")
    assert tried["quality"] == 1.0
    assert tried["shares"]["size"] == 1.0
    assert found.recommended["recipe"] != "nothing"


@pytest.mark.parametrize(("change", "kind", "said"), [
    ({"want": "siz=0.5"}, UnknownName, "did you mean size"),
    ({"want": "size=0.5, 3"}, ValueError, "want size must be"),
    ({"want": "size=5GB"}, ValueError, "met already"),
    ({"want": "parameters=10000"}, ValueError, "met already"),
    ({"want": "training_memory=0.5"}, ValueError, "about training"),
    ({"keep": 0.0}, ValueError, "keep must be"), ({"keep": 1.5}, ValueError, "keep must be"),
    ({"budget": 0.01}, ValueError, "budget must be at least"),
    ({"budget": "soon"}, ValueError, "budget must be a time"),
    ({"batch": 0}, ValueError, "batch must be"),
    ({"fidelity": "cosin"}, UnknownName, "did you mean cosine"),
    ({"also": ["prune_sublayer"]}, UnknownName, "did you mean")])
def test_bad_input_is_said_before_anything_is_written(change, kind, said, tmp_path):
    folder = tmp_path / "advice"
    with pytest.raises(kind, match=said):
        asked(folder, **change)
    assert not (folder / "advice.json").exists()


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder"):
        asked(tmp_path / "file")
    with pytest.raises(ValueError, match="is a file"):
        asked(tmp_path / "file" / "below")


def test_a_disk_that_fills_keeps_what_was_found(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(finalists, "save", full)
        with pytest.raises(OSError, match="No space left"):
            asked(tmp_path)
    assert not (tmp_path / "advice.json").exists()
    assert asked(tmp_path).met


def test_a_try_ends_when_its_time_is_over():
    start = time.monotonic()
    with pytest.raises(TimeUp), limited(0.1):
        time.sleep(5)
    assert time.monotonic() - start < 2
    with limited(0.05):
        pass
    time.sleep(0.1)  # the alarm is off


def sleeper(model):
    time.sleep(60)
    return model


@pytest.mark.check
def test_the_budget_is_kept_where_a_candidate_does_not_end(tmp_path):
    start = time.monotonic()
    found = asked(tmp_path, also=[sleeper], budget=12)
    assert time.monotonic() - start < 14
    assert any(entry["recipe"] == "sleeper" and "not done after" in entry["reason"]
               for entry in found.plain["failed"])
    assert found.met


SCRIPT = """
import json, sys
from tests.advise.test_advise import asked
print(json.dumps([point["recipe"] for point in asked(sys.argv[1]).points]))
"""


@pytest.mark.check
def test_after_a_kill_it_goes_on_and_ends_with_the_same_front(tmp_path):
    top = Path(__file__).parents[2]
    run = [sys.executable, "-c", SCRIPT]
    environment = {**os.environ, "PYTHONPATH": str(top)}
    whole = subprocess.run([*run, str(tmp_path / "whole")], env=environment, check=True,
                           capture_output=True, text=True).stdout
    for _ in range(2):
        process = subprocess.Popen([*run, str(tmp_path / "killed")], env=environment,
                                   stdout=subprocess.DEVNULL)
        time.sleep(5)
        process.send_signal(signal.SIGKILL)
        process.wait()
    after = subprocess.run([*run, str(tmp_path / "killed")], env=environment, check=True,
                           capture_output=True, text=True).stdout
    assert sorted(json.loads(after)) == sorted(json.loads(whole))


def test_two_workers_share_a_storage(tmp_path):
    storage = tmp_path / "shared.db"
    first = asked(tmp_path / "one", storage=storage)
    second = asked(tmp_path / "two", storage=storage)
    assert {one["recipe"] for one in first.plain["tried"]} == {
        one["recipe"] for one in second.plain["tried"]}
    assert second.met


@pytest.mark.check
def test_a_transformer_is_advised_on_by_its_own_distribution(tmp_path):
    torch.manual_seed(0)
    found = nw.advise(gpt(20, context=8), torch.randint(20, (64, 8)), want="size=0.9", keep=0.3,
                      budget=15, folder=tmp_path, progress=False)
    assert found.plain["quality"]["name"] == "distribution"
    assert found.met
    assert any("prune_sublayers" in one["recipe"] for one in found.plain["tried"])
    reread = nw.recipe(json.loads((tmp_path / found.recommended["folder"] / "recipe.json")
                                  .read_text()))
    assert str(reread) == found.recommended["recipe"]


def test_halving_is_a_reshape_like_others():
    small = halve_hidden(network(), check=False)
    assert small[0].out_features == 32


@nw.reshape.reshape
def learnt(model, teacher, calibration):
    """Return a copy with the teacher's last bias, as a training would find it."""
    return nw.reshape.decided({"bias": teacher[2].bias.tolist()})


@learnt.applies
def with_bias(model, decision):
    model[2].bias.data = torch.tensor(decision["bias"])
    return model


def test_a_step_that_learns_is_given_the_original_as_its_teacher():
    model = network()
    changed = nw.apply([halve_hidden, learnt], model, samples())
    assert changed[0].out_features == 32
    assert torch.equal(changed[2].bias, model[2].bias)
