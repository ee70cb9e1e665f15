import copy
import json
import sys

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig
from transformers import LlamaForCausalLM as Llama

import netwright as nw
from netwright import cli
from netwright.advise.inspect import FIGURES, inspect
from netwright.errors import CannotStage, NothingToReshape
from netwright.models import cnn, gcn, gpt, mlp

TOKENS = torch.arange(24).reshape(2, 12) % 32


def bert():
    return BertModel(BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                intermediate_size=32, vocab_size=32), add_pooling_layer=False)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32,
                                      n_positions=16))


def llama():
    return Llama(LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, intermediate_size=24, vocab_size=32))


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.spare, self.out = nn.Linear(6, 6), nn.Linear(6, 9), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.cell(self.cell(x).tanh()).tanh())


GRAPH = torch.randn(10, 16), torch.randint(10, (2, 30))
NETWORKS = {"gpt": (lambda: gpt(32, context=12), TOKENS), "bert": (bert, TOKENS),
            "gpt2": (gpt2, {"input_ids": TOKENS, "use_cache": False}),
            "llama": (llama, {"input_ids": TOKENS, "use_cache": False}),
            "cnn": (lambda: cnn(3, (16, 16), 10), torch.randn(2, 3, 16, 16)),
            "lstm": (lambda: nn.LSTM(6, 8, 2, batch_first=True), torch.randn(2, 5, 6)),
            "gcn": (lambda: gcn(16, 3), GRAPH), "encoder": (encoder, torch.randn(2, 5, 16)),
            "own": (Twice, torch.randn(4, 6)), "mlp": (lambda: mlp(8, 3), torch.randn(4, 8))}


@pytest.fixture(params=NETWORKS)
def network(request):
    make, example = NETWORKS[request.param]
    return make().eval(), example


def test_what_the_parts_take_is_what_the_whole_takes(network):
    model, example = network
    found = inspect(model, example, repeats=1)
    cost = nw.measure.cost(model, (example, None), repeats=1, warmup=0)
    assert found.total.parameters == cost.parameters
    for shares in (found.kinds, found.stages, found.parts):
        for figure in FIGURES:
            if figure != "seconds":
                given = sum(t.nbytes for t in _tensors(example)) if figure == "peak_bytes" else 0
                assert sum(getattr(s, figure) for s in shares) + given == getattr(found.total,
                                                                                  figure)
    assert found.total.seconds > 0
    assert found.total.bytes == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("name", ["gpt", "cnn", "bert", "llama", "own"])
def test_operations_and_the_peak_are_those_that_cost_measures(name):
    make, example = NETWORKS[name]
    model = make().eval()
    found = inspect(model, example, repeats=1)
    cost = nw.measure.cost(model, (example, None), repeats=1, warmup=0)
    assert (found.total.flops, found.total.peak_bytes) == (cost.flops, cost.peak_bytes)


def test_what_is_saved_for_backward_is_booked_where_it_is_saved():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    found = inspect(model, torch.randn(5, 4), repeats=1)
    saved = {share.name: share.saved_bytes for share in found.parts}
    assert saved == {"0": 5 * 4 * 4, "1": 5 * 8 * 4, "2": 0}  # 2 reads what tanh has kept


def test_kinds_are_those_of_the_anatomy():
    kinds = {name: {kind.name for kind in inspect(make().eval(), example, repeats=1).kinds}
             for name, (make, example) in NETWORKS.items()}
    transformer = {"attention", "embedding", "feed-forward", "normalisation"}
    for name in ("gpt", "bert", "gpt2", "llama"):
        assert transformer <= kinds[name]
    assert "head" in kinds["llama"]
    assert {"convolution", "pooling"} <= kinds["cnn"]
    assert kinds["lstm"] == {"recurrent"}
    assert "gathering" in kinds["gcn"]


@pytest.mark.parametrize("name", ["gpt", "bert", "gpt2", "llama"])
def test_attention_and_feed_forward_layers_have_the_operations_of_their_formulas(name):
    make, example = NETWORKS[name]
    model = make().eval()
    found = nw.anatomy(model, example)
    tokens, length = TOKENS.numel(), TOKENS.shape[1]
    width, heads = 64 if name == "gpt" else 16, found.attentions[0]
    shared = (heads.key_heads or heads.heads) / heads.heads
    products = 2 * tokens * width * width * (2 + 2 * shared) + 4 * tokens * length * width
    layer = found.feedforwards[0]
    dense = 2 * tokens * layer.dim * layer.hidden * (3 if layer.gate else 2)
    flops = {kind.name: kind.flops for kind in inspect(model, example, repeats=1).kinds}
    assert flops["attention"] == len(found.attentions) * products
    assert flops["feed-forward"] == len(found.feedforwards) * dense


def test_the_network_is_left_as_it_was(network):
    model, example = network
    model.train()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    inspect(model, example, repeats=1)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, module in model.named_modules():
        assert module.training
        assert module.__dict__.keys() == attributes[name].keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not nn.modules.module._global_forward_hooks
    assert all(p.grad is None for p in model.parameters())


