from copy import deepcopy

import pytest
import torch
from torch import nn

from netwright.blocks.experts import GLUExperts, MixtureOfExperts
from netwright.blocks.feedforward import GLU, FeedForward
from netwright.errors import NothingToReshape, UnknownName
from netwright.reshape import changes, prune_experts
from netwright.signals import apply, tensor_of


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def mixture(kind="list", n=6, k=2, seed=0):
    torch.manual_seed(seed)
    experts = {"list": lambda: [FeedForward(8, 16) for _ in range(n)],
               "gated": lambda: [GLU(8, 16) for _ in range(n)],
               "stacked": lambda: GLUExperts(8, 16, n)}[kind]()
    return nn.Sequential(nn.Linear(5, 8), MixtureOfExperts(8, experts, k=k), nn.Linear(8, 3))


@pytest.mark.parametrize("method", ["cluster_router", "usage", "random"])
@pytest.mark.parametrize("kind", ["list", "gated", "stacked"])
def test_what_stays_is_the_mixture_without_the_other_experts(kind, method):
    model, x = mixture(kind).double(), torch.randn(30, 5, dtype=torch.double)
    pruned = prune_experts(model, x, 3, method=method, generator=drawn())
    router = model[1].router.weight
    stay = [int((router == row).all(1).nonzero()) for row in pruned[1].router.weight]
    assert stay == sorted(set(stay))
    assert len(stay) == pruned[1].n_experts == pruned[1].router.n_experts == 3
    h = model[0](x)
    logits = (h @ router.T)[:, stay]
    top, chosen = logits.topk(2)
    rows = []
    for i in range(30):
        y = 0
        for w, j in zip(top[i].softmax(0), chosen[i].tolist(), strict=True):
            e = stay[j]
            one = h[i][None]
            y = y + w * (model[1].experts.expert(e, one) if kind == "stacked"
                         else model[1].experts[e](one))[0]
        rows.append(y)
    torch.testing.assert_close(pruned(x), model[2](torch.stack(rows)))


def test_which_experts_stay():
    model, x = mixture(), torch.randn(200, 5)
    router, h = model[1].router.weight.data, model[0](x).detach()
    with torch.no_grad():  # 0 and 3, 1 and 4, 2 and 5 are wanted for the same tokens
        router[3:] = 1.1 * router[:3]
    usage = (h @ router.T).softmax(-1).mean(0)
    expected = [max((i, i + 3), key=lambda e: usage[e]) for i in range(3)]
    pruned = prune_experts(model, x, 3)
    assert torch.equal(pruned[1].router.weight, router[sorted(expected)])
    kept = prune_experts(model, x, 3, method="usage")
    assert torch.equal(kept[1].router.weight, router[usage.topk(3).indices.sort().values])
    again = [prune_experts(model, x, 3, method="random", generator=drawn(s)) for s in (0, 0, 2)]
    weights = [m[1].router.weight for m in again]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("seed", range(3))
def test_a_tasks_experts_are_kept(seed):
    """Four clusters of inputs, a router that knows them; the task has two of them."""
    draw = drawn(seed)
    centers = torch.linalg.qr(torch.randn(8, 8, generator=draw))[0][:4]
    torch.manual_seed(seed)
    block = MixtureOfExperts(8, [FeedForward(8, 16) for _ in range(8)], k=1)
    with torch.no_grad():
        block.router.weight.copy_(10 * centers.repeat(2, 1)
                                  + torch.randn(8, 8, generator=draw))
    x = centers[torch.randint(2, (200,), generator=draw)]
    x = x + 0.05 * torch.randn(200, 8, generator=draw)
    model = nn.Sequential(nn.Identity(), block)

    def off(method):
        return float((prune_experts(model, x, 4, method=method, generator=drawn(seed))(x)
                      - model(x)).detach().square().mean())

    assert off("usage") < 0.2 * off("random") + 1e-9


