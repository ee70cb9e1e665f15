import gc
import json
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from torch import nn

import netwright as nw
from netwright.compare.changes import Change
from netwright.compare.compare import tasks
from netwright.errors import (
    BadTaskFile,
    CorruptCheckpoint,
    Diverged,
    ReadOnlyStorage,
    UnknownName,
    UnreachableStorage,
)
from netwright.rules import Backprop, Rule
from netwright.tasks import Parts


@pytest.fixture(autouse=True, scope="module")
def _fast_collection():
    gc.collect()
    gc.freeze()  # every measurement of memory collects garbage first
    yield
    gc.unfreeze()


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def points():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    x = torch.randn(90, 4, generator=generator) + 3 * nn.functional.one_hot(y, 4)
    return x[:60], y[:60], x[60:], y[60:]


POINTS = nw.Task("points", network, points, epochs=4, batch_size=20, learning_rate=1e-2)


class Frozen(Backprop):
    """A control that learns nothing."""

    def forward(self, x, y):
        loss = super().forward(x, y)
        for p in self.parameters():
            p.grad.zero_()
        return loss


class NeedsLabels(Backprop):
    def forward(self, x, y):
        raise ValueError("x must hold labels, got points; choose another rule")


class Named(Backprop):
    pass


class Diverging(Backprop):
    search: ClassVar = {"strength": [1.0, 2.0]}

    def __init__(self, network, *, strength=1.0):
        super().__init__(network)
        self.strength = strength

    def forward(self, x, y):
        if self.strength == 2.0:
            raise Diverged("loss is nan at epoch 1, step 1; lower the learning rate")
        return super().forward(x, y)


def trained(changes, task=POINTS, *, storage=None, **options):
    options = {"seeds": 2, "trials": 3, "progress": False, **options}
    return nw.compare(task, changes, storage=storage or InMemoryStorage(), **options)


def runs(storage):
    """Return the number of finished runs by study and job."""
    found = {}
    for study in storage.get_all_studies():
        for trial in storage.get_all_trials(study._study_id):
            if trial.state == TrialState.COMPLETE:
                key = study.study_name, trial.user_attrs["job"]
                found[key] = found.get(key, 0) + 1
    return found


def test_a_row_holds_what_a_hand_written_run_gives():
    found, = trained({"exact": Backprop}, trials=1, seeds=[5]).rows
    torch.manual_seed(5)
    rule, parts = Backprop(network()), POINTS.parts(5)
    optimizer = torch.optim.Adam(rule.parameters(), lr=1e-2)
    for _ in range(4):
        for x, y in parts.train:
            optimizer.zero_grad()
            rule(x, y)
            optimizer.step()
    (x, y), = parts.test
    assert found.scores == [nw.objectives.accuracy(rule.predict(x), y)]
    assert (found.task, found.change, found.metric, found.trials) == (
        "points", "exact", "accuracy", 1)
    assert found.parameters == 67
    assert found.failure == ""
    assert found.hyperparameters == {"learning_rate": 1e-2}
    assert [entry[0] for entry in found.curves[0]] == [1, 2, 3, 4]
    assert found.curves[0][-1][3] == found.scores[0]
    assert found.train_time == [found.curves[0][-1][1]]
    cost = nw.measure.cost(rule, POINTS.batch)
    assert (found.flops, found.saved_bytes, found.peak_bytes) == (
        cost.flops, cost.saved_bytes, cost.peak_bytes)
    assert found.step_time > 0
    assert found.alignment == pytest.approx({"0": 1.0, "2": 1.0})


def test_learning_beats_the_control():
    exact, control = trained({"exact": Backprop, "control": Frozen}).rows
    assert exact.mean > 0.8 > control.mean


def test_every_change_gets_the_same_trials_and_seeds():
    storage = InMemoryStorage()
    trained([Backprop, Named], storage=storage, seeds=3, trials=4)
    found = runs(storage)
    assert set(found.values()) == {1}
    for change in ("Backprop", "Named"):
        jobs = [key[1].split(" · ")[0] for key in found if f"/{change}/" in key[0]]
        assert sorted(jobs) == ["seed 0", "seed 1", "seed 2", "trial 0", "trial 1", "trial 2",
                                "trial 3"]


