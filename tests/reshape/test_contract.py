"""Every reshape, and chains of them, built again in a fresh process: the same to the bit."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

import netwright as nw
from netwright.catalogue.facets import methods
from netwright.contracts.check_reshape import Case, ordinary_batch, ordinary_network
from netwright.contracts.checks import variants
from netwright.reshape import changes

RESHAPES = {name.removeprefix("reshape."): method.value for name, method in methods().items()
            if method.facets.kind == "reshape"}
CHAINS = {
    "prune, moefy, prune": [("prune_sublayers", {"remove": 2}), ("moefy", {"n_experts": 4}),
                            ("prune_sublayers", {"remove": 1})],
    "upcycle, prune experts, prune": [("upcycle", {"n_experts": 4}), ("prune_experts", {"keep": 2}),
                                      ("prune_sublayers", {"remove": 2})],
    "swap, prune, parallelize": [("swap_feedforward", {"make": nw.blocks.GLU}),
                                 ("prune_sublayers", {"remove": 1}), ("parallelize_residual", {})],
    "prune, swap, reversible": [
        ("prune_sublayers", {"remove": 1}),
        ("swap_feedforward", {"make": partial(nw.blocks.StructuredFeedForward, rank=4)}),
        ("reversible", {})],
    "share, mix, prune": [("share_feedforward", {}), ("mix_lora", {"n_experts": 2, "rank": 2}),
                          ("prune_sublayers", {"remove": 3})],
}
READER = """
import sys, torch
import netwright as nw
from netwright.contracts.check_reshape import Case, ordinary_network
from netwright.catalogue.facets import facets

torch.manual_seed(int(sys.argv[2]))
for line in open(sys.argv[1] + "/cases"):
    number, name = line.split()
    network = (facets(getattr(nw.reshape, name)).network or ordinary_network)()
    folder = f"{sys.argv[1]}/{number}"
    model = nw.load(folder, network).eval()
    x, expected = torch.load(folder + "/outputs", weights_only=True)
    torch.manual_seed(2)
    with torch.no_grad():
        print(number, torch.equal(model(x), expected), len(nw.changes(model)))
"""


def made(name, label):
    said = methods()[f"reshape.{name}"].facets
    case = Case(RESHAPES[name], variants(RESHAPES[name])[label], said.network, said.batch)
    return case(), case.x


def chained(steps):
    torch.manual_seed(0)
    model, x = ordinary_network(), ordinary_batch()
    for name, arguments in steps:
        model = Case(RESHAPES[name], arguments, None, lambda: x)(model)
    return model, x


@pytest.mark.check
def test_every_reshape_and_five_chains_are_the_same_in_a_fresh_process(tmp_path):
    found = [(name, 1, partial(made, name, label))
             for name, value in RESHAPES.items() for label in variants(value)]
    found += [(steps[0][0], len(steps), partial(chained, steps)) for steps in CHAINS.values()]
    assert len(found) > len(RESHAPES) + len(CHAINS)
    lengths = []
    for number, (_, length, make) in enumerate(found):
        model, x = make()
        lengths.append(len(changes(model)))  # some are made for networks that were changed before
        assert lengths[-1] >= length
        nw.save(model.eval(), tmp_path / str(number))
        torch.manual_seed(2)
        with torch.no_grad():
            torch.save((x, model(x)), tmp_path / str(number) / "outputs")
    (tmp_path / "cases").write_text("\n".join(
        f"{number} {name}" for number, (name, _, _) in enumerate(found)))
    read = subprocess.run([sys.executable, "-c", READER, str(tmp_path), "99"], text=True,
                          capture_output=True, check=True, env=os.environ)
    assert read.stdout.split("\n")[:-1] == [
        f"{number} True {length}" for number, length in enumerate(lengths)]


@pytest.mark.parametrize("steps", CHAINS.values(), ids=CHAINS)
def test_a_chain_is_on_record_and_trains(steps):
    model, x = chained(steps)
    assert [change.name for change in changes(model)] == [name for name, _ in steps]
    model.train()(x).square().mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


ORDINARY = [name for name in RESHAPES if methods()[f"reshape.{name}"].facets.network is None]


@pytest.mark.check
@pytest.mark.parametrize("first", ORDINARY)
def test_one_after_another_works_or_says_why_not(first, tmp_path):
    works = 0
    for second in ORDINARY:
        steps = [(name, next(iter(variants(RESHAPES[name]).values()))) for name in (first, second)]
        try:
            model, x = chained(steps)
        except ValueError:  # NothingToReshape among them
            continue
        works += 1
        nw.save(model.eval(), tmp_path / second)
        assert torch.equal(nw.load(tmp_path / second, ordinary_network())(x), model(x)), second
    assert works


def test_a_block_without_a_public_name_is_refused_by_save_alone(tmp_path):
    class Own(nw.blocks.GLU):
        pass

    model = nw.reshape.swap_feedforward(ordinary_network(), Own)
    assert isinstance(next(m for m in model.modules() if isinstance(m, Own)), Own)
    with pytest.raises(ValueError, match=r"swap_feedforward was given make that made .*Own"):
        nw.save(model, tmp_path)


def test_what_was_swapped_back_is_not_on_record(tmp_path):
    model, x = ordinary_network(), ordinary_batch()
    swapped = nw.reshape.swap_feedforward(model, nw.blocks.GLU)
    part = nw.reshape.unswap_feedforward(swapped, model, layers=["1.mlp_out"])
    (change,) = changes(part)
    assert len(change.decision["layers"]) == 2
    nw.save(part, tmp_path)
    assert torch.equal(nw.load(tmp_path, ordinary_network())(x), part(x))
    assert changes(nw.reshape.unswap_feedforward(part, model)) == []


def test_only_adapters_are_written_beside_a_base(tmp_path):
    model, x = ordinary_network(), ordinary_batch()
    nw.save(model, tmp_path / "base")
    tuned = nw.reshape.mix_lora(model, x, n_experts=2, rank=2)
    with torch.no_grad():
        for p in tuned.parameters():
            if p.requires_grad:
                p.add_(0.1)
    nw.save(tuned, tmp_path / "adapters", base=tmp_path / "base")
    learns = sum(p.nbytes for p in tuned.parameters() if p.requires_grad)
    written = (tmp_path / "adapters" / "model.safetensors").stat().st_size
    assert learns < written < learns + 10_000 < sum(p.nbytes for p in tuned.parameters())
    assert torch.equal(nw.load(tmp_path / "adapters", ordinary_network())(x), tuned(x))
