from copy import deepcopy

import numpy
import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from netwright.blocks.kan import GroupRational, RationalFeedForward
from netwright.errors import UnknownName
from netwright.models import gpt


def rational(dim=6, groups=3, seed=0, **options):
    torch.manual_seed(seed)
    layer = GroupRational(dim, groups, **options).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


def plain(layer, x):
    """The formula, one channel at a time."""
    columns = []
    for channel in range(x.shape[-1]):
        group = channel // (x.shape[-1] // layer.groups)
        a = layer.numerator[group % len(layer.numerator)]
        b, z = layer.denominator[group], x[..., channel]
        p = sum(c * z ** i for i, c in enumerate(a))
        q = 1 + abs(sum(c * z ** (i + 1) for i, c in enumerate(b)))
        columns.append(p / q)
    return torch.stack(columns, -1)


@pytest.mark.parametrize("shape", [(6,), (7, 6), (2, 3, 5, 6), (0, 6)])
@pytest.mark.parametrize("share", [True, False])
def test_it_is_its_formula_and_both_backwards_are_autograds(shape, share):
    x = torch.randn(shape, dtype=torch.double, requires_grad=True)
    layer = rational(share_numerator=share, block=2)
    expected = plain(layer, x)
    up = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [x, *layer.parameters()], up)
    for backward in ("blocked", "autograd"):
        layer.backward = backward
        torch.testing.assert_close(layer(x), expected, rtol=1e-11, atol=1e-11)
        found = torch.autograd.grad(layer(x), [x, *layer.parameters()], up)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_gradcheck_of_the_hand_written_backward():
    layer, x = rational(4, 2, block=2), torch.randn(5, 4, dtype=torch.double, requires_grad=True)

    def call(x, a, b):
        return torch.func.functional_call(layer, {"numerator": a, "denominator": b}, (x,))

    given = (x, layer.numerator, layer.denominator)
    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given)


def test_only_what_learns_gets_a_gradient():
    layer, x = rational(), torch.randn(5, 6, dtype=torch.double)
    layer.denominator.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.denominator.grad is None
    assert x.grad is None
    assert layer.numerator.grad.abs().sum() > 0


def test_a_denominator_of_zeros_learns():
    layer, x = GroupRational(8, 2, fit="identity"), torch.randn(64, 8)
    assert torch.equal(layer.denominator, torch.zeros(2, 4))
    for backward in ("blocked", "autograd"):
        layer.backward = backward
        (grad,) = torch.autograd.grad((layer(x) - x.relu()).square().sum(), layer.denominator)
        assert (grad != 0).all()


def test_blocks_round_less_than_adding_one_after_another():
    errors = {"serial": [], "blocked": []}
    for seed in range(3):
        torch.manual_seed(seed)
        layer, x = GroupRational(8, 1), torch.randn(20000, 8)
        up = torch.rand(20000, 8)
        exact = deepcopy(layer).double()
        (wanted,) = torch.autograd.grad(exact(x.double()), exact.numerator, up.double())
        (found,) = torch.autograd.grad(layer(x), layer.numerator, up)
        with torch.no_grad():
            over_q = up / (1 + sum(c * x ** (i + 1) for i, c in
                                   enumerate(layer.denominator[0])).abs())
            terms = [(over_q * x ** i).flatten().numpy() for i in range(6)]
        serial = torch.tensor([numpy.add.accumulate(term)[-1].item() for term in terms])
        for name, sums in (("serial", serial), ("blocked", found[0])):
            errors[name].append(((sums.double() - wanted[0]) / wanted[0]).abs().mean())
    # Measured over ten seeds: 60 to 620 times.
    assert sum(errors["serial"]) > 10 * sum(errors["blocked"])


@pytest.mark.parametrize(("fit", "function", "within"), [
    ("identity", lambda x: x, 1e-6), ("swish", silu, 1e-4), ("tanh", torch.tanh, 1e-4),
    ("gelu", nn.functional.gelu, 5e-3), ("relu", torch.relu, 0.06)])
def test_it_begins_as_a_known_activation(fit, function, within):
    x = torch.linspace(-4, 4, 200)[:, None].expand(-1, 4)
    layer = GroupRational(4, 2, fit=fit)
    assert (layer(x) - function(x)).abs().max() < within
    draws = torch.randn(200000, dtype=torch.double)
    assert abs(layer.gain() * function(draws).square().mean() - 1) < 0.05


@pytest.mark.parametrize(("degree", "denominator"), [(1, 1), (3, 2), (6, 5), (7, 6)])
def test_other_degrees_fit_too(degree, denominator):
    x = torch.linspace(-4, 4, 200)[:, None].expand(-1, 4)
    layer = GroupRational(4, 2, degree=degree, denominator=denominator)
    assert layer(x).isfinite().all()
    assert (layer(x) - silu(x)).abs().max() < (1.2 if degree == 1 else 0.1)


def test_the_feed_forward_block_is_its_formula_and_keeps_the_variance():
    torch.manual_seed(0)
    block, x = RationalFeedForward(64, 256), torch.randn(512, 64)
    expected = block.down(plain(block.second, block.up(plain(block.first, x))))
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
    # Measured over ten seeds: 0.97 to 1.05.
    assert 0.85 < block(x).std() < 1.15
    assert gpt(20, context=8, width=16, feedforward=RationalFeedForward)(
        torch.zeros(2, 8, dtype=torch.long)).shape == (2, 8, 20)


@pytest.mark.parametrize("backward", ["blocked", "autograd"])
def test_lower_precision_and_autocast(backward):
    torch.manual_seed(0)
    block, x = RationalFeedForward(16, 32, backward=backward), torch.randn(8, 16)
    wanted = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = block(x)
    mixed.float().sum().backward()
    low = deepcopy(block).bfloat16()
    low.zero_grad()
    found = low(x.bfloat16())
    found.sum().backward()
    assert found.dtype == torch.bfloat16
    # Measured over ten seeds: at most 0.03.
    assert (mixed - wanted).abs().max() < 0.1
    assert (found.float() - wanted).abs().max() < 0.1
    assert all(p.grad.isfinite().all() for b in (block, low) for p in b.parameters())


def test_states_round_trip():
    one, other = rational(), rational(seed=1)
    other.load_state_dict(one.state_dict())
    x = torch.randn(3, 6, dtype=torch.double)
    assert torch.equal(one(x), deepcopy(other)(x))


def test_what_it_cannot_build_is_named():
    with pytest.raises(ValueError, match="groups must divide dim=12, got 8; try 4"):
        GroupRational(12)
    with pytest.raises(ValueError, match="degree must be at least 1, got 0"):
        GroupRational(8, degree=0)
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        RationalFeedForward(8, 0)
    with pytest.raises(UnknownName, match="swiss"):
        GroupRational(8, fit="swiss")
    with pytest.raises(UnknownName, match="block"):
        GroupRational(8, backward="block")
    with pytest.raises(ValueError, match=r"x must be \(\*, 8\)"):
        GroupRational(8)(torch.zeros(2, 7))
