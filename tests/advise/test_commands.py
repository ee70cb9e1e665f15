import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import netwright as nw
from netwright import cli
from netwright.advise.reading import images, model_in, texts
from netwright.models import mlp

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def netwright(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["netwright", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "140")
        capsys.readouterr()  # what the test itself has printed
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err
    return run


def words(count):
    return " ".join(f"word{i} and word{i * 7 % 13}, then word{i * 5 % 11} came back to it."
                    for i in range(count))


@pytest.fixture
def encoder(tmp_path):
    """A small sentence encoder with its tokenizer, and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    names = ["[PAD]", "[UNK]", "and", "then", "came", "back", "to", "it", ",", ".",
             *(f"word{i}" for i in range(64))]
    plain = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]",
                                        unk_token="[UNK]", model_max_length=32)
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=len(names), hidden_size=16, num_hidden_layers=3,
                                 num_attention_heads=2, intermediate_size=32,
                                 max_position_embeddings=32))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (tmp_path / "notes.txt").write_text(words(80))
    return folder


def test_a_folder_is_inspected_on_the_sentences_of_a_text(netwright, encoder, tmp_path):
    (tmp_path / "few.txt").write_text("word1 and then word2 came back to it.\n\n"
                                      "word3 and word4, then word5 came back to it and word6.")
    status, out, err = netwright("inspect", encoder, "--text", "few.txt", "--report", "page.html")
    assert (status, err) == (0, "")
    assert "BertModel on (2, 13) int64, (2, 13) int64" in out
    assert "15\N{NO-BREAK SPACE}% of the batch is padding" in out
    assert "What is in BertModel" in (tmp_path / "page.html").read_text()
    rows = json.loads(netwright("inspect", encoder, "--text", "notes.txt", "--batch", "3",
                                "--json")[1])
    assert rows["given"].startswith("(3, ")


def test_what_cannot_be_inspected_is_refused_in_a_line(netwright, encoder, tmp_path):
    for arguments, said in [
            (("model.pt",), "pickled checkpoint"), (("nowhere",), "nowhere"),
            ((encoder, "--report", tmp_path), "--report must be a file"),
            ((encoder, "--text", "none.txt"), "none.txt")]:
        status, out, err = netwright("inspect", *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert said in err
    (encoder / "model.safetensors").unlink()
    assert "must hold weights as safetensors" in netwright("inspect", encoder)[2]


@pytest.mark.check
def test_a_folder_and_a_text_give_models_that_load_anywhere(netwright, encoder, tmp_path):
    status, out, err = netwright("advise", encoder, "--text", "notes.txt", "--want", "size=0.9",
                                 "--keep", "0.2", "--budget", "15s", "-q", "-o", "advice",
                                 "--also", "cast")
    assert (status, err) == (0, "")
    assert "correlation of all pairs" in out
    found = nw.Advice.read("advice")
    best = found.recommended
    assert best["meets"]
    folder = tmp_path / "advice" / best["folder"]
    assert (folder / "tokenizer.json").is_file()
    plain = model_in(folder)
    status, out, err = netwright("apply", folder / "recipe.json", encoder, "again")
    assert (status, err) == (0, "")
    x = texts(plain, folder, "notes.txt")[0]
    again = model_in("again")
    with torch.no_grad():
        assert torch.allclose(plain(**x).last_hidden_state, again(**x).last_hidden_state)


@pytest.mark.check
def test_json_is_what_the_file_holds(netwright, encoder):
    status, out, _ = netwright("advise", encoder, "--text", "notes.txt", "--want", "size=0.9",
                               "--keep", "0.2", "--budget", "10s", "-q", "--json")
    assert status == 0
    with open("advice/advice.json") as file:
        assert json.loads(out) == json.load(file)


BUILDER = """
from netwright.models import mlp

def build():
    return mlp(64, 10, hidden=(32,))
"""


@pytest.mark.check
def test_a_builder_with_a_state_and_a_tasks_data(netwright, tmp_path):
    (tmp_path / "mine_to_build.py").write_text(BUILDER)
    torch.manual_seed(0)
    save_file(mlp(64, 10, hidden=(32,)).state_dict(), "state.safetensors")
    status, out, err = netwright(
        "advise", "mine_to_build:build", "--weights", "state.safetensors", "--data", "digits-mlp",
        "--fidelity", "agreement", "--budget", "8s", "-q")
    assert (status, err) == (0, "")
    assert "share of answers whose likeliest class is the original's" in out


def test_bad_input_gets_one_line(netwright, encoder, tmp_path):
    empty, pickled = tmp_path / "empty", tmp_path / "pickled"
    for folder in (empty, pickled):
        folder.mkdir()
        (folder / "config.json").write_text((encoder / "config.json").read_text())
    torch.save(nn.Linear(2, 2).state_dict(), pickled / "pytorch_model.bin")
    (tmp_path / "short.txt").write_text("One sentence that is by itself.")
    text = ("--text", "notes.txt", "-q")
    for arguments, said in [
            ((empty, *text), "must hold weights as safetensors"),
            ((pickled, *text), "safetensors.torch as s"),
            ((pickled / "pytorch_model.bin", *text), "is a pickled checkpoint"),
            (("./nowhere", *text), "does not exist"),
            ((encoder, "--text", "short.txt", "-q"), "at least 12 different samples"),
            ((encoder, "--text", "nowhere.txt", "-q"), "text must be a file"),
            ((encoder, *text, "--want", "siz=0.5"), "did you mean size"),
            ((encoder, *text, "--want", "size=2GB"), "met already"),
            ((encoder, *text, "--want", "size=0.5", "--want", "size=0.4"), "one limit"),
            ((encoder, *text, "--budget", "0.001s"), "budget must be at least"),
            ((encoder, *text, "--metric", "accuracy"), "pairs of inputs and targets"),
            ((encoder, *text, "--data", "digits-mlp"), "keep one"),
            (("digits-mlp", "-q"), "--weights must be given"),
            (("netwright.models:mlp", "-q"), "--data must be given"),
            ((encoder, *text, "-o", "notes.txt"), "must be a folder")]:
        status, out, err = netwright("advise", *arguments)
        assert status == 2, arguments
        assert said in err, (arguments, err)
        assert len(err.strip().splitlines()) == 1
        assert out == ""
    assert not (tmp_path / "advice" / "advice.json").exists()


def test_apply_keeps_the_model_and_says_what_is_wrong(netwright, encoder):
    status, _, err = netwright("apply", "prune_sublayers(remove=1)", encoder, encoder, "--text",
                               "notes.txt")
    assert (status, "is the model itself" in err) == (2, True)
    status, _, err = netwright("apply", "prune_sublayer", encoder, "out", "--text", "notes.txt")
    assert (status, "did you mean" in err) == (2, True)


def test_pictures_are_scaled_and_normalised(tmp_path):
    from PIL import Image
    for shade in (0, 255):
        Image.new("RGB", (20, 10), (shade, 0, 0)).save(tmp_path / f"{shade}.png")
    found, = images(nn.Identity(), tmp_path, size=8)
    assert found.shape == (2, 3, 8, 8)
    assert found[:, 0, 0, 0].tolist() == [0.0, 1.0]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="must hold pictures"):
        images(nn.Identity(), tmp_path / "none")


def test_windows_of_a_causal_model_follow_one_another(encoder, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(vocab_size=80, n_layer=1, n_embd=8, n_head=2,
                                       n_positions=16))
    found = texts(model, encoder, tmp_path / "notes.txt")[0]["input_ids"]
    assert found.shape[1] == 16
    assert len(found) > 12
