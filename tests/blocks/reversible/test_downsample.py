from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import pixel_unshuffle

import netwright as nw
from netwright.blocks.reversible import (
    AdditiveCoupling,
    InjectivePad,
    InvertibleDownsample,
    ReversibleSequential,
)
from netwright.errors import CannotReverse
from netwright.reversing.engine import Regroup


@pytest.mark.parametrize(("factor", "size"), [
    (2, (8,)), (3, (6, 9)), (2, (4, 6, 2)), ((1, 2), (3, 4)), (1, (5, 5)), ((1, 2, 2), (3, 4, 2))])
def test_it_moves_every_number_and_moves_it_back(factor, size):
    x = torch.arange(2.0 * 3 * torch.Size(size).numel()).view(2, 3, *size)
    down = InvertibleDownsample(factor)
    y = down(x)
    factors = (factor,) * len(size) if isinstance(factor, int) else factor
    assert y.shape == (2, 3 * torch.Size(factors).numel(),
                       *[n // f for n, f in zip(size, factors, strict=True)])
    assert torch.equal(y[0].flatten().sort().values, x[0].flatten())
    assert torch.equal(down.inverse(y), x)


def test_channels_of_a_patch_position_stand_together():
    x = torch.randn(2, 3, 4, 6)
    y = InvertibleDownsample(2)(x)
    for o, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        assert torch.equal(y[:, 3 * o:3 * o + 3], x[:, :, row::2, column::2])
    by_channel = pixel_unshuffle(x, 2).view(2, 3, 4, 2, 3).transpose(1, 2).reshape(2, 12, 2, 3)
    assert torch.equal(y, by_channel)


def test_it_is_a_permutation():
    jacobian = torch.autograd.functional.jacobian(
        lambda x: InvertibleDownsample(2)(x.view(1, 2, 2, 4)).flatten(), torch.randn(16))
    assert torch.equal(jacobian.sum(0), torch.ones(16))
    assert torch.equal(jacobian @ jacobian.T, torch.eye(16))
    assert float(torch.linalg.slogdet(jacobian).logabsdet) == 0


def test_padding_and_its_inverse():
    x = torch.randn(2, 3, 4)
    y = InjectivePad(5)(x)
    assert torch.equal(y[:, :3], x)
    assert not y[:, 3:].any()
    assert torch.equal(InjectivePad(5).inverse(y), x)
    assert torch.equal(InjectivePad(4, dim=2, parts=2)(x)[..., [0, 1, 4, 5]], x)
    assert not InjectivePad(4, dim=2, parts=2)(x)[..., [2, 3, 6, 7]].any()
    assert torch.equal(InjectivePad(4, dim=2, parts=2).inverse(
        InjectivePad(4, dim=2, parts=2)(x)), x)
    assert torch.equal(InjectivePad(2, dim=-1)(x)[..., :4], x)
    assert torch.equal(InjectivePad(0)(x), x)


def half(width, dims):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    return nn.Sequential(conv(width, width, 3, padding=1), norm(width), nn.ReLU(), nn.Dropout(0.2),
                         conv(width, width, 1))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("needs", [True, False])
def test_between_couplings_the_gradients_are_those_of_autograd(dims, needs):
    parts = [InjectivePad(1), AdditiveCoupling(half(2, dims), half(2, dims)),
             InvertibleDownsample(2),
             AdditiveCoupling(half(2 * 2 ** dims, dims), half(2 * 2 ** dims, dims))]
    x = torch.randn(3, 3, *(4, 6, 2)[:dims]).double().requires_grad_(needs)
    found = []
    for make in (ReversibleSequential, nn.Sequential):
        network = make(*deepcopy(parts)).double()
        x.grad = None
        torch.manual_seed(0)
        y = network(x)
        y.square().sum().backward()
        found.append([y, *[p.grad for p in network.parameters()], *network.buffers(),
                      *([x.grad] if needs else [])])
    assert all(torch.allclose(a, b, atol=1e-10, rtol=1e-10) for a, b in zip(*found, strict=True))


def test_they_only_move_numbers_and_store_nothing():
    assert all(isinstance(step, Regroup) for step in InvertibleDownsample(2).steps())

    def saved(*parts):
        batch = torch.randn(8, 2, 8, 8), torch.randn(8, 8, 4, 4)
        return nw.measure.cost(ReversibleSequential(*parts), batch, repeats=1, warmup=0,
                               loss=nn.functional.mse_loss).saved_bytes

    down = InvertibleDownsample(2)
    with_one = saved(down, AdditiveCoupling(half(4, 2), half(4, 2)))
    assert saved(AdditiveCoupling(half(1, 2), half(1, 2)), down,
                 *[AdditiveCoupling(half(4, 2), half(4, 2)) for _ in range(3)]) == with_one


def test_arguments_for_the_blocks_beside_them_pass_by():
    x, more = torch.randn(1, 2, 2, 2), torch.ones(3)
    assert torch.equal(ReversibleSequential(InjectivePad(2), InvertibleDownsample(2))(x, more),
                       InvertibleDownsample(2)(InjectivePad(2)(x)))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="factor must be at least 1, got 0"):
        InvertibleDownsample(0)
    with pytest.raises(ValueError, match="channels must be at least 0, got -1"):
        InjectivePad(-1)
    with pytest.raises(CannotReverse, match="multiples of factor=2"):
        InvertibleDownsample(2)(torch.randn(1, 1, 3, 4))
    with pytest.raises(CannotReverse, match="as many axes"):
        InvertibleDownsample((2, 2))(torch.randn(1, 1, 4))
    with pytest.raises(CannotReverse, match="multiple of the 4 positions"):
        InvertibleDownsample(2).inverse(torch.randn(1, 3, 2, 2))
    with pytest.raises(ValueError, match="divide channels=3, got 2"):
        InjectivePad(3, parts=2)
    with pytest.raises(CannotReverse, match="multiple of parts=2"):
        InjectivePad(2, parts=2)(torch.randn(1, 3, 2, 2))
    with pytest.raises(CannotReverse, match="there must be the 4 padded channels"):
        InjectivePad(4).inverse(torch.randn(1, 3, 2, 2))
