from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from netwright.data import digits
from netwright.measure import cost
from netwright.models import gpt
from netwright.rules import Backprop, ZerothOrder
from netwright.stages import stages


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def cnn() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(),
                         nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.3),
                         nn.Flatten(), nn.Linear(64, 3))


def seeded() -> Generator:
    return Generator().manual_seed(3)


def classes(*shape: int) -> Tensor:
    return torch.randint(3, shape)


def flat(network: nn.Module) -> Tensor:
    """Return the gradients that the network has, and take them away."""
    found = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                       for p in network.parameters() if p.requires_grad])
    network.zero_grad(set_to_none=True)
    return found


def directions(network: nn.Module, seeds: list[int]) -> Tensor:
    """Draw the directions of `seeds` by themselves, one row for each."""
    return torch.stack([torch.cat([
        torch.empty_like(p).normal_(generator=Generator().manual_seed(seed + i)).detach().flatten()
        for i, p in enumerate(network.parameters()) if p.requires_grad]) for seed in seeds])


def check_projection(network: nn.Module, x: Any, y: Tensor, *, epsilon: float = 1e-6,
                     close: float = 1e-5, **options: Any) -> ZerothOrder:
    """Hold the update to mean_k (g . z_k) z_k, with g from autograd, in float64."""
    network = network.double()
    rule = ZerothOrder(network, x, directions=3, epsilon=epsilon, generator=seeded(), **options)
    seeds = ZerothOrder(network, directions=3, generator=seeded()).seeds()
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    places = [p.data_ptr() for p in network.parameters()]
    torch.manual_seed(5)
    loss = rule(x, y)
    update, state = flat(network), torch.get_rng_state()
    after = {name: value.clone() for name, value in network.state_dict().items()}
    assert places == [p.data_ptr() for p in network.parameters()]
    network.load_state_dict(weights)
    torch.manual_seed(5)
    torch.testing.assert_close(loss, Backprop(network)(x, y).double(), rtol=close, atol=0)
    z = directions(network, seeds)
    wanted = (z @ flat(network)) @ z / 3
    assert (update - wanted).norm() < close * wanted.norm()
    # Weights are as they were, buffers and the random state as one pass in float64 leaves them.
    assert torch.equal(state, torch.get_rng_state())
    for name, value in network.state_dict().items():
        torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-5)
    for name, _ in network.named_parameters():
        assert torch.equal(after[name], weights[name])
    return rule


@pytest.mark.parametrize("difference", ["central", "forward"])
def test_each_estimate_is_the_gradient_projected_on_its_directions(difference):
    rule = check_projection(mlp(), torch.randn(7, 6).double(), classes(7), difference=difference)
    assert rule.stages is not None


def test_batch_norm_and_dropout_run_once():
    check_projection(cnn(), torch.randn(7, 1, 8, 8).double(), classes(7))


def test_frozen_and_shared_parameters():
    network = mlp()
    network[0].requires_grad_(False)
    network.add_module("5", nn.Linear(3, 8))
    network.add_module("6", nn.Tanh())
    network.add_module("7", network[4])
    check_projection(network, torch.randn(7, 6).double(), classes(7))
    assert network[0].weight.grad is None


def hugging_face(name: str) -> tuple[nn.Module, Any, Tensor]:
    transformers = pytest.importorskip("transformers")
    tokens = torch.randint(3, 30, (3, 7))
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 5:] = 0
    text = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 16}
    if name == "vit":
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            image_size=8, patch_size=4, num_channels=1, num_labels=3, hidden_dropout_prob=0.1)
        return (transformers.ViTForImageClassification(config), torch.randn(4, 1, 8, 8).double(),
                classes(4))
    x = {"input_ids": tokens, "attention_mask": mask}
    if name == "bert":
        config = transformers.BertConfig(**text, num_labels=3)
        return transformers.BertForSequenceClassification(config), x, classes(3)
    config = transformers.LlamaConfig(**text, num_key_value_heads=1, use_cache=False,
                                      tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config), x, tokens


@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_transformers(name):
    network, x, y = hugging_face(name)
    # Llama's norms compute in float32, where small differences of the loss are lost
    options = {"epsilon": 1e-3, "close": 2e-2} if name == "llama" else {}
    assert check_projection(network.train(), x, y, **options).stages is not None


