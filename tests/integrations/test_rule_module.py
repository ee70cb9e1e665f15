"""A rule as a module of Lightning: as a loop by hand with Backprop, and with what rules add."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, nn
from torch.utils.data import DataLoader, TensorDataset

import netwright as nw

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the library's own

from netwright.integrations import RuleModule  # noqa: E402

X = torch.randn(40, 6, generator=Generator().manual_seed(1))
Y = X[:, :3].argmax(1)
DATA = TensorDataset(X, Y)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 12),
                         nn.ReLU(), nn.Linear(12, 3))


def sgd(parameters: list) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1, 0.9)


def trainer(folder: Path, **options: Any) -> Any:
    return lightning.Trainer(**{
        "max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
        "default_root_dir": str(folder), **options})


def close(a: nn.Module, b: nn.Module, tolerance: float = 1e-6) -> bool:
    return all(torch.allclose(p, q, rtol=tolerance, atol=tolerance)
               for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(("theirs", "ours"), [
    ({}, {}), ({"accumulate_grad_batches": 3}, {"accumulate": 3}),
    ({"gradient_clip_val": 0.05}, {"clip": 0.05}), ({"precision": "bf16-mixed"}, {
        "autocast": torch.bfloat16})], ids=["plain", "accumulated", "clipped", "bf16"])
@pytest.mark.parametrize("make", [nw.rules.Backprop, lambda net: nw.rules.MonoForward(
    net, num_classes=3, example=X[:4], generator=Generator().manual_seed(2))],
    ids=["Backprop", "MonoForward"])
def test_it_trains_as_fit_does(make: Any, theirs: dict, ours: dict, tmp_path: Path) -> None:
    torch.manual_seed(3)
    rule = make(network())
    trainer(tmp_path, **theirs).fit(RuleModule(rule, sgd), DataLoader(DATA, 7))
    torch.manual_seed(3)
    expected = make(network())
    nw.fit(expected, DataLoader(DATA, 7), epochs=3, optimizer=sgd, progress=False, **ours)
    assert close(rule, expected)
    assert not close(rule, make(network()))


def test_it_logs_and_judges(tmp_path: Path) -> None:
    module = RuleModule(nw.rules.Backprop(network()), sgd, scheduler=lambda o: torch.optim
                        .lr_scheduler.StepLR(o, 1, 0.5))
    driver = trainer(tmp_path, max_epochs=12)
    driver.fit(module, DataLoader(DATA, 8), DataLoader(DATA, 11))
    told = {name: float(value) for name, value in driver.callback_metrics.items()}
    assert told["val_accuracy"] == pytest.approx(
        float((module.rule.predict(X).argmax(1) == Y).float().mean()))
    assert told["val_loss"] == pytest.approx(
        float(nn.functional.cross_entropy(module.rule.predict(X), Y)), rel=1e-5)
    assert told["train_loss"] < 1.0
    predicted = torch.cat(driver.predict(module, DataLoader(DATA, 8)))
    assert torch.allclose(predicted, module.rule.predict(X), atol=1e-6)
    assert driver.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5 ** 12)


def test_a_checkpoint_holds_all_of_a_rule(tmp_path: Path) -> None:
    def module() -> Any:
        return RuleModule(nw.rules.MonoForward(network(), num_classes=3, example=X[:4]), sgd)

    torch.manual_seed(3)
    whole = module()
    trainer(tmp_path, max_epochs=4).fit(whole, DataLoader(DATA, 7))
    torch.manual_seed(3)
    first = trainer(tmp_path, max_epochs=2)
    first.fit(module(), DataLoader(DATA, 7))
    first.save_checkpoint(tmp_path / "kept.ckpt")
    torch.manual_seed(77)
    resumed = module()
    trainer(tmp_path, max_epochs=4).fit(resumed, DataLoader(DATA, 7),
                                        ckpt_path=str(tmp_path / "kept.ckpt"))
    assert close(resumed, whole)


PROCESSES = """
import sys, torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
import lightning.pytorch as lightning
import netwright as nw
from netwright.integrations import RuleModule

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
Y = X[:, :3].argmax(1)
processes = int(sys.argv[2])
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 12),
                          torch.nn.ReLU(), torch.nn.Linear(12, 3))
rule = nw.rules.MonoForward(net, num_classes=3, example=X[:4])

class Shares(lightning.LightningDataModule):  # in order, where Lightning's own sampler shuffles
    def train_dataloader(self):
        data = TensorDataset(X, Y)
        sampler = DistributedSampler(data, shuffle=False) if processes > 1 else None
        return DataLoader(data, 20 // processes, sampler=sampler)

if __name__ == "__main__":
    lightning.Trainer(max_epochs=2, accelerator="cpu", devices=processes, logger=False,
        strategy="ddp" if processes > 1 else "auto", enable_checkpointing=False,
        use_distributed_sampler=False,
        enable_progress_bar=False, enable_model_summary=False).fit(
        RuleModule(rule, lambda p: torch.optim.SGD(p, 0.1)), Shares())
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save(rule.state_dict(), sys.argv[1])
"""


@pytest.mark.check
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PROCESSES)
    states = []
    for processes in (1, 2):
        where = tmp_path / f"{processes}.pt"
        subprocess.run([sys.executable, "train.py", str(where), str(processes)], cwd=tmp_path,
                       check=True, capture_output=True, timeout=200)
        states.append(torch.load(where, weights_only=True))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_trained_so_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rule must be a rule, got Sequential"):
        RuleModule(network())
    with pytest.raises(ValueError, match="optimizer must be a function"):
        RuleModule(nw.rules.Backprop(network()), sgd(list(network().parameters())))

    class Own(nw.rules.Rule):
        updates_weights = True

    with pytest.raises(ValueError, match="Own changes the weights itself"):
        RuleModule(Own(network()))
