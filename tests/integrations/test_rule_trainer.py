"""A rule in Hugging Face's Trainer: as Trainer with Backprop, and with what other rules add."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

import netwright as nw
from netwright.errors import CorruptCheckpoint

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="the Trainer of transformers needs it")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries' own

from netwright.integrations import RuleTrainer  # noqa: E402

TOKENS = torch.randint(2, 30, (24, 7), generator=Generator().manual_seed(0))
DATA = [{"input_ids": row, "labels": row[0] % 2} for row in TOKENS]
NEXT = [{"input_ids": row, "labels": row.masked_fill(torch.arange(7) > 3 + i % 3, -100)}
        for i, row in enumerate(TOKENS)]


def bert() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        vocab_size=30, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=24, vocab_size=30, max_position_embeddings=16))


def local(model: nn.Module) -> Any:
    torch.manual_seed(1)
    return nw.rules.MonoForward(model, num_classes=2, example={"input_ids": TOKENS[:2]})


def arguments(folder: Path, **options: Any) -> Any:
    return transformers.TrainingArguments(str(folder), **{
        "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-3,
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no",
        "logging_steps": 1, **options})


def close(a: nn.Module, b: nn.Module, tolerance: float = 1e-5) -> bool:
    return all(torch.allclose(p, q, rtol=tolerance, atol=tolerance)
               for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(("make", "data"), [(bert, DATA), (llama, NEXT)], ids=["bert", "llama"])
@pytest.mark.parametrize("options", [
    {}, {"gradient_accumulation_steps": 4}, {"max_grad_norm": 0.01}, {"bf16": True},
    {"warmup_steps": 3, "lr_scheduler_type": "cosine", "weight_decay": 0.1}],
    ids=["plain", "accumulated", "clipped", "bf16", "scheduled"])
def test_backprop_trains_as_trainer_does(make: Any, data: list, options: dict,
                                         tmp_path: Path) -> None:
    if make is bert and "gradient_accumulation_steps" in options:
        pytest.skip("Trainer adds these losses up without dividing, where a step is their mean")
    ours, theirs = make(), make()
    trainer = RuleTrainer(nw.rules.Backprop(ours), arguments(tmp_path / "ours", **options),
                          train_dataset=data, eval_dataset=data)
    told = trainer.train()
    plain = transformers.Trainer(theirs, arguments(tmp_path / "theirs", **options),
                                 train_dataset=data, eval_dataset=data)
    expected = plain.train()
    tolerance = 2e-3 if options.get("bf16") else 1e-5
    assert close(ours, theirs, tolerance)
    assert not close(ours, make())
    assert told.training_loss == pytest.approx(expected.training_loss, rel=10 * tolerance)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"],
                                                            rel=10 * tolerance)
    norms = [[entry["grad_norm"] for entry in each.state.log_history if "grad_norm" in entry]
             for each in (trainer, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=0.05 if options.get("bf16") else 1e-3)


def test_what_a_rule_adds_is_trained_and_cleared(tmp_path: Path) -> None:
    model = bert()
    rule = local(model)
    heads = [p.detach().clone() for p in rule.projections.parameters()]
    trainer = RuleTrainer(rule, arguments(tmp_path, num_train_epochs=20, learning_rate=1e-2),
                          train_dataset=DATA, eval_dataset=DATA)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert not any(map(torch.equal, rule.projections.parameters(), heads))
    assert trainer.evaluate()["eval_loss"] < before


def test_accumulated_batches_of_a_local_rule_make_the_step_of_one(tmp_path: Path) -> None:
    def step(size: int, accumulate: int) -> nn.Module:
        rule = local(bert())
        RuleTrainer(rule, arguments(tmp_path / f"{size}", per_device_train_batch_size=size,
                                    gradient_accumulation_steps=accumulate, num_train_epochs=1),
                    train_dataset=DATA,
                    optimizers=(torch.optim.SGD(rule.parameters(), 0.5), None)).train()
        return rule

    assert close(step(5, 5), step(24, 1), 1e-4)
    assert not close(step(5, 5), step(5, 1), 1e-4)


def test_resumed_it_ends_as_it_would_have(tmp_path: Path) -> None:
    def train(folder: Path, **options: Any) -> Any:
        rule = local(bert())
        args = arguments(folder, save_strategy="steps", save_steps=4, **options)
        trainer = RuleTrainer(rule, args, train_dataset=DATA)
        return rule, trainer

    whole, trainer = train(tmp_path / "whole")
    trainer.train()
    _, trainer = train(tmp_path / "broken", max_steps=12)
    trainer.add_callback(Stop(4))
    trainer.train()
    resumed, trainer = train(tmp_path / "broken")
    trainer.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    assert close(resumed, whole, 1e-6)
    (tmp_path / "broken" / "checkpoint-4" / "rule.safetensors").unlink()
    _, trainer = train(tmp_path / "broken")
    with pytest.raises(CorruptCheckpoint, match=r"rule\.safetensors"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))


class Stop(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_the_network_is_saved_for_anyone(tmp_path: Path) -> None:
    model = bert()
    trainer = RuleTrainer(local(model), arguments(tmp_path), train_dataset=DATA)
    trainer.train()
    trainer.save_model(str(tmp_path / "kept"))
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "kept")
    assert close(again, model, 0)


def test_the_best_model_has_its_heads_put_back(tmp_path: Path) -> None:
    rule = local(bert())
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 3,
               "load_best_model_at_end": True, "metric_for_best_model": "score",
               "greater_is_better": True}
    scores = iter([0.1, 0.9, 0.2])
    kept: list[list[Tensor]] = []

    def metric(_: Any) -> dict[str, float]:
        kept.append([p.detach().clone() for p in rule.parameters()])
        return {"score": next(scores)}

    RuleTrainer(rule, arguments(tmp_path, **options), train_dataset=DATA, eval_dataset=DATA,
                compute_metrics=metric).train()
    assert all(map(torch.equal, rule.parameters(), kept[1]))


def test_what_cannot_be_trained_so_is_said(tmp_path: Path) -> None:
    model = bert()
    rule = nw.rules.Backprop(model)
    with pytest.raises(ValueError, match="rule must be a rule, got Bert"):
        RuleTrainer(model, arguments(tmp_path))
    with pytest.raises(ValueError, match="model and model_init must be left out"):
        RuleTrainer(rule, arguments(tmp_path), model_init=bert)
    with pytest.raises(ValueError, match="give the rule loss="):
        RuleTrainer(rule, arguments(tmp_path), compute_loss_func=lambda *_: 0)
    with pytest.raises(ValueError, match="label_smoothing_factor must be 0"):
        RuleTrainer(rule, arguments(tmp_path, label_smoothing_factor=0.1))
    half = arguments(tmp_path)
    half.fp16 = True
    with pytest.raises(ValueError, match="use bf16=True"):
        RuleTrainer(rule, half)

    class Own(nw.rules.Rule):
        updates_weights = True

    with pytest.raises(ValueError, match="Own changes the weights itself"):
        RuleTrainer(Own(model), arguments(tmp_path))
