import pickle
from functools import partial

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.errors import BadTaskFile, MissingData, UnknownName
from netwright.objectives.metrics import accuracy
from netwright.tasks import TASKS, Parts, load_tasks, task


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 3))


def four(samples=20):
    x, y = torch.arange(samples * 6.).view(samples, 6), torch.arange(samples) % 3
    return x[:-5], y[:-5], x[-5:], y[-5:]


def rows(loader):
    return sorted(int(x[0]) for batch, _ in loader for x in batch)


def test_validation_is_carved_out_of_train_for_tuning_only():
    own = nw.Task("own", linear, four, validation=0.2, batch_size=4)
    tuning, final = own.parts(0, tuning=True), own.parts(0)
    every = [6 * i for i in range(15)]
    assert rows(final.train) == every
    assert sorted(rows(tuning.train) + rows(tuning.validation)) == every
    assert len(rows(tuning.validation)) == 3
    assert rows(tuning.test) == rows(final.test) == [90, 96, 102, 108, 114]


def test_every_seed_has_the_same_validation_samples_in_another_order():
    own = nw.Task("own", linear, four, batch_size=15)
    first, second = own.parts(0, tuning=True), own.parts(1, tuning=True)
    assert rows(first.validation) == rows(second.validation)
    (x1, _), (x2, _) = next(iter(own.parts(0).train)), next(iter(own.parts(1).train))
    assert not torch.equal(x1, x2)
    assert torch.equal(x1.sort(0).values, x2.sort(0).values)


def test_inputs_may_be_mappings_or_tuples():
    x, y = torch.randn(10, 6), torch.zeros(10, dtype=torch.long)
    own = nw.Task("own", linear, ({"input": x}, y, {"input": x}, y), batch_size=4)
    assert own.first["input"].shape == (2, 6)
    assert own.classes == 3
    batch, labels = own.batch
    assert batch["input"].shape == (4, 6)
    assert labels.shape == (4,)
    pair = nw.Task("pair", linear, ((x, x), y, (x, x), y))
    assert [part.shape for part in pair.first] == [(2, 6), (2, 6)]


def test_loaders_and_graphs_stay_as_they_are():
    x, y = torch.randn(4, 6), torch.zeros(4, dtype=torch.long)
    loaders = Parts([(x, y)], [(x + 1, y)], [(x + 2, y)])
    own = nw.Task("own", linear, loaders)
    assert own.parts(3, tuning=True) is loaders
    assert own.first is x
    graph = nw.data.karate()
    parts = nw.Task("graph", linear, graph).parts(0)
    assert [int((batches[0][1] != -100).sum()) for batches in parts] == [2, 16, 16]


def test_a_metric_of_ones_own():
    own = nw.Task("own", linear, four, metric=accuracy, higher_is_better=True)
    assert own.metric_name == "accuracy"
    assert own.score is accuracy
    assert own.maximize
    bits = nw.Task("own", linear, four, metric="bits per character")
    assert not bits.maximize


def test_building_leaves_the_random_state_alone():
    own = nw.Task("own", linear, four)
    before = torch.get_rng_state()
    assert own.classes == 3
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_built_in_tasks(name, monkeypatch):
    monkeypatch.delenv("NETWRIGHT_DATA", raising=False)
    if name.endswith("gcn"):
        pytest.importorskip("torch_geometric", reason="needs the extra graphs")
    built_in = pickle.loads(pickle.dumps(task(name)))
    network = built_in.network()
    if name.split("-")[0] in ("cora", "mnist", "cifar10", "tinyshakespeare"):
        with pytest.raises(MissingData, match="NETWRIGHT_DATA is not set"):
            built_in.parts(0)
        return
    rule = nw.rules.Backprop(network, loss=built_in.loss)
    batch = built_in.batch
    scores = rule.predict(batch[0])
    assert scores.shape[-1] == built_in.num_classes
    begins = {"gpt": (7, 0.9), "digits-flow": (65, 15), "moons-flow": (3, 1.5), "gru": (1, 0.4)}
    first, near = next((begins[part] for part in begins if part in name), (0.1, 0.9))
    assert float(built_in.score(scores, batch[1])) == pytest.approx(first, abs=near)
    assert rule(*batch).isfinite()