def test_mixtral():
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = t.MixtralForCausalLM(t.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=6)).eval()
    x = torch.randint(64, (2, 7), generator=drawn())
    same, expected = (tensor_of(apply(m, x)) for m in (prune_experts(model, x, 6), model))
    torch.testing.assert_close(same, expected)
    pruned = prune_experts(model, x, 3)
    assert pruned.config.num_local_experts == 3
    assert model.config.num_local_experts == 6
    assert tensor_of(apply(pruned, x)).shape == expected.shape
    assert sum(p.numel() for p in pruned.parameters()) < 0.7 * sum(
        p.numel() for p in model.parameters())
    small, large = pruned.model.layers[0].mlp, model.model.layers[0].mlp
    stay = [int((large.gate.weight == row).all(1).nonzero()) for row in small.gate.weight]
    h = torch.randn(2, 7, 32)
    rows = []
    for row in h.flatten(0, 1):
        top, chosen = (large.gate.weight[stay] @ row).topk(2)
        y = 0
        for w, j in zip(top.softmax(0), chosen.tolist(), strict=True):
            gate, up = (large.experts.gate_up_proj[stay[j]] @ row).chunk(2)
            y = y + w * large.experts.down_proj[stay[j]] @ (nn.functional.silu(gate) * up)
        rows.append(y)
    torch.testing.assert_close(small(h).flatten(0, 1), torch.stack(rows), rtol=1e-4, atol=1e-6)
    one = prune_experts(pruned, x, 1)
    assert tensor_of(apply(one, x)).isfinite().all()
    model.model.embed_tokens.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="must give finite router logits"):
        prune_experts(model, x, 3)


def test_fewer_than_a_token_used_and_what_is_given():
    model, x = mixture(k=3), torch.randn(30, 5)
    model[1].experts[0].requires_grad_(False)
    before = deepcopy(model.state_dict())
    assert torch.equal(prune_experts(model, x, 6)(x), model(x))
    pruned = prune_experts(model, [x, x], 1)
    assert pruned[1].router.k == 1
    h = pruned[0](x)
    torch.testing.assert_close(pruned(x), pruned[2](pruned[1].experts[0](h)))
    pruned.train()(x).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(),
                                                 strict=True))
    assert model[1].n_experts == 6
    fewer = prune_experts(model, x, 4, method="random", generator=drawn(1))
    assert fewer.training
    assert torch.equal(fewer(x), deepcopy(fewer)(x))


def test_what_cannot_be_is_refused():
    model, x = mixture(), torch.randn(30, 5)
    for keep in (0, 7):
        with pytest.raises(ValueError, match=f"between 1 and 6, got {keep}; '1' has 6 experts"):
            prune_experts(model, x, keep)
    with pytest.raises(UnknownName, match="did you mean cluster_router"):
        prune_experts(model, x, 3, method="cluster")
    with pytest.raises(ValueError, match="at least one sample"):
        prune_experts(model, [], 3)
    with pytest.raises(NothingToReshape, match="no mixture of experts"):
        prune_experts(nn.Sequential(FeedForward(5, 8)), x, 1)


def grouped():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1,
        n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=6, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=4, v_head_dim=8, qk_nope_head_dim=8,
        first_k_dense_replace=1, pad_token_id=None)).eval()


@pytest.mark.parametrize("method", ["cluster_router", "usage", "random"])
def test_as_many_experts_stay_in_each_group_of_a_grouped_router(method):
    model, x = grouped(), torch.randint(64, (2, 9), generator=drawn())
    pruned = prune_experts(model, x, 8, method=method, generator=drawn())
    block = pruned.model.layers[1].mlp
    (said,) = changes(pruned)[0].decision["mixtures"]
    assert [expert // 4 for expert in said["stay"]] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert (block.gate.num_experts, block.gate.top_k) == (8, 4)  # two groups of two are open
    other = x.clone()
    other[0, -1] = (other[0, -1] + 1) % 64
    with torch.no_grad():
        logits, moved = pruned(x).logits, pruned(other).logits
    assert torch.equal(logits[1], moved[1])
    torch.testing.assert_close(logits[0, :-1], moved[0, :-1])
    assert pruned(x[:1, :5]).logits.shape == (1, 5, 64)


@pytest.mark.parametrize("keep", [1, 3, 4, 6])
def test_what_does_not_divide_among_the_groups_is_refused(keep):
    with pytest.raises(ValueError, match=r"a multiple of the 4 groups .* try 8"):
        prune_experts(grouped(), torch.randint(64, (2, 9)), keep)
