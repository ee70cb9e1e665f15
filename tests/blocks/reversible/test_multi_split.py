import copy

import pytest
import torch
from torch import nn

from netwright.blocks.reversible import (
    MultiSplitReversible,
    ReversibleSequential,
    Zero,
    darts_reversible,
)
from netwright.errors import CannotReverse, Diverged
from netwright.measure import cost

WIDTH = 4


def dense():
    return nn.Sequential(nn.Linear(WIDTH, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2),
                         nn.Linear(6, WIDTH))


SPACE = {"dense": dense, "linear": lambda: nn.Linear(WIDTH, WIDTH), "nothing": Zero}


def chain(splits=3, depth=4, shared=True, space=SPACE):
    torch.manual_seed(0)
    one = nn.Parameter(torch.randn(splits, len(space))) if shared else None
    cells = [MultiSplitReversible(space, splits, architecture=one) for _ in range(depth)]
    for cell in cells:
        nn.init.normal_(cell.architecture)
    return ReversibleSequential(*cells).double()


def rows(splits=3):
    return torch.randn(16, splits * WIDTH, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(1))


def test_cell_is_its_formula():
    cell, x = chain(depth=1)[0].eval(), rows()
    streams = list(x.chunk(3, 1))
    for k in range(3):
        others = sum(streams[i] for i in range(3) if i != k)
        weights = cell.architecture[k].softmax(0)
        streams[k] = streams[k] + sum(
            w * op(others) for w, op in zip(weights, cell.mixed[k].ops.values(), strict=True))
    torch.testing.assert_close(cell(x), torch.cat(streams, 1))


@pytest.mark.parametrize("splits", [2, 3, 5])
def test_inverts(splits):
    deep, x = chain(splits, depth=12).eval(), rows(splits)
    torch.testing.assert_close(deep.inverse(deep(x)), x, atol=1e-10, rtol=0)
    single = copy.deepcopy(deep).float()
    # measured: at most 7e-6
    torch.testing.assert_close(single.inverse(single(x.float())), x.float(), atol=4e-5, rtol=0)


@pytest.mark.parametrize("splits", [2, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_gradients_are_those_of_plain_autograd(splits, shared):
    deep, x = chain(splits, shared=shared), rows(splits)
    plain, before = nn.Sequential(*copy.deepcopy(deep)), x.clone()
    for network in (deep, plain):
        torch.manual_seed(3)
        network(x).square().sum().backward()  # the input needs no gradient
    assert len([n for n, _ in deep.named_parameters() if n.endswith("architecture")]) == (
        1 if shared else 4)
    for (name, mine), theirs in zip(deep.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-10, rtol=1e-10, msg=name)
    for mine, theirs in zip(deep.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(x, before)


def test_a_shared_architecture_gathers_the_cells_gradients():
    shared, x = chain().eval(), rows()
    apart = chain(shared=False).eval()
    apart.load_state_dict(shared.state_dict())
    for network in (shared, apart):
        network(x).square().sum().backward()
    assert all(cell.architecture is shared[0].architecture for cell in shared)
    torch.testing.assert_close(shared[0].architecture.grad,
                               sum(cell.architecture.grad for cell in apart))


def test_gradients_through_autograd_grad():
    deep, x = chain().eval(), rows().requires_grad_()
    wanted = [x, deep[0].architecture]
    mine = torch.autograd.grad(deep(x).square().sum(), wanted)
    theirs = torch.autograd.grad(nn.Sequential(*deep)(x).square().sum(), wanted)
    torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)
    assert all(p.grad is None for p in deep.parameters())


def test_low_precision():
    deep, x = chain().float(), rows().float()
    with torch.autocast("cpu", torch.bfloat16):
        deep(x).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in deep.parameters())
    half = copy.deepcopy(deep).bfloat16()
    half.zero_grad()
    half(x.bfloat16()).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())


def test_frozen_parts_and_channels_anywhere():
    space = {"conv": lambda: nn.Conv2d(2, 2, 3, padding=1), "nothing": Zero}
    cells = ReversibleSequential(*[MultiSplitReversible(space, 2, dim=1) for _ in range(2)])
    cells[0].architecture.requires_grad_(False)
    x = torch.randn(3, 4, 5, 5)
    cells(x).sum().backward()
    assert cells[0].architecture.grad is None
    assert cells[1].architecture.grad is not None
    torch.testing.assert_close(cells.inverse(cells(x)), x, atol=1e-5, rtol=0)


def test_arguments_go_to_every_operation():
    class Scaled(nn.Module):
        def forward(self, x, scale, *, shift=0.0):
            return x * scale + shift

    cell, x = MultiSplitReversible({"scaled": Scaled, "nothing": Zero}, 2).double(), rows(2)
    scale = torch.tensor(0.5, dtype=torch.float64)
    half = torch.cat([x[:, :WIDTH] + (0.5 * x[:, WIDTH:] + 1) / 2, x[:, WIDTH:]], 1)
    torch.testing.assert_close(cell(x, scale, shift=1.0)[:, :WIDTH], half[:, :WIDTH])
    torch.testing.assert_close(cell.inverse(cell(x, scale, shift=1.0), scale, shift=1.0), x)