def test_unknown_names():
    with pytest.raises(UnknownName, match="no task is called 'digit-mlp'; did you mean digits-mlp"):
        task("digit-mlp")
    with pytest.raises(UnknownName, match="no metric is called 'acuracy'; did you mean accuracy"):
        nw.Task("own", linear, four, metric="acuracy")


@pytest.mark.parametrize(("options", "message"), [
    ({"name": "a/b"}, "name must be a few words without a slash"),
    ({"network": nn.Linear(2, 2)}, "network must be a function that builds a fresh network"),
    ({"metric": accuracy}, "higher_is_better must be given"),
    ({"epochs": 0}, "epochs must be at least 1, got 0"),
    ({"batch_size": 0}, "batch_size must be"),
    ({"learning_rate": 0}, "learning_rate must be above 0"),
    ({"validation": 1.0}, "validation must be above 0 and below 1, got"),
])
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        nw.Task(**{"name": "own", "network": linear, "data": four, **options})


def test_data_of_another_kind():
    with pytest.raises(ValueError, match=r"data of task 'own' must be .* got tuple of 2"):
        nw.Task("own", linear, (1, 2)).parts(0)


def test_the_documented_file(tmp_path):
    own, = load_tasks("docs/examples/own_task.py")
    assert own.name == "spirals"
    assert own.classes == 2
    again = pickle.loads(pickle.dumps(own))
    assert again.network is not None
    assert torch.equal(again.first, own.first)


def test_a_function_and_several_tasks(tmp_path):
    file = tmp_path / "several.py"
    file.write_text("import netwright as nw\nfrom torch import nn\n"
                    "def task():\n    return [nw.Task(n, lambda: nn.Linear(2, 2), None)"
                    " for n in 'ab']\n")
    assert [own.name for own in load_tasks(file)] == ["a", "b"]


@pytest.mark.parametrize(("text", "message"), [
    ("x = 1\nraise KeyError('lost')\n", r"own\.py, line 2 raised KeyError: 'lost'"),
    ("def f():\n    return 1 / 0\n\nf()\n", r"own\.py, line 2 raised ZeroDivisionError"),
    ("x = (\n", r"own\.py, line 1 raised SyntaxError: '\(' was never closed"),
    ("import nothing_of_that_name\n", r"own\.py, line 1 raised ModuleNotFoundError"),
    ("raise SystemExit(3)\n", r"own\.py, line 1 raised SystemExit: 3"),
    ("raise GeneratorExit\n", r"own\.py, line 1 raised GeneratorExit"),
    ("raise type('Odd', (BaseException,), {})(3)\n", r"own\.py, line 1 raised Odd: 3"),
    ("import netwright as nw\ntask = nw.Task('a', len, None, epochs=0)\n",
     r"own\.py, line 2 raised ValueError: epochs must be"),
    ("def task():\n    raise OSError('gone')\n", r"own\.py, line 2 raised OSError: gone"),
    ("x = 1\n", r"own\.py defines no task; write task = nw\.Task"),
])
def test_bad_files(tmp_path, text, message):
    file = tmp_path / "own.py"
    file.write_text(text)
    with pytest.raises(BadTaskFile, match=message) as caught:
        load_tasks(file)
    assert "\n" not in str(caught.value)


def test_a_missing_file():
    with pytest.raises(BadTaskFile, match=r"nowhere\.py does not exist; .* one of the tasks"):
        load_tasks("nowhere.py")


def test_partials_survive_pickling():
    own = nw.Task("own", partial(nw.models.mlp, 6, 3), four, epochs=3)
    assert pickle.loads(pickle.dumps(own)).epochs == 3