def test_what_is_printed_fits_eighty_columns(network):
    model, example = network
    lines = repr(inspect(model, example, repeats=1)).splitlines()
    assert max(map(len, lines)) <= 80
    assert "part" in lines[2].split()
    assert any(line.startswith("- A forward pass takes") for line in lines)


def test_what_most_of_it_is_is_said_in_words():
    model = nn.Sequential(nn.Embedding(1000, 8), nn.Flatten(), nn.Linear(96, 3))
    said = inspect(model.eval(), TOKENS, repeats=1).said
    assert said[0] == "96\N{NO-BREAK SPACE}% of the bytes are embedding (0)."


def unusual(model, example):
    return " ".join(inspect(model, example, repeats=1).unusual).replace("\N{NO-BREAK SPACE}", " ")


def test_nothing_is_said_of_what_is_usual():
    assert unusual(mlp(8, 3).eval().bfloat16(), torch.randn(4, 8).bfloat16()) == ""


def test_a_tied_head_is_said():
    said = unusual(gpt2().eval(), NETWORKS["gpt2"][1])
    assert "the head is tied to transformer.wte.weight (2 KiB)" in said


def test_wide_numbers_and_several_dtypes_are_said():
    assert "100 % of the bytes are float32: bfloat16 halves" in unusual(mlp(8, 3).eval(),
                                                                         torch.randn(4, 8))
    model = nn.Sequential(nn.Embedding(32, 4).double(), nn.Flatten()).eval()
    assert "float64: float32 halves" in unusual(model, TOKENS)


def test_dropout_and_batch_norm_left_on_are_said():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    said = unusual(model.train(), torch.randn(4, 6))
    assert "Dropout is left on, in 2: model.eval()" in said
    assert "as in training, in 1: model.eval()" in said
    model.eval()
    assert "model.eval()" not in unusual(model, torch.randn(4, 6))


def test_padding_is_said():
    mask = torch.ones_like(TOKENS)
    mask[0, 2:] = 0
    model = bert().eval()
    assert "42 % of the batch is padding" in unusual(model, {"input_ids": TOKENS,
                                                             "attention_mask": mask})
    assert "padding" not in unusual(model, {"input_ids": TOKENS,
                                            "attention_mask": torch.ones_like(TOKENS)})


def test_weights_that_nothing_reads_that_are_read_twice_or_held_are_said():
    model = Twice().eval()
    model.out.weight.requires_grad_(False)
    said = unusual(model, torch.randn(4, 6))
    assert "spare: nothing reads these weights here, 252 B, 50 % of the bytes" in said
    assert "cell runs 2 times in a pass." in said
    assert "14 % of the parameters are frozen." in said


def test_weights_that_are_zero_or_no_numbers_are_said():
    model = mlp(8, 3, hidden=(8,)).eval()
    with torch.no_grad():
        next(model.parameters())[:6] = 0
        [*model.parameters()][-1][0] = torch.nan
    said = unusual(model, torch.randn(4, 8))
    assert "55 % of the weights are zero" in said
    assert "numbers that are not finite in " in said


def test_a_network_that_runs_without_gradients_alone_is_looked_at():
    class Answering(nn.Linear):
        def forward(self, x):
            if torch.is_grad_enabled():
                raise RuntimeError("this kernel has no backward")
            return super().forward(x)

    said = unusual(Answering(6, 3).eval(), torch.randn(4, 6))
    assert "It cannot run with gradients: this kernel has no backward." in said


@pytest.mark.parametrize(("make", "example", "error", "said"), [
    (lambda: torch.compile(mlp(8, 3)), torch.randn(4, 8), NothingToReshape, "compiled"),
    (lambda: mlp(8, 3).to("meta"), torch.randn(4, 8), ValueError, "on the meta device"),
    (lambda: mlp(8, 3), torch.randn(4, 9), CannotStage, "cannot run on the example"),
    (lambda: mlp(8, 3), torch.randn(0, 8), ValueError, "at least one row"),
    (lambda: mlp(8, 3), "text", ValueError, "example must hold a tensor"),
    (lambda: mlp(8, 3), None, ValueError, "example must hold a tensor")])
def test_what_cannot_be_looked_at_is_refused(make, example, error, said):
    with pytest.raises(error, match=said):
        inspect(make(), example)


def test_no_model_and_no_repeats_are_refused():
    with pytest.raises(ValueError, match=r"model must be an nn\.Module"):
        inspect("model", TOKENS)
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        inspect(mlp(8, 3), torch.randn(4, 8), repeats=0)


def test_the_command_line_shows_it(capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["netwright", "inspect", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    status, out, _ = run("digits-mlp")
    assert status == 0
    assert "of the bytes are" in out
    assert "changes apply; `netwright applicable digits-mlp` lists them." in out
    rows = json.loads(run("digits-mlp", "--json")[1])
    assert rows["total"]["parameters"] == sum(kind["parameters"] for kind in rows["kinds"])
    status, _, err = run("netwright.models:cnn")
    assert status == 2
    assert "cnn could not be called without arguments" in err
    status, _, err = run("torch.nn:Identity")
    assert (status, "--shape" in err) == (2, True)


def _tensors(example):
    return [t for t in (example.values() if isinstance(example, dict) else
                        example if isinstance(example, tuple) else [example])
            if isinstance(t, torch.Tensor)]
