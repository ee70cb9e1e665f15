import gc
import math
from functools import partial

import pytest
import torch
from optuna.storages import InMemoryStorage

import netwright as nw

transformers = pytest.importorskip("transformers", reason="needs the extra hf")


@pytest.fixture(autouse=True, scope="module")
def _fast_collection():
    gc.collect()
    gc.freeze()  # every measurement of memory collects garbage first
    yield
    gc.unfreeze()


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2}


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=12, num_key_value_heads=2, max_position_embeddings=8, pad_token_id=0, **SIZES))


def counting():
    """Return padded sequences that count upwards, as a Hugging Face batch."""
    start = torch.randint(1, 4, (40, 1), generator=torch.Generator().manual_seed(0))
    tokens = start + torch.arange(9)
    x = {"input_ids": tokens[:, :-1].clone(), "attention_mask": torch.ones(40, 8).long()}
    y = tokens[:, 1:].clone()
    x["attention_mask"][::4, 6:], x["input_ids"][::4, 6:], y[::4, 6:] = 0, 0, -100
    first, rest = ({key: value[part] for key, value in x.items()}
                   for part in (slice(32), slice(32, None)))
    return first, y[:32], rest, y[32:]


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, num_labels=2, **SIZES))


def halves():
    """Return images whose upper or lower half is bright."""
    y = torch.arange(40) % 2
    x = 0.1 * torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x[y == 0, :, :4] += 1
    x[y == 1, :, 4:] += 1
    return x[:32], y[:32], x[32:], y[32:]


LANGUAGE = nw.Task("llama", llama, counting, metric="bits per character", epochs=6, batch_size=8,
                   learning_rate=1e-2)
IMAGES = nw.Task("vit", vit, halves, epochs=4, batch_size=8, learning_rate=1e-2)


def test_a_pruned_transformer_trains_under_a_rule_beside_the_whole_one():
    pruned = [partial(nw.reshape.prune_sublayers, remove=2), "Backprop"]
    found = nw.compare([LANGUAGE, IMAGES], {"whole": "Backprop", "pruned": pruned}, seeds=1,
                       trials=1, storage=InMemoryStorage(), progress=False)
    rows = {(row.task, row.change): row for row in found.rows}
    assert [row.failure for row in found.rows] == [""] * 4
    for task in ("llama", "vit"):
        whole, small = rows[task, "whole"], rows[task, "pruned"]
        assert small.parameters < whole.parameters
        assert small.flops < whole.flops
        assert small.saved_bytes < whole.saved_bytes
        assert list(small.alignment.values()) == pytest.approx([1.0] * len(small.alignment))
    assert rows["llama", "pruned"].mean < 0.7 * math.log2(12)
    assert rows["vit", "pruned"].mean > 0.9


def test_a_reshape_that_finds_nothing_is_a_row_that_says_so():
    found, = nw.compare("digits-mlp", ["prune_sublayers + Backprop"], seeds=1, trials=1, epochs=1,
                        storage=InMemoryStorage(), progress=False).rows
    assert "has no sublayer" in found.failure
    assert not found.scores
