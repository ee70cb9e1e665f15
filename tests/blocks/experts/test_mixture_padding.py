"""What stands at padding changes nothing, however the mixture is told where that is."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from netwright.blocks import GLU, MixtureOfExperts
from netwright.blocks.experts import (
    ExpertChoiceRouter,
    HashRouter,
    LossFreeRouter,
    TopKRouter,
    feed_attention_mask,
)
from netwright.rules import Rule

DIM, N = 6, 4
ROUTERS = {"top": lambda: TopKRouter(DIM, N), "one": lambda: TopKRouter(DIM, N, 1),
           "loss-free": lambda: LossFreeRouter(DIM, N), "hash": lambda: HashRouter(N, 9),
           "expert choice": lambda: ExpertChoiceRouter(DIM, N)}
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1]])  # left, right, packed


def mixture(router="top", **options):
    torch.manual_seed(0)
    return MixtureOfExperts(DIM, lambda: GLU(DIM, 8), ROUTERS[router](), n_experts=N, z=0.1,
                            balance=0.1, **options)


def learnt(moe, x, real, ids=None, **mask):
    """Return what a training pass gives and teaches."""
    moe.zero_grad()  # an expert of padding alone has a gradient of zeros, one of nothing has none
    y = moe(x, ids, **mask)[real]
    y.square().sum().backward()
    return [y, *moe.usage, *(torch.zeros_like(p) if p.grad is None else p.grad
                             for p in moe.parameters())]


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("capacity", [None, 0.6])
@pytest.mark.parametrize("form", ["routed", "dense"])
@pytest.mark.parametrize("router", ROUTERS)
def test_the_real_tokens_alone_count(router, form, capacity):
    moe, real = mixture(router, form=form, capacity=capacity), MASK.bool()
    x, ids = torch.randn(3, 5, DIM), torch.randint(9, (3, 5))
    expected = learnt(moe, x[real][None], torch.ones(1, int(real.sum())).bool(), ids[real][None])
    for filled in (x, torch.where(real[..., None], x, torch.full_like(x, 7.0))):
        close(learnt(moe, filled, real, ids, mask=MASK), expected)
    other = learnt(moe, x, real, ids)
    assert not torch.equal(other[1], expected[1])  # without a mask padding counts


class Encoder(nn.Module):
    def __init__(self, moe, recompute=None):
        super().__init__()
        self.moe, self.recompute = moe, recompute

    def forward(self, inputs_embeds, attention_mask=None):
        if self.recompute is None:
            return self.moe(inputs_embeds)
        return checkpoint(self.moe, inputs_embeds, use_reentrant=self.recompute)


@pytest.mark.parametrize("recompute", [None, True, False])
def test_a_models_mask_is_that_of_the_pass_also_when_it_runs_again(recompute):
    first, second = torch.randn(2, 3, 5, DIM, requires_grad=True).unbind()
    masks = (MASK, 1 - MASK)
    expected = deepcopy(mixture())
    for x, mask in zip((first, second), masks, strict=True):
        expected(x, mask=mask)[mask.bool()].square().sum().backward(retain_graph=True)
    encoder = Encoder(mixture(), recompute)
    feed_attention_mask(encoder)
    ys = [encoder(x, attention_mask=mask)[mask.bool()] for x, mask in
          zip((first, second), masks, strict=True)]
    sum(y.square().sum() for y in ys).backward()
    close([p.grad for p in encoder.parameters()], [p.grad for p in expected.parameters()])
    assert torch.equal(encoder.moe.usage.load, expected.usage.load)


def test_it_stays_with_a_copy_and_goes_with_its_handles():
    encoder = Encoder(mixture())
    handles = feed_attention_mask(encoder)
    x, copy = torch.randn(3, 5, DIM), deepcopy(encoder)
    copy(x, attention_mask=MASK)
    assert int(copy.moe.usage.load.sum()) == 2 * int(MASK.sum())
    for handle in handles:
        handle.remove()
    encoder(x, attention_mask=MASK)
    assert int(encoder.moe.usage.load.sum()) == 2 * MASK.numel()


def test_undefined_logits_at_padding_do_not_matter():
    moe, x = mixture().eval(), torch.randn(3, 5, DIM)
    x[MASK == 0] = torch.nan
    assert moe(x, mask=MASK)[MASK.bool()].isfinite().all()
    with pytest.raises(ValueError, match="logits must be finite"):
        moe(x)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"mask must be \(3, 5\).*got \(3, 4\)"):
        mixture()(torch.randn(3, 5, DIM), mask=MASK[:, :4])
    with pytest.raises(ValueError, match="takes attention_mask"):
        feed_attention_mask(mixture())


def test_all_padding_is_no_load():
    moe, x = mixture(), torch.randn(3, 5, DIM)
    moe(x, mask=torch.zeros(3, 5)).sum().backward()
    assert moe.usage.load.tolist() == [0] * N
    assert moe.usage.balance_loss == moe.usage.z_loss == 0


class StageByStage(Rule):
    """A rule that runs the network's parts itself, none of which is called with the mask."""

    def forward(self, x, y):
        h = x["input_ids"]
        for stage in self.network:
            h = stage(h)
        loss = (h.sum(-1) - y).square().mean()
        loss.backward()
        return loss.detach()


def test_a_rule_lets_its_stages_know():
    network = nn.Sequential(nn.Embedding(9, DIM), mixture())
    x = {"input_ids": torch.randint(9, (3, 5)), "attention_mask": MASK}
    StageByStage(network)(x, torch.ones(3, 5))
    assert int(network[1].usage.load.sum()) == 2 * int(MASK.sum())
    StageByStage(network)({"input_ids": x["input_ids"]}, torch.ones(3, 5))
    assert int(network[1].usage.load.sum()) == 2 * MASK.numel()
