from copy import deepcopy

import pytest
import torch
from torch import nn

from netwright.blocks.experts import (
    MixtureOfExperts,
    SelfAttention,
    WideNet,
    par_pattern,
    sublayers,
)
from netwright.blocks.feedforward import FeedForward
from netwright.errors import UnknownName
from netwright.models.gpt import Block

DIM = 8


def x(batch=2, length=5):
    torch.manual_seed(1)
    return torch.randn(batch, length, DIM, dtype=torch.double)


def transplant(attention, block):
    attention.query_key_value.load_state_dict(block.query_key_value.state_dict())
    attention.out.load_state_dict(block.attention_out.state_dict())


@pytest.mark.parametrize("causal", [True, False])
def test_sf_is_a_transformer_block(causal):
    torch.manual_seed(0)
    block = Block(DIM, 4, causal=causal).double()
    stack = sublayers("sf", DIM, causal=causal).double()
    transplant(stack[0].module, block)
    stack[0].norm, stack[1].norm = block.attention_norm, block.mlp_norm
    stack[1].module[0], stack[1].module[2] = block.mlp_in, block.mlp_out
    torch.testing.assert_close(stack(x()), block(x()), rtol=1e-10, atol=1e-12)


def test_a_stack_adds_one_sublayer_after_the_other():
    torch.manual_seed(0)
    stack = sublayers("sgfx", DIM, {"x": lambda dim: nn.Linear(dim, dim)}, hidden=6,
                      n_experts=3, k=1).double()
    kinds = [type(one.module) for one in stack]
    assert kinds == [SelfAttention, MixtureOfExperts, FeedForward, nn.Linear]
    assert (stack[1].module.n_experts, stack[1].module.router.k) == (3, 1)
    h = x()
    for one in stack:
        h = h + one.module(nn.functional.layer_norm(h, (DIM,)))
    torch.testing.assert_close(stack(x()), h)
    torch.testing.assert_close(deepcopy(stack)(x()), h)


def test_causal_attention_sees_what_was_before():
    torch.manual_seed(0)
    stack, changed = sublayers("sgsf", DIM).double(), x().clone()
    changed[:, 3, 0] += 1
    same = (stack(x()) - stack(changed)).abs().amax((0, 2)) < 1e-12
    assert same.tolist() == [True, True, True, False, False]


def test_patterns_of_little_attention():
    assert par_pattern(12) == "sfsfsfsfffff"
    for length in range(2, 30):
        pattern = par_pattern(length)
        assert len(pattern) == length
        assert pattern.count("s") == max(1, length // 3)
        assert "s" not in pattern[-(-2 * length // 3):]


def test_widenet_is_the_block_that_is_run_again():
    torch.manual_seed(0)
    net = WideNet(DIM, 3, n_experts=3, hidden=5).double()
    for norm in [*net.attention_norms, *net.expert_norms]:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    h = x()
    for i in range(3):
        h = h + net.attention(net.attention_norms[i](h))
        h = h + net.experts(net.expert_norms[i](h))
    torch.testing.assert_close(net(x()), h)
    # The shared part's gradient is the sum over the depths of those of separate copies.
    net(x()).square().sum().backward()
    copies = [deepcopy(net) for _ in range(3)]
    h = x()
    for i, copy in enumerate(copies):
        copy.zero_grad()
        h = h + copy.attention(copy.attention_norms[i](h))
        h = h + copy.experts(copy.expert_norms[i](h))
    h.square().sum().backward()
    for name in ("query_key_value", "out"):
        torch.testing.assert_close(
            getattr(net.attention, name).weight.grad,
            sum(getattr(copy.attention, name).weight.grad for copy in copies))


def test_widenet_has_as_many_parameters_at_any_depth_but_for_norms():
    def size(depth, **options):
        return sum(p.numel() for p in WideNet(DIM, depth, **options).parameters())
    assert size(5) - size(1) == 4 * 2 * 2 * DIM
    assert size(5, individual_norms=False) == size(1)
    shared = WideNet(DIM, 2, experts=nn.Linear(DIM, DIM), attention=nn.Identity())
    assert shared(torch.zeros(2, 5, DIM)).shape == (2, 5, DIM)


@pytest.mark.parametrize(("make", "error", "words"), [
    (lambda: sublayers("", DIM), ValueError, "a letter for each sublayer"),
    (lambda: sublayers("sq", DIM), UnknownName, "no kind of sublayer is called 'q'"),
    (lambda: SelfAttention(DIM, 3), ValueError, "heads must divide dim=8, got 3"),
    (lambda: par_pattern(9, 7), ValueError, "attention must be between 1 and 6"),
    (lambda: par_pattern(9, 0), ValueError, "attention must be between 1 and 6"),
    (lambda: WideNet(DIM, 0), ValueError, "depth must be at least 1"),
])
def test_what_cannot_be_made(make, error, words):
    with pytest.raises(error, match=words):
        make()
