from copy import deepcopy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, layer_norm, relu, silu

from netwright.blocks.kan import AFKANFeedForward, AFKANLinear
from netwright.errors import UnknownName
from netwright.models import gpt

COMBINATIONS = {"sum": lambda p, q: p + q, "prod": lambda p, q: p * q,
                "sum_prod": lambda p, q: p + q + p * q, "quad1": lambda p, q: p * p * q * q,
                "quad2": lambda p, q: p * q + p * p + q * q,
                "cubic1": lambda p, q: (p + q) * (p * p + q * q),
                "cubic2": lambda p, q: p ** 3 * q ** 3}


def layer(seed=0, **options):
    torch.manual_seed(seed)
    return AFKANLinear(4, 3, grid=2, order=1, **options).double()


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("reduce", ["global", "spatial", "linear", "none"])
@pytest.mark.parametrize("normalize", [True, False])
def test_it_is_its_formula(combine, reduce, normalize):
    one = layer(combine=combine, reduce=reduce, normalize_functions=normalize)
    x = torch.randn(5, 4, dtype=torch.double)
    for row, found in zip(x, one(x), strict=True):
        f = torch.stack([torch.stack([COMBINATIONS[combine](silu(z - low), silu(high - z))
                                      for z in row])
                         for low, high in zip(one.low, one.high, strict=True)])
        if normalize:
            f = (f - f.min()) / (f.max() - f.min())
        if reduce == "none":
            wanted = one.weight @ f.flatten()
        else:
            if reduce == "global":
                a = ((f.T @ one.mix + one.shift) / 2).softmax(0)
                h = torch.stack([a[i] * f[:, i].sum() for i in range(4)])
            elif reduce == "linear":
                h = f.T @ one.mix + one.shift
            else:
                padded = nn.functional.pad(f, (1, 1))
                scores = torch.stack([padded[:, i:i + 3].mul(one.mix[:, 0]).sum(1) + one.shift
                                      for i in range(4)], 1)
                h = (f * (scores / 2).softmax(0)).sum(0)
            wanted = one.weight @ silu(layer_norm(h, (4,)))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_relu_with_quad1_is_a_layer_of_local_bumps():
    one = AFKANLinear(1, 1, grid=5, order=3, activation="relu", reduce="none",
                      normalize_functions=False).double()
    x = torch.linspace(-1, 2, 301, dtype=torch.double)[:, None]
    f = one.functions(x)[:, :, 0]
    low = torch.arange(-3, 5).double() / 5
    wanted = (relu(x - low) * relu(low + 0.8 - x)).square()
    torch.testing.assert_close(f, wanted, rtol=1e-5, atol=1e-7)
    assert torch.equal(f == 0, ~((x > one.low) & (x < one.high)))


@pytest.mark.parametrize("shape", [(4,), (7, 4), (2, 3, 5, 4), (0, 4)])
def test_any_leading_shape(shape):
    one, x = layer(), torch.randn(shape, dtype=torch.double)
    wanted = [one(row) for row in x.reshape(-1, 4)]
    assert one(x).shape == (*shape[:-1], 3)
    if wanted:
        torch.testing.assert_close(one(x), torch.stack(wanted).view(*shape[:-1], 3))


def test_every_parameter_learns_and_equal_functions_are_no_trouble():
    for reduce in ("global", "spatial", "linear", "none"):
        one = layer(reduce=reduce)
        one(torch.randn(8, 4, dtype=torch.double)).square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in one.parameters())
        flat = AFKANLinear(1, 3, grid=1, order=1, activation="relu", reduce=reduce)
        x = torch.full((2, 1), 50.0, requires_grad=True)
        flat(x).sum().backward()
        assert x.grad.isfinite().all()


def test_it_has_one_weight_for_each_edge():
    sizes = {reduce: sum(p.numel() for p in AFKANLinear(64, 32, reduce=reduce).parameters())
             for reduce in ("global", "none")}
    assert sizes["global"] < 64 * 32 + 2 * 64 + 25
    assert sizes["none"] == 6 * 64 * 32 + 12


def test_it_learns_digits_where_shuffled_labels_teach_nothing():
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images[:600] / 16).float(), torch.tensor(labels[:600])

    def correct(seed, shuffled):
        torch.manual_seed(seed)
        network = nn.Sequential(AFKANLinear(64, 32), AFKANLinear(32, 10))
        truth = y[torch.randperm(600)] if shuffled else y
        optimizer = torch.optim.Adam(network.parameters(), 0.02)
        for _ in range(30):
            optimizer.zero_grad()
            cross_entropy(network(x[:400]), truth[:400]).backward()
            optimizer.step()
        return (network(x[400:]).argmax(1) == truth[400:]).float().mean().item()

    learnt, shuffled = ([correct(seed, s) for seed in range(2)] for s in (False, True))
    # Measured over six seeds: 0.63 to 0.82, and 0.07 to 0.14.
    assert min(learnt) > 0.5
    assert max(shuffled) < 0.3


def test_the_feed_forward_block():
    block = AFKANFeedForward(16, 64)
    x = torch.randn(4, 5, 16)
    torch.testing.assert_close(block(x), block[1](block[0](x)))
    assert gpt(20, context=8, width=16, feedforward=AFKANFeedForward)(
        torch.zeros(2, 8, dtype=torch.long)).shape == (2, 8, 20)


@pytest.mark.parametrize("reduce", ["global", "spatial", "linear", "none"])
def test_lower_precision_and_autocast(reduce):
    torch.manual_seed(0)
    block, x = AFKANFeedForward(16, 32, reduce=reduce), torch.randn(8, 16)
    wanted = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = block(x)
    mixed.float().sum().backward()
    low = deepcopy(block).bfloat16()
    low.zero_grad()
    found = low(x.bfloat16())
    found.float().sum().backward()
    assert found.dtype == torch.bfloat16
    scale = wanted.abs().max()
    assert (mixed - wanted).abs().max() < 0.1 * scale
    assert (found.float() - wanted).abs().max() < 0.2 * scale
    assert all(p.grad.isfinite().all() for b in (block, low) for p in b.parameters())


def test_states_round_trip_and_draws_repeat():
    one, other = layer(), layer(seed=1)
    other.load_state_dict(one.state_dict())
    x = torch.randn(3, 4, dtype=torch.double)
    assert torch.equal(one(x), deepcopy(other)(x))
    draws = [AFKANLinear(2, 3, generator=torch.Generator().manual_seed(s)).weight
             for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert other.temperature.item() == 2


def test_what_it_cannot_build_is_named():
    with pytest.raises(ValueError, match="grid must be at least 1, got 0"):
        AFKANLinear(2, 2, grid=0)
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        AFKANFeedForward(2, 0)
    with pytest.raises(UnknownName, match="quad3"):
        AFKANLinear(2, 2, combine="quad3")
    with pytest.raises(UnknownName, match="attention"):
        AFKANLinear(2, 2, reduce="attention")
    with pytest.raises(UnknownName, match="swish"):
        AFKANLinear(2, 2, activation="swish")
    with pytest.raises(ValueError, match=r"x must be \(\*, 2\)"):
        AFKANLinear(2, 2)(torch.zeros(3, 4))
