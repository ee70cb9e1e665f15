import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

import netwright as nw
from netwright.data import Batches
from netwright.errors import CorruptCheckpoint
from netwright.runtime.files import text_digest
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
    options = {"epochs": 2, "optimizer": lambda p: torch.optim.SGD(p, 0.1), **changed}
    network = options.pop("network", None) or nn.Sequential(nn.Linear(4, 5), nn.Tanh(),
                                                            nn.Linear(5, 2))
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
        case "a folder in the JSON's place":
            document.unlink()
            document.mkdir()
        case "a folder in the tensors' place":
            tensors.unlink()
            tensors.mkdir()
        case "deep JSON":
            document.write_text("[" * 100_000 + "]" * 100_000)
        case "missing JSON":
            document.unlink()
        case "dangling JSON":
            document.unlink()
            document.symlink_to(folder / "nowhere")
        case "dangling tensors":
            tensors.unlink()
            tensors.symlink_to(folder / "nowhere")
        case _ if name in WRONG:
            content = json.loads(text)["content"]
            WRONG[name](content)
            document.write_text(json.dumps({"sha256": text_digest(content), "content": content}))
        case "newer format":
            content = {**json.loads(text)["content"], "format": 99}
            document.write_text(json.dumps({"sha256": text_digest(content), "content": content}))


def set_in(*path: str, value: object) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value
    return change


WRONG = {  # what has a digest that is right
    "no state": set_in("state", value={}), "a list for a state": set_in("state", value=[]),
    "tensors elsewhere": set_in("tensors", value="../tensors.safetensors"),
    "a number for a file": set_in("tensors", value=3),
    "words for a step": set_in("state", "at", "step", value="four"),
    "a step before the first": set_in("state", "at", "step", value=-4),
    "an unknown place": set_in("state", "at", "where", value=1),
    "no optimizer": set_in("state", "optimizer", value=None),
    "no weights": set_in("state", "rule", value={}),
    "other weights": set_in("state", "rule", "network.0.weight",
                            value={"$tensor": "state/rule/network.2.bias"}),
    "no history": set_in("state", "history", value=[]),
    "no random states": set_in("state", "random_now", value=[]),
    "other random states": set_in("state", "random_now", value=[{"torch": 1}]),
    "no description": set_in("state", "run", value=None),
    "a tensor that is not there": set_in("state", "best", value={"$tensor": "nowhere"}),
}


@pytest.mark.parametrize("name", [
    *WRONG, "a folder in the JSON's place", "a folder in the tensors' place", "deep JSON",
    "missing JSON", "dangling JSON", "dangling tensors",
    "truncated JSON", "empty JSON", "binary JSON", "another JSON", "changed JSON",
    "truncated tensors", "changed tensors", "missing tensors", "newer format"])
def test_a_damaged_checkpoint_is_refused_and_left_alone(name: str, tmp_path: Path) -> None:
    trained(tmp_path)
    damage(name, tmp_path)
    before = held(tmp_path)
    with pytest.raises(CorruptCheckpoint, match="delete"):
        trained(tmp_path)
    assert held(tmp_path) == before


def held(folder: Path) -> dict[str, object]:
    return {path.name: path.read_bytes() if path.is_file() else path.is_dir()
            for path in folder.iterdir()}


@pytest.mark.parametrize("name", WRONG)
def test_a_damaged_checkpoint_changes_neither_weights_nor_random_states(name: str,
                                                                        tmp_path: Path) -> None:
    trained(tmp_path)
    damage(name, tmp_path)
    torch.manual_seed(5)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    before = [p.detach().clone() for p in network.parameters()]
    torch.manual_seed(6)
    with pytest.raises(CorruptCheckpoint):
        trained(tmp_path, network=network, optimizer=optimizer)
    assert all(map(torch.equal, network.parameters(), before))
    assert not optimizer.state
    drawn = torch.rand(3)
    torch.manual_seed(6)
    assert torch.equal(drawn, torch.rand(3))


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


def net(activation: nn.Module | None = None, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), activation or nn.Tanh(), nn.Dropout(dropout),
                         nn.Linear(5, 2))


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.linear, self.factor = nn.Linear(4, 2), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.factor


class Rewritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.factor = nn.Linear(4, 2), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.factor - 1


