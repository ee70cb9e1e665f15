from copy import deepcopy

import pytest
import torch
from torch import nn

from netwright.blocks.feedforward import PermutedKroneckerLinear, channels_for, effective_width
from netwright.errors import UnknownName

S, C = 5, 7


def vec(x):
    return x.flatten(-2)


def test_a_mixer_is_its_kronecker_matrices():
    """Token and channel mixing with an activation, beside the wide MLP with dense matrices."""
    torch.manual_seed(0)
    x = torch.randn(3, S, C, dtype=torch.double)
    tokens = [nn.Linear(S, 2 * S).double(), nn.Linear(2 * S, S).double()]
    channels = [nn.Linear(C, 3 * C).double(), nn.Linear(3 * C, C).double()]
    h = x + tokens[1](tokens[0](x.mT).relu()).mT
    h = h + channels[1](channels[0](h).relu())

    layers = [PermutedKroneckerLinear(C, S, 2 * S, "transpose"),
              PermutedKroneckerLinear(C, 2 * S, S, "transpose"),
              PermutedKroneckerLinear(S, C, 3 * C), PermutedKroneckerLinear(S, 3 * C, C)]
    for layer, small in zip(layers, tokens + channels, strict=True):
        layer.double().load_state_dict(small.state_dict())
    wide = vec(x)
    for up, down in (layers[:2], layers[2:]):
        wide = wide + down(up(wide).relu())
    torch.testing.assert_close(wide, vec(h), rtol=0, atol=1e-12)

    eye_c, eye_s = torch.eye(C, dtype=torch.double), torch.eye(S, dtype=torch.double)
    matrices = [torch.kron(tokens[0].weight, eye_c), torch.kron(tokens[1].weight, eye_c),
                torch.kron(eye_s, channels[0].weight), torch.kron(eye_s, channels[1].weight)]
    biases = [tokens[0].bias.repeat_interleave(C), tokens[1].bias.repeat_interleave(C),
              channels[0].bias.repeat(S), channels[1].bias.repeat(S)]
    dense = vec(x)
    for i in (0, 2):
        inner = (dense @ matrices[i].T + biases[i]).relu()
        dense = dense + inner @ matrices[i + 1].T + biases[i + 1]
    torch.testing.assert_close(dense, vec(h), rtol=0, atol=1e-12)
    for layer, matrix in zip(layers, matrices, strict=True):
        assert torch.equal(layer.dense_weight(), matrix)


@pytest.mark.parametrize("permutation", ["none", "transpose", "random", "given"])
def test_values_and_gradients_are_the_dense_layers(permutation):
    torch.manual_seed(1)
    if permutation == "given":
        permutation = (torch.randperm(4 * 6), torch.randperm(4 * 3))
    layer = PermutedKroneckerLinear(4, 6, 3, permutation, bias=False).double()
    before, after = layer.before, layer.after
    if isinstance(permutation, str) and permutation == "transpose":
        before = torch.arange(24).view(6, 4).T.flatten()
        after = torch.arange(12).view(4, 3).T.flatten()
    first = torch.eye(24)[before].double() if before is not None else torch.eye(24).double()
    last = torch.eye(12)[after].double() if after is not None else torch.eye(12).double()
    matrix = last @ torch.block_diag(*[layer.weight] * 4) @ first
    torch.testing.assert_close(layer.dense_weight(), matrix, rtol=0, atol=1e-15)
    x = torch.randn(2, 3, 24, dtype=torch.double, requires_grad=True)
    signal = torch.randn(2, 3, 12, dtype=torch.double)
    made = torch.autograd.grad(layer(x), [x, layer.weight], signal)
    expected = torch.autograd.grad(x @ matrix.T, [x, layer.weight], signal)
    for one, other in zip(made, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("permutation", ["none", "transpose", "random"])
def test_shapes_dtypes_and_copies(permutation):
    layer = PermutedKroneckerLinear(4, 6, 3, permutation)
    x = torch.randn(2, 3, 24)
    y = layer(x)
    assert layer(x[0, 0]).shape == (12,)
    assert layer(x[:0]).shape == (0, 3, 12)
    other = PermutedKroneckerLinear(4, 6, 3, permutation)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)
    assert torch.equal(deepcopy(layer)(x), y)
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert other(x).dtype == torch.bfloat16
    draws = [PermutedKroneckerLinear(4, 6, 3, permutation,
                                     generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    if permutation == "random":
        assert torch.equal(draws[0].before, draws[1].before)
        assert torch.equal(draws[0].after, draws[1].after)


@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 16, 32, 64])
def test_channels_at_fixed_connections(tokens):
    channels = channels_for(4096, tokens)

    def connections(c):
        token = PermutedKroneckerLinear(c, tokens, tokens, "transpose")
        channel = PermutedKroneckerLinear(tokens, c, c)
        return sum(layer.copies * layer.weight.numel() for layer in (token, channel)) / 2

    assert connections(channels - 1 or 0.5) < 4096 < connections(channels + 1) \
        if channels > 1 else connections(2) > 4096
    assert effective_width(tokens, channels) <= effective_width(16, channels_for(4096, 16)) == 256


def test_what_cannot_be_is_refused():
    for make, says in [
        (lambda: PermutedKroneckerLinear(0, 2, 2), "copies must be at least 1"),
        (lambda: PermutedKroneckerLinear(2, 2, 2)(torch.zeros(3, 5)), r"x must be \(\*, 4\)"),
        (lambda: PermutedKroneckerLinear(2, 2, 2, (torch.arange(4), torch.zeros(4).long())),
         "permutation must hold each of 0..3 once"),
        (lambda: effective_width(0, 3), "must be at least 1"),
        (lambda: channels_for(0, 3), "must be at least 1"),
        (lambda: channels_for(10, 64), "take fewer tokens"),
    ]:
        with pytest.raises(ValueError, match=says):
            make()
    with pytest.raises(UnknownName, match="transpose"):
        PermutedKroneckerLinear(2, 2, 2, "transposed")
