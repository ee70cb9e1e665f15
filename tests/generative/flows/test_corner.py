import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import conv2d, pad

from netwright.errors import CannotReverse
from netwright.generative.flows import Flow, InvConv2d, InvertibleConv3x3
from netwright.generative.flows.corner import (
    CORNERS,
    corner_convolution,
    corner_matrix,
    inverse_convolution,
    log_abs_det,
    starting_weight,
)


def kernel(corner, channels=3, size=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = starting_weight(channels, size, corner, generator).double()
    return weight + 0.1 * torch.randn(weight.shape, generator=generator).double()


def dense(weight, corner, height, width):
    """The convolution as a matrix, one column for each pixel of a basis image."""
    n = weight.shape[0] * height * width
    basis = torch.eye(n, dtype=weight.dtype).view(n, weight.shape[0], height, width)
    return corner_convolution(basis, weight, corner).flatten(1).T


@pytest.mark.parametrize("corner", CORNERS)
def test_it_is_the_convolution_that_its_formula_says(corner):
    weight, x = kernel(corner), torch.randn(2, 3, 4, 5).double()
    top, left = "T" in corner, "L" in corner
    y = torch.zeros_like(x)
    for i in range(4):
        for j in range(5):
            for a in range(3):
                for b in range(3):
                    row = i + (a - 2 if top else a)
                    column = j + (b - 2 if left else b)
                    if 0 <= row < 4 and 0 <= column < 5:
                        y[:, :, i, j] += x[:, :, row, column] @ weight[:, :, a, b].T
    torch.testing.assert_close(corner_convolution(x, weight, corner), y)


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (4, 6), (6, 4)])
def test_the_solve_is_that_of_the_dense_matrix(corner, size):
    weight, y = kernel(corner), torch.randn(2, 3, *size).double()
    expected = torch.linalg.solve(dense(weight, corner, *size), y.flatten(1).T).T.view_as(y)
    torch.testing.assert_close(inverse_convolution(y, weight, corner), expected)


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_gradients_and_their_gradients(corner, k):
    weight = kernel(corner, 2, k).requires_grad_()
    y = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda a, b: inverse_convolution(a, b, corner), (y, weight))
    if k == 2:
        assert gradgradcheck(lambda a, b: inverse_convolution(a, b, corner), (y, weight))


def test_gradients_are_those_of_a_triangular_solve_on_the_dense_matrix():
    weight = kernel("TL", 1).requires_grad_()
    y = torch.randn(4, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    signal = torch.randn_like(y)
    mine = torch.autograd.grad((inverse_convolution(y, weight) * signal).sum(), (y, weight))
    x = torch.linalg.solve_triangular(dense(weight, "TL", 8, 8), y.flatten(1).T, upper=False)
    theirs = torch.autograd.grad((x.T.view_as(y) * signal).sum(), (y, weight))
    for found, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_it_runs_inside_transforms_of_functions():
    weight, y = kernel("TR"), torch.randn(5, 3, 4, 4).double()
    solve = inverse_convolution
    many = torch.func.vmap(lambda y: solve(y[None], weight, "TR")[0])(y)
    torch.testing.assert_close(many, solve(y, weight, "TR"))
    kernels = torch.stack([weight, 2 * weight])
    each = torch.func.vmap(lambda w: solve(y, w, "TR"))(kernels)
    torch.testing.assert_close(each[1], solve(y, weight, "TR") / 2)
    flow = Flow([InvConv2d(3)], (3, 4, 4)).double()
    jacobian = torch.func.jacrev(lambda y: flow(y[None])[0].flatten())(y[0]).flatten(1)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], flow.log_det(y)[0])
    per_image = torch.func.vmap(torch.func.grad(
        lambda w, y: solve(y[None], w, "TR").square().sum()), (None, 0))(weight, y)
    whole = torch.func.grad(lambda w: solve(y, w, "TR").square().sum())(weight)
    torch.testing.assert_close(per_image.sum(0), whole)


def test_a_plain_padded_convolution_at_the_top_left():
    weight, x = kernel("TL"), torch.randn(2, 3, 6, 6).double()
    torch.testing.assert_close(corner_convolution(x, weight), conv2d(pad(x, (2, 0, 2, 0)), weight))


@pytest.mark.parametrize("corner", CORNERS)
def test_the_condition_is_necessary_and_sufficient(corner):
    weight = kernel(corner)
    found = torch.linalg.slogdet(dense(weight, corner, 3, 4))[1]
    torch.testing.assert_close(12 * log_abs_det(weight, corner), found)
    corner_matrix(weight, corner)[1] = 2 * corner_matrix(weight, corner)[0]  # rank 2 of 3
    assert torch.linalg.matrix_rank(dense(weight, corner, 3, 4)) < 36
    with pytest.raises(CannotReverse, match="corner matrix"):
        log_abs_det(weight, corner)
    other = kernel(corner, seed=1)  # all else may be anything at all
    corner_matrix(other, corner).copy_(torch.eye(3))
    torch.testing.assert_close(log_abs_det(other, corner), torch.zeros((), dtype=torch.float64))


def test_the_determinants_gradient():
    weight = kernel("BR").requires_grad_()
    assert gradcheck(lambda w: log_abs_det(w, "BR"), weight)


@pytest.mark.parametrize("make", [InvertibleConv3x3, InvConv2d])
def test_a_singular_corner_is_refused_both_ways(make):
    layer, x = make(3), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        layer.weight[:, 0, -1, -1] = 0
    for call in (layer, layer.inverse, layer.log_det, Flow([layer], (3, 4, 4)).log_prob):
        with pytest.raises(CannotReverse, match="nonsingular"):
            call(x)
    with torch.no_grad():
        layer.weight[0, 0, -1, -1] = torch.nan
    with pytest.raises(CannotReverse, match="finite"):
        layer(x)


def test_errors():
    with pytest.raises(ValueError, match=r"no order is called 'LT'; .*TL"):
        InvConv2d(3, order="LT")
    with pytest.raises(ValueError, match=r"no pad is called .*top-left"):
        InvertibleConv3x3(3, "TL")
    for make in (InvertibleConv3x3, InvConv2d):
        with pytest.raises(ValueError, match=r"x must be \(batch, 3, height, width\)"):
            make(3)(torch.randn(2, 4, 5, 5))
        with pytest.raises(ValueError, match="must be at least 1"):
            make(0)
