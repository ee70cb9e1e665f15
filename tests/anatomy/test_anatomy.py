import dataclasses
import json
import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional

import netwright as nw
from netwright.anatomy.attention import Attention
from netwright.anatomy.parts import (
    Convolution,
    Embedding,
    Experts,
    Linear,
    Normalisation,
    Recurrent,
    Repeated,
    Tie,
)
from netwright.blocks.experts import MixtureOfExperts, TopKRouter
from netwright.errors import NothingToReshape
from netwright.models import gpt
from tests.anatomy.models import Heads, built, images, tokens


def found(name):
    return nw.anatomy(*built(name))


def branches(anatomy):
    """Return for each stream its width and what adds to it."""
    return [(stream.width, [(b.name, b.holds, b.norm, b.norm_place) for b in stream.sublayers])
            for stream in anatomy.streams]


def test_gpt2_is_one_stream_of_fused_attention_and_feed_forward():
    anatomy = found("gpt2")
    assert branches(anatomy) == [(32, [
        (f"transformer.h.{i}.{part}", (kind,), f"transformer.h.{i}.{norm}", "before")
        for i in (0, 1) for part, kind, norm in (("attn", "attention", "ln_1"),
                                                 ("mlp", "feedforward", "ln_2"))])]
    assert anatomy.streams[0].name == "transformer.h"
    assert anatomy.streams[0].sublayers[0].feeders == (
        "transformer.h.0.ln_1",)
    projection = "transformer.h.0.attn.c_attn"
    assert anatomy.attentions[0] == Attention(
        "transformer.h.0.attn", projection, projection, projection, "transformer.h.0.attn.c_proj",
        heads=4, key_heads=4, head_dim=8, fused=True, cross=False)
    first = anatomy.feedforwards[0]
    assert (first.name, first.up, first.down, first.gate, first.activation) == (
        "transformer.h.0.mlp", "transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj", None,
        "gelu (tanh)")
    assert (first.dim, first.hidden, first.out, first.packed) == (32, 128, 32, False)
    assert anatomy.embeddings == (Embedding("transformer.wte", 64, 32),
                                  Embedding("transformer.wpe", 1024, 32))
    assert anatomy.head == "lm_head"
    assert anatomy.ties == (Tie(("transformer.wte.weight", "lm_head.weight")),)
    assert anatomy.linears[0] == Linear(projection, 32, 96)
    assert anatomy.normalisations[-1] == Normalisation("transformer.ln_f", "layer", 32)
    assert anatomy.unused == anatomy.repeated == anatomy.experts == anatomy.convolutions == ()


def test_llama_shares_key_heads_and_gates_its_feed_forward():
    anatomy = found("llama")
    layer = "model.layers.1"
    assert anatomy.attentions[1] == Attention(
        f"{layer}.self_attn", *(f"{layer}.self_attn.{p}_proj" for p in "qkvo"),
        heads=4, key_heads=2, head_dim=8, fused=False, cross=False)
    gated = anatomy.feedforwards[1]
    assert (gated.up, gated.gate, gated.activation, gated.packed) == (
        f"{layer}.mlp.up_proj", f"{layer}.mlp.gate_proj", "silu", False)
    assert anatomy.normalisations[0] == Normalisation("model.layers.0.input_layernorm", "rms", 32)
    assert len(anatomy.linears) == 2 * 7 + 1
    assert not anatomy.ties


def test_bert_normalises_after_each_sum():
    ((width, rows),) = branches(found("bert"))
    assert width == 32
    assert [row[2:] for row in rows] == [
        (f"bert.encoder.layer.{i}.{part}output.LayerNorm", "after")
        for i in (0, 1) for part in ("attention.", "")]


def test_an_encoder_and_a_decoder_are_two_streams_and_attention_across():
    anatomy = found("t5")
    assert [[row[1] for row in rows] for _, rows in branches(anatomy)] == [
        [("attention",), ("feedforward",)], [("attention",), ("attention",), ("feedforward",)]]
    assert [stream.name for stream in anatomy.streams] == [
        "encoder.block.0.layer", "decoder.block.0.layer"]
    assert [attention.cross for attention in anatomy.attentions] == [False, False, True]
    (tie,) = anatomy.ties
    assert set(tie.names) == {"shared.weight", "encoder.embed_tokens.weight",
                              "decoder.embed_tokens.weight", "lm_head.weight"}


