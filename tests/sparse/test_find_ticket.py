from functools import partial

import pytest
import torch
from torch import nn

import netwright as nw


def make(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(),
                         nn.Linear(20, 5))


def steps(model, masks, count=20, seen=None):
    torch.manual_seed(1)
    x, y = torch.randn(64, 10), torch.randint(5, (64,))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    masks.hold(model, optimizer)
    for _ in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if seen is not None:
            seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        yield


def whole(model, masks):
    for _ in steps(model, masks):
        pass


@pytest.mark.parametrize("rounds", [1, 3])
def test_density_falls_to_one_weight_and_the_last_layer_half_as_fast(rounds):
    ticket = nw.sparse.find_ticket(make, whole, rounds=rounds)
    for name, size, rate in (("0.weight", 200, 0.2), ("2.weight", 400, 0.2),
                             ("4.weight", 100, 0.1)):
        assert int(ticket.masks[name].sum()) == round(size * (1 - rate) ** rounds)


def test_what_stays_goes_back_to_the_first_weights_bit_for_bit():
    ticket = nw.sparse.find_ticket(make, whole, rounds=2)
    model = ticket.model(partial(make, seed=5))
    for name, p in make().named_parameters():
        mask = ticket.masks.get(name, torch.ones_like(p, dtype=torch.bool))
        assert torch.equal(model.get_parameter(name), p * mask)


def test_what_stays_goes_back_to_the_weights_of_a_step():
    seen = []
    first = make()
    for _ in steps(first, nw.Masks({n: torch.ones_like(p, dtype=torch.bool)
                                    for n, p in first.named_parameters()}), seen=seen):
        pass
    ticket = nw.sparse.find_ticket(make, steps, rounds=2, rewind=3)
    for name, p in seen[2].items():
        mask = ticket.masks.get(name, torch.ones_like(p, dtype=torch.bool))
        assert torch.equal(ticket.initial[name], p * mask)


def test_the_smallest_trained_weights_go_and_never_come_back():
    seen = []

    def watched(model, masks):
        for _ in steps(model, masks, count=100):
            pass
        seen.append(({n: p.detach().clone() for n, p in model.named_parameters()}, masks))

    ticket = nw.sparse.find_ticket(make, watched, rounds=3)
    for (trained, masks), after in zip(seen, [m for _, m in seen[1:]] + [ticket.masks],
                                       strict=True):
        for name, mask in masks.items():
            assert not trained[name][~mask].any()  # through AdamW and weight decay
            assert not (after[name] & ~mask).any()
            gone = mask & ~after[name]
            assert trained[name][gone].abs().max() <= trained[name][after[name]].abs().min()


def test_a_search_that_was_broken_off_goes_on(tmp_path):
    expected = nw.sparse.find_ticket(make, whole, rounds=3)
    calls = []

    def failing(model, masks):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        whole(model, masks)

    with pytest.raises(KeyboardInterrupt):
        nw.sparse.find_ticket(make, failing, rounds=3, folder=tmp_path)
    found = nw.sparse.find_ticket(make, failing, rounds=3, folder=tmp_path)
    assert len(calls) == 4
    for name, mask in expected.masks.items():
        assert torch.equal(found.masks[name], mask)
        assert torch.equal(found.initial[name], expected.initial[name])


def test_bad_input_is_told():
    for options in ({"rounds": 0}, {"rounds": 1, "rate": 1.0}, {"rounds": 1, "rewind": -1}):
        with pytest.raises(ValueError):
            nw.sparse.find_ticket(make, whole, **options)
    with pytest.raises(TypeError, match="generator"):
        nw.sparse.find_ticket(make, whole, rounds=1, rewind=2)
    with pytest.raises(ValueError, match="did not reach"):
        nw.sparse.find_ticket(make, steps, rounds=1, rewind=200)


def test_a_folder_of_another_call_is_refused_and_one_of_more_rounds_gives_those_asked(tmp_path):
    nw.sparse.find_ticket(make, whole, rounds=3, folder=tmp_path)
    fewer = nw.sparse.find_ticket(make, whole, rounds=1, folder=tmp_path)
    assert int(fewer.masks["0.weight"].sum()) == 160
    with pytest.raises(nw.errors.CorruptCheckpoint, match="another call, with other rate"):
        nw.sparse.find_ticket(make, whole, rounds=3, rate=0.5, folder=tmp_path)
    (tmp_path / "2.masks").write_bytes(b"half of it")
    with pytest.raises(nw.errors.CorruptCheckpoint, match="cannot be read"):
        nw.sparse.find_ticket(make, whole, rounds=2, folder=tmp_path)
