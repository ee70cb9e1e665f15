import json
import os
from copy import deepcopy

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.errors import CorruptCheckpoint
from netwright.models import gpt
from netwright.reshape import decided, prune_sublayers, reshape, saved

IDS = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))


@reshape
def nothing(model: nn.Module) -> nn.Module:
    return decided({})


@nothing.applies
def same(model, decision):
    return model


def small(seed=0):
    torch.manual_seed(seed)
    return gpt(64, context=8, depth=3)


def llama(**options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, **options)).eval()


class Odd(nn.Module):
    """Tied weights, buffers of both kinds, a frozen part and mixed modes."""

    def __init__(self):
        super().__init__()
        self.read, self.write = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout()
        self.register_buffer("kept", torch.randn(8))
        self.register_buffer("derived", torch.randn(8), persistent=False)
        self.read.bias.requires_grad_(False)

    def forward(self, x):
        return self.drop(self.norm(self.write(self.read(x)) + self.kept)) * self.derived


# What comes back.

def test_a_model_comes_back_with_its_outputs_and_its_record(tmp_path):
    pruned = prune_sublayers(small(), IDS, 2)
    nw.save(pruned, tmp_path / "model")
    again = nw.load(tmp_path / "model", small(seed=1))
    assert torch.equal(again(IDS), pruned(IDS))
    assert nw.changes(again) == nw.changes(pruned)
    assert again.removed_sublayers == pruned.removed_sublayers
    again(IDS).sum().backward()


def test_dtypes_ties_modes_buffers_layouts_and_what_learns_are_kept(tmp_path):
    torch.manual_seed(0)
    model = Odd().double()
    model.write.weight = model.read.weight
    model.norm.eval()
    model.read.weight.data = model.read.weight.data.T.contiguous().T
    model.norm.weight.requires_grad_(False)
    x = torch.randn(4, 8, dtype=torch.float64)
    nw.save(nothing(model), tmp_path)
    again = nw.load(tmp_path, Odd())
    assert again.write.weight is again.read.weight
    assert again.read.weight.stride() == (1, 8)
    assert [m.training for m in again.modules()] == [m.training for m in model.modules()]
    assert {n for n, p in again.named_parameters() if not p.requires_grad} == {
        "read.bias", "norm.weight"}
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert {tuple(t.dtype for t in part) for part in (again.parameters(), model.parameters())} == {
        (torch.float64,) * 4}


def test_the_given_network_is_left_as_it_is(tmp_path):
    nw.save(prune_sublayers(small(), IDS, 2), tmp_path)
    network = small(seed=1)
    before = deepcopy(network.state_dict())
    nw.load(tmp_path, network)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert nw.changes(network) == []


def test_a_model_that_was_never_changed_is_saved_too(tmp_path):
    nw.save(small(), tmp_path)
    assert torch.equal(nw.load(tmp_path, small(seed=1))(IDS), small()(IDS))


def test_large_models_are_written_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "SHARD", 40_000)
    model = nothing(small())
    nw.save(model, tmp_path)
    shards = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert torch.equal(nw.load(tmp_path, small(seed=1))(IDS), model(IDS))
    monkeypatch.undo()
    nw.save(model, tmp_path)  # in one file again, the others go
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changes.json",
                                                                "model.safetensors"]