def test_the_best_settings_are_used():
    storage = InMemoryStorage()
    row, = trained([Backprop], storage=storage).rows
    study = next(s for s in storage.get_all_studies() if not s.study_name.endswith("/final"))
    complete = storage.get_all_trials(study._study_id, states=[TrialState.COMPLETE])
    best = max(complete, key=lambda trial: trial.value)
    assert row.hyperparameters == best.params


def test_the_same_results_anywhere_and_the_random_state_untouched():
    before = torch.get_rng_state()
    first = trained([Backprop]).rows[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    second = trained([Backprop]).rows[0]
    assert first.scores == second.scores
    assert [[e[2:] for e in c] for c in first.curves] == [[e[2:] for e in c]
                                                           for c in second.curves]


def test_what_is_recorded_is_not_run_again():
    storage = InMemoryStorage()
    first = trained([Backprop], storage=storage)
    assert sum(runs(storage).values()) == 5
    again = trained([Backprop], storage=storage)
    assert sum(runs(storage).values()) == 5
    assert again.rows == first.rows
    more = trained([Backprop], storage=storage, seeds=3)
    assert sum(runs(storage).values()) == 6
    assert more.rows[0].scores[:2] == first.rows[0].scores
    assert nw.recorded(storage).rows == more.rows


def test_other_settings_and_other_code_are_not_mixed():
    storage = InMemoryStorage()
    trained([Backprop], storage=storage, epochs=1)
    longer = trained([Backprop], storage=storage, epochs=2)
    assert sum(runs(storage).values()) == 10
    assert len(longer.rows[0].curves[0]) == 2
    other = nw.Task("points", lambda: nn.Sequential(nn.Linear(4, 3)), points, epochs=1)
    shallow = trained([Backprop], other, storage=storage)
    assert sum(runs(storage).values()) == 15
    assert shallow.rows[0].parameters == 15
    assert nw.recorded(storage).rows == shallow.rows  # the newest of that task and change


def test_a_change_that_cannot_run_does_not_stop_the_others(monkeypatch):
    storage = InMemoryStorage()
    failed, fine = trained([NeedsLabels, Backprop], storage=storage).rows
    assert failed.failure == "x must hold labels, got points; choose another rule"
    assert not failed.scores
    assert fine.mean > 0.8
    assert fine.failure == ""
    assert [trial.user_attrs["failure"] for study in storage.get_all_studies()
            for trial in storage.get_all_trials(study._study_id, states=[TrialState.FAIL])
            ] == [failed.failure]
    # It is tried again the next time: what was missing may be there by then.
    monkeypatch.setattr(Change, "build",
                        lambda change, network, task, options: Backprop(network))
    assert trained([NeedsLabels], storage=storage).rows[0].failure == ""


def test_a_trial_that_diverges_costs_only_that_trial():
    row, = trained([Diverging], trials=4).rows
    assert row.failure == ""
    assert row.hyperparameters["strength"] == 1.0
    assert 1 <= row.trials < 4
    assert len(row.scores) == 2


def test_settings_that_cannot_run_cost_only_their_trial():
    class Picky(Diverging):
        def forward(self, x, y):
            if self.strength == 2.0:
                raise ValueError("strength 2 needs another network")
            return super().forward(x, y)
    storage = InMemoryStorage()
    row, = trained([Picky], trials=4, storage=storage).rows
    assert (row.failure, row.hyperparameters["strength"], len(row.scores)) == ("", 1.0, 2)
    assert 1 <= row.trials < 4
    assert nw.recorded(storage).rows == [row]


def test_all_trials_diverge():
    row, = trained({"never": partial(Diverging, strength=2.0)}).rows
    assert row.failure.startswith("all 3 tuning trials diverged; the first: loss is nan at epoch")


def test_reshapes_and_lists():
    def wider(network):
        return nn.Sequential(*network[:2], nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    plain, wide = trained({"plain": "Backprop", "wider": [wider, "Backprop"]}).rows
    assert wide.parameters == 235 > plain.parameters
    assert wide.mean > 0.8


def test_what_cannot_run_is_found_before_anything_is_trained():
    steps = []

    class Seen(Backprop):
        def forward(self, x, y):
            steps.append(len(y))
            return super().forward(x, y)
    storage = InMemoryStorage()
    fine, failed = trained({"fine": Seen, "block": "TokenMixing"}, storage=storage, trials=1).rows
    assert failed.failure.startswith("TokenMixing cannot run on task 'points' because its network")
    assert fine.mean > 0.8
    found = [trial for study in storage.get_all_studies()
             for trial in storage.get_all_trials(study._study_id, deepcopy=True)]
    refused = next(t for t in found if t.state == TrialState.FAIL)
    assert all(refused.datetime_complete < t.datetime_start for t in found
               if t.state == TrialState.COMPLETE)
    assert steps[0] == 20


def test_rows_hold_their_recipe(tmp_path):
    storage = InMemoryStorage()
    rows = trained({"mine": "mlp(hidden=[8]) + SGD", "own": Named}, storage=storage, trials=2,
                   seeds=1).rows
    assert nw.recipe(rows[0].recipe) == nw.recipe("mlp(hidden=[8]) + SGD")
    assert rows[1].recipe["rule"]["function"].endswith("test_compare:Named")
    assert rows[0].parameters == 67
    assert json.loads(json.dumps(rows[0].recipe)) == rows[0].recipe
    assert nw.recorded(storage).rows == rows


def test_batches_are_changed_in_training_only():
    seen = []

    def mirrored(x, y):
        seen.append(len(y))
        return -x, y
    turned, = trained({"turned": nw.Recipe(data=nw.recipe({"data": mirrored}).data)},
                      trials=1, seeds=1).rows
    assert turned.mean < 0.4
    assert set(seen) == {20, 8}  # the batches of 60 samples, and of the 48 that tuning trains on


def test_the_same_name_in_two_steps_is_tuned_apart():
    def scaled(network, *, strength=1.0):
        return network
    scaled.search = {"strength": [1.0, 3.0]}
    row, = trained({"two": [scaled, Diverging]}, trials=1, seeds=1).rows
    assert row.hyperparameters.keys() == {"learning_rate", "0.strength", "1.strength"}


def test_lower_may_be_better():
    def error(scores, y):
        return 1 - nw.objectives.accuracy(scores, y)
    task = nw.Task("points", network, points, metric=error, higher_is_better=False, epochs=4,
                   batch_size=20, learning_rate=1e-2)
    storage = InMemoryStorage()
    exact, control = trained([Backprop, Frozen], task, storage=storage).rows
    assert (exact.metric, exact.higher_is_better) == ("error", False)
    assert exact.mean < 0.2 < control.mean
    assert nw.recorded(storage).rows[0].higher_is_better is False


def test_loaders_graphs_and_language(tmp_path):
    x, y, x_test, y_test = points()
    loaders = nw.Task("loaders", network, Parts([(x[:40], y[:40])], [(x[40:], y[40:])],
                                                [(x_test, y_test)]), epochs=30, learning_rate=1e-2)
    text = nw.data.characters("abcd" * 60, context=8)
    language = nw.Task("language", partial(nw.models.gpt, 96, 8, width=16, heads=2), text,
                       metric="bits per character", epochs=8, batch_size=8, learning_rate=1e-2)
    first, second = trained(["Backprop"], [loaders, language], trials=1, seeds=1).rows
    assert first.mean > 0.8
    assert second.mean < 3 < 6.58


def test_nodes_of_a_graph():
    pytest.importorskip("torch_geometric", reason="needs the extra graphs")
    row, = trained(["Backprop"], "karate-gcn", trials=1, seeds=2, epochs=40).rows
    assert row.failure == ""
    assert row.mean > 0.8


def test_settings():
    found = trained([Backprop], seeds=[3, 1], trials=2)
    assert found.settings["seeds"] == [3, 1]
    assert found.settings["trials"] == 2
    assert found.settings["epochs"] == {"points": 4}
    assert json.loads(json.dumps(found.settings))["storage"] == "InMemoryStorage"


def test_arguments_are_checked_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for options, message in [({"seeds": 0}, "seeds must be"), ({"seeds": [1, 1]}, "seeds must be"),
                             ({"trials": 0}, "trials must be"), ({"epochs": 0}, "epochs must be"),
                             ({"workers": 0}, "workers must be"),
                             ({"device": "abacus"}, "device must be one that PyTorch has here")]:
        with pytest.raises(ValueError, match=message):
            nw.compare(POINTS, ["Backprop"], progress=False, **options)
    with pytest.raises(UnknownName, match="did you mean MonoForward"):
        nw.compare(POINTS, ["MonoForwad"])
    with pytest.raises(UnknownName, match="no task is called 'digits'"):
        nw.compare("digits", ["Backprop"])
    with pytest.raises(BadTaskFile, match="does not exist"):
        nw.compare("nowhere.py", ["Backprop"])
    with pytest.raises(ValueError, match="task must be a Task, the name of one or the path"):
        nw.compare(3, ["Backprop"])
    with pytest.raises(ValueError, match="got 'points' 2 times"):
        tasks([POINTS, POINTS])
    with pytest.raises(UnreachableStorage, match="could not be opened"):
        nw.compare(POINTS, ["Backprop"], storage="sqlite:////missing/a.db")
    with pytest.raises(UnreachableStorage, match="does not exist; run a comparison first"):
        nw.recorded("none.db")
    assert list(tmp_path.iterdir()) == []


def test_what_another_process_cannot_import_runs_in_this_one(tmp_path, capfd):
    task = nw.Task("points", lambda: network(), points, epochs=1)
    row, = nw.compare(task, ["Backprop"], storage=tmp_path / "a.db", seeds=1, trials=1,
                      workers=2).rows
    assert row.failure == ""
    shown = " ".join(capfd.readouterr().err.split())
    assert "one process does all the runs: 'points' has a function" in shown


def test_the_default_storage_is_one_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nw.compare(POINTS, {"mine": lambda network: Backprop(network)}, seeds=1, trials=1, epochs=1,
               workers=1, progress=False)
    assert Path("runs/netwright.db").is_file()
    assert [row.change for row in nw.recorded().rows] == ["mine"]


def test_nothing_given_is_changed():
    first, changes = points(), [[Backprop]]
    copies = [part.clone() for part in first]
    trained(changes, nw.Task("points", network, first, epochs=2))
    assert all(map(torch.equal, first, copies))
    assert changes == [[Backprop]]
    assert issubclass(changes[0][0], Rule)


def test_what_is_finished_can_be_shown_where_nothing_may_be_written(tmp_path):
    options = {"trials": 1, "epochs": 1, "workers": 1, "progress": False}
    found = nw.compare(POINTS, ["Backprop"], seeds=1, storage=tmp_path / "a.db", **options)
    url = f"sqlite:///file:{tmp_path / 'a.db'}?mode=ro&uri=true"
    assert nw.recorded(url).rows == found.rows
    assert nw.compare(POINTS, ["Backprop"], seeds=1, storage=url, **options).rows == found.rows
    with pytest.raises(ReadOnlyStorage, match="may only be read"):
        nw.compare(POINTS, ["Backprop"], seeds=2, storage=url, **options)
    with pytest.raises(ReadOnlyStorage, match="may only be read"):
        nw.compare(POINTS, ["MonoForward"], seeds=1, storage=url, **options)


def test_a_recipe_in_a_file_that_is_none(tmp_path):
    for text in ("[" * 100_000, "{", ""):
        (tmp_path / "recipe.json").write_text(text)
        with pytest.raises(CorruptCheckpoint, match="must be a recipe, and cannot be read"):
            nw.recipe(tmp_path / "recipe.json")
    with pytest.raises(CorruptCheckpoint, match="got a folder"):
        nw.recipe(tmp_path)
    with pytest.raises(ValueError, match="nested too deep"):
        nw.recipe('{"rule": ' + '{"name": ' * 100_000)