def test_the_chosen_operations_alone():
    cell, x = chain(depth=1, shared=False)[0].eval(), rows()
    cell.architecture.data.copy_(torch.tensor([[0.0, 9, 0], [0, 0, 9], [9, 0, 0]]))
    assert cell.chosen() == ["linear", "nothing", "dense"]
    alone = cell.derived()
    assert alone.chosen() == cell.chosen()
    assert [name for name, _ in alone.named_parameters() if "mixed.1" in name] == []
    assert alone.mixed[0].ops["linear"].weight.shape == (WIDTH, WIDTH)
    cell.architecture.data.mul_(100)  # the softmax is a choice
    torch.testing.assert_close(alone(x), cell(x))
    torch.testing.assert_close(alone.inverse(alone(x)), x, atol=1e-10, rtol=0)
    anew = cell.derived(SPACE)
    assert not torch.equal(anew.mixed[0].ops["linear"].weight, cell.mixed[0].ops["linear"].weight)
    ReversibleSequential(alone, copy.deepcopy(alone))(x).sum().backward()
    assert alone.mixed[0].ops["linear"].weight.grad is not None


def test_memory_does_not_grow_with_depth():
    batch = torch.randn(512, 8), torch.randint(8, (512,))

    def bytes_of(depth, reversible):
        network = chain(2, depth, space={"linear": lambda: nn.Linear(WIDTH, WIDTH)}).float()
        found = cost(network if reversible else nn.Sequential(*network), batch, repeats=1, warmup=0)
        return found.saved_bytes, found.working_bytes
    for few, many in zip(bytes_of(2, True), bytes_of(7, True), strict=True):
        assert many <= 1.05 * few
    assert bytes_of(7, False)[0] > 2.5 * bytes_of(2, False)[0]


class Swapped(nn.Module):
    """Read the row's neighbour."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.linear(x.roll(1, 1))


def task(useful, seed=0, batches=20):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches, 32, 6, WIDTH, generator=generator)
    y = (x.roll(1, 2) if useful else x)[..., 0] > 0
    return list(zip(x, y.long(), strict=True))


def search(useful, seed, **options):
    torch.manual_seed(seed)
    space = {"swapped": Swapped, "linear": lambda: nn.Linear(WIDTH, WIDTH), "nothing": Zero}
    options = {"entry": nn.Linear(WIDTH, 2 * WIDTH), "head": nn.Linear(2 * WIDTH, 2), "depth": 2,
               "epochs": 1, "optimizer": lambda p: torch.optim.Adam(p, 2e-2),
               "architecture_optimizer": lambda p: torch.optim.Adam(p, 2e-2), **options}
    return darts_reversible(space, task(useful), task(useful, 1), **options)


def test_search_finds_what_is_useful():
    for seed in range(3):
        useful, useless = search(True, seed), search(False, seed)
        assert useful.weights.shape == (1, 1, 2, 3)
        torch.testing.assert_close(useful.weights.sum(-1), torch.ones(1, 1, 2))
        assert "swapped" in useful.chosen[0]
        assert useful.weights[-1, 0, :, 0].mean() > useless.weights[-1, 0, :, 0].mean() + 0.05


def test_search_without_sharing_and_what_it_leaves():
    entry, head = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, 2)
    entry.weight.requires_grad_(False)
    before = copy.deepcopy((entry.state_dict(), head.state_dict()))
    found = search(True, 0, entry=entry, head=head, shared=False, depth=3, epochs=1)
    assert found.weights.shape == (1, 3, 2, 3)
    assert [len(cell) for cell in found.chosen] == [2, 2, 2]
    torch.testing.assert_close((entry.state_dict(), head.state_dict()), before)
    assert torch.equal(found.network[0].weight, entry.weight)
    assert not torch.equal(found.network[0].bias, entry.bias)
    assert found.network[1][0].architecture.requires_grad
    assert not found.network[0].weight.requires_grad
    derived = found.derived()
    assert [cell.chosen() for cell in derived[1]] == found.chosen
    derived(task(True)[0][0]).sum().backward()


def test_each_step_moves_one_kind_alone():
    seen = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            seen.append([p.grad is not None for p in self.param_groups[0]["params"]])
            others = {True: 0, False: 0}
            for p in everything[0].parameters():
                others[p.requires_grad] += 1
            seen.append(others)

    everything = []

    def make(parameters):
        everything[:] = [nn.ParameterList(parameters)]
        return Watched(parameters, 0.1)
    # the architecture's optimizer is made last: everything[0] is the architecture
    found = search(True, 0, epochs=1, optimizer=make, architecture_optimizer=make)
    assert found.weights.std() < 0.01  # nothing was stepped
    assert all(all(have) for have in seen[::2])
    assert seen[1::4] == [{True: 1, False: 0}] * 20  # stepping it
    assert seen[3::4] == [{True: 0, False: 1}] * 20  # stepping the weights


def test_errors():
    with pytest.raises(ValueError, match="splits must be at least 2"):
        MultiSplitReversible(SPACE, 1)
    with pytest.raises(ValueError, match="at least one operation"):
        MultiSplitReversible({}, 2)
    for wrong in (nn.Parameter(torch.zeros(3, 3)), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match=r"= \(2, 3\), got a"):
            MultiSplitReversible(SPACE, 2, architecture=wrong)
    narrow = MultiSplitReversible({"narrow": lambda: nn.Linear(4, 1)}, 2)
    with pytest.raises(CannotReverse, match="operation 'narrow' must return"):
        narrow(torch.randn(2, 8))
    with pytest.raises(CannotReverse, match="3 equal parts"):
        chain()(rows(2))
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        search(True, 0, depth=0)
    ends = {"entry": nn.Linear(4, 8), "head": nn.Linear(8, 2)}
    batch = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))]
    with pytest.raises(ValueError, match="train gave no batches"):
        darts_reversible(SPACE, [], batch, **ends)
    with pytest.raises(ValueError, match="validation gave no batches"):
        darts_reversible(SPACE, batch, [], **ends)
    with pytest.raises(Diverged, match="the loss of the search is nan"):
        darts_reversible(SPACE, [(batch[0][0] * float("nan"), batch[0][1])], batch, **ends)