def weighed(weight: float) -> Any:
    def loss(scores: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(scores, y, weight=torch.tensor([1.0, weight]))
    return loss


def grouped(first: float, second: float, *, turned: bool = False) -> Callable:
    def make(parameters: list) -> torch.optim.Optimizer:
        parameters = parameters[::-1] if turned else parameters
        return torch.optim.SGD([{"params": parameters[:2], "lr": first},
                                {"params": parameters[2:], "lr": second}], 0.1)
    return make


def other_data(shift: float) -> Batches:
    x = torch.randn(20, 4, generator=Generator().manual_seed(0)) + shift
    return Batches(x, x[:, 0].gt(0).long(), 10)


def loaded(shift: float) -> DataLoader:
    data = other_data(shift)
    return DataLoader(TensorDataset(data.x, data.y), 10, shuffle=True)


OTHERS: dict[str, tuple[dict, dict, str]] = {
    "activation": ({"network": net()}, {"network": net(nn.ReLU())},
                   r"network\.1\.type is Tanh, here it is ReLU"),
    "dropout": ({"network": net()}, {"network": net(dropout=0.9)},
                r"network\.2\.p is 0\.0, here it is 0\.9"),
    "a setting": ({"network": Scaled(1.0)}, {"network": Scaled(2.0)},
                  r"network\.factor is 1\.0, here it is 2\.0"),
    "code": ({"network": Scaled(1.0)}, {"network": Rewritten()}, r"its code\.Scaled is"),
    "loss": ({"network": nw.rules.Backprop(net(), loss=weighed(1.0))},
             {"network": nw.rules.Backprop(net(), loss=weighed(2.0))}, r"its loss is .*loss"),
    "loss module": ({"network": nw.rules.Backprop(net(), loss=nn.CrossEntropyLoss())},
                    {"network": nw.rules.Backprop(net(), loss=nn.CrossEntropyLoss(
                        label_smoothing=0.1))}, r"loss\.label_smoothing is 0\.0"),
    "another loss": ({"network": net()}, {"network": nw.rules.Backprop(
        net(), loss=lambda o, y: (o.sum(1) - y).square().mean())}, "its loss is cross_entropy"),
    "a rule's options": (
        {"network": nw.rules.ForwardGradient(net(), generator=Generator())},
        {"network": nw.rules.ForwardGradient(net(), directions=8, generator=Generator())},
        r"rule\.directions is 1, here it is 8"),
    "data": ({"train": other_data(0)}, {"train": other_data(1e-3)}, r"its train\.head is"),
    "a loader's data": ({"train": loaded(0)}, {"train": loaded(1e-3)}, r"its train\.head is"),
    "validation": ({"validation": other_data(0)}, {"validation": other_data(1)},
                   r"its validation\.head is"),
    "schedule": ({"scheduler": lambda o: StepLR(o, 1, 0.5)},
                 {"scheduler": lambda o: StepLR(o, 2, 0.5)}, r"step_size is 1, here it is 2"),
    "schedule by a function": ({"scheduler": lambda o: LambdaLR(o, lambda e: 0.5 ** e)},
                               {"scheduler": lambda o: LambdaLR(o, lambda e: 0.7 ** e)},
                               r"lr_lambdas\.0 is"),
    "rates of groups": ({"optimizer": grouped(0.1, 0.2)}, {"optimizer": grouped(0.1, 0.3)},
                        r"groups\.1\.lr is 0\.2, here it is 0\.3"),
    "order of parameters": ({"optimizer": grouped(0.1, 0.1)},
                            {"optimizer": grouped(0.1, 0.1, turned=True)},
                            r"groups\.0\.parameters\.0 is network\.0\.weight"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_decides_a_training_tells_its_checkpoint(name: str, tmp_path: Path) -> None:
    there, here, said = OTHERS[name]
    trained(tmp_path, **deepcopy(there))
    before = held(tmp_path)
    with pytest.raises(CorruptCheckpoint, match=said):
        trained(tmp_path, **deepcopy(here))
    assert held(tmp_path) == before
    trained(tmp_path, **deepcopy(there), epochs=3)  # the control


def test_what_a_training_changes_itself_does_not_tell_it(tmp_path: Path) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.passes, self.linear = 0, nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            return self.linear(x)

    network = Counts()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    options = {"network": network, "optimizer": optimizer, "scheduler": StepLR(optimizer, 1, 0.5)}
    trained(tmp_path, **options)
    assert len(trained(tmp_path, **options, epochs=4)) == 4  # the same objects
    other = Counts()
    fresh = torch.optim.SGD(other.parameters(), 0.1)
    assert len(trained(tmp_path, network=other, optimizer=fresh,
                       scheduler=StepLR(fresh, 1, 0.5), epochs=5)) == 5


def test_a_loss_that_holds_the_network_tells_the_same(tmp_path: Path) -> None:
    def regular() -> nw.rules.Rule:
        network = net()

        def loss(scores: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(scores, y) + 1e-3 * network[0].weight.square().sum()
        return nw.rules.Backprop(network, loss=loss)

    rule = regular()
    trained(tmp_path, network=rule)
    trained(tmp_path, network=rule, epochs=3)
    assert len(trained(tmp_path, network=regular(), epochs=4)) == 4


def test_a_full_disk_is_said_and_leaves_the_checkpoint(tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path)
    before = held(tmp_path)

    def full(tensors: dict, path: Path) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=r"could not be written.*No space left.*free some space"):
        trained(tmp_path, epochs=3)
    monkeypatch.undo()
    assert {name: value for name, value in held(tmp_path).items()
            if name != "checkpoint.partial"} == before
    assert len(trained(tmp_path, epochs=3)) == 3
    assert len(held(tmp_path)) == 2


def test_two_trainings_do_not_share_a_folder(tmp_path: Path) -> None:
    code = f"""
import sys, time, torch, netwright as nw
nw.fit(torch.nn.Linear(2, 2), [(torch.ones(3, 2), torch.tensor([0, 1, 0]))], epochs=1000,
       checkpoint={str(tmp_path)!r}, progress=False,
       on_epoch=lambda epoch: (print(epoch.epoch, flush=True), time.sleep(60)))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "1\n"
            before = held(tmp_path)
            with pytest.raises(ValueError, match="the folder of a training that is running now"):
                trained(tmp_path)
            assert held(tmp_path) == before
        finally:
            other.kill()
    with pytest.raises(CorruptCheckpoint, match="another training"):  # the lock died with it
        trained(tmp_path)


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
