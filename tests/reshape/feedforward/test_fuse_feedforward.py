from copy import deepcopy

import pytest
import torch
from torch import nn

from netwright.blocks.feedforward import GLU
from netwright.errors import NothingToReshape, UnknownName
from netwright.models import gpt
from netwright.reshape import fuse_feedforward, prune_sublayers
from netwright.reshape.feedforward import feedforward_runs, feedforwards
from netwright.reshape.pruning import sublayers, without_sublayers
from netwright.stages import call
from tests.reshape.feedforward.models import built, tokens


class Branch(nn.Module):
    """A residual feed-forward layer whose norm a test can choose."""

    def __init__(self, dim, hidden, norm=nn.LayerNorm, activation=nn.GELU, gated=False):
        super().__init__()
        self.norm = norm(dim)
        for p in self.norm.parameters():
            nn.init.uniform_(p, 0.5, 1.5)
        self.mlp = GLU(dim, hidden) if gated else nn.Sequential(
            nn.Linear(dim, hidden), activation(), nn.Linear(hidden, dim))

    def forward(self, h):
        return h + self.mlp(self.norm(h))


class OffsetNorm(nn.Module):
    """A norm that keeps its scale's distance from 1, as some models do."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, h):
        return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + self.weight)


def stack(*branches, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*(Branch(8, width, **kind) for width, kind in branches)).double()


KINDS = {"layer norm": {}, "RMS norm": {"norm": nn.RMSNorm}, "scale from 1": {"norm": OffsetNorm},
         "no scale": {"norm": lambda dim: nn.LayerNorm(dim, elementwise_affine=False)},
         "gated": {"gated": True, "norm": nn.RMSNorm}, "gated, shifted": {"gated": True},
         "no norm": {"norm": lambda dim: nn.Identity()}}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_fused_equals_the_exact_parallel_sum(kind):
    model = stack((12, kind), (20, kind), (16, kind))
    h = torch.randn(9, 8, dtype=torch.float64)
    fused = fuse_feedforward(model, h, names(model, h))
    expected = h + sum(branch.mlp(branch.norm(h)) for branch in model)
    torch.testing.assert_close(fused(h), expected, atol=1e-12, rtol=1e-12)
    (layer,) = feedforwards(fused, h)
    assert layer.hidden == 48
    assert fused.fused_feedforward == ((layer.down, *(
        other.down for other in feedforwards(model, h)[1:])),)


def names(model, h):
    return [layer.name for layer in feedforwards(model, h)]


def test_the_gradients_of_the_fused_layer_are_those_of_the_sum():
    model = stack((12, {}), (20, {}))
    h = torch.randn(9, 8, dtype=torch.float64)
    fused = fuse_feedforward(model, h, names(model, h))
    fused(h).square().sum().backward()
    (h + sum(branch.mlp(branch.norm(h)) for branch in model)).square().sum().backward()
    torch.testing.assert_close(fused[0].mlp[2].weight.grad, torch.cat(
        [branch.mlp[2].weight.grad for branch in model], 1))


@pytest.mark.parametrize("name", ["gpt", "gpt2", "llama", "vit", "encoder, norm first"])
def test_attention_that_was_taken_out_leaves_a_run_that_fuses(name):
    model, x = built(name)
    attention = [s for s in sublayers(model, x) if "att" in s]
    fewer = without_sublayers(model, x, attention[1:])
    taken = []
    (run,) = feedforward_runs(fewer, x)
    assert len(run.layers) == 2
    fused = fuse_feedforward(fewer, x, dependence=2.0)
    # By hand: the second layer is made to read what the first one reads.
    by_hand = deepcopy(fewer)
    for branch in _norms(by_hand, name):
        branch.register_forward_pre_hook(lambda _, args: (taken.append(args[0]), (taken[0],))[1])
    for part in by_hand.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0
    torch.testing.assert_close(call(fused, x), call(by_hand, x), atol=1e-5, rtol=1e-5)
    assert len(sublayers(fused, x)) == len(sublayers(fewer, x)) - 1


def _norms(model, name):
    """Return the norms before the feed-forward layers."""
    return {"gpt": lambda: [model[1].mlp_norm, model[2].mlp_norm],
            "gpt2": lambda: [block.ln_2 for block in model.transformer.h],
            "llama": lambda: [layer.post_attention_layernorm for layer in model.model.layers],
            "vit": lambda: [layer.layernorm_after for layer in model.vit.layers],
            "encoder, norm first": lambda: [layer.norm2 for layer in model.layers]}[name]()


def test_it_follows_prune_sublayers_and_the_cache_still_works():
    torch.manual_seed(0)
    model, x = built("llama")
    pruned = without_sublayers(model, x, ["model.layers.1.self_attn"])
    fused = fuse_feedforward(pruned, x, dependence=2.0)
    generated = fused.generate(x, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 10)
    smaller = prune_sublayers(fused, x, remove=1)
    assert len(sublayers(smaller, x)) == len(sublayers(fused, x)) - 1


def test_dependence_is_the_cosine_distance_of_what_a_layer_adds():
    model = stack((12, {}), (20, {}), (16, {}))
    h = torch.randn(9, 8, dtype=torch.float64)
    (run,) = feedforward_runs(model, h)
    assert run.layers == ("0.mlp", "1.mlp", "2.mlp")
    a, b, c = model
    whole = c.mlp(c.norm(b(a(h))))
    without = c.mlp(c.norm(a(h)))
    expected = 1 - nn.functional.cosine_similarity(whole, without, dim=-1).mean()
    assert run.dependence[1, 2] == pytest.approx(expected.item(), abs=1e-6)
    assert (run.dependence.tril() == 0).all()


def test_a_layer_joins_only_those_that_it_depends_little_on():
    model = stack(*[(12, {})] * 4)
    for p in model[1].mlp[2].parameters():
        p.data *= 30  # what comes after it sees another stream
    h = torch.randn(50, 8, dtype=torch.float64)
    (run,) = feedforward_runs(model, h)
    assert run.dependence[0, 1] < 0.1 < run.dependence[1, 2]
    fused = fuse_feedforward(model, h, dependence=0.1)
    assert fused.fused_feedforward == (("0.mlp.2", "1.mlp.2"), ("2.mlp.2", "3.mlp.2"))
    assert run.dependence[2, 3] < 0.1


def test_little_dependence_means_that_little_is_lost():
    """Where layers add little, the parallel sum is near; where they add much, it is not."""
    lost = []
    for scale in (0.1, 3.0):
        model = stack((12, {}), (12, {}), (12, {}))
        for branch in model:
            for p in branch.mlp[2].parameters():
                p.data *= scale
        h = torch.randn(50, 8, dtype=torch.float64)
        fused = fuse_feedforward(model, h, dependence=2.0)
        with torch.no_grad():
            added = (model(h) - h).norm()
            lost.append(((fused(h) - model(h)).norm() / added).item())
    assert lost[0] < 0.05 < 0.2 < lost[1]  # 0.02 and 0.5, over 3 seeds


def test_the_model_stays():
    model = stack((12, {}), (12, {}))
    before = deepcopy(model.state_dict())
    fuse_feedforward(model, torch.randn(4, 8, dtype=torch.float64), dependence=2.0)
    assert all(torch.equal(a, b) for a, b in
               zip(before.values(), model.state_dict().values(), strict=True))
    assert not any(m._forward_hooks for m in model.modules())


def test_networks_without_runs_are_refused():
    with pytest.raises(NothingToReshape, match="take attention out first"):
        fuse_feedforward(gpt(64, context=8, width=32), tokens())
    model, x = built("encoder")  # which normalises after the sum
    fewer = without_sublayers(model, x, ["layers.1.self_attn"])
    with pytest.raises(NothingToReshape, match="follow one another"):
        fuse_feedforward(fewer, x)


def test_what_cannot_be_one_layer_is_refused():
    h = torch.randn(30, 8, dtype=torch.float64)
    for other, message in [({"activation": nn.ReLU}, "one activation"),
                           ({"norm": nn.RMSNorm}, "one kind"),
                           ({"gated": True}, "all have a gate"),
                           ({"norm": lambda dim: nn.LayerNorm(dim, eps=0.1)}, "one kind")]:
        with pytest.raises(ValueError, match=message):
            fuse_feedforward(stack((12, {}), (12, other)), h, dependence=2.0)
    model = stack((12, {}), (12, {}))
    with pytest.raises(NothingToReshape, match="allow more"):
        fuse_feedforward(model, h, dependence=0.0)
    with pytest.raises(NothingToReshape, match="names no two"):
        fuse_feedforward(model, h, ["0.mlp"])
    with pytest.raises(UnknownName):
        fuse_feedforward(model, h, ["5"])
