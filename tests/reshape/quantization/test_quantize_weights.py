import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.blocks import Grid, QuantizedConv2d, QuantizedEmbedding, QuantizedLinear, quantize
from netwright.blocks.quantized import dequantize
from netwright.errors import NothingToReshape, UnknownName
from netwright.models import cnn, gpt


def llama(**settings):
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        **settings)).eval()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4,
                                      n_positions=32)).eval()


def test_every_layer_holds_the_nearest_codes_and_the_model_is_that_of_rounded_weights():
    model = gpt(16, context=8, width=16, depth=2, heads=2).eval()
    small = nw.reshape.quantize_weights(model, grid="int4/8")
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            made = small.get_submodule(name)
            assert isinstance(made, (QuantizedLinear, QuantizedEmbedding))
            near = dequantize(quantize(layer.weight, "int4/8"))
            assert torch.equal(made.weight, near)
            layer.weight.data = near
    x = torch.randint(16, (3, 8))
    torch.testing.assert_close(small(x), model(x))


def test_a_convolutional_network_and_a_first_layer_that_groups_do_not_divide():
    model, x = cnn(3, (32, 32), 10).eval(), torch.randn(2, 3, 32, 32)
    small = nw.reshape.quantize_weights(model, grid="int8")
    assert any(isinstance(part, QuantizedConv2d) for part in small.modules())
    assert not any(isinstance(part, nn.Conv2d) for part in small.modules())
    assert (small(x) - model(x)).abs().max() < 0.05 * model(x).abs().max()
    with pytest.raises(ValueError, match=r"groups of 32, which do not divide the 27 inputs"):
        nw.reshape.quantize_weights(model, grid=Grid("int4", group=32))
    nw.reshape.quantize_weights(model, grid="int4/32")(x)


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_stays_tied_and_generation_agrees_with_a_full_pass(tied):
    model = llama(tie_word_embeddings=tied)
    small = nw.reshape.quantize_weights(model, embeddings="int4/16")
    head, table = small.lm_head, small.model.embed_tokens
    assert (head.stored is table.stored) == tied
    assert str(table.stored.grid) == "int4/16"
    assert str(head.stored.grid) == ("int4/16" if tied else "int8")
    kept = nw.reshape.quantize_weights(model, embeddings=False)
    assert isinstance(kept.lm_head, nn.Linear) == tied
    assert isinstance(kept.model.embed_tokens, nn.Embedding)
    left = nw.changes(kept)[-1].decision["left"]
    assert ("lm_head" in left) == tied
    assert "embeddings=False" in left["model.embed_tokens"]


def test_the_transposed_layers_of_gpt2_are_held_by_outputs():
    model, x = gpt2(), torch.randint(64, (2, 9))
    small = nw.reshape.quantize_weights(model)
    layer = small.transformer.h[0].attn.c_attn
    assert isinstance(layer, QuantizedLinear)
    assert (layer.out_features, layer.in_features) == (96, 32)
    expected, got = model(x).logits, small(x).logits
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()
    assert small.generate(x, max_new_tokens=3, do_sample=False).shape == (2, 12)


@torch.no_grad()
def test_the_second_order_sweep_errs_less_on_what_layers_take():
    torch.manual_seed(0)
    mix = torch.randn(32, 32)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    x = torch.randn(512, 8) @ mix[:8]
    for grid in ("int3", "int3/8", "fp3/16 asymmetric", "int3/tensor"):
        errors = [float((made(x) - model(x)).square().mean()) for made in (
            nw.reshape.quantize_weights(model, grid=grid),
            nw.reshape.quantize_weights(model, x, grid=grid, method="gptq"))]
        assert errors[1] < 0.7 * errors[0], grid


def test_layers_that_take_the_same_are_swept_as_if_alone():
    from netwright.reshape.quantization._second_order import _swept
    weights, x = [torch.randn(4, 16), torch.randn(6, 16)], torch.randn(64, 16)
    together = _swept(weights, x.T @ x, Grid("int3", group=8), torch.float32)
    for weight, found in zip(weights, together, strict=True):
        (alone,) = _swept([weight], x.T @ x, Grid("int3", group=8), torch.float32)
        assert torch.equal(alone.codes, found.codes)
        assert torch.equal(alone.scale, found.scale)


