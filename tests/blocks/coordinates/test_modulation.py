from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import grid_sample, layer_norm

from netwright.blocks.coordinates import CoordinateAwareModulation


def randomised(*args, **options):
    modulation = CoordinateAwareModulation(*args, **options).double()
    for parameter in modulation.parameters():
        nn.init.normal_(parameter)
    return modulation


@pytest.mark.parametrize("channels", [1, 6])
def test_it_is_its_formula(channels):
    modulation = randomised((5, 7), 6, channels=channels)
    h, x = torch.randn(3, 4, 6).double(), torch.rand(3, 4, 2).double() * 2 - 1

    def read(grid):
        found = grid_sample(grid[None], x.flip(-1)[None].view(1, 3, 4, 2), padding_mode="border",
                            align_corners=True)
        return found[0].movedim(0, -1)

    expected = read(modulation.gamma) * layer_norm(h, (6,)) + read(modulation.beta)
    torch.testing.assert_close(modulation(h, x), expected, rtol=0, atol=1e-12)


def test_it_starts_as_its_norm_and_reads_entries_at_the_corners():
    modulation = CoordinateAwareModulation((3, 3), 4, norm=nn.Identity)
    h, x = torch.randn(9, 4), torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 2)
    torch.testing.assert_close(modulation(h, x), h)
    nn.init.normal_(modulation.gamma)
    nn.init.normal_(modulation.beta)
    torch.testing.assert_close(modulation(h, x), modulation.gamma.view(9, 1) * h
                               + modulation.beta.view(9, 1))


def test_gradients_and_any_number_of_coordinates():
    for shape in ((4,), (3, 4), (2, 3, 4), (2, 2, 3, 2)):
        modulation = randomised(shape, 3)
        h = torch.randn(2, 3, dtype=torch.double, requires_grad=True)
        x = (torch.rand(2, len(shape), dtype=torch.double) * 1.8 - 0.9).requires_grad_()
        assert torch.autograd.gradcheck(modulation, (h, x))


def test_a_batch_norm_takes_its_place():
    modulation = CoordinateAwareModulation((4,), 3, norm=lambda dim: nn.BatchNorm1d(
        dim, affine=False))
    h, x = 5 + 2 * torch.randn(100, 3), torch.rand(100, 1)
    y = modulation(h, x)
    torch.testing.assert_close(y.mean(0), torch.zeros(3), rtol=0, atol=1e-5)


def test_a_linear_layer_with_grids_fits_what_it_cannot_alone():
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 128)[:, None]
    y = (20 * x).sin()

    def error(modulated):
        torch.manual_seed(0)
        first, last = nn.Linear(1, 16), nn.Linear(16, 1)
        modulation = CoordinateAwareModulation((64,), 16, norm=nn.Identity)
        modulation.requires_grad_(modulated)
        parts = nn.ModuleList([first, last, modulation])
        optimizer = torch.optim.Adam([p for p in parts.parameters() if p.requires_grad], 2e-2)
        for _ in range(100):
            optimizer.zero_grad()
            loss = (last(modulation(first(x), x).relu()) - y).square().mean()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    found = error(True), error(False)
    # Measured over five seeds: 0.0002 to 0.006 against 0.48 to 0.49.
    assert found[0] < 0.5 * found[1]


def test_round_trips_lower_precision_and_empty_batches():
    one, other = CoordinateAwareModulation((4, 5), 6), CoordinateAwareModulation((4, 5), 6)
    nn.init.normal_(one.gamma)
    other.load_state_dict(one.state_dict())
    h, x = torch.randn(3, 6), torch.rand(3, 2)
    assert torch.equal(one(h, x), other(h, x))
    assert torch.equal(one(h, x), deepcopy(one)(h, x))
    with torch.autocast("cpu", torch.bfloat16):
        one(nn.Linear(6, 6)(h), x).sum().backward()
    assert all(p.grad.isfinite().all() for p in one.parameters())
    assert one(h[:0], x[:0]).shape == (0, 6)
    half = one.bfloat16()(h.bfloat16(), x)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(("make", "words"), [
    (lambda: CoordinateAwareModulation((), 4), "grid_shape must hold at least one size"),
    (lambda: CoordinateAwareModulation((4, 0), 4), r"got \(4, 0\) and 4"),
    (lambda: CoordinateAwareModulation((4,), 4, channels=2), "channels must be 1 or dim=4, got 2"),
    (lambda: CoordinateAwareModulation((4,), 4)(torch.zeros(3, 4), torch.zeros(3, 2)),
     r"x must be \(\*, 1\)"),
    (lambda: CoordinateAwareModulation((4,), 4)(torch.zeros(3, 5), torch.zeros(3, 1)),
     r"h must be \(3, 4\)"),
])
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
