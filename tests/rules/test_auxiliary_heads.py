"""Blocks of stages, and the heads that read class scores off them."""

import pytest
import torch
from torch import Generator, nn
from torch.nn import functional

from netwright.errors import UnknownName
from netwright.rules.auxiliary_heads import AuxiliaryHead, Signal, blocks_of, signals
from netwright.stages import stages


def names(network, blocks):
    return [[stage.name for stage in block] for block in blocks_of(stages(network), blocks)]


def test_a_head_of_features_is_two_linear_layers():
    head = AuxiliaryHead(Signal(5, 0), 3, width=8).double()
    h = torch.randn(6, 5).double()
    expected = ((h @ head.hidden.weight.T + head.hidden.bias).relu() @ head.scores.weight.T
                + head.scores.bias)
    torch.testing.assert_close(head(h), expected)
    tokens = torch.randn(6, 4, 5).double()
    assert head(tokens, torch.zeros(6, 4)).shape == (6, 4, 3)
    torch.testing.assert_close(head(tokens, torch.zeros(6)), head(tokens.mean(1)))


def test_a_head_of_maps_pools_convolves_and_pools():
    head = AuxiliaryHead(Signal(2, 2), 3, width=8)
    h = torch.randn(4, 2, 16, 6)
    small = h.unflatten(2, (8, 2)).mean(3)  # 16 rows to 8; 6 columns stay
    maps = functional.conv2d(small, head.convolution.weight, head.convolution.bias, padding=1)
    cells = maps.relu().unflatten(3, (2, 3)).unflatten(2, (2, 4)).mean((3, 5)).flatten(1)
    torch.testing.assert_close(head(h), head.scores(head.hidden(cells).relu()))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_maps_of_any_size_down_to_one_cell(axes):
    head = AuxiliaryHead(Signal(2, axes), 3, width=4)
    for size in (1, 3, 12):
        assert head(torch.randn(5, 2, *[size] * axes)).shape == (5, 3)


def test_the_draw_is_pytorchs_own_and_follows_the_generator():
    torch.manual_seed(0)
    head = AuxiliaryHead(Signal(50, 0), 40, width=60)
    for layer in (head.hidden, head.scores):
        plain = nn.Linear(layer.in_features, layer.out_features)
        for mine, theirs in ((layer.weight, plain.weight), (layer.bias, plain.bias)):
            assert mine.abs().max() <= layer.in_features ** -0.5
            torch.testing.assert_close(mine.std(), theirs.std(), rtol=0.3, atol=0)
    same = [AuxiliaryHead(Signal(2, 2), 3, width=4, generator=Generator().manual_seed(1))
            for _ in range(2)]
    assert all(map(torch.equal, same[0].parameters(), same[1].parameters()))


def test_blocks_by_number_name_or_one_a_stage():
    network = nn.Sequential(*[nn.Linear(4, 4) for _ in range(7)])
    assert names(network, None) == [[str(i)] for i in range(7)]
    assert names(network, 1) == [list("0123456")]
    assert names(network, 3) == [list("012"), list("34"), list("56")]
    assert names(network, 7) == names(network, None)
    assert names(network, ["0", "5"]) == [list("01234"), list("56")]
    assert names(network, ["2", "5"]) == [list("01234"), list("56")]


def test_signals_with_and_without_an_example():
    cnn = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 3), nn.ReLU(),
                        nn.Flatten(), nn.Linear(48, 10))
    assert signals(stages(cnn), None) == ([Signal(2, 2), Signal(48, 0), None], 10)
    x = torch.randn(4, 1, 8, 8)
    assert signals(stages(cnn, x), x) == ([Signal(2, 2), Signal(48, 0), Signal(10, 0)], 10)
    line = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Conv1d(2, 3, 3), nn.Flatten(),
                         nn.Linear(12, 3))
    x = torch.randn(4, 1, 8)
    assert signals(stages(line, x), x)[0][0] == Signal(2, 1)
    tokens = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(4, 7, 5)
    assert signals(stages(tokens, x), x) == ([Signal(8, 0), Signal(3, 0)], 3)
    lazy = nn.Sequential(nn.Linear(5, 8), nn.LazyLinear(3))
    assert signals(stages(lazy), None) == ([None, None], None)


@pytest.mark.parametrize(("blocks", "error", "match"), [
    (0, ValueError, "between 1 and 3, got 0; .* 3 stages"),
    (4, ValueError, "between 1 and 3, got 4; .* 3 stages"),
    ("0", ValueError, "a list of the names .* got '0'"),
    ([], ValueError, "a list of the names"),
    (["0", "7"], UnknownName, "stage to begin a block at"),
    (["1", "0"], ValueError, "in the order in which they run"),
    (["0", "0"], ValueError, "once each"),
])
def test_blocks_that_cannot_be(blocks, error, match):
    net = stages(nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]))
    with pytest.raises(error, match=match):
        blocks_of(net, blocks)
