from copy import deepcopy

import pytest
import torch
from torch import nn

from netwright.blocks.experts import MixtureOfExperts
from netwright.blocks.feedforward import GLU, FeedForward
from netwright.errors import NothingToReshape, UnknownName
from netwright.models import gpt, mlp
from netwright.reshape import moefy
from netwright.reshape.experts.moefy import balanced_kmeans
from netwright.signals import apply, tensor_of


def relu(dim, hidden):
    return FeedForward(dim, hidden, activation="relu")


def tokens(batch=4):
    return torch.randint(64, (batch, 8), generator=torch.Generator().manual_seed(1))


def built(name):
    torch.manual_seed(0)
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
             "num_hidden_layers": 2, "num_attention_heads": 4}
    if name in ("gpt2", "llama"):
        t = pytest.importorskip("transformers")
        model = (t.GPT2LMHeadModel(t.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4,
                                                bos_token_id=0, eos_token_id=0))
                 if name == "gpt2" else t.LlamaForCausalLM(t.LlamaConfig(**small)))
        return model.eval(), tokens()
    if name == "encoder":
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        return (nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
                torch.randn(3, 5, 16))
    make = {"relu": relu, "gated": GLU, "functional gelu": None}[name]
    return gpt(64, context=8, width=32, heads=4, feedforward=make), tokens()


def mixtures(model):
    return [m for m in model.modules() if isinstance(m, MixtureOfExperts)]


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["relu", "gated", "functional gelu", "encoder", "gpt2", "llama"])
def test_all_experts_are_the_dense_model(name):
    model, x = built(name)
    whole = moefy(model, x, n_experts=8, k=8, steps=2, generator=drawn())
    assert len(mixtures(whole)) == 2
    expected, found = (tensor_of(apply(m, x)) for m in (model, whole))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for y in (expected, found):
        y.pow(3).sum().backward()
    a, b = next(model.parameters()).grad, next(whole.parameters()).grad
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()))
    total = sum(p.numel() for p in whole.parameters()) - sum(
        p.numel() for m in mixtures(whole) for p in m.router.parameters())
    assert total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("split", ["cluster", "coactivation", "random"])
@pytest.mark.parametrize("router", ["mlp", "similarity", "groundtruth"])
def test_fewer_experts_are_the_dense_layer_with_the_others_units_at_zero(split, router):
    torch.manual_seed(0)
    model, x = relu(12, 48).double(), torch.randn(20, 12, dtype=torch.double)
    sparse = moefy(model, x, n_experts=6, k=2, split=split, router=router, steps=5,
                   generator=drawn())
    found = sparse(x)
    chosen = sparse.router(x).experts
    hidden = (x @ model[0].weight.T + model[0].bias).clamp(min=0)
    owner = torch.empty(48, dtype=torch.long)
    for i, row in enumerate(model[0].weight):
        (owner[i],) = [e for e, expert in enumerate(sparse.experts)
                       if (expert[0].weight == row).all(1).any()]
    assert torch.bincount(owner).tolist() == [8] * 6
    runs = (owner[None, :, None] == chosen[:, None, :]).any(-1)
    expected = (hidden * runs) @ model[2].weight.T + model[2].bias
    torch.testing.assert_close(found, expected)
    if router == "groundtruth":
        active = torch.stack([hidden[:, owner == e].sum(1) for e in range(6)], 1)
        assert torch.equal(chosen.sort().values, active.topk(2).indices.sort().values)


def planted(seed):
    """A layer whose units fire in four groups, each on inputs of its own; the groups."""
    draw = drawn(seed)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=draw))[0][:4]
    owner = torch.arange(4).repeat(8)[torch.randperm(32, generator=draw)]
    layer = relu(16, 32)
    with torch.no_grad():
        layer[0].weight.copy_(directions[owner] + 0.1 * torch.randn(32, 16, generator=draw))
        layer[0].bias.fill_(-0.5)
    kinds = torch.arange(4).repeat(100)
    x = 2 * directions[kinds] + 0.1 * torch.randn(400, 16, generator=draw)
    return layer, x, owner


@pytest.mark.parametrize("seed", range(3))
def test_units_that_fire_together_become_an_expert(seed):
    layer, x, owner = planted(seed)
    whole = {}
    for split in ("cluster", "coactivation", "random"):
        made = moefy(layer, x, n_experts=4, k=1, split=split, steps=100, generator=drawn(seed))
        groups = [{int(owner[(layer[0].weight == row).all(1)]) for row in expert[0].weight}
                  for expert in made.experts]
        whole[split] = all(len(group) == 1 for group in groups)
        with torch.no_grad():
            missed = (made(x) - layer(x)).square().sum() / layer(x).square().sum()
        # With one of four experts, 1e-3 or less is missed where groups were found.
        assert (missed < 0.02) == whole[split]
    assert whole == {"cluster": True, "coactivation": True, "random": False}


@pytest.mark.parametrize("seed", range(3))
def test_the_fitted_router_finds_more_active_experts_than_the_centers_do(seed):
    torch.manual_seed(seed)
    layer, x = relu(16, 64), torch.randn(3000, 16)
    found = {}
    for router in ("mlp", "similarity", "groundtruth"):
        made = moefy(layer, x[:2000], n_experts=8, k=2, router=router, steps=200,
                     generator=drawn(seed))
        rest = x[2000:]
        with torch.no_grad():
            found[router] = float(made.router.activity(rest).gather(
                1, made.router(rest).experts).sum())
    assert found["similarity"] < found["mlp"] <= found["groundtruth"]
    assert found["mlp"] > 0.9 * found["groundtruth"]


