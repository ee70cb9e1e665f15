from copy import deepcopy

import pytest
import torch
from torch import nn

from netwright.blocks.experts import MixtureOfExperts
from netwright.blocks.feedforward import GLU, FeedForward
from netwright.errors import NothingToReshape
from netwright.models import gpt
from netwright.reshape import upcycle
from netwright.reshape.experts.upcycle import SoftExperts
from netwright.signals import apply, tensor_of


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(batch=4):
    return torch.randint(64, (batch, 8), generator=drawn(1))


class Mixing(nn.Module):
    """Something in attention's place: each position sees the mean of all."""

    def __init__(self, width):
        super().__init__()
        self.value = nn.Linear(width, width)

    def forward(self, h):
        return self.value(h) + self.value(h).mean(-2, keepdim=True)


class Layer(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.attention, self.feedforward = Mixing(width), FeedForward(width, 32)

    def forward(self, h):
        h = h + self.attention(h)
        return h + self.feedforward(h)


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), Layer(), Layer(), nn.Linear(16, 3))


def built(name):
    torch.manual_seed(0)
    if name == "llama":
        t = pytest.importorskip("transformers")
        return t.LlamaForCausalLM(t.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, use_cache=False)).eval(), tokens()
    if name == "layers":
        return network(0), torch.randn(5, 7, 6)
    return gpt(64, context=8, width=32, feedforward={"gated": GLU}.get(name)), tokens()


@pytest.mark.parametrize("name", ["plain", "gated", "llama", "layers"])
def test_it_starts_at_the_dense_function(name):
    model, x = built(name)
    before = deepcopy(model.state_dict())
    attention = {"llama": ["self_attn"], "layers": ["attention"]}.get(name, [])
    for given in (model, [model, deepcopy(model), deepcopy(model)]):
        # Attention experts keep no cache, which the run of the result would refuse.
        mixed = upcycle(given, x, n_experts=4, k=3, attention=attention, generator=drawn(),
                        check=name != "llama")
        expected, found = (tensor_of(apply(m, x)) for m in (model, mixed))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert sum(isinstance(m, MixtureOfExperts) for m in mixed.modules()) == 2
        assert sum(isinstance(m, SoftExperts) for m in mixed.modules()) == 2 * bool(attention)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(),
                                                 strict=True))
    found.pow(3).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixed.parameters())


def test_several_models_become_one():
    models, x = [network(seed).double() for seed in range(3)], torch.randn(5, 7, 6).double()
    mixed = upcycle(models, x, n_experts=6, k=2, attention=["attention"], generator=drawn())
    h = x
    for i in (0, 3):
        mean = sum(m[i].weight for m in models) / 3
        torch.testing.assert_close(mixed[i].weight, mean)
    h = mixed[0](x)
    for i in (1, 2):
        soft, mixture = mixed[i].attention, mixed[i].feedforward
        weights = (h @ soft.router.T).softmax(-1)
        h = h + sum(weights[..., j, None] * m[i].attention(h) for j, m in enumerate(models))
        top, chosen = (h @ mixture.router.weight.T).topk(2)
        added = torch.zeros_like(h)
        for row in torch.cartesian_prod(torch.arange(5), torch.arange(7)).tolist():
            for w, e in zip(top[tuple(row)].softmax(-1), chosen[tuple(row)], strict=True):
                added[tuple(row)] += w * models[int(e) % 3][i].feedforward(h[tuple(row)])
        h = h + added
    torch.testing.assert_close(mixed(x), mixed[3](h))


def test_noise_is_for_further_copies_only():
    model, x = built("plain")
    for models in ([model], [model, deepcopy(model)]):
        mixed = upcycle(models, x, n_experts=4, noise=0.5, generator=drawn())
        experts = mixed[1].feedforward.experts if hasattr(mixed[1], "feedforward") else next(
            m for m in mixed.modules() if isinstance(m, MixtureOfExperts)).experts
        first = model[1].mlp_in.weight
        same = [torch.equal(expert[0].weight, first) for expert in experts]
        assert same == [i < len(models) for i in range(4)]
        off = (experts[-1][0].weight - first).std() / first.std()
        assert 0.45 < off.item() < 0.55
        assert not torch.allclose(mixed(x), model(x), atol=1e-3)


@pytest.mark.parametrize("seed", range(2))
def test_specialists_become_experts_that_a_router_can_tell_apart(seed):
    """Two layers that know one half of the inputs each; only the routers are trained."""
    torch.manual_seed(seed)
    x = torch.randn(400, 6, generator=drawn(seed))
    side = x[:, 0] > 0
    maps = torch.randn(2, 6, 6, generator=drawn(seed + 1))
    y = torch.where(side[:, None], x @ maps[0], x @ maps[1])
    base, models = nn.Sequential(nn.Identity(), FeedForward(6, 32)), []
    for rows in (side, ~side):
        model = deepcopy(base)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            (model(x[rows]) - y[rows]).square().mean().backward()
            optimizer.step()
        models.append(model)
    left = {}
    for name, given in {"specialists": models, "copies": models[:1]}.items():
        mixed = upcycle(given, x, n_experts=2, k=2, balance=0.0, generator=drawn(seed))
        router = mixed[1].router
        optimizer = torch.optim.Adam(router.parameters(), 0.1)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (mixed(x) - y).square().mean()
            loss.backward()
            optimizer.step()
        left[name] = loss.item()
    # Measured over 4 seeds: 0.05 to 0.07.
    assert left["specialists"] < 0.2 * left["copies"]


def test_copies_states_modes_and_dtypes():
    model, x = built("plain")
    model[1].requires_grad_(False)
    state = torch.get_rng_state()
    mixed, other = (upcycle(model.eval(), x, n_experts=4, noise=0.1, generator=drawn(seed))
                    for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert not mixed.training
    assert not torch.equal(mixed(x), other(x))
    other.load_state_dict(mixed.state_dict())
    assert torch.equal(mixed(x), other(x))
    assert torch.equal(mixed(x), deepcopy(mixed)(x))
    frozen = [p.requires_grad for m in mixed[1].modules() if isinstance(m, MixtureOfExperts)
              for p in m.experts.parameters()]
    assert frozen
    assert not any(frozen)
    assert mixed(x[:0]).shape == (0, 8, 64)
    assert upcycle(deepcopy(model).bfloat16(), x)(x).dtype == torch.bfloat16


@pytest.mark.parametrize(("options", "says"), [
    ({"k": 9}, "k must be between 1 and 8, got .; .*n_experts=8 twice"),
    ({"n_experts": 1}, "n_experts must be at least 2, got 1; .* 2 models"),
    ({"noise": -1.0}, "noise must be at least 0"),
    ({"attention": ["attention"], "example": None}, "example must be given"),
])
def test_what_cannot_be_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        upcycle([network(0), network(1)], **{"example": torch.randn(2, 5, 6)} | options)


def test_other_bad_input():
    x = torch.randn(2, 5, 6)
    with pytest.raises(ValueError, match="an empty list"):
        upcycle([], x)
    other = network(1)
    other[3] = nn.Linear(16, 4)
    with pytest.raises(ValueError, match=r"model 1 has 3\.weight of \(4, 16\)"):
        upcycle([network(0), other], x)
    with pytest.raises(NothingToReshape, match="'attn'"):
        upcycle(network(0), x, attention=["attn"])
    with pytest.raises(NothingToReshape, match="experts already"):
        upcycle(upcycle(network(0), x), x)
