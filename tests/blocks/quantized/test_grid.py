import itertools

import pytest
import torch

from netwright.blocks.quantized import Grid, dequantize, fake_quantize, quantize
from netwright.blocks.quantized.packing import packed, unpacked
from netwright.errors import UnknownName

GRIDS = [Grid(levels, group=group, per=per, asymmetric=asymmetric)
         for levels in ("int2", "int3", "int4", "int8", "fp3", "fp4", "nf4", (-1.0, 0.0, 0.25, 2.0))
         for group, per in ((None, None), (None, "tensor"), (8, None))
         for asymmetric in (False, True)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_each_weight_becomes_the_nearest_of_all_that_a_code_can_stand_for(grid, dtype):
    weight = torch.randn(3, 16).to(dtype)
    found = quantize(weight, grid)
    groups, size = found.scale.shape[1], 16 // found.scale.shape[1]
    chosen = dequantize(found, torch.float64)
    for row, group in itertools.product(range(3), range(groups)):
        at = slice(group * size, (group + 1) * size)
        each = torch.arange(grid.size, dtype=torch.uint8).repeat(len(weight), 1)
        place = 0 if grid.per == "tensor" else row
        scale = found.scale[place, group].double()
        second = None if found.second is None else found.second[place, group].double()
        if grid.is_integer and grid.symmetric:
            levels = grid.table * scale
        elif grid.is_integer:
            levels = torch.arange(grid.size).double() * scale + second
        elif grid.symmetric:
            levels = grid.table * scale
        else:
            levels = torch.where(grid.table < 0, grid.table * second, grid.table * scale)
        assert each.shape[1] == len(levels)
        errors = (weight[row, at].double()[:, None] - levels).abs().amin(1)
        got = (weight[row, at].double() - chosen[row, at]).abs()
        assert torch.allclose(got, errors, atol=1e-6 * float(levels.abs().max()))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_zeros_and_rows_of_one_value_give_no_nan(grid):
    weight = torch.zeros(4, 16)
    weight[1], weight[2], weight[3, 3] = 1e-30, -5.0, 1e30
    found = quantize(weight, grid)
    assert dequantize(found).isfinite().all()
    if grid.per != "tensor":
        assert (found.scale[0] == 1).all()
        if 0.0 in grid.numbers:
            assert not dequantize(found)[0].any()


def test_the_scale_of_integers_leaves_no_weight_further_than_half_a_step():
    weight = torch.randn(64, 64)
    for bits in range(2, 9):
        found = quantize(weight, Grid(bits=bits))
        assert ((dequantize(found) - weight).abs() <= found.scale / 2 + 1e-6).all()
        assert found.scale.flatten() == pytest.approx(
            (2 * weight.abs().amax(1) / (2**bits - 1)).tolist())


def test_scales_for_each_sign_use_levels_that_one_scale_leaves_unused():
    positive = torch.rand(1, 4096) + 0.01
    one, two = (quantize(positive, Grid("fp4", asymmetric=a)) for a in (False, True))
    assert len(one.codes.unique()) == len(two.codes.unique()) == 8  # the negative half is idle
    lopsided = torch.where(torch.rand(1, 4096) < 0.5, -0.2, 1.0) * torch.rand(1, 4096)
    errors = [(dequantize(quantize(lopsided, Grid("fp4", asymmetric=a))) - lopsided).square().mean()
              for a in (False, True)]
    assert errors[1] < errors[0]
    even = torch.tensor([[-3.0, -1.1, 0.2, 3.0]])
    same = [dequantize(quantize(even, Grid("fp4", asymmetric=a))) for a in (False, True)]
    assert torch.equal(*same)
    assert Grid("fp4", group=32, asymmetric=True).code_bits(64) == Grid(
        "int4", group=32, asymmetric=True).code_bits(64) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("levels", ["int2", "int4", "nf4", "fp3"])
def test_scales_that_are_to_err_least_err_less_than_those_of_the_range(levels, dtype):
    weight = torch.randn(32, 64).to(dtype)
    for group in (None, 16):
        grids = [Grid(levels, group=group, fit=fit) for fit in ("range", "error")]
        errors = [(dequantize(quantize(weight, grid), torch.float64) - weight.double()).square()
                  for grid in grids]
        per = [error.unflatten(1, (-1, group or 64)).sum(2) for error in errors]
        assert (per[1] <= per[0] * (1 + 1e-6)).all()
        assert per[1].sum() < 0.95 * per[0].sum()
    peak = torch.tensor([[8.0, 1.0, -2.0, 3.0]])
    if levels == "int4":  # a level for each, as the scale is negative
        assert torch.equal(dequantize(quantize(peak, Grid(4, fit="error"))), peak)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 33])
def test_codes_are_packed_without_loss_into_as_few_bytes(bits, columns):
    codes = torch.randint(2**bits, (5, columns), dtype=torch.uint8)
    held = packed(codes, bits)
    assert torch.equal(unpacked(held, bits, columns), codes)
    if columns == 8:
        assert held.shape == (5, bits)


def test_gradients_pass_straight_through_and_values_are_those_of_the_codes():
    weight = torch.randn(4, 8, requires_grad=True)
    near = fake_quantize(weight, "int3/4")
    assert torch.equal(near, dequantize(quantize(weight, "int3/4")))
    (gradient,) = torch.autograd.grad((near * torch.arange(8.0)).sum(), weight)
    assert torch.equal(gradient, torch.arange(8.0).expand(4, 8))


def test_short_forms_and_plain_data_stand_for_the_grid():
    for grid in GRIDS:
        assert Grid.of(grid.as_plain()) == grid
        if isinstance(grid.levels, str):
            again = Grid.of(str(grid))
            assert (again.levels, again.group, again.per, again.asymmetric) == (
                grid.levels, grid.group, grid.per, grid.asymmetric)
    assert Grid.of(4) == Grid("int4", pad=True, fit="error")
    assert Grid(bits=3, symmetric=False) == Grid("int3", asymmetric=True)


def test_bad_grids_and_weights_are_refused():
    with pytest.raises(UnknownName, match="nf4"):
        Grid("nf5")
    with pytest.raises(ValueError, match="bits must be"):
        Grid(bits=9)
    with pytest.raises(ValueError, match="say different things"):
        Grid("int4", bits=3)
    with pytest.raises(ValueError, match="say different things"):
        Grid(group=8, per="tensor")
    with pytest.raises(ValueError, match="2 to 256 different finite numbers"):
        Grid([1.0, 1.0])
    with pytest.raises(ValueError, match="must divide the 27 inputs, got 32"):
        quantize(torch.randn(2, 3, 3, 3), Grid(group=32))
    assert dequantize(quantize(torch.randn(2, 3, 3, 3), Grid(group=32, pad=True))).shape == (
        2, 3, 3, 3)
    with pytest.raises(ValueError, match="weight must be finite"):
        quantize(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match="floating-point matrix"):
        quantize(torch.randn(3))