def test_experts_in_one_parameter_are_seen_with_their_router():
    anatomy = found("mixtral")
    mlp = "model.layers.0.mlp"
    assert anatomy.experts[0] == Experts(mlp, f"{mlp}.experts", f"{mlp}.gate", count=4, chosen=2,
                                         dim=32, hidden=48, packed=True)
    assert branches(anatomy)[0][1][1][:2] == (mlp, ("experts",))
    assert not anatomy.feedforwards


def test_a_list_of_experts_is_seen_and_those_that_were_not_chosen_are_not_unused():
    router = TopKRouter(8, 3, 1)
    block = MixtureOfExperts(8, [nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
                                 for _ in range(3)], router, fused=False)
    anatomy = nw.anatomy(nn.Sequential(nn.Linear(8, 8), block), torch.randn(1, 8))
    assert anatomy.experts == (Experts("1", "1.experts", "1.router", 3, 1, 8, 12, packed=False),)
    assert not anatomy.unused
    assert not anatomy.feedforwards


def test_parallel_branches_are_both_sublayers():
    (_, rows), = branches(found("neox"))
    assert {row[:2] for row in rows} == {
        (f"gpt_neox.layers.{i}.{part}", (kind,)) for i in (0, 1)
        for part, kind in (("attention", "attention"), ("mlp", "feedforward"))}


def test_one_layer_that_gives_gate_and_what_it_gates():
    layer = found("phi3").feedforwards[0]
    assert layer.gate == layer.up == "model.layers.0.mlp.gate_up_proj"
    assert (layer.dim, layer.hidden, layer.out, layer.activation, layer.packed) == (
        32, 48, 32, "silu", True)


def test_a_convolutional_network_has_a_stream_for_each_width():
    anatomy = found("resnet")
    assert [(width, len(rows)) for width, rows in branches(anatomy)] == [(8, 2), (16, 1)]
    assert branches(anatomy)[0][1][0][1:] == (
        ("convolution",), "resnet.encoder.stages.0.layers.0.layer.1.normalization", "within")
    assert anatomy.convolutions[0] == Convolution(
        "resnet.embedder.embedder.convolution", 3, 8, (7, 7), (2, 2), 1, False)
    assert {norm.kind for norm in anatomy.normalisations} == {"batch"}
    assert anatomy.head == "classifier.1"


def test_depthwise_convolutions_and_sums_of_another_layout():
    anatomy = found("convnext")
    assert anatomy.convolutions[1].groups == 8
    assert branches(anatomy)[0] == (8, [
        (f"convnext.encoder.stages.0.layers.{i}.pwconv2", ("feedforward", "convolution"), None,
         None) for i in (0, 1)])


def test_a_layer_that_runs_several_times_is_named_once():
    anatomy = found("albert")
    assert anatomy.repeated == (Repeated("encoder.albert_layer_groups.0", 2),)
    assert len(anatomy.attentions) == len(anatomy.feedforwards) == 1
    assert [row[1] for row in branches(anatomy)[0][1]] == [("attention",), ("feedforward",)]


@pytest.mark.parametrize("name", ["vit", "opt"])
def test_other_transformers_are_one_stream_normalised_before(name):
    ((width, rows),) = branches(found(name))
    assert width == 32
    assert [(row[1], row[3]) for row in rows] == 2 * [(("attention",), "before"),
                                                      (("feedforward",), "before")]


def test_pytorchs_own_encoder_is_seen_although_it_has_a_fused_path():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    anatomy = nw.anatomy(encoder, torch.randn(2, 5, 16))
    packed = "layers.0.self_attn.in_proj_weight"
    assert anatomy.attentions == (Attention(
        "layers.0.self_attn", packed, packed, packed, "layers.0.self_attn.out_proj", 2, 2, 8,
        fused=True, cross=False),)
    assert [b.norm_place for b in anatomy.streams[0].sublayers] == ["after", "after"]
    assert not anatomy.unused


