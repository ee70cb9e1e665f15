"""Calibration data: streamed, without padding, and gone on with after a stop."""

import inspect
import weakref
from functools import partial

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.anatomy.feedforwards import feedforwards
from netwright.blocks import GLU, FeedForward
from netwright.catalogue.facets import methods
from netwright.errors import CorruptCheckpoint
from netwright.models import gpt
from netwright.reshape import find_bricks, moefy, prune_experts, swap_feedforward, upcycle
from tests.reshape.feedforward.models import built

READERS = {name: method.value for name, method in methods().items()
           if name.startswith("reshape.")
           and "calibration" in inspect.signature(method.value).parameters}


class Masked(nn.Module):
    """A causal network that is told of padding it has no need of."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, input_ids, attention_mask=None):
        return self.network(input_ids)


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def model(experts=0):
    torch.manual_seed(0)
    network = gpt(16, context=24, width=16, depth=3, heads=2)
    return Masked(upcycle(network, torch.zeros(1, 4).long(), n_experts=experts, noise=1.0,
                          generator=drawn()) if experts else network)


def batches(number, length=8):
    return [torch.randint(16, (4, length), generator=drawn(i)) for i in range(number)]


def padded(x, longer, fill):
    mask = torch.ones_like(x)
    pad = torch.full((len(x), longer), fill)
    return {"input_ids": torch.cat([x, pad], 1), "attention_mask": torch.cat([mask, 0 * pad], 1)}


CALLS = {
    "prune_experts": (6, lambda m, x: prune_experts.decide(m, x, 3)),
    "moefy": (0, lambda m, x: moefy.decide(m, x, n_experts=4, split="coactivation", steps=3,
                                           generator=drawn())),
    "moefy by weights": (0, lambda m, x: moefy.decide(m, x, n_experts=4, steps=3,
                                                      generator=drawn())),
    "find_bricks": (0, lambda m, x: [[units.tolist() for units in found.units]
                                     for found in find_bricks(m, x, 4)]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_however_a_batch_is_padded_the_decision_is_the_same(call):
    experts, decide = call
    network, some = model(experts), batches(2)
    expected = decide(network, [{"input_ids": x} for x in some])
    for longer, fill in ((3, 0), (16, 7)):
        assert decide(network, [padded(x, longer, fill) for x in some]) == expected


def test_blocks_learn_the_same_however_a_batch_is_padded():
    network, some = model(), batches(2)
    found = []
    for data in ([{"input_ids": x} for x in some], [padded(x, 9, 5) for x in some]):
        swapped = swap_feedforward(network, FeedForward, calibration=data, steps=3,
                                   generator=drawn())
        found.append([*(swap.error for swap in swapped.swapped_feedforward),
                      *(p.detach() for p in swapped.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["prune_experts", "moefy", "find_bricks"])
def test_one_batch_is_in_memory_at_a_time(name):
    experts, decide = CALLS[name]
    alive, most = weakref.WeakSet(), 0

    class Batch(torch.Tensor):
        pass

    def stream():
        nonlocal most
        for x in batches(6):
            batch = x.as_subclass(Batch)
            alive.add(batch)
            del x
            most = max(most, len(alive))
            yield {"input_ids": batch}

    assert decide(model(experts), stream()) == decide(
        model(experts), [{"input_ids": x} for x in batches(6)])
    assert most <= 3  # the first, the one that has run, and the one that is made


def test_no_more_is_read_than_is_kept():
    read = []

    def stream():
        for i, x in enumerate(batches(50)):
            read.append(i)
            yield {"input_ids": x}

    swap_feedforward(model(), GLU, calibration=stream(), steps=1, rows=100)
    assert len(read) == 4  # of 32 vectors each


def test_a_sample_of_a_long_stream_is_spread_over_it():
    layer, rows = FeedForward(4, 8), 60
    seen = []

    def keep(module, args):
        seen.append(args[0])

    from netwright.reshape._calibration import Stream
    from netwright.reshape.experts.moefy import _drawn
    from netwright.runtime.progress import Bar
    parts = [torch.full((50, 4), float(i)) for i in range(10)]
    picked = _drawn(layer, ["0"], Stream(parts), rows, drawn(1), Bar(1, None, ""))["0"][:, 0]
    assert len(picked) == rows
    assert len(picked.unique()) >= 8
    assert abs(float(picked.mean()) - 4.5) < 1.2  # a deviation of .37


@pytest.mark.parametrize("name", ["phi3", "glm4", "modernbert"])
def test_packed_gates_are_taken_by_everything(name):
    network, x = packed(name)
    found = feedforwards(network, x)
    assert [layer.packed for layer in found] == [0, 0]
    expected = network(**x).logits
    for reshape in (partial(moefy, n_experts=4, k=4, steps=1), partial(upcycle, n_experts=2),
                    partial(nw.reshape.mix_lora, n_experts=2)):
        changed = reshape(network, x)
        assert len(list(changed.parameters())) != len(list(network.parameters()))
        torch.testing.assert_close(changed(**x).logits, expected, rtol=1e-3, atol=1e-4)
    swapped = swap_feedforward(network, GLU, x)
    back = nw.reshape.unswap_feedforward(swapped, network)
    assert not torch.allclose(swapped(**x).logits, expected, atol=1e-4)
    assert torch.equal(back(**x).logits, expected)
    bricks = find_bricks(network, x, 3)
    whole = nw.reshape.keep_bricks(network, bricks, [range(len(b.units)) for b in bricks])
    torch.testing.assert_close(whole(**x).logits, expected, rtol=1e-4, atol=1e-5)
    part = nw.reshape.keep_bricks(network, bricks, [[0] for _ in bricks])
    assert feedforwards(part, x)[0].hidden == len(bricks[0].units[0])
    shared = nw.reshape.share_feedforward(network, 40, example=x)
    assert {layer.hidden for layer in feedforwards(shared, x)} == {40}


def packed(name):
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
             "num_attention_heads": 4, "num_hidden_layers": 2, "pad_token_id": 0}
    grouped = small | {"num_key_value_heads": 2}
    network = {"phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**grouped)),
               "glm4": lambda: t.Glm4ForCausalLM(t.Glm4Config(**grouped, head_dim=8)),
               "modernbert": lambda: t.ModernBertForMaskedLM(t.ModernBertConfig(
                   **small, attn_implementation="eager"))}[name]()
    return network.eval(), {"input_ids": torch.randint(1, 64, (2, 7), generator=drawn(1))}


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_attention_alone_is_adapted_where_all_layers_are_experts(name):
    network, x = built(name)
    tuned = nw.reshape.mix_lora(network, x)
    learns = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert learns
    assert all("self_attn" in name for name in learns)
    pruned = prune_experts(network, x, 2)
    assert pruned(x).logits.isfinite().all()


CALLS_THAT_RESUME = {
    "swap_feedforward": lambda folder, **how: swap_feedforward(
        model(), GLU, calibration=[{"input_ids": x} for x in batches(2)], resume=folder,
        generator=drawn(), **{"steps": 4, **how}),
    "moefy": lambda folder, **how: moefy(
        model(), [{"input_ids": x} for x in batches(2)], resume=folder, steps=3,
        generator=drawn(), **{"n_experts": 4, **how}),
    "find_bricks": lambda folder, **how: find_bricks(
        model(), [{"input_ids": x} for x in batches(2)], resume=folder, **{"bricks": 4, **how}),
}


@pytest.mark.parametrize("name", CALLS_THAT_RESUME)
def test_a_call_that_was_broken_off_ends_the_same(name, tmp_path, monkeypatch):
    from netwright.reshape._resuming import Finished
    call = CALLS_THAT_RESUME[name]
    expected = state(call(None))
    put, count = Finished.put, 0

    def stopped(self, *args):
        nonlocal count
        put(self, *args)
        count += 1
        if count == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Finished, "put", stopped)
    with pytest.raises(KeyboardInterrupt):
        call(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(Finished, "put", put)
    assert equal(state(call(tmp_path)), expected)
    other = {"swap_feedforward": {"steps": 5}, "moefy": {"n_experts": 8},
             "find_bricks": {"bricks": 5}}[name]
    with pytest.raises(ValueError, match=f"resume must name .* with other .*{next(iter(other))}"):
        call(tmp_path, **other)
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(CorruptCheckpoint, match="cannot be read"):
        call(tmp_path)
    for bad in (3, "", file):
        with pytest.raises(ValueError, match="resume must be a"):
            call(bad)


def state(result):
    if isinstance(result, nn.Module):
        return list(result.state_dict().values())
    return [units for bricks in result for units in bricks.units]


def equal(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_every_parameter_that_learns_gets_a_gradient():
    """Who waits for one that never comes, as several processes do, waits for ever."""
    network, x = model(), batches(1)[0]
    for router in ("mlp", "similarity", "groundtruth"):
        changed = moefy(network, {"input_ids": x}, n_experts=4, steps=2, k=4, router=router)
        changed(x).sum().backward()
        assert all(p.grad is not None for p in changed.parameters() if p.requires_grad)
