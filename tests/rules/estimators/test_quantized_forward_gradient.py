from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

import netwright as nw
from netwright.data import Batches, digits
from netwright.measure import cost
from netwright.models import cnn, mlp
from netwright.rules import Backprop, QuantizedForwardGradient
from netwright.rules.estimators.quantized_forward_gradient import exponent, rounded

X = torch.randn(12, 6, generator=Generator().manual_seed(0))
Y = torch.arange(12) % 3


def small(**options: Any) -> QuantizedForwardGradient:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    return QuantizedForwardGradient(network, generator=Generator().manual_seed(1), **options)


def whole(rule: QuantizedForwardGradient) -> list[Tensor]:
    """Return every parameter over its step, in float64."""
    return [p.detach().double() / 2.0 ** int(a)
            for p, a in zip(rule.network.parameters(), rule.exponents, strict=True)]


def in_integers(network: nn.Sequential, x: Tensor, bits: int = 16) -> Tensor:
    """Return what the network gives by int64 sums and shifts alone, ReLU between its layers."""
    def split(values: Tensor) -> tuple[Tensor, int]:
        a = int(exponent(values, bits))
        return (values.double() / 2.0 ** a).round().long(), a

    h, a = split(x)
    for layer in network:
        if isinstance(layer, nn.ReLU):
            h = h.clamp_min(0)
        elif isinstance(layer, nn.Flatten):
            h = h.flatten(1)
        else:
            b = int(exponent(layer.weight, 8))
            c = int(exponent(layer.bias, 8))
            w = (layer.weight.detach().double() / 2.0 ** b).long()
            bias = (layer.bias.detach().double() / 2.0 ** c).long()
            low = min(a + b, c)
            if isinstance(layer, nn.Conv2d):
                # int64 has no convolution: patches, and a product of whole numbers.
                patches = functional.unfold(h.double(), layer.kernel_size).long()
                sums = (w.flatten(1) @ patches).unflatten(2, [n - layer.kernel_size[0] + 1
                                                              for n in h.shape[2:]])
                bias = bias.view(-1, 1, 1)
            else:
                sums = h @ w.T
            sums = sums * 2 ** (a + b - low) + bias * 2 ** (c - low)
            h, a = split(sums.double() * 2.0 ** low)
        h, a = split(h.double() * 2.0 ** a)
    return h.double() * 2.0 ** a


@pytest.mark.parametrize("kind", ["linear", "convolutional"])
def test_the_forward_pass_is_that_of_whole_numbers_bit_for_bit(kind):
    if kind == "linear":
        network = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(),
                                nn.Linear(32, 3))
        x = X
    else:
        network = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU(),
                                nn.Flatten(), nn.Linear(64, 3))
        x = torch.randn(12, 2, 8, 8)
    rule = QuantizedForwardGradient(network, directions=2)
    rule(x, Y)  # puts the weights on their grid
    scores = rule.predict(x)
    assert torch.equal(scores.double(), in_integers(network, x))
    assert not torch.equal(scores, network(x))
    torch.testing.assert_close(scores, network(x), atol=1e-3, rtol=1e-3)


def test_weights_stay_on_the_grid_of_eight_bits_and_inside_it():
    rule = small(rate=20.0, epsilon=0.5)
    for _ in range(30):
        rule(X, Y)
    for q in whole(rule):
        assert torch.equal(q, q.round())
        assert q.abs().max() <= 127
    assert max(float(q.abs().max()) for q in whole(rule)) == 127  # it would have gone further


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_first_call_rounds_by_half_a_step_at_most(bits):
    rule = small(weight_bits=bits, rate=1e-9)
    before = [p.detach().clone() for p in rule.network.parameters()]
    scores = rule.predict(X)
    assert all(torch.equal(p, w) for p, w in zip(rule.network.parameters(), before, strict=True))
    rule(X, Y)
    assert torch.equal(rule.predict(X), scores)  # it was rounded there too
    for p, w, a in zip(rule.network.parameters(), before, rule.exponents, strict=True):
        assert (p - w).abs().max() <= 2.0 ** float(a) / 2
        assert float(w.abs().max()) > (2 ** (bits - 1) - 1) * 2.0 ** (int(a) - 1)  # none is idle