@pytest.mark.parametrize("seed", range(3))
def test_balanced_kmeans(seed):
    draw = drawn(seed)
    centers = 5 * torch.randn(6, 4, generator=draw)
    owner = torch.arange(6).repeat(10)[torch.randperm(60, generator=draw)]
    points = centers[owner] + 0.1 * torch.randn(60, 4, generator=draw)
    groups = balanced_kmeans(points, 6, generator=drawn(seed))
    assert sorted(groups.flatten().tolist()) == list(range(60))

    def spread(groups):
        return float(points[groups].var(1).sum())
    chance = spread(torch.randperm(60, generator=draw).view(6, 10))
    assert spread(groups) < 0.6 * chance


def test_layers_of_other_outputs_are_split_where_asked():
    network, x = mlp(20, 5, hidden=[32]), torch.randn(50, 20)
    with pytest.raises(NothingToReshape):
        moefy(network, x)
    whole = moefy(network, x, k=16, steps=2, square=False)
    torch.testing.assert_close(whole(x), network(x), rtol=1e-4, atol=1e-5)


def test_an_activation_of_ones_own_is_copied():
    class Bent(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(0.3))

        def forward(self, x):
            return torch.maximum(x, self.slope * x)

    torch.manual_seed(0)
    model, x = FeedForward(12, 32, activation=Bent), torch.randn(9, 12)
    whole = moefy(model, x, n_experts=4, k=4, steps=2)
    torch.testing.assert_close(whole(x), model(x), rtol=1e-4, atol=1e-5)
    assert not {id(p) for p in whole.parameters()} & {id(p) for p in model.parameters()}


def test_what_is_given_stays_and_the_draws_are_the_generators():
    model, x = built("relu")
    model[1].feedforward.requires_grad_(False)
    before, state = deepcopy(model.state_dict()), torch.get_rng_state()
    first, second = (moefy(model, [x, x], n_experts=8, steps=3, generator=drawn(4))
                     for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(),
                                                 strict=True))
    assert torch.equal(first(x), second(x))
    assert first.training
    assert not any(p.requires_grad for p in mixtures(first)[0].experts.parameters())
    assert all(p.requires_grad for p in mixtures(first)[1].experts.parameters())
    again = deepcopy(first)
    for p in again.parameters():
        p.data.zero_()
    again.load_state_dict(first.state_dict())
    assert torch.equal(again(x), first(x))
    mixtures(first)[0].router.k = 8
    assert not torch.equal(again(x), first(x))
    first.double()(x).sum().backward()
    half = moefy(model.bfloat16(), x, n_experts=8, steps=2)
    assert half(x).dtype == torch.bfloat16


@pytest.mark.parametrize(("options", "says"), [
    ({"n_experts": 7}, "n_experts must divide the 128 hidden units"),
    ({"n_experts": 8, "k": 9}, "k must be between 1 and 8, got .; .*n_experts=8 twice"),
    ({"n_experts": 8, "k": 0}, "k must be between 1 and 8, got .; .*n_experts=8 twice"),
    ({"steps": 0}, "steps must be at least 1"),
])
def test_what_cannot_be_is_refused(options, says):
    model, x = built("relu")
    with pytest.raises(ValueError, match=says):
        moefy(model, x, **options)


def test_other_bad_input():
    model, x = built("relu")
    with pytest.raises(UnknownName, match="did you mean cluster"):
        moefy(model, x, split="clusters")
    with pytest.raises(UnknownName, match="did you mean groundtruth"):
        moefy(model, x, router="truth")
    with pytest.raises(ValueError, match="at least one sample"):
        moefy(model, [])
    with pytest.raises(NothingToReshape, match="no feed-forward layer"):
        moefy(nn.Linear(4, 4), torch.randn(3, 4))
    with pytest.raises(NothingToReshape, match="experts already"):
        moefy(moefy(model, x, n_experts=8, steps=2), x)
    model[0].characters.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="calibration must give finite values"):
        moefy(model, x)


def test_what_its_experts_would_not_have_is_refused():
    model, x = built("relu")
    handle = model[1].feedforward[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"hooks at '1\.feedforward\.0'.*remove the hooks"):
        moefy(model, x, n_experts=8, steps=2)
    handle.remove()
    nn.utils.parametrizations.weight_norm(model[1].feedforward[0])
    with pytest.raises(ValueError, match="remove_parametrizations first"):
        moefy(model, x, n_experts=8, steps=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_routers_of_narrow_models_learn_in_float32(dtype):
    layer = FeedForward(16, 32, activation="relu")
    x = torch.randn(200, 16, generator=drawn(1))
    wide = moefy(layer, x, n_experts=4, k=1, steps=200, generator=drawn(2))
    narrow = moefy(deepcopy(layer).to(dtype), x.to(dtype), n_experts=4, k=1, steps=200,
                   generator=drawn(2))
    score = mixtures(narrow)[0].router.score
    assert score[0].weight.dtype == dtype
    for ours, theirs in zip(score.parameters(), mixtures(wide)[0].router.score.parameters(),
                            strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=0.1, atol=0.1)
