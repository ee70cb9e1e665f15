"""Units taken out by name: on record, saved, and built again elsewhere without an example."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.errors import NothingToReshape, UnknownName
from netwright.reshape import changes, remove_units
from netwright.signals import apply, tensors
from tests.reshape.pruning.families import NETWORKS, PRETRAINED

READER = """
import sys, torch
import netwright as nw
from netwright.signals import apply, tensors
import transformers

for folder, uniform in zip(sys.argv[1::2], sys.argv[2::2]):
    model = nw.load(folder)
    x, expected = torch.load(folder + "/outputs", weights_only=True)
    with torch.no_grad():
        same = torch.equal(tensors(apply(model.eval(), x))[0], expected)
    kind = getattr(transformers, type(model).__name__)
    try:
        again = kind.from_pretrained(folder).eval()
        with torch.no_grad():
            plain = torch.equal(tensors(apply(again, x))[0], expected)
    except OSError:
        plain = None
    print(same, plain)
"""


def first_units(model, x, *, kinds, every=True, count=1):
    """Return the first units of each block of all groups of some kinds, or of one of them."""
    groups = [g for g in nw.axes(model, x).groups if g.removable and g.kind in kinds
              and g.count // g.blocks > count]
    return {g.name: [b * g.per_block + i for b in range(g.blocks) for i in range(count)]
            for g in groups[:None if every else 1]}


def outputs(model, x):
    with torch.no_grad():
        return tensors(apply(model.eval(), x))[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_copy_is_what_the_axes_remove_and_its_decision_makes_it_again(name):
    make, x = NETWORKS[name][0], NETWORKS[name][1]()
    model = make()
    ids = first_units(model, x, kinds=("hidden", "head", "stream"))
    assert ids
    expected = nw.axes(model, x).remove_all(ids)
    smaller = remove_units(model, x, ids)
    assert torch.equal(outputs(smaller, x), outputs(expected, x))
    (change,) = changes(smaller)
    again = remove_units.apply(make(), json.loads(json.dumps(change.decision)))
    assert torch.equal(outputs(again, x), outputs(expected, x))
    assert ([(n, p.shape) for n, p in again.named_parameters()]
            == [(n, p.shape) for n, p in expected.named_parameters()])
    assert str(again) == str(expected)


@pytest.mark.check
def test_a_fresh_process_builds_narrowed_models_again_and_transformers_loads_uniform_ones(tmp_path):
    pytest.importorskip("transformers")
    given, expected = [], []
    uniform = {"llama": ("hidden", "head"), "gpt2": ("hidden", "stream"), "bert": ("hidden",),
               "vit": ("hidden",)}
    for name, (make, input_of) in PRETRAINED.items():
        for every in (True, False)[:1 + (name in ("llama", "vit"))]:
            model, x = make(), input_of()
            ids = first_units(model, x, kinds=("hidden",) if name != "llama" or not every
                              else uniform[name], every=every)
            ids = {group: these for group, these in ids.items() if "pooler" not in group}
            smaller = remove_units(model, x, ids)
            folder = tmp_path / f"{name}-{every}"
            smaller.save_pretrained(folder)
            torch.save((x, outputs(smaller, x)), folder / "outputs")
            given += [str(folder), str(every)]
            expected.append(f"True {True if every else None}")
            said = json.loads((folder / "config.json").read_text())
            assert ("netwright" in said) is not every
            if not every:
                assert said["netwright"]["removed"][next(iter(ids))]["ids"] == [0]
                shapes = {n: list(p.shape) for n, p in smaller.named_parameters()}
                assert all(shapes[n] == shape for n, shape in said["netwright"]["shapes"].items())
    read = subprocess.run([sys.executable, "-c", READER, *given], text=True, capture_output=True,
                          check=True, env=os.environ)
    assert read.stdout.split("\n")[:-1] == expected


def test_a_second_removal_is_kept_too(tmp_path):
    make, x = NETWORKS["llama"][0], NETWORKS["llama"][1]()
    once = remove_units(make(), x, {"model.layers.0.mlp.gate_proj: hidden": [1, 5]})
    twice = remove_units(once, x, {"model.layers.1.mlp.gate_proj: hidden": [0, 47]})
    assert twice.config.intermediate_size == 46
    nw.save(twice, tmp_path)
    assert torch.equal(outputs(nw.load(tmp_path), x), outputs(twice, x))


def test_weights_that_were_trained_since_are_loaded(tmp_path):
    make, x = NETWORKS["llama"][0], NETWORKS["llama"][1]()
    smaller = remove_units(make(), x, {"model.layers.0.self_attn.q_proj: head": [1]})
    with torch.no_grad():
        for p in smaller.parameters():
            p.mul_(1.01)
    nw.save(smaller, tmp_path)
    assert torch.equal(outputs(nw.load(tmp_path), x), outputs(smaller, x))


def test_what_cannot_be_removed_is_refused_before_anything_changes():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(3, 4)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(UnknownName, match="group of units"):
        remove_units(model, x, {"1: hidden": [0]})
    with pytest.raises(ValueError, match="must leave a unit"):
        remove_units(model, x, {"0: hidden": range(6)})
    with pytest.raises(ValueError, match="between 0 and 5"):
        remove_units(model, x, {"0: hidden": [6]})
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    recurrent, ids = NETWORKS["lstm"][0](), {"rnn: cell": [0]}
    with pytest.raises(NothingToReshape, match="does not run"):
        remove_units(recurrent, NETWORKS["lstm"][1](), ids)
