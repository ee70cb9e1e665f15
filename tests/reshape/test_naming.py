from functools import partial

import pytest
import torch
from torch import nn

from netwright.blocks import GLU, StructuredFeedForward
from netwright.reshape._naming import Built, plain, resolved, restored, unnamed


def own(dim, hidden):
    class Own(nn.Linear):
        pass
    return Own(dim, hidden)


def built(make):
    watch = Built()
    with watch.watching():
        block = make(6, 12)
    return block, watch.said(block)


@pytest.mark.parametrize(("make", "said"), [
    (StructuredFeedForward, {"block": "blocks.StructuredFeedForward",
                             "arguments": {"dim": 6, "hidden": 12}}),
    (partial(StructuredFeedForward, rank=2, generator=torch.Generator()),
     {"block": "blocks.StructuredFeedForward", "arguments": {"dim": 6, "hidden": 12, "rank": 2}}),
    (lambda dim, hidden: GLU(dim, 2 * hidden // 3, activation=nn.Tanh),
     {"block": "blocks.GLU", "arguments": {"dim": 6, "hidden": 8,
                                           "activation": {"name": "torch.nn.Tanh"}}}),
    (lambda dim, hidden: nn.Sequential(nn.Linear(dim, hidden), nn.Linear(hidden, dim, False)),
     {"block": "torch.nn.Sequential", "positional": [
         {"block": "torch.nn.Linear", "arguments": {"in_features": 6, "out_features": 12}},
         {"block": "torch.nn.Linear",
          "arguments": {"in_features": 12, "out_features": 6, "bias": False}}]}),
])
def test_what_was_built_is_named_with_the_arguments_that_build_it(make, said):
    block, found = built(make)
    assert found == said
    assert repr(restored(found)) == repr(block)


def test_what_has_no_name_is_said_to_have_none():
    assert list(unnamed(built(own)[1])) == [f"own.<locals>.Own of {__name__}"]
    assert "Own" in next(unnamed(built(lambda dim, hidden: nn.Sequential(own(dim, hidden)))[1]))


def test_what_was_changed_after_it_was_built_is_not_taken_for_what_was_built():
    def make(dim, hidden):
        block = GLU(dim, hidden)
        block.up = nn.Linear(dim, hidden, bias=True)
        return block
    assert "changed after it was built" in next(unnamed(built(make)[1]))


def test_a_description_is_no_way_to_run_anything():
    for name in ("torch.load", "torch.hub.load", "os.system", "load", "torch.nn.Modul",
                 "torch.ops.aten.from_file.default"):
        with pytest.raises(ValueError, match="must be the public name of a block"):
            resolved(name)
    assert resolved("torch.nn.functional.gelu") is nn.functional.gelu
    assert resolved("blocks.GLU") is GLU


@pytest.mark.parametrize("value", [1, "a", None, True, 0.5, float("inf"), [1, [2.5]], {"a": [1]},
                                   nn.GELU, torch.tanh, nn.functional.gelu, torch.float64,
                                   torch.ops.aten.gelu.default])
def test_plain_data_is_restored(value):
    assert restored(plain(value)) == value
