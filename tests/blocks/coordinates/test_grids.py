import pytest
import torch
from torch.nn.functional import grid_sample

from netwright.blocks.coordinates.grids import interpolate, neighbours


@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize("sizes", [(5, 7), (3, 4, 6), (1, 4)])
def test_it_is_pytorchs_grid_sample(sizes, corners):
    grid = torch.randn(3, *sizes, dtype=torch.double, requires_grad=True)
    x = (torch.rand(50, len(sizes), dtype=torch.double) * 2.6 - 1.3).requires_grad_()
    places = x.flip(-1).view(1, *(1,) * (len(sizes) - 1), 50, len(sizes))
    theirs = grid_sample(grid[None], places, padding_mode="border", align_corners=corners)
    theirs, ours = theirs.view(3, 50).t(), interpolate(grid, x, corners=corners)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    towards = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(y, (grid, x), towards, retain_graph=True)
                      for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_one_axis_and_any_leading_shape():
    grid = torch.tensor([[0.0, 1.0, 4.0]])
    x = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0]).view(2, 3, 1)
    expected = torch.tensor([0.0, 0.0, 0.5, 1.0, 2.5, 4.0]).view(2, 3, 1)
    torch.testing.assert_close(interpolate(grid, x, corners=True), expected)
    assert interpolate(grid, x[:0], corners=True).shape == (0, 3, 1)


def test_weights_add_up_to_one_and_second_derivatives_exist():
    x = (torch.rand(20, 3, dtype=torch.double) * 2 - 1).requires_grad_()
    indices, weights = neighbours((4, 5, 6), x, corners=False)
    torch.testing.assert_close(weights.sum(-1), torch.ones(20, dtype=torch.double))
    assert indices.min() >= 0
    assert indices.max() < 120
    grid = torch.randn(1, 4, 5, 6, dtype=torch.double)
    (slope,) = torch.autograd.grad(interpolate(grid, x, corners=False).sum(), x, create_graph=True)
    assert torch.autograd.grad(slope.square().sum(), x)[0].any()
