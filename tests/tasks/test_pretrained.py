import os
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import netwright as nw
from netwright import cli
from netwright.tasks import example_of, pretrained, text_task

TEXT = "a network learns what it reads and writes what it has learnt again and again " * 60


def tokenizer():
    words = {word: i for i, word in enumerate(["?", *sorted(set(TEXT.split()))])}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=16, n_head=2, n_positions=32,
                                      vocab_size=64))


MODELS = {
    "gpt2": gpt2,
    "llama": lambda: LlamaForCausalLM(LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=64, max_position_embeddings=64)),
    "bert": lambda: BertModel(BertConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=64, max_position_embeddings=48)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(
        d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, vocab_size=64)),
    "vit": lambda: ViTForImageClassification(ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8)),
}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    gpt2().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "notes.txt").write_text(TEXT)
    return tmp_path / "model"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_gives_the_model_it_holds_and_an_input_that_it_takes(name, dtype, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval()
    model.save_pretrained(tmp_path)
    found = pretrained(tmp_path)
    assert type(found) is type(model)
    assert not found.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), found.parameters(),
                                                 strict=True))
    x = example_of(found, tmp_path)
    assert len(nw.stages(found, example=x)) >= 2


def test_an_input_is_the_beginning_of_a_text(folder):
    model = pretrained(folder)
    x = example_of(model, folder, folder.parent / "notes.txt")
    assert x.tolist() == [tokenizer()(TEXT)["input_ids"][:32]]  # as far as the model reads
    drawn = example_of(model, folder.parent)  # where there is no tokenizer
    assert drawn.shape == (1, 32)


def test_a_changed_model_is_read_as_it_was_saved(folder, tmp_path):
    model = pretrained(folder)
    x = example_of(model, folder)
    smaller = nw.reshape.prune_sublayers(model, x, remove=2)
    nw.save(smaller, tmp_path / "smaller")
    again = pretrained(tmp_path / "smaller")
    assert torch.equal(again(x).logits, smaller(x).logits)


def test_the_task_of_a_text_is_going_on_with_it(folder):
    task = text_task(folder, folder.parent / "notes.txt", context=16, epochs=2, batch_size=4,
                     learning_rate=1e-2)
    x, y = task.parts(0).test.x[:1], task.parts(0).test.y[:1]
    assert torch.equal(x[:, 1:], y[:, :-1])
    model = task.network()
    assert model.training
    held_out = task.parts(0).test
    before = model.eval()(held_out.x).logits.flatten(0, 1)
    history = nw.fit(task.network(), task.parts(0).train, epochs=2, validation=held_out,
                     metric=task.score, higher_is_better=False,
                     optimizer=lambda p: task.optimize(p, 1e-2))
    bits = cross_entropy(before, held_out.y.flatten()).item() / torch.log(torch.tensor(2.0)).item()
    assert history.epochs[-1].metric < bits - 1  # six bits at random, less than five learnt


COMMANDS = {
    "stages": (["stages", "{folder}"], " stages, "),
    "stages of a text": (["stages", "{folder}", "--text", "{text}"], " stages, "),
    "anatomy": (["anatomy", "{folder}"], "attention"),
    "applicable": (["applicable", "{folder}", "--kind", "reshape"], "prune_sublayers"),
    "fit": (["fit", "{folder}", "--text", "{text}", "--epochs", "1", "-q"], "bits per token"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_take_a_folder(name, folder, monkeypatch, capsys):
    line, says = COMMANDS[name]
    line = [part.format(folder=folder, text=folder.parent / "notes.txt") for part in line]
    monkeypatch.setattr(sys, "argv", ["netwright", *line])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 0, err
    assert says in out


def damaged(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])


def unknown(folder):
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("GPT2LMHeadModel", "GPT9LMHeadModel"))


@pytest.mark.parametrize(("spoil", "says"), [
    (damaged, "could not be loaded as GPT2LMHeadModel"),
    (unknown, "names the class GPT9LMHeadModel"),
    (lambda folder: (folder / "config.json").write_text("{"), "could not be read as a model's"),
    (lambda folder: os.remove(folder / "config.json"), "must hold a config.json"),
])
def test_what_is_wrong_with_a_folder_is_said(spoil, says, folder):
    spoil(folder)
    with pytest.raises(ValueError, match=says):
        pretrained(folder)


@pytest.mark.parametrize(("content", "says"), [
    (None, "text must be a file"), (b"", "must hold words"), (b"\xff\xfe\xfa", "UTF-8"),
    (b"a network learns", "must have at least 161 tokens"),
])
def test_what_is_wrong_with_a_text_is_said(content, says, folder, tmp_path):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        text_task(folder, path, context=16)


def test_the_task_of_a_text_needs_a_causal_language_model(tmp_path):
    MODELS["bert"]().save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text(TEXT)
    with pytest.raises(ValueError, match="causal language model, got BertModel"):
        text_task(tmp_path, tmp_path / "notes.txt")
