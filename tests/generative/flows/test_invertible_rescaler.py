from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from netwright.generative.flows import InvertibleRescaler
from netwright.measure import cost


def rescaler(channels=2, blocks=3, **options):
    torch.manual_seed(0)
    model = InvertibleRescaler(channels, blocks, hidden=6, **options).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def image(dtype=torch.float64):
    return torch.rand(3, 2, 12, 15, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("size", [(6, 6), (5, 13), (12, 4)])
@pytest.mark.parametrize("scale_encoding", [True, False])
def test_the_blocks_are_undone_exactly_at_any_scale(size, scale_encoding):
    model, x = rescaler(scale_encoding=scale_encoding), image()
    torch.testing.assert_close(model.decode(model.encode(x, size), size), x, rtol=0, atol=1e-10)
    single = model.float()
    z = single.encode(image(torch.float32), size)
    # Measured at most 2e-6.
    torch.testing.assert_close(single.decode(z, size), image(torch.float32), rtol=0, atol=1e-5)


def test_at_first_it_is_bicubic_both_ways():
    model, x = InvertibleRescaler(2, 3).double(), image()
    small, back = model(x, (5, 9))
    expected = interpolate(x, (5, 9), mode="bicubic", antialias=True)
    torch.testing.assert_close(small, expected)
    torch.testing.assert_close(back, interpolate(expected, (12, 15), mode="bicubic",
                                                 antialias=True))


def test_gradients_are_those_of_stored_activations_both_ways():
    def step(model, x):
        (model.loss(x, (5, 9)) + model.up(x, (20, 16)).square().mean()).backward()
        return [x.grad, *[p.grad for p in model.parameters()]]

    model = rescaler()
    for coupling in model.blocks:  # what draws and counts must do so once
        coupling.f.net = nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4),
                                       nn.Dropout(0.2)).double()
    plain = deepcopy(model)
    blocks = plain.blocks
    plain.blocks.forward = lambda x, *told: _stored(blocks, x, told)
    plain.decode = lambda z, size: sum(
        blocks.inverse(z, *plain._told(z, size)).chunk(2, 1))
    found = []
    for each in (model, plain):
        torch.manual_seed(2)
        found.append(step(each, image().requires_grad_()))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def _stored(blocks, x, told):
    for block in blocks:
        x = block(x, *told)
    return x


def test_gradients_without_one_for_the_image_and_by_autograd_grad():
    model, x = rescaler(), image()
    before = x.clone()
    model.loss(x, (5, 9)).backward()
    expected = [p.grad for p in model.parameters()]
    found = torch.autograd.grad(model.loss(x, (5, 9)), list(model.parameters()))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(x, before)


def test_stored_bytes_do_not_grow_with_depth():
    def saved(blocks):
        x = torch.rand(2, 2, 12, 12)
        found = cost(_Loss(InvertibleRescaler(2, blocks, hidden=8)), (x, x),
                     loss=lambda out, _: out, repeats=1, warmup=1)
        return found.saved_bytes
    assert saved(4) == saved(2)


class _Loss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.loss(x, (7, 9))


def test_what_the_blocks_are_told_is_the_scale_and_the_place_between_pixels():
    (told,) = rescaler()._told(image(), (6, 5))
    assert told.shape == (1, 4, 12, 15)
    down, vertical, across, horizontal = told[0]
    assert (vertical == 0.5).all()
    torch.testing.assert_close(horizontal, torch.full_like(horizontal, 1 / 3))
    torch.testing.assert_close(down[:4, 0], torch.tensor([-.25, .25, -.25, .25]).double())
    torch.testing.assert_close(across[0, :3], torch.tensor([-1 / 3, 0, 1 / 3]).double())
    assert rescaler(scale_encoding=False)._told(image(), (6, 5)) == ()


def test_it_learns_to_restore_more_than_bicubic_does():
    torch.manual_seed(0)

    def textures(n):
        coarse = torch.randn(n, 1, 5, 5)
        return 0.25 + 0.5 * (interpolate(coarse, (12, 12), mode="bicubic") > 0)
    model = InvertibleRescaler(1, 1, hidden=8)
    x = textures(64)

    def missing():
        with torch.no_grad():
            return float((model(x, (5, 6))[1] - x).abs().mean())
    before = missing()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model.loss(textures(8), (5, 6)).backward()
        optimizer.step()
    assert missing() < 0.95 * before
    bicubic = interpolate(x, (5, 6), mode="bicubic", antialias=True)
    assert (model.down(x, (5, 6)) - bicubic).abs().mean() < 0.05


def test_a_model_is_loaded_and_copied():
    model, x = rescaler(), image()
    other = InvertibleRescaler(2, 3, hidden=6).double()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.down(x, (6, 6)), model.down(x, (6, 6)))
    assert torch.equal(deepcopy(model).down(x, (6, 6)), model.down(x, (6, 6)))


def test_errors():
    model, x = InvertibleRescaler(2, 1), image(torch.float32)
    with pytest.raises(ValueError, match=r"x must be \(batch, 2, height, width\)"):
        model.down(x[:, :1], (5, 5))
    with pytest.raises(ValueError, match="y must be"):
        model.up(x[:, :1], (25, 25))
    for size in ((12, 15), (13, 5), (0, 5)):
        with pytest.raises(ValueError, match="smaller than that of x"):
            model.down(x, size)
    for size in ((12, 15), (11, 30)):
        with pytest.raises(ValueError, match="larger than that of y"):
            model.up(x, size)
    with pytest.raises(ValueError, match="blocks must be at least 1, got 0"):
        InvertibleRescaler(2, 0)