@torch.no_grad()
def test_a_model_that_is_no_chain_of_stages_is_calibrated_as_a_whole():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.a(x) * torch.sigmoid(self.b(x.flip(0)))

    model, x = Two(), torch.randn(64, 8)
    errors = [float((made(x) - model(x)).square().mean()) for made in (
        nw.reshape.quantize_weights(model, grid="int2"),
        nw.reshape.quantize_weights(model, x, grid="int2", method="gptq"))]
    assert errors[1] <= errors[0]


READER = """
import sys, torch, netwright as nw
for number in range(int(sys.argv[2])):
    model = nw.load(f"{sys.argv[1]}/{number}").eval()
    x, expected = torch.load(f"{sys.argv[1]}/{number}.pt")
    with torch.no_grad():
        print(torch.equal(model(x).logits, expected), len(x))
"""


@pytest.mark.check
def test_models_of_transformers_are_small_on_disk_and_the_same_in_a_fresh_process(tmp_path):
    x = torch.randint(64, (2, 6))
    models = [nw.reshape.quantize_weights(llama(tie_word_embeddings=True), grid="int4/16",
                                          dtype="bfloat16"),
              nw.reshape.quantize_weights(gpt2(), x, grid="int3/8", method="gptq"),
              nw.reshape.quantize_dynamic(llama()), nw.reshape.cast(llama(), "bfloat16")]
    for number, model in enumerate(models):
        nw.save(model, tmp_path / str(number))
        with torch.no_grad():
            torch.save((x, model.eval()(x).logits), tmp_path / f"{number}.pt")
    read = subprocess.run([sys.executable, "-c", READER, str(tmp_path), str(len(models))],
                          text=True, capture_output=True, check=True, env=os.environ)
    assert read.stdout == "True 2\n" * len(models)
    nw.save(llama(tie_word_embeddings=True), tmp_path / "whole")
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("0", "whole")]
    assert sizes[0] < 0.35 * sizes[1]  # names take a good part of so small a file
    config = (tmp_path / "0" / "config.json").read_text()
    assert '"quantize_weights"' in config
    assert '"dtype": "bfloat16"' in config


def test_parts_that_read_their_weights_themselves_stay_and_are_named():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model, x = nn.Sequential(layer, nn.LSTM(16, 16)).eval(), torch.randn(2, 5, 16)
    small = nw.reshape.quantize_weights(model)
    left = nw.changes(small)[-1].decision["left"]
    assert "0.self_attn" in left
    assert "1" in left
    assert (small[0](x) - layer(x)).abs().max() < 0.05


def test_a_mapping_gives_each_layer_its_own_grid_and_leaves_the_others():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    small = nw.reshape.quantize_weights(model, grid={"0": "int4/8", "2": 8})
    assert [str(part.stored.grid) if isinstance(part, QuantizedLinear) else None
            for part in small] == ["int4/8", None, "int8"]
    assert isinstance(nw.reshape.quantize_weights(model, layers=["1"])[0], nn.Linear)
    with pytest.raises(UnknownName, match="no layer is called '3'"):
        nw.reshape.quantize_weights(model, layers=["3"])


def test_bad_arguments_are_refused_with_what_to_do():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(UnknownName, match="gptq"):
        nw.reshape.quantize_weights(model, method="gtpq")
    with pytest.raises(ValueError, match="calibration must be given"):
        nw.reshape.quantize_weights(model, method="gptq")
    with pytest.raises(UnknownName, match="nf4"):
        nw.reshape.quantize_weights(model, grid="nf")
    with pytest.raises(UnknownName, match="bfloat16"):
        nw.reshape.quantize_weights(model, dtype="bfloat")
    model[0].weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"0\.weight with 1 numbers"):
        nw.reshape.quantize_weights(model)
    with pytest.raises(ValueError, match=r"finite weights, got 0\.weight"):
        nw.reshape.quantize_dynamic(model)
    with pytest.raises(NothingToReshape, match="no matrix at all"):
        nw.reshape.quantize_weights(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)))
