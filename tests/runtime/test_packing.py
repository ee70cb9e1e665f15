import math

import numpy as np
import pytest
import torch

from netwright.runtime.packing import pack, read_tensors, unpack, write_packed

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64,
          torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.int32,
          torch.int16, torch.int8, torch.uint8, torch.bool)


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


def drawn(dtype, *shape):
    generator = torch.Generator().manual_seed(0)
    width, count = torch.empty(0, dtype=dtype).element_size(), math.prod(shape)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.3
    raw = torch.randint(256, (count * width,), generator=generator)
    return raw.to(torch.uint8).view(dtype).reshape(shape)  # NaN payloads among them


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (1,), (0, 3), (3, 0), (64, 33)])
def test_every_pattern_of_bits_comes_back(dtype, shape):
    tensor = drawn(dtype, *shape)
    tensor.view(-1)[::2] = 0
    held, how = pack(tensor)
    again = unpack(held, how)
    assert again.dtype == dtype
    assert again.shape == tensor.shape
    assert bits(again) == bits(tensor)


def test_special_numbers_scalars_and_layouts_come_back():
    odd = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45])
    for tensor in (odd, odd[3], torch.randn(6, 4).T, torch.randn(9)[::2], torch.tensor(0.0),
                   torch.randn(4, dtype=torch.complex64).conj()):
        before = tensor.clone()
        held, how = pack(tensor)
        assert bits(unpack(held, how)) == bits(before.resolve_conj()) == bits(tensor.resolve_conj())


@pytest.mark.parametrize(("dtype", "zeros", "most"), [
    (torch.bfloat16, 0.0, 0.68), (torch.float32, 0.0, 0.86), (torch.float32, 0.5, 0.47),
    (torch.float32, 0.9, 0.13), (torch.bfloat16, 0.5, 0.41), (torch.float16, 0.5, 0.56)])
def test_weights_take_less(dtype, zeros, most):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 512, generator=generator) * 0.02
    weight[torch.rand(weight.shape, generator=generator) < zeros] = 0
    weight = weight.to(dtype)
    held, _ = pack(weight)
    assert held.nbytes < most * weight.nbytes


def test_noise_takes_hardly_more():
    tensor = drawn(torch.int64, 1000, 8)
    assert pack(tensor)[0].nbytes <= tensor.nbytes


def test_fewer_or_other_bytes_are_refused():
    held, how = pack(torch.randn(40, 40))
    for damaged in (held[:-1], np.concatenate([held, held[:3]])):
        with pytest.raises(ValueError, match="bytes packed"):
            unpack(damaged, how)


def test_a_file_has_its_tensors_one_by_one(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"x": torch.randn(30, 3), "b.y": torch.arange(5), "none": torch.empty(0)}
    write_packed(tensors, path)
    found = read_tensors(path)
    assert list(found) == list(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
