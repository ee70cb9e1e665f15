import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Generator, nn

import netwright as nw
from netwright.data import Batches
from netwright.errors import CorruptCheckpoint
from netwright.runtime.random_state import every_random_state, set_every_random_state
from netwright.training.checkpoints import load, save


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    tied = torch.randn(3, 4)
    state = {
        "float64": torch.randn(3, dtype=torch.float64), "bfloat16": torch.randn(2).bfloat16(),
        "half": torch.randn(2).half(), "int": torch.arange(3), "bool": torch.tensor([True, False]),
        "empty": torch.empty(0, 5), "scalar": torch.tensor(2.5), "complex": torch.randn(2) * 1j,
        "first": tied, "second": tied, "row": tied[1], "turned": tied.t(),
        "wide": torch.ones(1).expand(4), "nested": [1, (2, None), {"a": True, 3: "x", "$t": 0.1}],
        "infinite": [float("inf"), float("-inf")], "counter": Counter({4: 2}), "tenth": 0.1 + 0.2,
    }
    save(tmp_path, state)
    found = load(tmp_path)
    assert found is not None
    assert list(found) == list(state)
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype
            torch.testing.assert_close(found[name], value, rtol=0, atol=0)
        else:
            assert found[name] == value
            assert type(found[name]) is type(value)
    assert len(list(tmp_path.iterdir())) == 2


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    weight = torch.randn(1000, 100)
    save(tmp_path / "once", {"a": weight})
    save(tmp_path / "twice", {"a": weight, "b": weight})
    once, twice = ((tmp_path / name).glob("*.safetensors") for name in ("once", "twice"))
    assert next(once).stat().st_size == next(twice).stat().st_size


def test_nan_is_kept(tmp_path: Path) -> None:
    save(tmp_path, {"score": float("nan"), "weights": torch.tensor([float("nan")])})
    found = load(tmp_path)
    assert found is not None
    assert found["score"] != found["score"]
    assert found["weights"].isnan().all()


def test_an_empty_folder_holds_no_checkpoint(tmp_path: Path) -> None:
    assert load(tmp_path) is None
    assert load(tmp_path / "none") is None


def test_other_files_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    for step in range(3):
        save(tmp_path, {"step": torch.tensor(step)})
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"
    assert len(list(tmp_path.iterdir())) == 3


def test_what_cannot_be_kept_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    save(tmp_path, {"step": 1})
    with pytest.raises(TypeError, match="state/inner/0 is set, which a checkpoint cannot hold"):
        save(tmp_path, {"inner": [{1}]})
    with pytest.raises(TypeError, match="make it dense"):
        save(tmp_path, {"inner": torch.eye(2).to_sparse()})
    assert load(tmp_path) == {"step": 1}


def test_random_states_return() -> None:
    import random

    import numpy
    generator = Generator().manual_seed(1)

    def draw() -> list[float]:
        return [float(torch.rand(())), random.random(), numpy.random.rand(),
                float(torch.rand((), generator=generator))]

    state = every_random_state([generator])
    first = draw()
    assert draw() != first
    set_every_random_state(state, [generator])
    assert draw() == first


def trained(folder: Path, **changed: object) -> nw.History:
    x = torch.randn(20, 4, generator=Generator().manual_seed(0))
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    options = {"epochs": 2, "optimizer": lambda p: torch.optim.SGD(p, 0.1), **changed}
    data = options.pop("train", Batches(x, x[:, 0].gt(0).long(), 10))
    return nw.fit(network, data, checkpoint=folder, **options)