def test_graph_networks():
    geometric = pytest.importorskip("torch_geometric.nn")
    network = geometric.GCN(5, 8, 2, 3, dropout=0.2)
    y = classes(9)
    y[4:] = -100
    check_projection(network, (torch.randn(9, 5).double(), torch.randint(0, 9, (2, 20))), y)


class Twice(nn.Module):
    """No chain: its second layer reads its own output and the input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).tanh()) + (x @ self.one.weight.T).sin()[:, :3]


def test_a_network_that_cannot_be_staged_is_shifted_as_a_whole():
    network = Twice().double()
    rule = ZerothOrder(network, epsilon=1e-6, directions=3, generator=seeded())
    assert rule.stages is None
    check_projection(network, torch.randn(7, 6).double(), classes(7))


def test_stages_give_the_update_of_the_whole_network():
    network, x, y = mlp(), torch.randn(7, 6), classes(7)
    by_stage = ZerothOrder(network, generator=seeded())
    whole = ZerothOrder(network, generator=seeded())
    whole.stages = None
    by_stage(x, y)
    update = flat(network)
    whole(x, y)
    assert torch.equal(update, flat(network))


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -1.0, 0.0, 2.0]).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x


def test_the_mean_converges_to_the_gradient_of_the_smoothed_loss():
    """E (w + epsilon z)^3 = w^3 + 3 epsilon^2 w, so that its gradient is 3 w^2 + 3 epsilon^2."""
    network, x, errors = Weights(), torch.ones(4).double(), []
    exact = 3 * network.w.detach() ** 2
    smooth = exact + 3 * 0.5 ** 2
    for n in (64, 1024):
        found = []
        for seed in range(6):
            ZerothOrder(network, directions=n, epsilon=0.5, generator=Generator().manual_seed(seed),
                        loss=lambda h, y: h.pow(3).sum())(x, torch.zeros(()))
            found.append(flat(network))
        errors.append((torch.stack(found) - smooth).square().sum(1).mean().sqrt())
    assert errors[1] < 0.35 * errors[0]  # a quarter in theory
    mean = torch.stack(found).mean(0)
    assert (mean - smooth).norm() < 0.4 * (mean - exact).norm()


def test_in_place_is_what_sgd_does_with_the_gradient():
    network, x, y = mlp().double(), torch.randn(7, 6).double(), classes(7)
    other = deepcopy(network)
    stepping = ZerothOrder(network, in_place=True, rate=0.1, directions=3, generator=seeded())
    rule = ZerothOrder(other, directions=3, generator=seeded())
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        assert torch.allclose(stepping(x, y), rule(x, y))
        optimizer.step()
    assert stepping.updates_weights
    assert all(p.grad is None for p in network.parameters())
    for ours, theirs in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_scalars_of_the_clients_make_the_update_of_all_their_data():
    server, x, y = mlp().double(), torch.randn(12, 6).double(), classes(12)
    rule = ZerothOrder(server, directions=5, generator=seeded())
    seeds = rule.seeds()
    shares = [(x[:3], y[:3]), (x[3:], y[3:])]
    sent = [ZerothOrder(deepcopy(server)).scalars(*share, seeds) * len(share[1]) / len(y)
            for share in shares]
    assert sent[0].shape == (5,)
    rule.replay(seeds, sum(sent))
    federated = flat(server)
    ZerothOrder(server, directions=5, generator=seeded())(x, y)
    torch.testing.assert_close(federated, flat(server), rtol=1e-6, atol=1e-9)


def test_scalars_change_nothing():
    network, x, y = mlp(), torch.randn(7, 6), classes(7)
    before = deepcopy(network.state_dict())
    rule = ZerothOrder(network, in_place=True, rate=0.1)
    seeds = rule.seeds()
    assert torch.equal(rule.scalars(x, y, seeds), rule.scalars(x, y, seeds))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


class Fails(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")


@pytest.mark.parametrize("whole", [False, True])
def test_weights_are_what_they_were_where_a_pass_fails(whole):
    network = nn.Sequential(nn.Linear(6, 4), Fails(), nn.Linear(4, 3))
    before, places = deepcopy(network.state_dict()), [p.data_ptr() for p in network.parameters()]
    rule = ZerothOrder(network)
    rule.stages = None if whole else rule.stages
    with pytest.raises(RuntimeError, match="no such kernel"):
        rule(torch.randn(2, 6), classes(2))
    assert places == [p.data_ptr() for p in network.parameters()]
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def largest_stage(network: nn.Module, x: Any) -> int:
    return max(sum(p.nbytes for p in stage.parameters()) for stage in stages(network, x))


def test_memory_is_that_of_inference_and_of_one_stages_parameters():
    network, x = gpt(64, 16, width=32, depth=6), torch.randint(64, (32, 16))
    y = torch.randint(64, (32, 16))
    inference = cost(network, (x, None), repeats=1, warmup=0).peak_bytes
    found = cost(ZerothOrder(network, in_place=True, rate=0.1), (x, y), repeats=1, warmup=0)
    assert found.saved_bytes == 0
    # the loss makes log-probabilities, which inference does not; then labels and random states
    logits, rest = y.numel() * 64 * 4, y.nbytes + 2**14
    assert found.peak_bytes <= inference + largest_stage(network, x) + logits + rest
    exact = cost(Backprop(network), (x, y), repeats=1, warmup=0)
    assert found.peak_bytes < 0.3 * exact.peak_bytes


def test_in_place_holds_no_gradient():
    network, batch = mlp(), (torch.randn(1, 6), classes(1))
    rule, stepping = ZerothOrder(network), ZerothOrder(network, in_place=True, rate=0.1)
    with_gradient = cost(rule, batch, repeats=1, warmup=0)
    without = cost(stepping, batch, repeats=1, warmup=0)
    assert with_gradient.peak_by_kind["gradients"] == sum(p.nbytes for p in network.parameters())
    assert without.peak_by_kind["gradients"] == 0
    assert without.peak_bytes < with_gradient.peak_bytes


def test_autocast_sees_the_shifted_weights_and_then_the_new_ones():
    network, x, y = mlp(), torch.randn(7, 6), classes(7)
    plain = ZerothOrder(network, epsilon=0.5, generator=seeded()).scalars(x, y, [11, 12, 13])
    rule = ZerothOrder(network, epsilon=0.5, in_place=True, rate=10.0)
    with torch.autocast("cpu", torch.bfloat16):
        before = rule.predict(x)
        torch.testing.assert_close(rule.scalars(x, y, [11, 12, 13]), plain, atol=0.05, rtol=0.05)
        rule.replay([11, 12, 13], plain)
        after = rule.predict(x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after.float(), rule.predict(x), atol=0.2, rtol=0.05)


def test_a_network_in_bfloat16_still_sees_a_slope():
    network = mlp().bfloat16()
    found = ZerothOrder(network, epsilon=0.01).scalars(torch.randn(64, 6).bfloat16(), classes(64),
                                                       list(range(20)))
    assert found.dtype == torch.float32
    assert (found != 0).float().mean() > 0.8


def accuracy(*, shuffled: bool = False, frozen: bool = False) -> float:
    data = digits()
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 16),
                            nn.Tanh(), nn.Linear(16, 10))
    network[1].requires_grad_(not frozen)
    network[3].requires_grad_(not frozen)
    rule = ZerothOrder(network, directions=8)
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.02)
    y = data.y_train[torch.randperm(len(data.y_train))] if shuffled else data.y_train
    for _ in range(6):
        for batch in torch.randperm(len(y)).split(64):
            optimizer.zero_grad()
            rule(data.x_train[batch], y[batch])
            optimizer.step()
    return float((rule.predict(data.x_test).argmax(1) == data.y_test).float().mean())


def test_digits_are_learned_in_the_hidden_stages_too():
    trained = accuracy()
    assert trained > 0.6
    assert trained > accuracy(frozen=True) + 0.15
    assert accuracy(shuffled=True) < 0.3


@pytest.mark.parametrize(("options", "words"), [
    ({"epsilon": 0.0}, "epsilon must be above 0, got 0.0"),
    ({"directions": 0}, "directions must be at least 1, got 0"),
    ({"difference": "backward"}, "no difference is called 'backward'; did you mean forward"),
    ({"in_place": True}, "rate must be .* got rate=None with in_place=True"),
    ({"rate": 0.1}, "rate must be .* got rate=0.1 with in_place=False"),
])
def test_options_that_do_not_exist(options, words):
    with pytest.raises(ValueError, match=words):
        ZerothOrder(mlp(), **options)


def test_scalars_and_seeds_belong_together():
    network = mlp()
    with pytest.raises(ValueError, match="one slope for each of the 2 seeds, got 3"):
        ZerothOrder(network).replay([1, 2], torch.zeros(3))
    assert all(p.grad is None for p in network.parameters())
