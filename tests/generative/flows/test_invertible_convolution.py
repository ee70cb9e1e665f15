import pytest
import torch

from netwright.generative.flows import Flow, InvertibleConv3x3
from netwright.generative.flows.invertible_convolution import PADS


@pytest.mark.parametrize("pad", PADS)
def test_the_jacobian_is_block_triangular_with_the_corner_on_its_diagonal(pad):
    layer = InvertibleConv3x3(2, pad).double()
    layer.weight.data.normal_()
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x)[0], x)[0, :, :, :, 0]
    pixels = jacobian.permute(1, 2, 0, 4, 5, 3).reshape(12, 2, 12, 2)
    for p in range(12):
        torch.testing.assert_close(pixels[p, :, p], layer.corner())
        for q in range(12):
            before = (q // 4 <= p // 4 if "top" in pad else q // 4 >= p // 4) and (
                q % 4 <= p % 4 if "left" in pad else q % 4 >= p % 4)
            if not before:
                assert not pixels[p, :, q].any()


def test_kernel_of_one_is_the_convolution_of_glow():
    layer, x = InvertibleConv3x3(3, kernel_size=1), torch.randn(2, 3, 4, 5)
    z, log_det = layer(x)
    torch.testing.assert_close(z, torch.einsum("oc,bchw->bohw", layer.weight[:, :, 0, 0], x))
    torch.testing.assert_close(log_det, torch.zeros(2), rtol=0, atol=1e-4)  # a rotation


def test_a_weight_drawn_by_a_generator_is_the_same_again():
    first, second = (InvertibleConv3x3(3, generator=torch.Generator().manual_seed(5))
                     for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, InvertibleConv3x3(3).weight)


def test_it_learns_how_neighbouring_pixels_belong_together():
    torch.manual_seed(0)

    def images(n):
        noise = torch.randn(n, 1, 9, 9)
        return noise[:, :, 1:, 1:] + noise[:, :, :-1, 1:] + noise[:, :, 1:, :-1]

    def learned(kernel_size):
        flow = Flow([InvertibleConv3x3(1, kernel_size=kernel_size) for _ in range(2)], (1, 8, 8))
        optimizer = torch.optim.Adam(flow.parameters(), 0.02)
        for _ in range(150):
            optimizer.zero_grad()
            (-flow.log_prob(images(64)).mean()).backward()
            optimizer.step()
        return flow.log_prob(images(500)).mean().item() / 64
    assert learned(3) > learned(1) + 0.1