def damage(name: str, folder: Path) -> None:
    (tensors,) = folder.glob("*.safetensors")
    document = folder / "checkpoint.json"
    text, binary = document.read_text(), tensors.read_bytes()
    match name:
        case "truncated JSON":
            document.write_text(text[:len(text) // 2])
        case "empty JSON":
            document.write_text("")
        case "binary JSON":
            document.write_bytes(b"\xff\xfe\x00")
        case "another JSON":
            document.write_text('{"weights": [1, 2]}')
        case "changed JSON":
            document.write_text(text.replace('"step": 4', '"step": 5'))
        case "truncated tensors":
            tensors.write_bytes(binary[:-10])
        case "changed tensors":
            tensors.write_bytes(binary[:-1] + bytes([binary[-1] ^ 1]))
        case "missing tensors":
            tensors.unlink()
        case "newer format":
            content = {**json.loads(text)["content"], "format": 99}
            from netwright.training.checkpoints import _text_digest
            document.write_text(json.dumps({"sha256": _text_digest(content), "content": content}))


@pytest.mark.parametrize("name", [
    "truncated JSON", "empty JSON", "binary JSON", "another JSON", "changed JSON",
    "truncated tensors", "changed tensors", "missing tensors", "newer format"])
def test_a_damaged_checkpoint_is_refused_and_left_alone(name: str, tmp_path: Path) -> None:
    trained(tmp_path)
    damage(name, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CorruptCheckpoint, match="delete it"):
        trained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("changed", "said"), [
    ({"optimizer": torch.optim.Adam}, "its optimizer.type is SGD, here it is Adam"),
    ({"optimizer": lambda p: torch.optim.SGD(p, 0.2)}, "its optimizer.lr is 0.1, here it is 0.2"),
    ({"accumulate": 2}, "its accumulate is 1, here it is 2"),
    ({"seed": 1}, "its seed is None, here it is 1"),
    ({"train": [(torch.randn(3, 4), torch.tensor([0, 1, 1]))]}, "its train.type is Batches"),
])
def test_another_training_is_refused(changed: dict, said: str, tmp_path: Path) -> None:
    trained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CorruptCheckpoint, match=said):
        trained(tmp_path, **changed)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_finished_training_can_be_made_longer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    at_once = trained(tmp_path / "at once", epochs=4)
    torch.manual_seed(0)
    trained(tmp_path / "later", epochs=2)
    later = trained(tmp_path / "later", epochs=4)
    assert [e.loss for e in later.epochs] == [e.loss for e in at_once.epochs]


def test_litter_of_broken_writings_is_cleared(tmp_path: Path) -> None:
    trained(tmp_path, epochs=1)
    files = sorted(tmp_path.iterdir())
    (tmp_path / "checkpoint.partial").mkdir()
    litter = [f"tensors-{'0' * 32}.safetensors", "checkpoint.partial/.tmpx1Y2z3",
              "checkpoint.partial/tensors", "checkpoint.partial/checkpoint.json"]
    for name in [*litter, "mine.safetensors"]:
        (tmp_path / name).write_text("half", encoding="utf-8")
    trained(tmp_path, epochs=1)  # already done, so that nothing is saved
    assert sorted(tmp_path.iterdir()) == sorted([*files, tmp_path / "mine.safetensors"])


@pytest.mark.check
@pytest.mark.timeout(900)
def test_a_killed_training_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """SIGKILL at each event of the writing and at random moments, for several kinds of training.

    The control takes up everything but the random states, and ends elsewhere.
    """
    worker = Path(__file__).with_name("resume_worker.py")
    done = subprocess.run([sys.executable, str(worker), str(tmp_path)], capture_output=True,
                          text=True, timeout=880)
    assert done.returncode == 0, done.stderr
    reports = {report["case"]: report for report in map(json.loads, done.stdout.splitlines())}
    assert not reports.pop("forgetful")["same"]
    assert {"backprop", "loader", "augmented", "jitter", "lbfgs"} < set(reports)
    assert [name for name, report in reports.items() if not report["same"]] == []
    assert [name for name, report in reports.items()
            if report["left"] != [".json", ".safetensors"]] == []
    assert reports["backprop"]["died"] >= 16  # the kills did happen
    assert [name for name, report in reports.items() if not report["died"]] == []