def test_from_a_base_only_what_differs_is_written(tmp_path):
    model = small()
    nw.save(model, tmp_path / "base")
    pruned = prune_sublayers(model, IDS, 2)
    with torch.no_grad():
        pruned[0].characters.weight[0] += 1
    nw.save(pruned, tmp_path / "change", base=tmp_path / "base")
    size = (tmp_path / "change" / "model.safetensors").stat().st_size
    assert size < pruned[0].characters.weight.nbytes + 1000
    assert torch.equal(nw.load(tmp_path / "change", small(seed=1))(IDS), pruned(IDS))

    os.rename(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(CorruptCheckpoint, match="base=") as error:
        nw.load(tmp_path / "change", small(seed=1))
    assert "changes.json" in str(error.value)
    again = nw.load(tmp_path / "change", small(seed=1), base=tmp_path / "moved")
    assert torch.equal(again(IDS), pruned(IDS))
    nw.save(small(seed=2), tmp_path / "moved")
    with pytest.raises(CorruptCheckpoint, match="another digest"):
        nw.load(tmp_path / "change", small(seed=1), base=tmp_path / "moved")


# Hugging Face models.

def test_fewer_layers_load_by_from_pretrained(tmp_path):
    from netwright.reshape.pruning import without_sublayers
    model = llama(tie_word_embeddings=True)
    shorter = without_sublayers(model, IDS, ["model.layers.1.self_attn", "model.layers.1.mlp"])
    nw.save(shorter, tmp_path)
    plain, again = type(model).from_pretrained(tmp_path), nw.load(tmp_path)
    assert plain.config.num_hidden_layers == again.config.num_hidden_layers == 2
    assert model.config.num_hidden_layers == 3
    for loaded in (plain, again):
        assert torch.equal(loaded(IDS).logits, shorter(IDS).logits)
        written = loaded.generate(IDS, max_new_tokens=4, do_sample=False)
        assert torch.equal(written, shorter.generate(IDS, max_new_tokens=4, do_sample=False))


def test_what_the_class_cannot_express_is_refused_by_from_pretrained(tmp_path):
    from netwright.reshape.pruning import without_sublayers
    model = llama()
    pruned = without_sublayers(model, IDS, ["model.layers.1.mlp"]).bfloat16()
    pruned.save_pretrained(tmp_path)
    again = nw.load(tmp_path)
    assert again.dtype == torch.bfloat16
    assert torch.equal(again(IDS).logits, pruned(IDS).logits)
    with pytest.raises(OSError, match=r"netwright\.load"):
        type(model).from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == 3
    assert config["netwright"]["changes"] == ["without_sublayers"]


@pytest.mark.parametrize("change", [
    lambda model: nw.reshape.swap_feedforward(model, nw.blocks.GLU, IDS),
    lambda model: nw.reshape.moefy(model, IDS, n_experts=4, steps=2),
    lambda model: nw.reshape.prune_experts(nw.reshape.upcycle(model, IDS, n_experts=4), IDS, 2),
    lambda model: nw.reshape.mix_lora(model, IDS, n_experts=2, rank=2),
    lambda model: nw.reshape.share_feedforward(model, example=IDS),
    lambda model: nw.reshape.reversible(model),
    lambda model: nw.reshape.parallelize_residual(nw.reshape.prune_sublayers(model, IDS, 1)),
], ids=["swap", "moefy", "upcycle and prune experts", "mix", "share", "reversible",
        "prune and parallelize"])
def test_a_changed_llama_is_saved_by_save_pretrained_and_loaded(change, tmp_path):
    changed = change(llama()).eval()
    changed.save_pretrained(tmp_path)
    assert torch.equal(nw.load(tmp_path)(IDS).logits, changed(IDS).logits)
    with pytest.raises(OSError, match=r"netwright\.load"):
        llama().from_pretrained(tmp_path)


def test_save_pretrained_of_a_copy_saves_the_copy(tmp_path):
    from netwright.reshape.pruning import without_sublayers
    copied = deepcopy(without_sublayers(llama(), IDS, ["model.layers.1.mlp"]))
    with torch.no_grad():
        copied.lm_head.weight.mul_(2)
    copied.save_pretrained(tmp_path)
    assert torch.equal(nw.load(tmp_path)(IDS).logits, copied(IDS).logits)
    with pytest.raises(ValueError, match=r"netwright\.save"):
        copied.save_pretrained(tmp_path, push_to_hub=True)


def test_a_folder_of_hugging_faces_own_is_a_base(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "base")
    pruned = prune_sublayers(model, IDS, 3)
    nw.save(pruned, tmp_path / "change", base=tmp_path / "base")
    assert (tmp_path / "change" / "model.safetensors").stat().st_size < 200
    assert torch.equal(nw.load(tmp_path / "change")(IDS).logits, pruned(IDS).logits)


# A kill at any moment.

def test_a_kill_leaves_the_old_model_or_the_new_one_whole(tmp_path, monkeypatch):
    old, new = nothing(small()), prune_sublayers(small(seed=2), IDS, 2)
    replace, unlink = os.replace, type(tmp_path).unlink
    found = set()
    for moment in range(12):
        folder = tmp_path / str(moment)
        nw.save(old, folder)
        (folder / "notes.txt").write_text("mine")
        calls = [0]

        def killed(act, *args, calls=calls, moment=moment, **options):
            calls[0] += 1
            if calls[0] > moment:
                raise KeyboardInterrupt
            return act(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda *a: killed(replace, *a))
            patch.setattr(type(tmp_path), "unlink", lambda *a, **k: killed(unlink, *a, **k))
            try:
                nw.save(new, folder)
            except KeyboardInterrupt:
                found.add("killed")
        outputs = nw.load(folder, small(seed=1))(IDS)
        found.add(next(name for name, model in (("old", old), ("new", new))
                       if torch.equal(outputs, model(IDS))))
        assert (folder / "notes.txt").read_text() == "mine"
        nw.save(new, folder)
        assert sorted(path.name for path in folder.iterdir()) == [
            "changes.json", "model.safetensors", "notes.txt"]
    assert found == {"killed", "old", "new"}


# What bad folders and models get.

@pytest.mark.parametrize("name", ["changes.json", "model.safetensors"])
@pytest.mark.parametrize("harm", ["gone", "cut", "flipped", "folder"])
def test_a_damaged_folder_is_refused_with_the_files_name(tmp_path, name, harm):
    nw.save(prune_sublayers(small(), IDS, 2), tmp_path)
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    if harm in ("gone", "folder"):
        path.unlink()
        if harm == "folder":
            path.mkdir()
    elif harm == "cut":
        path.write_bytes(content[:len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=name.replace(".", r"\.")):
        nw.load(tmp_path, small())


def test_a_foreign_folder_is_refused(tmp_path):
    with pytest.raises(CorruptCheckpoint, match=r"changes\.json is missing"):
        nw.load(tmp_path, small())
    for text in ('["other"]', "[" * 100_000):
        (tmp_path / "changes.json").write_text(text)
        with pytest.raises(CorruptCheckpoint, match=r"changes\.json cannot be read"):
            nw.load(tmp_path, small())
    (tmp_path / "changes.json").write_text('{"format": 9, "sha256": ""}')
    with pytest.raises(CorruptCheckpoint, match="of format 9"):
        nw.load(tmp_path, small())


def test_the_network_must_be_the_one_that_was_reshaped(tmp_path):
    nw.save(prune_sublayers(small(), IDS, 2), tmp_path)
    with pytest.raises(ValueError, match="network must be given"):
        nw.load(tmp_path)
    with pytest.raises(ValueError, match="network must be a torch"):
        nw.load(tmp_path, Odd())
    with pytest.raises(ValueError, match=r"'0\.characters\.weight' is \(65"):
        nw.load(tmp_path, gpt(65, context=8, depth=3))
    with pytest.raises(ValueError, match=r"it has '4\."):
        nw.load(tmp_path, gpt(64, context=8, depth=4))


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    inner = nn.Sequential(prune_sublayers(small(), IDS, 1))
    with pytest.raises(ValueError, match="'0', which was reshaped by itself"):
        nw.save(inner, tmp_path / "a")
    with pytest.raises(ValueError, match=r"compiled by torch\.compile"):
        nw.save(torch.compile(small(), backend="eager"), tmp_path / "a")
    with pytest.raises(ValueError, match="plain tensors"):
        nw.save(nn.Linear(2, 2, device="meta"), tmp_path / "a")
    with pytest.raises(ValueError, match="base must be another folder"):
        nw.save(small(), tmp_path / "a", base=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_compressed_folder_is_smaller_and_comes_back_to_the_bit(tmp_path):
    model = llama()
    sparse = nw.reshape.prune_weights(model, None, 0.7)
    x = IDS % 64
    nw.save(sparse, tmp_path / "plain")
    nw.save(sparse, tmp_path / "small", compress=True)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("plain", "small")]
    assert sizes[1] < 0.6 * sizes[0]
    again = nw.load(tmp_path / "small")
    assert all(torch.equal(t, again.state_dict()[name])
               for name, t in sparse.state_dict().items())
    assert torch.equal(again(x).logits, sparse.eval()(x).logits)
    with pytest.raises(OSError, match="read-this-folder-by-netwright"):
        type(model).from_pretrained(tmp_path / "small")
    nw.save(again, tmp_path / "small")
    assert torch.equal(type(model).from_pretrained(tmp_path / "small")(x).logits, again(x).logits)


def test_a_compressed_base_gives_its_weights(tmp_path):
    model = small()
    nw.save(model, tmp_path / "base", compress=True)
    pruned = prune_sublayers(model, IDS, 2)
    nw.save(pruned, tmp_path / "less", base=tmp_path / "base", compress=True)
    assert torch.equal(nw.load(tmp_path / "less", small(seed=1))(IDS), pruned(IDS))


def test_a_damaged_compressed_folder_is_told(tmp_path):
    nw.save(small(), tmp_path, compress=True)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CorruptCheckpoint, match="digest"):
        nw.load(tmp_path, small())
