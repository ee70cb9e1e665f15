import pytest
import torch
from torch import nn

import netwright as nw
from netwright.errors import NothingToReshape, UnknownName
from tests.reshape.quantization.test_quantize_weights import llama


def test_frequencies_and_statistics_stay_in_full_precision():
    small = nw.reshape.cast(llama(), "bfloat16")
    kinds = {name: t.dtype for name, t in (*small.named_parameters(), *small.named_buffers())}
    assert {name for name, kind in kinds.items() if kind == torch.float32} == {
        name for name in kinds if "inv_freq" in name} != set()
    assert small.config.dtype == torch.bfloat16
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                        nn.Linear(144, 2))
    half = nw.reshape.cast(net)
    assert half[1].running_mean.dtype == half[1].weight.dtype == torch.float32
    x = torch.randn(4, 3, 8, 8)
    for mode in (True, False):
        half.train(mode), net.train(mode)
        assert half(x).dtype == torch.bfloat16
        assert (half(x).float() - net(x)).abs().max() < 0.1
    half(x).sum().backward()
    assert half[0].weight.grad is not None


def test_numbers_beyond_the_type_stay():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].bias.data[0] = 1e6
    held = nw.changes(nw.reshape.cast(net, "float16", check=False))[-1].decision["held"]
    assert list(held) == ["1.bias"]
    assert not nw.changes(nw.reshape.cast(net, "bfloat16"))[-1].decision["held"]


def test_ties_stay_and_a_wider_type_takes_all():
    model = llama(tie_word_embeddings=True)
    small = nw.reshape.cast(model)
    assert small.lm_head.weight is small.model.embed_tokens.weight
    again = nw.reshape.cast(small, "float32")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert again(torch.zeros(1, 4, dtype=torch.long)).logits.dtype == torch.float32
    net = nn.Sequential(nn.Linear(4, 4))
    assert nw.reshape.cast(nw.reshape.cast(net), "float64")(torch.randn(2, 4)).dtype == (
        torch.float64)


def test_nothing_to_do_and_unknown_types_are_said():
    with pytest.raises(NothingToReshape, match="nothing that is not in"):
        nw.reshape.cast(nn.Sequential(nn.Linear(4, 4)), "float32")
    with pytest.raises(UnknownName, match="float16"):
        nw.reshape.cast(nn.Sequential(nn.Linear(4, 4)), "int8")
