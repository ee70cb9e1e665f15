"""A rule in Hugging Face's Trainer and in Lightning's, in steps per second beside theirs alone.

    python benchmarks/integrations.py

Backprop's step is the same work as that of the trainer itself, so that the ratio is what the
integration costs. Each contender trains STEPS steps in turn, TURNS times, in processor time of one
thread; the ratio is that of the smallest times.
"""

import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import netwright as nw
from netwright.integrations import RuleModule, RuleTrainer
from netwright.runtime.machine import machine

RESULTS = Path(__file__).parent / "results" / "integrations.json"
STEPS, TURNS, BATCH = 60, 7, 8


def bert() -> Any:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
        vocab_size=1000, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def with_trainer(ruled: bool) -> Callable[[], Any]:
    """Return what trains by transformers' Trainer."""
    tokens = torch.randint(2, 1000, (STEPS * BATCH, 32))
    data = [{"input_ids": row, "labels": row[0] % 2} for row in tokens]
    given = transformers.TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=BATCH, num_train_epochs=1, report_to=[],
        disable_tqdm=True, use_cpu=True, save_strategy="no", logging_strategy="no")
    model = bert()
    made = (RuleTrainer(nw.rules.Backprop(model), given, train_dataset=data) if ruled else
            transformers.Trainer(model, given, train_dataset=data))
    return made.train


class Plain(lightning.LightningModule):
    """Backpropagation as Lightning has it, with its loss logged as a rule's is."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x, y = batch
        loss = cross_entropy(self.network(x), y)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(y))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def with_lightning(ruled: bool) -> Callable[[], Any]:
    """Return what trains by Lightning's Trainer."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(),
                            nn.Linear(1024, 10))
    x = torch.randn(STEPS * 64, 256)
    loader = DataLoader(TensorDataset(x, x[:, :10].argmax(1)), 64)
    module = RuleModule(nw.rules.Backprop(network), lambda parameters: torch.optim.AdamW(
        parameters, 1e-3)) if ruled else Plain(network)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tempfile.mkdtemp())
    return lambda: trainer.fit(module, loader)


def compared(make: Callable[[bool], Callable[[], Any]]) -> Mapping[str, float]:
    """Return steps per processor second of both, and their ratio."""
    least = {ruled: float("inf") for ruled in (False, True)}
    for turn in range(TURNS + 1):
        for ruled in least:
            train = make(ruled)
            start = time.process_time()
            train()
            if turn:  # the first one warms up
                least[ruled] = min(least[ruled], time.process_time() - start)
    return {"steps per second alone": STEPS / least[False],
            "steps per second with the rule": STEPS / least[True],
            "ratio": least[False] / least[True]}


def main() -> None:
    """Measure both."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found = {"transformers' Trainer": compared(with_trainer),
             "Lightning's Trainer": compared(with_lightning)}
    print(json.dumps(found, indent=1))
    RESULTS.write_text(json.dumps({"rows": found, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
