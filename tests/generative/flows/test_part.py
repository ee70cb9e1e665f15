import pytest
import torch
from torch.nn.functional import pixel_unshuffle

from netwright.generative.flows import (
    ActNorm,
    Flow,
    InvConv2d,
    Part,
    Permute,
    Squeeze,
    image_coupling,
    multi_scale,
)


def test_only_the_first_channels_are_changed():
    torch.manual_seed(0)
    inner = image_coupling(4, 8)
    for parameter in inner.parameters():
        parameter.data.normal_()
    x = torch.randn(2, 6, 4, 4)
    z, log_det = Part([inner], 4)(x)
    expected, volume = inner(x[:, :4])
    torch.testing.assert_close(z[:, :4], expected)
    assert torch.equal(z[:, 4:], x[:, 4:])
    torch.testing.assert_close(log_det, volume)


def test_scales_halve_the_image_and_what_goes_on():
    seen = []

    def block(channels):
        seen.append(channels)
        return [ActNorm(channels)]
    flow = Flow(multi_scale(3, 3, block), (3, 16, 8))
    assert seen == [12, 24, 48]
    x = torch.randn(2, 3, 16, 8)
    assert flow(x)[0].shape == x.shape
    assert flow.sample(4).shape == (4, 3, 16, 8)


def test_three_scales_are_undone_and_give_plain_autograds_gradients():
    found = []
    for stored in (True, False):
        torch.manual_seed(0)
        flow = Flow(multi_scale(1, 3, lambda c: [ActNorm(c), InvConv2d(c, 2),
                                                 image_coupling(c, 4)]), (1, 8, 8), stored=stored)
        flow.double()
        x = torch.randn(3, 1, 8, 8).double()
        (-flow.log_prob(x).mean()).backward()
        found.append([p.grad for p in flow.parameters()])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(flow.inverse(flow(x)[0]), x, rtol=0, atol=1e-10)


def test_squares_become_channels_and_back():
    x = torch.randn(2, 3, 6, 9)
    z, log_det = Squeeze(3)(x)
    assert torch.equal(z, pixel_unshuffle(x, 3))
    assert not log_det.any()
    assert torch.equal(Squeeze(3).inverse(z), x)
    assert torch.equal(Squeeze(3, back=True)(z)[0], x)
    flow = Flow([Squeeze(), Squeeze(back=True)], (1, 4, 4))
    assert not flow.steps()  # one undoes the other, so neither is taken


def test_errors():
    with pytest.raises(ValueError, match="multiples of 2"):
        Squeeze()(torch.randn(2, 1, 5, 4))
    with pytest.raises(ValueError, match="channels a multiple of 4"):
        Squeeze(back=True)(torch.randn(2, 6, 5, 4))
    with pytest.raises(ValueError, match="factor must be at least 1"):
        Squeeze(0)
    with pytest.raises(ValueError, match="more than 2 channels"):
        Part([Permute([1, 0])], 2)(torch.randn(3, 2, 4, 4))
    with pytest.raises(ValueError, match="must return the size"):
        Part([Squeeze()], 2)(torch.randn(3, 4, 4, 4))
    with pytest.raises(ValueError, match="levels must be at least 1"):
        multi_scale(1, 0, lambda channels: [])
    with pytest.raises(ValueError, match="channels must be at least 2"):
        image_coupling(1)
