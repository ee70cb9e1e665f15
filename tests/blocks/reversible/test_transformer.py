import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from netwright.blocks.reversible import (
    DoubleStreams,
    MergeStreams,
    ReversibleSequential,
    ReversibleTransformerBlock,
)
from netwright.errors import CannotReverse
from netwright.measure import cost
from netwright.models.gpt import Embed
from netwright.rules import Backprop, Reversible

DIM, LENGTH = 8, 6
PRESENT = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
MASKS = {"none": None, "padding": PRESENT[:, None],
         "each pair": torch.eye(LENGTH, dtype=torch.bool)
         | (torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.6),
         "numbers": torch.randn(2, 4, LENGTH, LENGTH, dtype=torch.float64,
                                generator=torch.Generator().manual_seed(0))}


def tokens(dtype=torch.float64, width=2 * DIM):
    return torch.randn(2, LENGTH, width, dtype=dtype, generator=torch.Generator().manual_seed(1))


def stack(depth=3, **options):
    torch.manual_seed(0)
    options = {"heads": 4, **options}
    return ReversibleSequential(*[ReversibleTransformerBlock(DIM, **options)
                                  for _ in range(depth)]).double()


class Normed(nn.Module):
    """A feed-forward whose batch norm counts batches."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(DIM, 12), nn.BatchNorm1d(12)
        self.last = nn.Linear(12, DIM)

    def forward(self, x):
        return self.last(self.norm(self.first(x).transpose(1, 2)).relu().transpose(1, 2))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_pytorchs_own(name, causal):
    block = ReversibleTransformerBlock(DIM, heads=4, causal=causal).double()
    mine = block.attention.body
    other = nn.MultiheadAttention(DIM, 4, batch_first=True, dtype=torch.float64)
    other.load_state_dict({"in_proj_weight": mine.query_key_value.weight,
                           "in_proj_bias": mine.query_key_value.bias,
                           "out_proj.weight": mine.out.weight, "out_proj.bias": mine.out.bias})
    mask, x = MASKS[name], tokens(width=DIM)
    hidden = torch.zeros(2, 4, LENGTH, LENGTH, dtype=torch.float64)
    if mask is not None:
        full = mask[:, None] if mask.ndim == 3 else mask
        hidden = hidden + (full if full.is_floating_point()
                           else torch.zeros_like(full, dtype=torch.float64)
                           .masked_fill(~full, float("-inf")))
    if causal:
        hidden = hidden.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), float("-inf"))
    expected, _ = other(x, x, x, attn_mask=hidden.flatten(0, 1), need_weights=False)
    torch.testing.assert_close(mine(x, mask=mask), expected)


def test_block_is_its_formula_and_inverts():
    block, x = ReversibleTransformerBlock(DIM, 4, hidden=5).double(), tokens()
    x1, x2 = x.chunk(2, -1)
    y1 = x1 + block.attention.body(block.attention.norm(x2))
    y2 = x2 + block.feed_forward.body(block.feed_forward.norm(y1))
    torch.testing.assert_close(block(x), torch.cat([y1, y2], -1))
    assert block.feed_forward.body[0].out_features == 5
    deep = stack(12, causal=True)
    for name, mask in MASKS.items():
        back = deep.inverse(deep(x, mask=mask), mask=mask)
        torch.testing.assert_close(back, x, atol=1e-10, rtol=0, msg=name)
    single = copy.deepcopy(deep).float()
    # measured: 7e-7
    torch.testing.assert_close(single.inverse(single(x.float())), x.float(), atol=5e-6, rtol=0)


@pytest.mark.parametrize("name", MASKS)
def test_gradients_are_those_of_plain_autograd(name):
    deep, x = stack(3, causal=True, dropout=0.2, feed_forward=Normed()), tokens()
    for block in deep[1:]:
        block.feed_forward.body = Normed().double()
    plain = nn.ModuleList(copy.deepcopy(list(deep)))
    mask = None if MASKS[name] is None else MASKS[name].clone()
    if mask is not None and mask.is_floating_point():
        mask.requires_grad_()
    before = x.clone()
    torch.manual_seed(3)
    deep(x, mask=mask).square().sum().backward()  # the input needs no gradient
    learned, given = [p.grad.clone() for p in deep.parameters()], mask
    if mask is not None and mask.requires_grad:
        given = mask.detach().clone().requires_grad_()
    torch.manual_seed(3)
    h = x
    for block in plain:
        h = block(h, mask=given)
    h.square().sum().backward()
    for mine, theirs in zip(learned, plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.grad, atol=1e-10, rtol=1e-10)
    for mine, theirs in zip(deep.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)
    if mask is not given:
        torch.testing.assert_close(mask.grad, given.grad, atol=1e-10, rtol=1e-10)
    assert torch.equal(x, before)


def test_gradients_through_autograd_grad():
    deep, x = stack(2), tokens().requires_grad_()
    (mine,) = torch.autograd.grad(deep(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(nn.Sequential(*deep)(x).square().sum(), x)
    torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)
    assert all(p.grad is None for p in deep.parameters())


def test_a_token_sees_only_what_it_may():
    deep, x = stack(2, causal=True), tokens().requires_grad_()
    deep(x)[:, 2].sum().backward()
    seen = x.grad.abs().sum((0, 2))
    assert (seen[:3] > 0).all()
    assert (seen[3:] == 0).all()
    deep, x = stack(2), tokens().requires_grad_()
    deep(x, mask=PRESENT[:, None])[1, 0].sum().backward()
    assert (x.grad[1].abs().sum(1) > 0).tolist() == PRESENT[1].tolist()


def test_any_attention_and_feed_forward():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(DIM, DIM)

        def forward(self, x, scale, *, shift=0.0):
            return self.linear(x.mean(1, keepdim=True)).expand_as(x) * scale + shift

    blocks = [ReversibleTransformerBlock(DIM, attention=Mean(), feed_forward=nn.Linear(DIM, DIM))
              for _ in range(2)]
    deep, x = ReversibleSequential(*blocks).double(), tokens()
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    y = deep(x, scale, shift=0.1)
    torch.testing.assert_close(deep.inverse(y, scale, shift=0.1), x, atol=1e-10, rtol=0)
    (mine,) = torch.autograd.grad(y.square().sum(), scale)
    h = x
    for block in blocks:
        h = block(h, scale, shift=0.1)
    torch.testing.assert_close(mine, torch.autograd.grad(h.square().sum(), scale)[0])


def test_low_precision():
    deep, x = stack(4, causal=True).float(), tokens(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        deep(x).square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32
               for p in deep.parameters())
    half = copy.deepcopy(deep).bfloat16()
    half.zero_grad()
    half(x.bfloat16(), mask=PRESENT[:, None]).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())


def test_frozen_parts_copies_and_states():
    deep, x = stack(2), tokens()
    deep[0].attention.requires_grad_(False)
    deep(x).sum().backward()
    assert deep[0].attention.norm.weight.grad is None
    assert deep[0].feed_forward.norm.weight.grad is not None
    other = stack(2, causal=False)
    for p in other.parameters():
        nn.init.normal_(p)
    other.load_state_dict(deep.state_dict())
    assert torch.equal(other(x), copy.deepcopy(deep)(x))


def small_gpt(depth, width=16, context=8):
    return nn.Sequential(
        Embed(96, context, width), DoubleStreams(),
        *[ReversibleTransformerBlock(width, heads=4, causal=True, dropout=0.1)
          for _ in range(depth)],
        MergeStreams(), nn.LayerNorm(width), nn.Linear(width, 96))


def test_streams_are_doubled_and_merged():
    x = torch.randn(2, 3, 4)
    assert torch.equal(DoubleStreams()(x), torch.cat([x, x], -1))
    assert torch.equal(DoubleStreams(1)(x), torch.cat([x, x], 1))
    torch.testing.assert_close(MergeStreams()(DoubleStreams()(x)), x)
    torch.testing.assert_close(MergeStreams(1)(torch.cat([x, 3 * x], 1)), 2 * x)


def test_the_rule_gives_a_language_models_gradients():
    network, x = small_gpt(3).double(), torch.randint(96, (4, 8))
    other = copy.deepcopy(network)
    y = torch.randint(96, (4, 8))
    torch.manual_seed(0)
    mine = Reversible(network)(x, y)
    torch.manual_seed(0)
    torch.testing.assert_close(mine, Backprop(other)(x, y))
    for p, q in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-10, rtol=1e-10)


def test_memory_does_not_grow_with_depth():
    batch = torch.randint(96, (32, 8)), torch.randint(96, (32, 8))

    def bytes_of(make, depth):
        found = cost(make(small_gpt(depth)), batch, repeats=1, warmup=0)
        return found.saved_bytes, found.working_bytes
    (saved, working), (more_saved, more_working) = (bytes_of(Reversible, n) for n in (2, 8))
    assert more_saved <= 1.05 * saved
    assert more_working <= 1.05 * working
    assert bytes_of(Backprop, 8)[0] > 3 * bytes_of(Backprop, 2)[0]


def test_learns_what_only_attention_can_tell():
    generator = torch.Generator().manual_seed(0)

    def trained(blind):
        torch.manual_seed(0)
        rule = Reversible(small_gpt(2))
        mask = torch.eye(7, dtype=torch.bool)
        if blind:  # each token sees itself alone
            for block in rule.network[2:4]:
                block.attention.body.register_forward_pre_hook(
                    lambda module, args, options: (args, {"mask": mask}), with_kwargs=True)
        optimizer = torch.optim.Adam(rule.parameters(), lr=1e-2)
        for _ in range(120):
            x = torch.randint(8, (16, 8), generator=generator)
            optimizer.zero_grad()
            rule(x[:, 1:], x[:, :-1])  # the token before
            optimizer.step()
        x = torch.randint(8, (64, 8), generator=generator)
        return cross_entropy(rule.predict(x[:, 1:])[:, 1:].flatten(0, 1), x[:, 1:-1].flatten())
    assert trained(blind=False) < 0.7
    assert trained(blind=True) > 1.9  # chance is log 8 = 2.08


def test_errors():
    with pytest.raises(ValueError, match="heads must divide dim=8, got 3"):
        ReversibleTransformerBlock(8, 3)
    with pytest.raises(ValueError, match="heads is missing"):
        ReversibleTransformerBlock(8)
    with pytest.raises(ValueError, match="dropout must be"):
        ReversibleTransformerBlock(8, 2, dropout=1.0)
    with pytest.raises(ValueError, match="beside attention="):
        ReversibleTransformerBlock(8, causal=True, attention=nn.Identity())
    with pytest.raises(ValueError, match="beside feed_forward="):
        ReversibleTransformerBlock(8, 2, hidden=4, feed_forward=nn.Identity())
    for wrong in (torch.ones(5, 5), torch.ones(6), torch.ones(2, 4, 6)):
        with pytest.raises(ValueError, match="mask must be"):
            stack(1)(tokens(), mask=wrong)
    with pytest.raises(ValueError, match="even number"):
        MergeStreams()(torch.randn(2, 3))
    with pytest.raises(CannotReverse, match="2 equal parts"):
        stack(1)(tokens(width=15))
    for wrong in (nn.Linear(8, 4), nn.GRU(8, 8, batch_first=True)):
        deep = ReversibleSequential(ReversibleTransformerBlock(8, attention=wrong)).double()
        with pytest.raises(CannotReverse, match=f"{type(wrong).__name__} must return"):
            deep(tokens())
