from collections.abc import Iterable
from itertools import chain

import pytest
import torch
from torch import Tensor, distributed

from netwright.data import Batches

X, Y = torch.arange(10.0).view(10, 1), torch.arange(10)


def targets(batches: Batches) -> list[list[int]]:
    return [y.tolist() for _, y in batches]


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


def test_without_shuffling_the_order_is_the_datas() -> None:
    batches = Batches(X, Y, 4, shuffle=False)
    assert targets(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(batches) == 3


def test_drop_last_leaves_out_the_batch_that_is_not_full() -> None:
    batches = Batches(X, Y, 4, shuffle=False, drop_last=True)
    assert targets(batches) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(batches) == 2


def test_inputs_follow_their_targets() -> None:
    for x, y in Batches({"a": X, "b": 2 * X}, Y, 3):
        assert torch.equal(x["a"].flatten(), y.float())
        assert torch.equal(x["b"].flatten(), 2 * y.float())
    for x, y in Batches((X, -X), Y, 3):
        assert torch.equal(x[0].flatten(), y.float())
        assert torch.equal(x[1].flatten(), -y.float())


def test_each_epoch_is_another_permutation_of_all_samples() -> None:
    batches = Batches(X, Y, 4)
    epochs = [flat(targets(batches)) for _ in range(5)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 5


def test_seed_and_epoch_alone_decide_the_order() -> None:
    batches = Batches(X, Y, 4, seed=3)
    epochs = [targets(batches) for _ in range(3)]
    torch.manual_seed(99)
    again = Batches(X, Y, 4, seed=3)
    again.set_epoch(2)
    assert targets(again) == epochs[2]
    assert targets(Batches(X, Y, 4, seed=4)) != epochs[0]


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    targets(Batches(X, Y, 4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_shares_of_all_processes_make_up_each_batch(
        world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = targets(Batches(X, Y, 4))
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        shares.append(targets(Batches(X, Y, 4)))
    assert [flat(parts) for parts in zip(*shares, strict=True)] == whole


@pytest.mark.parametrize(("x", "y", "options", "said"), [
    (X, Y[:9], {}, "x must hold as many samples as y, got 10 and 9"),
    ((X, X[:9]), Y, {}, r"x\[1\] must hold as many samples as y, got 9 and 10"),
    ({"mask": X[:9]}, Y, {}, r"x\['mask'\] must hold as many samples"),
    (X[:0], Y[:0], {}, r"x must hold at least one sample, got shape \(0, 1\)"),
    (X, torch.tensor(1), {}, "x must hold as many samples as y, got 10 and 0"),
    (X.log() - X.log(), Y, {}, "x must not hold NaN, got NaN in sample 0"),
    (X, torch.where(Y == 7, torch.nan, 1.0), {}, "y must not hold NaN, got NaN in sample 7"),
    ([[1.0]], Y, {}, r"x\[0\] must be a tensor, got list"),
    (X, Y, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
    (X, Y, {"batch_size": 11, "drop_last": True}, "leaves none of the 10 samples"),
    (X, Y, {"seed": -1}, "seed must be at least 0, got -1"),
])
def test_bad_data_is_refused(x: object, y: Tensor, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Batches(x, y, **{"batch_size": 4, **options})
