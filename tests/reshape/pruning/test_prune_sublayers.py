from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.errors import CorruptCheckpoint, NothingToReshape, UnknownName
from netwright.models import gpt
from netwright.reshape import prune_sublayers
from netwright.reshape.pruning import sublayers, without_sublayers
from netwright.reshape.pruning._distances import Distances
from netwright.stages import call

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4}


class Branch(nn.Module):
    """A pre-norm residual branch whose parts a test can weigh."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.first = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.last = nn.Linear(2 * width, width)

    def forward(self, h):
        return h + self.last(torch.relu(self.first(self.norm(h))))


def residual(depth=4, width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), *(Branch(width) for _ in range(depth)),
                         nn.Linear(width, 3))


def tokens():
    torch.manual_seed(1)
    return torch.randint(64, (2, 10))


def padded():
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": tokens(), "attention_mask": mask}


def images():
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def llama(**changes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **SMALL | {"num_key_value_heads": 2} | changes)).eval()


def hugging_face(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
              "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    made = {
        "llama": lambda: llama(),
        "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(
            **SMALL, num_key_value_heads=2, num_local_experts=4)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)),
        "neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL)),
        "bert": lambda: transformers.BertForSequenceClassification(
            transformers.BertConfig(**SMALL)),
        "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**vision)),
    }
    return made[name]().eval()


def encoder(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()


FAMILIES = [("llama", padded), ("mixtral", tokens), ("gpt2", tokens), ("neox", tokens),
            ("bert", padded), ("vit", images)]


# Which sublayers there are.

def test_those_of_llama_are_attention_and_feed_forward_of_every_layer():
    assert sublayers(llama(), padded()) == [
        f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn", "mlp")]


def test_parts_that_are_no_module_of_their_own_are_found_by_what_writes():
    assert sublayers(gpt(64, context=10), tokens()) == [
        f"{i}.{part}" for i in (1, 2) for part in ("attention_out", "mlp_out")]


@pytest.mark.parametrize("norm_first", [True, False])
def test_those_of_pytorch_encoder_layers_are_found(norm_first):
    assert sublayers(encoder(norm_first), torch.randn(2, 5, 16)) == [
        f"layers.{i}.{part}" for i in range(3) for part in ("self_attn", "linear2")]


def test_a_sum_that_is_no_residual_stream_is_no_sublayer():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            stream = self.a(x) + self.b(x)
            return stream + self.c(stream)

    assert sublayers(Two(), torch.randn(2, 4)) == ["c"]


# What removing one does.

@pytest.mark.parametrize("which", range(4))
def test_the_stream_passes_what_was_removed_unchanged(which):
    model, x = residual(), torch.randn(6, 5)
    pruned = without_sublayers(model, x, [f"{which + 1}.last"])
    by_hand = nn.Sequential(*(m for i, m in enumerate(model) if i != which + 1))
    assert torch.equal(pruned(x), by_hand(x))
    assert len(list(pruned.parameters())) == len(list(by_hand.parameters()))


def test_a_llama_without_a_layers_two_sublayers_is_the_llama_without_that_layer():
    model, x = llama(), padded()
    shorter = deepcopy(model)
    del shorter.model.layers[1]
    pruned = without_sublayers(model, x, ["model.layers.1.self_attn", "model.layers.1.mlp"])
    assert torch.equal(call(pruned, x), call(shorter, x))
    assert sum(p.numel() for p in pruned.parameters()) == sum(
        p.numel() for p in shorter.parameters())


@pytest.mark.parametrize(("name", "make"), [f for f in FAMILIES if f[0] != "bert"])
def test_a_model_without_any_sublayer_is_its_embedding_and_its_head(name, make):
    model, x = hugging_face(name), make()
    pruned = prune_sublayers(model, x, remove=len(sublayers(model, x)))
    empty = deepcopy(model)
    del next(m for m in empty.modules() if isinstance(m, nn.ModuleList))[:]
    assert torch.equal(call(pruned, x), call(empty, x))


# Which is chosen.

@pytest.mark.parametrize("distance", ["angular", "euclidean", "jensen-shannon"])
def test_the_choice_is_the_best_of_all(distance):
    model, x = residual(), torch.randn(64, 5)
    outputs = model(x)

    def change(name):
        new = without_sublayers(model, x, [name])(x)
        if distance == "angular":
            return torch.acos(torch.cosine_similarity(outputs.double(), new.double(), dim=-1))
        if distance == "euclidean":
            return (outputs - new).square().sum(-1).sqrt()
        p, q = outputs.softmax(-1), new.softmax(-1)
        mixed = (p + q) / 2
        return ((p * (p / mixed).log()).sum(-1) + (q * (q / mixed).log()).sum(-1)) / 2

    changes = {name: change(name).mean().item() for name in sublayers(model, x)}
    pruned = prune_sublayers(model, x, remove=1, distance=distance)
    assert pruned.removed_sublayers == (min(changes, key=changes.get),)


def test_later_choices_count_what_is_already_gone():
    model, x = llama(), padded()
    one = prune_sublayers(model, x, remove=1).removed_sublayers
    three = prune_sublayers(model, x, remove=3).removed_sublayers
    assert three[:1] == one
    outputs, real = call(model, x).double(), x["attention_mask"].bool()
    second = {}
    for name in sublayers(model, x):
        if name not in one:
            new = call(without_sublayers(model, x, [*one, name]), x).double()
            angle = torch.acos(torch.cosine_similarity(outputs, new, dim=-1))
            second[name] = angle[real].mean().item()
    assert three[1] == min(second, key=second.get)


@pytest.mark.parametrize("name", ["model.layers.0.mlp", "model.layers.2.self_attn"])
def test_a_sublayer_that_adds_nothing_goes_first_and_the_outputs_stay(name):
    model, x = llama(), padded()
    part = model.get_submodule(name)
    (part.down_proj if name.endswith("mlp") else part.o_proj).weight.data.zero_()
    pruned = prune_sublayers(model, x, remove=1)
    assert pruned.removed_sublayers == (name,)
    assert torch.equal(call(pruned, x), call(model, x))


def test_padding_does_not_count():
    model, x = llama(), padded()
    other = {**x, "input_ids": x["input_ids"].clone()}
    other["input_ids"][1, 6:] = 3
    assert (prune_sublayers(model, x, remove=4).removed_sublayers
            == prune_sublayers(model, other, remove=4).removed_sublayers)


def test_batches_in_a_list_count_as_one_batch():
    model = gpt(64, context=10, depth=3)
    x = tokens()
    assert (prune_sublayers(model, [x[:1], x[1:]], remove=3).removed_sublayers
            == prune_sublayers(model, x, remove=3).removed_sublayers)


def test_a_distance_of_ones_own_is_used():
    model, x = residual(), torch.randn(6, 5)
    worst = prune_sublayers(model, x, remove=1, distance=lambda old, new: -(old - new).norm())
    assert worst.removed_sublayers != prune_sublayers(
        model, x, remove=1, distance="euclidean").removed_sublayers


# What comes out is an ordinary module.

@pytest.mark.parametrize(("name", "make"), FAMILIES)
def test_the_result_trains_is_saved_copied_and_pruned_again(name, make, tmp_path):
    model, x = hugging_face(name), make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    pruned = prune_sublayers(model, x, remove=2)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not hasattr(model, "removed_sublayers")
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())

    again = prune_sublayers(pruned, x, remove=1)
    assert again.removed_sublayers[:2] == pruned.removed_sublayers
    assert len(again.removed_sublayers) == 3

    other = prune_sublayers(model, x, remove=2)
    for p in other.parameters():
        p.data.zero_()
    other.load_state_dict(pruned.state_dict())
    assert torch.equal(call(other, x), call(pruned, x))
    copied = deepcopy(pruned)
    assert torch.equal(call(copied, x), call(pruned, x))
    torch.save(pruned, tmp_path / "pruned.pt")
    assert torch.equal(call(torch.load(tmp_path / "pruned.pt", weights_only=False), x),
                       call(pruned, x))

    pruned.train()
    call(pruned, x).square().mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in pruned.parameters())


def test_removing_saves_the_compute():
    model, x = llama(), padded()
    flops = [nw.measure.cost(m, (x, None)).flops for m in (
        model, prune_sublayers(model, x, remove=6))]
    assert flops[1] == 2 * 20 * 32 * 64  # the head alone


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("name", ["layers.0.linear2", "layers.0.self_attn", "layers.2.linear2"])
def test_pytorch_encoder_layers_run_without_their_fused_path(norm_first, name):
    model, x = encoder(norm_first), torch.randn(2, 5, 16)
    pruned = without_sublayers(model, x, [name])
    with torch.no_grad():
        fused = pruned(x)
    assert torch.allclose(fused, pruned(x), atol=1e-6)
    kept = [layer.activation_relu_or_gelu for layer in pruned.layers]
    assert sum(kind == 0 for kind in kept) == 1
    assert not torch.allclose(fused, model(x), atol=1e-3)


@pytest.mark.parametrize("remove", [["model.layers.0.self_attn"], ["model.layers.1.self_attn"],
                                    ["model.layers.0.self_attn", "model.layers.2.self_attn"]])
def test_a_pruned_llama_writes_with_a_cache_what_it_writes_without(remove):
    pruned = without_sublayers(llama(bos_token_id=0, eos_token_id=None, pad_token_id=0), padded(),
                               remove)
    given = {"input_ids": tokens(), "max_new_tokens": 6, "do_sample": False,
             "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    assert torch.equal(pruned.generate(**given, use_cache=True),
                       pruned.generate(**given, use_cache=False))


@pytest.mark.parametrize(("make", "x"), [
    (lambda: llama(), padded), (lambda: hugging_face("vit"), images),
    (lambda: gpt(64, context=10, depth=3), tokens)])
def test_what_is_left_can_be_staged(make, x):
    pruned = prune_sublayers(make(), x(), remove=2).eval()
    net = nw.stages(pruned, example=x())
    assert torch.equal(net(x()), call(pruned, x()))


def test_mode_dtype_and_frozen_parameters_are_kept():
    model = residual().double().train()
    model[1].requires_grad_(False)
    pruned = prune_sublayers(model, torch.randn(6, 5, dtype=torch.float64), remove=1)
    assert pruned.training
    assert pruned(torch.randn(2, 5, dtype=torch.float64)).dtype == torch.float64
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name for name, p in pruned.named_parameters() if not p.requires_grad} <= frozen
    assert all(p.requires_grad for p in model[2].parameters())


def test_it_is_the_same_in_inference_mode():
    network = residual()
    x = torch.randn(6, 5)
    expected = prune_sublayers(network, x, remove=2)
    with torch.inference_mode():
        pruned = prune_sublayers(network, x + 0, remove=2)
        chosen = without_sublayers(network, x + 0, list(pruned.removed_sublayers))
    assert pruned.removed_sublayers == expected.removed_sublayers
    for result in (pruned, chosen):
        assert not any(p.is_inference() for p in result.parameters())
        assert torch.equal(result(x), expected(x))
        result(x).sum().backward()


def test_the_norms_of_a_post_norm_stream_stay():
    pruned = prune_sublayers(hugging_face("bert"), padded(), remove=6)
    left = {name.split(".", 4)[-1] for name, _ in pruned.named_parameters() if ".layer." in name}
    assert left == {f"{part}.LayerNorm.{kind}" for part in ("attention.output", "output")
                    for kind in ("weight", "bias")}


def test_layers_that_were_only_tried_keep_their_fused_path():
    pruned = prune_sublayers(encoder(True), torch.randn(2, 5, 16), remove=1)
    touched = {int(name.split(".")[1]) for name in pruned.removed_sublayers}
    assert [layer.activation_relu_or_gelu == 0 for layer in pruned.layers] == [
        i in touched for i in range(3)]


# What bad input gets.

def test_a_plain_chain_has_nothing_to_remove():
    with pytest.raises(NothingToReshape, match="Sequential has no sublayer"):
        prune_sublayers(nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)),
                        torch.randn(2, 5), remove=1)


def test_a_compiled_network_is_refused():
    compiled = torch.compile(residual(), backend="eager")
    with pytest.raises(NothingToReshape, match=r"compiled by torch\.compile.*compile the result"):
        prune_sublayers(compiled, torch.randn(6, 5))


@pytest.mark.parametrize("remove", [0, -1, 5])
def test_too_many_or_none_are_refused(remove):
    with pytest.raises(ValueError, match=f"remove must be between 1 and 4, got {remove}; .* 4 "):
        prune_sublayers(residual(), torch.randn(2, 5), remove=remove)


@pytest.mark.parametrize("calibration", [[], torch.randn(0, 5)])
def test_calibration_must_hold_something(calibration):
    with pytest.raises(ValueError, match="calibration must hold at least one sample"):
        prune_sublayers(residual(), calibration, remove=1)


def test_calibration_must_be_finite():
    with pytest.raises(ValueError, match="calibration must give finite outputs"):
        prune_sublayers(residual(), torch.full((2, 5), float("nan")), remove=1)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UnknownName, match="did you mean angular"):
        prune_sublayers(residual(), torch.randn(2, 5), remove=1, distance="angle")
    with pytest.raises(UnknownName, match=r"did you mean .*1\.last"):
        without_sublayers(residual(), torch.randn(2, 5), ["1.lst"])


# Inside a comparison.

def language():
    drawn = torch.Generator().manual_seed(0)
    x = torch.randint(64, (40, 10), generator=drawn)
    return x[:32], x[:32].roll(-1, 1), x[32:], x[32:].roll(-1, 1)


def pictures():
    drawn = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 3, 16, 16, generator=drawn), torch.arange(40) % 2
    return x[:32], y[:32], x[32:], y[32:]


@pytest.mark.parametrize(("network", "data", "classes"), [
    (lambda: llama(), language, 64), (lambda: hugging_face("vit"), pictures, 2)])
def test_pruned_models_are_compared(network, data, classes, tmp_path):
    task = nw.Task("small", network, data, epochs=1, batch_size=16, num_classes=classes)
    found = nw.compare(task, {"whole": nw.rules.Backprop,
                              "pruned": [partial(prune_sublayers, remove=2), nw.rules.Backprop]},
                       seeds=1, trials=1, storage=tmp_path / "runs.db", workers=1, progress=False)
    whole, pruned = found.rows
    assert (whole.failure, pruned.failure) == ("", "")
    assert pruned.parameters < whole.parameters
    assert pruned.flops < whole.flops
    assert len(pruned.scores) == 1


# How they are tried.

def whole_runs(model, x, remove):
    """Return what is removed where every try is a run of the whole model."""
    outputs, removed = call(model, x).double(), []
    for _ in range(remove):
        moved = {}
        for name in sublayers(model, x):
            if name not in removed:
                new = call(without_sublayers(model, x, [*removed, name]), x).double()
                u, v = (nn.functional.normalize(t, dim=-1) for t in (outputs, new))
                angle = 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))
                mask = x.get("attention_mask") if isinstance(x, dict) else None
                moved[name] = (angle if mask is None or angle.shape != mask.shape
                               else angle[mask.bool()]).mean().item()
        removed.append(min(moved, key=moved.get))
    return tuple(removed)


@pytest.mark.parametrize(("name", "make"), FAMILIES)
def test_running_on_from_a_stage_finds_what_whole_runs_find(name, make):
    model = hugging_face(name)
    assert prune_sublayers(model, make(), remove=3).removed_sublayers == whole_runs(
        model, make(), 3)


def test_a_try_runs_only_what_comes_after_its_stage():
    model = gpt(64, context=10, depth=6).eval()
    ran = []
    for k in range(1, 7):
        model[k].register_forward_hook(lambda *_, k=k: ran.append(k))
    prune_sublayers(model, tokens().repeat(8, 1), remove=1, check=False)
    # of 12 tries each runs on from its own block: the last block runs in all, the first in two
    assert ran.count(6) - ran.count(1) >= 10


def test_weights_are_not_copied_while_sublayers_are_tried():
    model = gpt(64, context=10, depth=3)
    held = []
    first = next(p for p in model.parameters())

    class Watching(nn.Module):
        def forward(self, x):
            held.append(True)
            return x

    model.append(Watching())
    seen = {}
    model.register_forward_pre_hook(
        lambda m, _: seen.update({next(m.parameters()).data_ptr(): True}))
    prune_sublayers.decide(model, tokens(), remove=2)
    assert list(seen) == [first.data_ptr()]
    assert held


def test_a_model_that_reads_a_norms_weights_keeps_the_norm():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mixer = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, h):
            return h + self.mixer(self.norm(h.to(self.norm.weight.dtype)))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), Reading(), Reading(), nn.Linear(8, 3))
    x = torch.randn(6, 5)
    pruned = prune_sublayers(model, x, remove=1)
    assert pruned.removed_sublayers in [("1.mixer",), ("2.mixer",)]
    kept = without_sublayers(model, x, pruned.removed_sublayers)
    assert torch.equal(kept(x), pruned(x))


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2"])
def test_state_space_models_are_pruned_and_write_on(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    more = {"num_heads": 8, "head_dim": 8, "n_groups": 2} if kind == "Mamba2" else {}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=32, num_hidden_layers=4, state_size=4, **more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    pruned = prune_sublayers(model, tokens(), remove=2)
    assert all(name.endswith("mixer") for name in pruned.removed_sublayers)
    assert call(pruned, tokens()).isfinite().all()


def test_the_position_bias_that_later_layers_share_is_not_removed():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(transformers.T5Config(
        d_model=32, num_layers=3, num_heads=4, d_kv=8, d_ff=48, vocab_size=64)).eval()
    for p in model.parameters():
        p.data.normal_(std=0.2)
    x = {"input_ids": tokens()}
    names = sublayers(model, x)
    assert not any(name.endswith("block.0.layer.0.SelfAttention") for name in names)
    second = next(name for name in names if "block.1.layer.0" in name)
    without = without_sublayers(model, x, [second])
    third = []
    for network in (model, without):
        network.encoder.block[2].layer[0].SelfAttention.register_forward_hook(
            lambda m, a, k, out: third.append(k["position_bias"]),
            with_kwargs=True)
        network(**x)
    assert torch.equal(third[0], third[1])


def test_a_search_that_was_broken_off_goes_on(tmp_path):
    model, x = gpt(64, context=10, depth=4).eval(), tokens()
    expected = prune_sublayers(model, x, remove=4).removed_sublayers
    tried = []

    def angle(old, new):
        tried.append(1)
        if len(tried) == 15:
            raise KeyboardInterrupt
        return torch.acos(nn.functional.cosine_similarity(old.double(), new.double(), dim=-1))

    path = tmp_path / "search"
    with pytest.raises(KeyboardInterrupt):
        prune_sublayers(model, x, remove=4, distance=angle, resume=path)
    before = len(tried)
    pruned = prune_sublayers(model, x, remove=4, distance=angle, resume=path)
    assert pruned.removed_sublayers == expected
    assert len(tried) - before <= 7 + 6 + 5  # the first removal is not sought again
    assert nw.changes(pruned)[0].arguments.keys() == {"remove", "distance"}
    more = prune_sublayers(model, x, remove=5, distance=angle, resume=path)
    assert more.removed_sublayers[:4] == expected


def test_a_search_of_other_data_another_model_or_distance_is_refused(tmp_path):
    model, x, path = gpt(64, context=10), tokens(), tmp_path / "search"
    prune_sublayers(model, x, remove=1, resume=path)
    with pytest.raises(CorruptCheckpoint, match="belongs to another call, with other model or"):
        prune_sublayers(model, x.flip(0), remove=1, resume=path)
    with pytest.raises(CorruptCheckpoint, match="belongs to another call, with other distance"):
        prune_sublayers(model, x, remove=1, resume=path, distance="euclidean")
    (path / "sublayers.json").write_text("{")
    with pytest.raises(CorruptCheckpoint, match="cannot be read"):
        prune_sublayers(model, x, remove=1, resume=path)


@pytest.mark.parametrize(("old", "new", "angle"), [
    ([1, 0], [0, 2], 0.5), ([1, 0], [-3, 0], 1), ([1, 0], [1, 0], 0), ([0, 0], [1, 0], 0.5),
    ([1, 0], [0, 0], 0.5), ([0, 0], [0, 0], 0), ([1, 0], [1, 1e-5], 1e-5 / torch.pi)])
def test_the_angle_over_pi(old, new, angle):
    old, new = torch.tensor([[old]]).float(), torch.tensor([[new]]).float()
    distances = Distances("angular")
    total, count = distances.between(old, distances.prepared(old, old), new)
    assert count == 1
    assert total == pytest.approx(angle, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize(("kind", "gone"), [
    ("BartForCausalLM", ["model.decoder.layers.0.self_attn"]),
    ("BartForConditionalGeneration", ["model.decoder.layers.0.self_attn",
                                      "model.encoder.layers.0.self_attn",
                                      "model.decoder.layers.1.encoder_attn"])])
def test_caches_of_encoders_and_decoders_are_numbered_apart(kind, gone):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.BartConfig(
        d_model=16, encoder_layers=2, decoder_layers=2, vocab_size=20, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, init_std=0.2)).eval()
    x = torch.randint(4, 20, (2, 6))
    pruned = without_sublayers(model, {"input_ids": x}, gone, check=False)
    written = [pruned.generate(x, max_new_tokens=4, min_new_tokens=4, do_sample=False,
                               use_cache=cached, output_logits=True, return_dict_in_generate=True)
               for cached in (True, False)]
    torch.testing.assert_close(torch.stack(written[0].logits), torch.stack(written[1].logits))