@pytest.mark.parametrize("shape", [(3, 5), (7,)])
def test_exponents_are_the_least_that_hold_all_numbers(shape):
    values = torch.randn(shape) * 1e-3
    for bits in (3, 8, 16):
        limit, a = 2 ** (bits - 1) - 1, float(exponent(values, bits))
        assert limit * 2 ** (a - 1) < float(values.abs().max()) <= limit * 2 ** a
    assert float(exponent(torch.tensor([127.0]), 8)) == 0
    assert float(exponent(torch.zeros(2), 8)) == -7
    step = 2.0 ** exponent(values, 8)
    assert (rounded(values, 8) - values).abs().max() <= step / 2


def test_the_update_is_the_mean_of_signs_times_shifts():
    rule = small(directions=3, epsilon=0.3)
    rule(X, Y)
    q, twin = whole(rule), small(directions=3, epsilon=0.3)
    twin.load_state_dict(rule.state_dict())
    rule.generator.manual_seed(5)
    twin.generator.manual_seed(5)
    wanted = [torch.zeros_like(v) for v in q]
    with torch.no_grad():
        for _ in range(3):
            for p, v, a in zip(twin.network.parameters(), q, rule.exponents, strict=True):
                p.copy_(v * 2.0 ** int(a))
            shifts = [twin._shift(i) for i in range(4)]
            losses = []
            for sign in (1, -1):
                for p, v, d, a in zip(twin.network.parameters(), q, shifts, rule.exponents,
                                      strict=True):
                    p.copy_((v + sign * d).clamp(-127, 127) * 2.0 ** int(a))
                losses.append(functional.cross_entropy(twin.predict(X), Y))
            for total, d in zip(wanted, shifts, strict=True):
                total += (losses[0] - losses[1]).sign() * d / 3
    rule(X, Y)
    for after, before, update in zip(whole(rule), q, wanted, strict=True):
        inside = (before - update).abs() < 126
        assert ((before - after) - update)[inside].abs().max() < 1  # rounded up or down
        assert float(((before - after) - update)[inside].mean().abs()) < 0.4


def test_rounding_at_random_is_right_in_the_mean():
    rule = small()
    rule(X, Y)
    q = whole(rule)[0]
    moved = torch.zeros_like(q)
    with torch.no_grad():
        for _ in range(200):
            rule._step({0: torch.full_like(q, 0.25)})  # of a rate of 1
            moved += q - whole(rule)[0]
            rule.network[0].weight.copy_(q * 2.0 ** int(rule.exponents[0]))
    inside = q > -127
    assert moved[inside].unique().numel() > 3
    assert float(moved[inside].mean()) / 200 == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("kernelwise", [True, False])
def test_shifts_are_whole_and_as_long_as_epsilon_says(kernelwise):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(400, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        network[0].weight[0] *= 0.02
    rule = QuantizedForwardGradient(network, epsilon=0.2, kernelwise=kernelwise)
    rule(torch.randn(12, 400), Y)
    d, q = rule._shift(0), whole(rule)[0]
    assert torch.equal(d, d.round())
    relative = d.norm(dim=1) / q.norm(dim=1)
    torch.testing.assert_close(relative[1:], torch.full((7,), 0.2, dtype=d.dtype), atol=0.03,
                               rtol=0)
    small_one = d[0].norm() / 20  # what it has a number, of 400
    assert small_one == pytest.approx(1, abs=0.1) if kernelwise else small_one > 5
    assert rule._shift(1).any()  # biases are not left behind


def test_momentum_draws_towards_past_updates():
    rule = small(momentum=0.9, directions=1, rate=1.0, epsilon=0.5)
    first = rule._shift(0)
    rule(X, Y)
    past = rule.past_0.double().flatten()
    assert past.any()
    towards = torch.stack([torch.cosine_similarity(rule._shift(0).flatten(), past, dim=0)
                           for _ in range(50)]).mean()
    assert 0.7 < towards < 0.98
    assert abs(torch.cosine_similarity(first.flatten(), past, dim=0)) < 0.6


def test_a_share_of_the_weights_moves_the_largest():
    rule = small(share=0.25, rate=2.0)
    rule(X, Y)
    start = whole(rule)
    for _ in range(20):
        rule(X, Y)
    for i, (after, before) in enumerate(zip(whole(rule), start, strict=True)):
        moved, chosen = after != before, getattr(rule, f"chosen_{i}")
        assert int(chosen.sum()) == -(-before.numel() // 4)
        assert not (moved & ~chosen).any()
        assert moved.any()
    w = small().network[0].weight.detach().abs()
    assert w[rule.chosen_0].min() >= w[~rule.chosen_0].max()


def test_nothing_is_stored_for_backward():
    x, y = torch.rand(64, 1, 8, 8), torch.randint(10, (64,))
    network = cnn(1, (8, 8), 10, norm=True)
    assert cost(Backprop(network), (x, y), repeats=1).saved_bytes > 100_000
    assert cost(QuantizedForwardGradient(network, directions=2), (x, y),
                repeats=1).saved_bytes == 0


def test_buffers_and_random_state_change_as_in_one_pass():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(),
                            nn.Linear(8, 3))
    rule = QuantizedForwardGradient(network, directions=3, generator=Generator().manual_seed(1))
    torch.manual_seed(4)
    network(X)
    state = torch.get_rng_state()
    network[1].reset_running_stats()
    torch.manual_seed(4)
    rule(X, Y)
    assert torch.equal(state, torch.get_rng_state())
    assert int(network[1].num_batches_tracked) == 1


def transformer(name: str) -> tuple[nn.Module, Any, Tensor]:
    transformers = pytest.importorskip("transformers")
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 5:] = 0
    x = {"input_ids": torch.randint(3, 30, (3, 7)), "attention_mask": mask}
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=16, use_cache=False,
            bos_token_id=1, eos_token_id=2)), x, x["input_ids"]
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=3)), x, Y[:3]


