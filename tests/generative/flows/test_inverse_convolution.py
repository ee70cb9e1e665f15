import pytest
import torch

from netwright.generative.flows import Flow, InvConv2d, InvertibleConv3x3
from netwright.generative.flows.corner import CORNERS, corner_convolution


@pytest.mark.parametrize("order", CORNERS)
def test_the_inverse_is_one_ordinary_convolution(order):
    layer, z = InvConv2d(3, order=order).double(), torch.randn(2, 3, 5, 6).double()
    torch.testing.assert_close(layer.inverse(z), corner_convolution(z, layer.weight, order))
    torch.testing.assert_close(layer(layer.inverse(z))[0], z)


def test_it_undoes_the_invertible_convolution_of_the_same_weight():
    forward, backward = InvertibleConv3x3(3, "bottom-left").double(), InvConv2d(3, order="BL")
    backward.double().weight.data.copy_(forward.weight)
    x = torch.randn(2, 3, 6, 5).double()
    y, there = forward(x)
    again, back = backward(y)
    torch.testing.assert_close(again, x)
    torch.testing.assert_close(there + back, torch.zeros(2).double(), rtol=0, atol=1e-10)


def test_each_pixel_of_a_sample_is_made_of_a_kernel_of_the_noise():
    layer, noise = InvConv2d(1, order="TL"), torch.zeros(1, 1, 6, 6)
    noise[0, 0, 2, 2] = 1
    touched = layer.inverse(noise)[0, 0] != 0
    assert touched[2:5, 2:5].all()
    assert touched.sum() == 9


def test_it_learns_an_image_whose_pixels_follow_each_other():
    torch.manual_seed(0)
    true = InvConv2d(1, 2)
    true.weight.data = torch.tensor([[[[0.1, 0.5], [0.4, 1.0]]]])
    learner = Flow([InvConv2d(1, 2)], (1, 6, 6))
    optimizer = torch.optim.Adam(learner.parameters(), 0.03)
    for _ in range(200):
        with torch.no_grad():
            x = true.inverse(torch.randn(128, 1, 6, 6))
        optimizer.zero_grad()
        (-learner.log_prob(x).mean()).backward()
        optimizer.step()
    found = learner.transforms[0].weight.detach()
    torch.testing.assert_close(found / found[..., -1, -1].sign(), true.weight.detach(),
                               rtol=0, atol=0.06)
