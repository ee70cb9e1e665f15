"""Batches as loaders of Hugging Face give them: mappings, with the model's own loss or a rule's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import netwright as nw

transformers = pytest.importorskip("transformers")
TOKENS = torch.randint(2, 30, (12, 7), generator=Generator().manual_seed(0))
MASK = torch.ones_like(TOKENS)
MASK[:5, 4:] = 0
PADDED = TOKENS.masked_fill(MASK == 0, 0)
SIZE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 24, "vocab_size": 30}


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_embd=16, n_layer=3, n_head=2, vocab_size=30, n_positions=16, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1))


def bert(kind: str = "BertForSequenceClassification", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.BertConfig(
        **SIZE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options))


def t5() -> nn.Module:
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=30, dropout_rate=0.0,
        decoder_start_token_id=0))


def rows(**columns: Tensor) -> list[dict[str, Tensor]]:
    return [{name: column[i] for name, column in columns.items()} for i in range(len(TOKENS))]


NEXT = PADDED.masked_fill(MASK == 0, -100)
CASES: dict[str, tuple[Callable[[], nn.Module], list[dict[str, Tensor]]]] = {
    "causal": (gpt, rows(input_ids=PADDED, attention_mask=MASK, labels=NEXT)),
    "classes": (bert, rows(input_ids=PADDED, attention_mask=MASK, labels=TOKENS[:, 0] % 2)),
    "masked": (lambda: bert("BertForMaskedLM"), rows(
        input_ids=PADDED, attention_mask=MASK, labels=TOKENS.where(TOKENS > 20, -100))),
    "regression": (lambda: bert(num_labels=1, problem_type="regression"), rows(
        input_ids=PADDED, attention_mask=MASK, labels=TOKENS[:, 0] / 30)),
    "several labels": (lambda: bert(num_labels=3, problem_type="multi_label_classification"), rows(
        input_ids=PADDED, labels=(TOKENS[:, :3] % 2).float())),
    "answers": (lambda: bert("BertForQuestionAnswering"), rows(
        input_ids=PADDED, start_positions=TOKENS[:, 0] % 4, end_positions=TOKENS[:, 1] % 4)),
    "sequence to sequence": (t5, rows(input_ids=PADDED, attention_mask=MASK, labels=NEXT)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_loader_of_mappings_trains_with_the_models_own_loss(name: str) -> None:
    make, data = CASES[name]
    ours, theirs = make(), make()
    history = nw.fit(ours, DataLoader(data, 4), epochs=2, progress=False,
                     optimizer=lambda p: torch.optim.SGD(p, 0.1))
    theirs.train()
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    for _ in range(2):
        for batch in DataLoader(data, 4):
            optimizer.zero_grad()
            theirs(**batch).loss.backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert history[1].loss < history[0].loss


@pytest.mark.parametrize("name", ["causal", "classes", "masked", "sequence to sequence"])
def test_accumulated_mappings_make_the_step_of_one(name: str) -> None:
    make, data = CASES[name]

    def step(size: int, accumulate: int) -> tuple[list[Tensor], float]:
        model = make()
        history = nw.fit(model, DataLoader(data, size), epochs=1, accumulate=accumulate,
                         optimizer=lambda p: torch.optim.SGD(p, 0.5), progress=False)
        return [p.detach() for p in model.parameters()], history[0].loss

    (whole, loss), (parts, told) = step(12, 1), step(5, 3)
    for p, q in zip(parts, whole, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert told == pytest.approx(loss, rel=1e-5)


def test_a_causal_models_metric_is_of_the_next_tokens() -> None:
    make, data = CASES["causal"]
    model = make()
    seen: list[Tensor] = []

    def metric(scores: Tensor, y: Tensor) -> float:
        seen.append(y)
        return float(cross_entropy(scores.flatten(0, -2), y.flatten()))

    history = nw.fit(model, DataLoader(data, 4), epochs=1, validation=DataLoader(data, 5),
                     metric=metric, progress=False)
    batch = DataLoader(data, 12)
    with torch.no_grad():
        expected = float(model.eval()(**next(iter(batch))).loss)
    assert history[0].metric == pytest.approx(expected, rel=1e-5)
    assert torch.equal(seen[0][:, :-1], NEXT[:, 1:])
    assert bool((seen[0][:, -1] == -100).all())


@pytest.mark.parametrize("name", ["causal", "classes"])
def test_a_local_rule_is_given_the_labels_as_y(name: str) -> None:
    make, data = CASES[name]
    model = make()
    example = {key: value[None] for key, value in data[0].items() if key != "labels"}
    rule = nw.rules.MonoForward(model, num_classes=30 if name == "causal" else 2, example=example)
    history = nw.fit(rule, DataLoader(data, 4), epochs=15, progress=False,
                     validation=DataLoader(data, 4),
                     optimizer=lambda p: torch.optim.Adam(p, 1e-2))
    assert history[-1].loss < 0.8 * history[0].loss
    assert history[-1].metric > history[0].metric


def test_a_mapping_without_labels_is_said() -> None:
    batch = {"input_ids": TOKENS}
    with pytest.raises(ValueError, match='must hold a tensor "labels"'):
        nw.fit(nw.rules.Backprop(gpt()), [batch], epochs=1)
    with pytest.raises(ValueError, match="labels"):
        nw.fit(nn.Linear(2, 2), [batch], epochs=1)


def test_pairs_still_train_a_model_that_takes_labels() -> None:
    model, y = bert(), TOKENS[:, 0] % 2
    history = nw.fit(model, [({"input_ids": TOKENS}, y)], epochs=3, progress=False)
    assert history[-1].loss < history[0].loss