def graph() -> tuple[nn.Module, Any, Tensor]:
    y = Y[:9].clone()
    y[4:] = -100
    return (pytest.importorskip("torch_geometric.nn").GCN(5, 8, 2, 3),
            (torch.randn(9, 5), torch.randint(0, 9, (2, 20))), y)


@pytest.mark.parametrize("make", [lambda: transformer("bert"), lambda: transformer("gpt2"), graph],
                         ids=["bert", "gpt2", "graph"])
def test_transformers_and_graphs(make):
    network, x, y = make()
    rule = QuantizedForwardGradient(network, directions=2)
    assert rule(x, y).isfinite()
    assert all(torch.equal(q, q.round()) for q in whole(rule))
    scores = rule.predict(x)
    torch.testing.assert_close(scores, Backprop(network).predict(x), atol=0.01, rtol=0.01)
    assert not torch.equal(scores, Backprop(network).predict(x))


def adapted(seed: int = 0, *, frozen: bool = False,
            shuffled: bool = False) -> tuple[float, float]:
    """Return the accuracy on digits with their rows in another order, before and after."""
    data = digits()
    torch.manual_seed(seed)
    network = mlp(64, 10, hidden=(32,))
    x, test = data.x_train.clone(), data.x_test.clone()
    nw.fit(network, Batches(x, data.y_train, 64), epochs=6, progress=False,
           optimizer=lambda p: torch.optim.Adam(p, 3e-3))
    for images in (x, test):
        images[:, :, :4] = images[:, :, :4].flip(3)
    network[1].requires_grad_(not frozen)
    y = data.y_train[torch.randperm(len(x))] if shuffled else data.y_train
    rule = QuantizedForwardGradient(network, directions=4)

    def right() -> float:
        return float((rule.predict(test).argmax(1) == data.y_test).float().mean())

    before = right()
    nw.fit(rule, Batches(x, y, 64), epochs=10, progress=False)
    return before, right()


def test_a_network_adapts_in_its_hidden_layer_too():
    before, after = adapted()
    assert after > before + 0.05
    assert after > adapted(frozen=True)[1]
    assert adapted(shuffled=True)[1] < before


@pytest.mark.parametrize(("options", "match"), [
    ({"rate": 0.0}, "rate must be above 0, got 0.0"),
    ({"epsilon": -1.0}, "epsilon must be above 0, got -1.0"),
    ({"directions": 0}, "directions must be at least 1, got 0"),
    ({"weight_bits": 1}, "weight_bits must be between 2 and 16, got 1"),
    ({"activation_bits": 17}, "activation_bits must be between 2 and 16, got 17"),
    ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
    ({"share": 0.0}, "share must be above 0 and at most 1, got 0.0"),
])
def test_options_that_do_not_exist(options, match):
    with pytest.raises(ValueError, match=match):
        small(**options)
