from copy import deepcopy

import pytest
import torch
from torch import nn

from netwright.blocks import (
    DynamicLinear,
    QuantizedConv2d,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
    dequantize,
    quantize,
)
from netwright.blocks.quantized import kernels, linear

GRIDS = ["int8", "int8/tensor", "int4/16", "int3/16", "int2/16 asymmetric", "nf4", "fp4/16",
         "int5 asymmetric"]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_linear_layer_is_the_one_of_the_rounded_weight(grid, dtype):
    layer = nn.Linear(32, 24).to(dtype)
    made = QuantizedLinear.of(layer, grid)
    assert torch.equal(made.weight, dequantize(quantize(layer.weight, grid)))
    layer.weight.data = made.weight
    for shape in ((32,), (1, 32), (40, 32), (2, 3, 32), (0, 32)):
        x = torch.randn(shape).to(dtype)
        expected, got = layer(x), made(x)
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5,
                                   atol=2e-2 if dtype == torch.bfloat16 else 1e-6)
    x = torch.randn(3, 32).to(dtype).requires_grad_()
    torch.testing.assert_close(*(torch.autograd.grad(f(x).square().sum(), x)[0]
                                 for f in (made, layer)))


@pytest.mark.parametrize("grid", ["int8", "int4/32", "int4/64", "int4"])
def test_few_rows_take_the_packed_kernel_and_many_the_dense_product(grid, monkeypatch):
    monkeypatch.setattr(kernels, "packed_rows", lambda bits, dtype: 4)
    calls = []
    monkeypatch.setattr(linear, "packed_product", lambda x, held: calls.append(len(x)) or
                        kernels.packed_product(x, held))
    made = QuantizedLinear.of(nn.Linear(128, 32), grid, dtype=torch.bfloat16)
    for rows in (1, 4, 5):
        x = torch.randn(rows, 128, dtype=torch.bfloat16)
        expected = x.double() @ made.weight.double().T + made.bias.double()
        assert (made(x).double() - expected).abs().max() < 0.05
    assert calls == [1, 4]
    made(torch.randn(1, 128, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert calls == [1, 4]


def test_the_kernel_sees_codes_that_were_loaded_after_its_first_use(monkeypatch):
    monkeypatch.setattr(kernels, "packed_rows", lambda bits, dtype: 4)
    made, other = (QuantizedLinear.of(nn.Linear(64, 16), "int4/32", dtype=torch.bfloat16)
                   for _ in range(2))
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    before = made(x)
    made.load_state_dict(other.state_dict())
    assert torch.equal(made(x), other(x))
    assert not torch.equal(made(x), before)


def test_sizes_that_the_kernels_blocks_do_not_divide_take_the_dense_product():
    for outputs, inputs in ((6, 8), (16, 33), (17, 64), (16, 32), (32, 96), (1, 1)):
        for grid in ("int8", "int4"):
            held = QuantizedWeight.of(torch.randn(outputs, inputs).bfloat16(), grid)
            fits = outputs % 16 == 0 and inputs % 32 == 0
            assert kernels._has_kernel(held) == fits
            if fits:
                x = torch.randn(3, inputs).bfloat16()
                torch.testing.assert_close(kernels.packed_product(x, held), x @ held().T, rtol=0.02,
                                           atol=0.1)


@pytest.mark.parametrize("grid", ["int8/tensor", "int8 asymmetric", "nf4/32", "int4/16", "int3/32"])
def test_grids_without_a_kernel_take_the_dense_product(grid, monkeypatch):
    monkeypatch.setattr(kernels, "packed_rows", lambda bits, dtype: 4)
    made = QuantizedLinear.of(nn.Linear(64, 16), grid, dtype=torch.bfloat16)
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    assert torch.equal(made(x), nn.functional.linear(x, made.weight, made.bias.bfloat16()))


def test_how_many_rows_are_few_is_measured_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("NETWRIGHT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.packed_rows.cache_clear()
    measured = kernels.packed_rows(4, torch.bfloat16)
    assert measured in (0, *kernels.TRIED)
    monkeypatch.setattr(kernels, "_measured", lambda bits, dtype: 99)
    kernels.packed_rows.cache_clear()
    assert kernels.packed_rows(4, torch.bfloat16) == measured
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # where nothing can be written
    kernels.packed_rows.cache_clear()
    assert kernels.packed_rows(4, torch.bfloat16) == 99
    kernels.packed_rows.cache_clear()


@pytest.mark.parametrize("settings", [
    {"padding": 1}, {"padding": "same", "dilation": 2}, {"stride": 2, "groups": 2},
    {"padding": 1, "padding_mode": "reflect", "bias": False}])
@pytest.mark.parametrize("grid", ["int8", "int4/6"])
def test_a_convolution_is_the_one_of_the_rounded_weight(settings, grid):
    layer = nn.Conv2d(4, 6, 3, **settings)
    made = QuantizedConv2d.of(layer, grid)
    layer.weight.data = made.weight
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(made(x), layer(x))


@pytest.mark.parametrize("grid", GRIDS)
def test_a_table_gives_the_rounded_rows_without_unpacking_the_others(grid, monkeypatch):
    layer = nn.Embedding(100, 32, padding_idx=0)
    made = QuantizedEmbedding.of(layer, grid)
    x = torch.tensor([[3, 99], [0, 3]])
    assert torch.equal(made(x), made.weight[x])
    assert made.padding_idx == 0
    seen = []
    own = QuantizedWeight._valued
    monkeypatch.setattr(QuantizedWeight, "_valued", lambda self, codes, *rest: seen.append(
        len(codes)) or own(self, codes, *rest))
    made(x)
    assert seen == [4]


def test_activations_are_rounded_row_by_row():
    layer = nn.Linear(64, 16)
    made = DynamicLinear.of(layer)
    x = torch.randn(5, 64) * torch.tensor([[1.0], [1e-3], [1e3], [0.0], [1.0]])
    scale = x.abs().amax(1, keepdim=True) / 127
    near = torch.where(scale > 0, (x / scale).round() * scale, 0.0)
    torch.testing.assert_close(made(x), near @ made.weight.T + layer.bias, rtol=1e-4, atol=1e-5)
    assert torch.equal(made(x)[2:3], made(x[2:3]))
    x = torch.randn(3, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(made(x).sum(), x)
    torch.testing.assert_close(gradient, made.weight.sum(0).expand(3, 64))
    assert made(torch.full((1, 64), float("nan"))).isnan().all()


@pytest.mark.parametrize("make", [
    lambda: QuantizedLinear.of(nn.Linear(32, 8), "int3/16"),
    lambda: QuantizedConv2d.of(nn.Conv2d(32, 8, 1), "nf4/16 asymmetric"),
    lambda: DynamicLinear.of(nn.Linear(32, 8))])
def test_layers_are_copied_loaded_moved_and_train_their_bias(make):
    made, other = make(), make()
    x = torch.randn(2, 32, 4, 4) if isinstance(made, QuantizedConv2d) else torch.randn(2, 32)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(x), made(x))
    assert torch.equal(deepcopy(made)(x), made(x))
    assert [name for name, _ in made.named_parameters()] == ["bias"]
    made(x).square().sum().backward()
    assert made.bias.grad.any()
    half = deepcopy(made).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert half.stored.codes.dtype == made.stored.codes.dtype
    with torch.autocast("cpu"):
        assert made(x).shape == other(x).shape


def test_weight_is_what_others_look_at():
    made = QuantizedLinear.of(nn.Linear(32, 8), "int4/32", dtype=torch.bfloat16)
    assert made.weight.dtype == torch.bfloat16
    assert made.weight.device.type == "cpu"
    assert made.weight.shape == (8, 32)
