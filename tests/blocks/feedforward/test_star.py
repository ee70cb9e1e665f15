from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm, conv2d, linear, relu6

from netwright.blocks.feedforward import Star, StarBlock
from netwright.errors import UnknownName
from netwright.models import gpt


def test_star_is_its_formula_and_has_its_gradients():
    block = Star(5, 8, out=3).double()
    x = 9 * torch.randn(2, 4, 5, dtype=torch.double, requires_grad=True)
    one, two = (linear(x, p.weight, p.bias) for p in (block.gate, block.up))
    assert (one > 6).any()  # where ReLU6 differs from ReLU
    expected = linear(relu6(one) * two, block.down.weight, block.down.bias)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)
    signal, leaves = torch.randn_like(expected), [x, *block.parameters()]
    for mine, theirs in zip(torch.autograd.grad(block(x), leaves, signal),
                            torch.autograd.grad(expected, leaves, signal), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_the_bare_operation_is_a_quadratic_form():
    block = Star(4, 6, activation="identity", bias=False).double()
    x = torch.randn(7, 4, dtype=torch.double)
    forms = torch.einsum("oh,hi,hj->oij", block.down.weight, block.gate.weight, block.up.weight)
    torch.testing.assert_close(block(x), torch.einsum("oij,bi,bj->bo", forms, x, x),
                               rtol=0, atol=1e-13)


@pytest.mark.parametrize("bias", [False, True])
def test_features_span_all_monomials_where_a_sum_stays_linear(bias):
    block = Star(4, 40, activation="identity", bias=bias).double()
    x = torch.randn(200, 4, dtype=torch.double)
    one, two = block.gate(x), block.up(x)
    monomials = 5 * 6 // 2 if bias else 4 * 5 // 2
    assert torch.linalg.matrix_rank(one * two) == monomials
    assert torch.linalg.matrix_rank(one + two) == 4 + bias


@pytest.mark.parametrize("training", [False, True])
def test_the_block_is_its_formula(training):
    block = StarBlock(3, 5, kernel=5).double().train(training)
    for norm in (block.before[1], block.after[0]):
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(tensor)
    x = torch.randn(4, 3, 6, 7, dtype=torch.double)

    def normed(h, norm):
        return batch_norm(h, None if training else norm.running_mean,
                          None if training else norm.running_var, norm.weight, norm.bias, training)

    h = normed(conv2d(x, block.before[0].weight, padding=2, groups=3), block.before[1])
    one, two, three = (block.star.gate, block.star.up, block.star.down)
    h = (relu6(conv2d(h, one.weight[..., None, None], one.bias))
         * conv2d(h, two.weight[..., None, None], two.bias))
    h = normed(conv2d(h, three.weight[..., None, None], three.bias), block.after[0])
    expected = x + conv2d(h, block.after[1].weight, block.after[1].bias, padding=2, groups=3)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)


def test_any_leading_shape_dtype_and_network():
    block = Star(6)
    for shape in ((6,), (3, 6), (2, 1, 3, 6), (0, 6)):
        assert block(torch.randn(shape)).shape == shape
    image = StarBlock(6)
    assert image.eval()(torch.randn(0, 6, 4, 4)).shape == (0, 6, 4, 4)
    assert image.bfloat16()(torch.randn(2, 6, 4, 4).bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert block(torch.randn(3, 6)).dtype == torch.bfloat16
    twin, x = deepcopy(block), torch.randn(3, 6)
    other = Star(6)
    other.load_state_dict(twin.state_dict())
    assert torch.equal(other(x), block(x))
    assert gpt(9, context=4, width=8, feedforward=Star)(
        torch.zeros(2, 4, dtype=torch.long)).shape == (2, 4, 9)


def test_one_bare_star_learns_xor_and_a_sum_does_not():
    """Measured over 5 seeds: 100% and at most 75%."""
    torch.manual_seed(0)
    x = torch.tensor([[0., 0.], [0., 1.], [1., 0.], [1., 1.]])
    y = torch.tensor([0., 1., 1., 0.])
    right = {}
    for name, block in {"star": Star(2, 4, activation="identity", out=1),
                        "sum": nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 1))}.items():
        optimizer = torch.optim.Adam(block.parameters(), 3e-2)
        for _ in range(200):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(block(x)[:, 0], y).backward()
            optimizer.step()
        right[name] = int(((block(x)[:, 0] > 0) == (y > 0)).sum())
    assert right["star"] == 4 > right["sum"]


@pytest.mark.parametrize(("make", "says"), [
    (lambda: Star(0), "dim must be at least 1, got 0"),
    (lambda: Star(4, 0), "hidden must be at least 1, got 0"),
    (lambda: Star(4, out=0), "out must be at least 1, got 0"),
    (lambda: Star(4, activation=nn.ReLU6()), "activation must be"),
    (lambda: StarBlock(4, kernel=4), "kernel must be odd"),
    (lambda: StarBlock(4)(torch.randn(2, 3, 5, 5)), "x must be .batch, 4, height, width."),
])
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
    with pytest.raises(UnknownName, match="swish"):
        Star(4, activation="swish")