def test_attention_written_out_by_hand():
    anatomy = nw.anatomy(Heads(), torch.randn(2, 5, 16))
    assert anatomy.attentions == (Attention("", "query", "key", "value", "out", 4, 2, 4,
                                            fused=False, cross=False),)
    (without,) = nw.anatomy(Heads(out=False), torch.randn(2, 5, 16)).attentions
    assert without.out is None


class Written(nn.Module):
    """Everything as functions of parameters, in one module."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(12, 6)), nn.Parameter(torch.randn(6, 12))
        self.bias, self.kernel = nn.Parameter(torch.zeros(12)), nn.Parameter(torch.randn(4, 1, 3))
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        h = functional.layer_norm(x, (6,), self.scale)
        h = x + functional.linear(functional.linear(h, self.up, self.bias).relu(), self.down)
        return functional.conv1d(h[:, None], self.kernel)


def test_functions_of_parameters_are_named_by_these():
    anatomy = nw.anatomy(Written(), torch.randn(3, 6))
    (layer,) = anatomy.feedforwards
    assert (layer.name, layer.up, layer.down, layer.activation) == ("", "up", "down", "relu")
    assert anatomy.convolutions == (Convolution("kernel", 1, 4, (3,), (1,), 1, False),)


@pytest.mark.parametrize(("network", "x", "expected"), [
    (nn.LSTM(4, 8, 2, bidirectional=True), torch.randn(5, 2, 4),
     Recurrent("", "LSTM", 4, 8, layers=2, directions=2)),
    (nn.Sequential(nn.GRU(4, 8)), torch.randn(5, 2, 4), Recurrent("0", "GRU", 4, 8))])
def test_recurrent_layers(network, x, expected):
    assert nw.anatomy(network, x).recurrents == (expected,)


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.again = nn.Linear(3, 5), nn.Linear(5, 5)

    def forward(self, x, h):
        return torch.tanh(self.into(x) + self.again(h))


class Rolled(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = Cell(), nn.Linear(5, 2)

    def forward(self, x):
        h = x.new_zeros(len(x), 5)
        for step in x.unbind(1):
            h = self.cell(step, h)
        return self.head(h)


def test_a_cell_of_ones_own_is_recurrent_and_a_layer_that_is_stacked_is_not():
    anatomy = nw.anatomy(Rolled(), torch.randn(2, 4, 3))
    assert anatomy.recurrents == (Recurrent("cell", "Cell", 3, 5),)
    layer = nn.Linear(4, 4)
    stacked = nw.anatomy(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(2, 4))
    assert stacked.recurrents == ()
    assert stacked.repeated == (Repeated("0", 2),)


def test_a_graph_network():
    geometric = pytest.importorskip("torch_geometric.nn")
    network = geometric.GCN(4, 8, 2, 3)
    edges = torch.tensor([[0, 1, 2], [1, 2, 0]])
    anatomy = nw.anatomy(network, (torch.randn(3, 4), edges))
    assert anatomy.linears == (Linear("convs.0.lin", 4, 8), Linear("convs.1.lin", 8, 3))
    assert anatomy.streams == anatomy.attentions == anatomy.feedforwards == ()


def test_a_plain_chain_has_neither_stream_nor_attention():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                            nn.Linear(16, 3))
    anatomy = nw.anatomy(network, torch.randn(2, 1, 4, 4))
    assert anatomy.streams == anatomy.attentions == anatomy.feedforwards == ()
    assert anatomy.normalisations == (Normalisation("1", "batch", 4),)
    assert anatomy.head == "4"


class Reached(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.left = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

    def forward(self, x):
        return x + self.used.weight.sum() + nn.Identity()(x)


def test_what_nothing_reads_is_unused_by_its_outermost_module():
    anatomy = nw.anatomy(Reached(), torch.randn(2, 4))
    assert anatomy.unused == ("left",)
    assert anatomy.head is None
    assert anatomy.streams == ()  # x + x is no sublayer


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_show_the_same(dtype):
    model, x = built("llama")
    assert nw.anatomy(deepcopy(model).to(dtype), x) == nw.anatomy(model, x)


@pytest.mark.parametrize("setting", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_mode_of_autograd_does_not_matter(setting):
    model, x = built("bert")
    with setting():
        assert nw.anatomy(model, x) == nw.anatomy(model, x)


def test_frozen_and_compiled_networks():
    model, x = built("gpt2")
    assert nw.anatomy(deepcopy(model).requires_grad_(False), x) == nw.anatomy(model, x)
    with pytest.raises(NothingToReshape, match="compiled"):
        nw.anatomy(torch.compile(model), x)


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=0.5)
        self.drop, self.last = nn.Dropout(), None

    def forward(self, x):
        x += 1
        self.last = self.drop(self.norm(self.layer(x))) + torch.rand(1)
        return self.last


def test_network_input_mode_buffers_and_random_state_stay():
    network, x = Remembers(), torch.randn(3, 4)
    network.layer.eval()
    state, given, drawn = deepcopy(network.state_dict()), x.clone(), torch.get_rng_state()
    settings = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    nw.anatomy(network, x)
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert network.training
    assert not network.layer.training
    assert network.last is None
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in network.modules())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert settings == (torch.backends.mha.get_fastpath_enabled(),
                        torch._C._get_mkldnn_enabled())


def test_a_cache_that_is_given_stays():
    model, x = built("llama")
    cache = model(x, use_cache=True).past_key_values
    before = cache.get_seq_length()
    anatomy = nw.anatomy(model, {"input_ids": x[:, :1], "past_key_values": cache})
    assert cache.get_seq_length() == before == 7
    assert anatomy.attentions[0].key_heads == 2


def test_a_run_that_fails_leaves_the_network_as_it_was():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 4)).train()
    with pytest.raises(RuntimeError):
        nw.anatomy(network, torch.randn(2, 4))
    assert network.training
    assert all(not m._forward_hooks for m in network.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_lazy_networks_stay_lazy():
    network = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))
    assert nw.anatomy(network, torch.randn(2, 3)).linears == (Linear("0", 3, 4), Linear("2", 4, 2))
    assert nn.parameter.is_lazy(network[0].weight)


def test_parts_are_plain_data_and_the_table_can_be_read():
    model = gpt(64, context=16, depth=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        anatomy = nw.anatomy(model, tokens())
    said = json.loads(json.dumps(dataclasses.asdict(anatomy)))
    assert said["attentions"][0]["heads"] == 4
    rows = anatomy.table()
    assert {"part": "feed-forward", "name": "1", "sizes": "64 -> 256 -> 64, gelu"} in rows
    assert all(row["name"] in repr(anatomy) for row in rows)
    assert repr(anatomy).startswith("Anatomy of Sequential\n")
    assert hash(anatomy) == hash(nw.anatomy(model, tokens()))


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return {"first": self.first(x), "second": self.second(x)}


def test_a_network_of_several_outputs_is_looked_at_too():
    assert [layer.name for layer in nw.anatomy(Several(), torch.randn(2, 4)).linears] == [
        "first", "second"]


class Rolling(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = Heads()

    def forward(self, x):
        return x + self.heads(x.roll(1, 1)).roll(-1, 1)


def test_a_branch_may_be_rolled_back_before_it_is_added():
    ((width, rows),) = branches(nw.anatomy(Rolling(), torch.randn(2, 5, 16)))
    assert (width, rows[0][:2]) == (16, ("heads", ("attention",)))


class Sinks(Heads):
    """Attention some of which goes nowhere, by a score of its own for each head."""

    def __init__(self):
        super().__init__()
        self.sink = nn.Parameter(torch.zeros(4, 1, 1))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (heads, 4)).transpose(1, 2)
                   .repeat_interleave(4 // heads, 1)
                   for layer, heads in ((self.query, 4), (self.key, 2), (self.value, 2)))
        scores = torch.cat([q @ k.mT, self.sink.expand(len(x), 4, x.shape[1], 1)], -1)
        return self.out((scores.softmax(-1)[..., :-1] @ v).transpose(1, 2).flatten(2))


def test_attention_with_scores_of_its_own_beside():
    (layer,) = nw.anatomy(Sinks(), torch.randn(2, 5, 16)).attentions
    assert (layer.query, layer.key, layer.out, layer.heads, layer.key_heads) == (
        "query", "key", "out", 4, 2)


def test_an_image_network_that_is_given_by_keyword():
    assert nw.anatomy(built("vit")[0], images()).head == "classifier"
