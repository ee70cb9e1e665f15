from copy import deepcopy

import pytest
import torch
from torch.nn.functional import interpolate

from netwright.generative.flows import ConditionalAffineCoupling, ConditionalFlow, Flow
from netwright.measure import cost


def flow(blocks=3, hidden=6):
    torch.manual_seed(0)
    made = ConditionalFlow(blocks, 3, 4, hidden).double()
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made


def images(n=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, *size, generator=generator).to(dtype)
            for size in ((3, 6, 8), (3, 3, 4), (1, 6, 8))]


def test_a_coupling_does_what_its_formula_says():
    coupling = flow().transforms[0]
    x, _, pan = images()
    condition = torch.cat([x, pan], 1)
    z, log_det = coupling(x, condition)

    def affine(net, seen, changed):
        s, t = net(torch.cat([seen, condition], 1)).chunk(2, 1)
        s = 5 * 2 / torch.pi * torch.atan(s / 5)
        return changed * s.exp() + t, s.sum((1, 2, 3))
    first, one = affine(coupling.f, x[:, 1:], x[:, :1])
    second, two = affine(coupling.g, first, x[:, 1:])
    torch.testing.assert_close(z, torch.cat([first, second], 1))
    torch.testing.assert_close(log_det, one + two)


def test_the_inverse_undoes_it():
    made = flow()
    x, *condition = images()
    torch.testing.assert_close(made.inverse(made(x, condition)[0], condition), x, rtol=0,
                               atol=1e-10)
    x, *condition = images(dtype=torch.float32)
    made.float()
    # Measured at most 2e-6.
    torch.testing.assert_close(made.inverse(made(x, condition)[0], condition), x, rtol=0,
                               atol=1e-5)


def test_log_det_is_the_dense_jacobians():
    made = flow(2, 2)
    x, *condition = [image[..., :4] for image in images(1)]
    jacobian = torch.autograd.functional.jacobian(lambda x: made(x, condition)[0].flatten(), x)
    dense = torch.linalg.slogdet(jacobian.flatten(1))[1]
    torch.testing.assert_close(made.log_det(x, condition)[0], dense, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("needs", [True, False])
def test_gradients_are_plain_autograds_those_of_the_condition_too(needs):
    made = flow()
    stored = deepcopy(made)
    stored.stored = True
    found = []
    for each in (stored, made, made):
        x, low, pan = images()
        x.requires_grad_(needs)
        low.requires_grad_(needs)
        loss = -each.log_prob(x, (low, pan)).mean()
        wanted = [*([x, low] if needs else []), *each.parameters()]
        found.append(torch.autograd.grad(loss, wanted))
    for mine, theirs in zip([*found[1], *found[2]], [*found[0]] * 2, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_the_input_keeps_its_values_and_stored_bytes_do_not_grow():
    def saved(blocks):
        x, low, pan = images(dtype=torch.float32)
        before = x.clone()
        given = torch.cat([interpolate(low, x.shape[2:]), pan], 1)

        class Fixed(Flow):
            def forward(self, x, condition=None):
                return super().forward(x, given)
        found = cost(Fixed(flow(blocks).float().transforms, x.shape[1:]), (x, x),
                     loss=lambda out, _: out[0].square().sum() - out[1].sum(), repeats=1, warmup=1)
        assert torch.equal(x, before)
        return found.saved_bytes
    assert saved(8) == saved(2)


def test_a_density_of_two_numbers_integrates_to_one():
    torch.manual_seed(0)
    coupling = ConditionalAffineCoupling(2, 1, 4, clamp=1.0).double()
    for parameter in coupling.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    density = Flow([coupling], (2, 1, 1))
    side = torch.linspace(-9, 9, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side).view(-1, 2, 1, 1)
    with torch.no_grad():
        total = density.log_prob(grid, torch.full((len(grid), 1, 1, 1), 0.7).double()).exp().sum()
    assert abs(total * (side[1] - side[0]) ** 2 - 1) < 1e-3


def test_it_starts_as_the_identity_and_takes_any_size_and_one_image():
    made = ConditionalFlow(2, 3, 4, 6)
    x, low, pan = images(dtype=torch.float32)
    assert torch.equal(made(x, (low, pan))[0], x)
    large = torch.randn(2, 4, 10, 12)
    assert made.sample(2, large).shape == (2, 3, 10, 12)
    assert made.sample(2, (low, pan)).shape == x.shape
    draws = [made.sample(2, (low, pan), generator=torch.Generator().manual_seed(3))
             for _ in range(2)]
    assert torch.equal(*draws)
    other = ConditionalFlow(2, 3, 4, 6)
    other.load_state_dict(flow(2).float().state_dict())
    assert torch.equal(other(x, (low, pan))[0], flow(2).float()(x, (low, pan))[0])


def test_autocast_and_bfloat16():
    x, *condition = images(dtype=torch.float32)
    made = flow().float()
    plain = made.log_prob(x, condition)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = made.log_prob(x, condition)
    mixed.sum().backward()
    torch.testing.assert_close(mixed, plain, rtol=0.05, atol=3.0)
    z, _ = made.bfloat16()(x.bfloat16(), [c.bfloat16() for c in condition])
    assert z.dtype == torch.bfloat16


def test_samples_follow_the_condition_and_differ():
    torch.manual_seed(0)

    def pairs(n):
        pan = torch.randn(n, 1, 4, 4)
        return 2 * pan + 0.3 * torch.randn(n, 2, 4, 4), pan
    made = ConditionalFlow(2, 2, 1, 8)
    optimizer = torch.optim.Adam(made.parameters(), 1e-2)
    for _ in range(60):
        x, pan = pairs(32)
        optimizer.zero_grad()
        (-made.log_prob(x, pan).mean()).backward()
        optimizer.step()
    x, pan = pairs(200)
    sample, another = made.sample(200, pan), made.sample(200, pan)
    assert (sample - 2 * pan).abs().mean() < 0.8  # a sample of other pan images is off by 2.3
    assert (sample - 2 * pan.flip(0)).abs().mean() > 1.5
    assert 0.2 < (sample - another).std() < 1.0


def test_errors():
    with pytest.raises(ValueError, match="channels must be at least 2"):
        ConditionalAffineCoupling(1, 3)
    with pytest.raises(ValueError, match="hidden must be at least 2"):
        ConditionalAffineCoupling(2, 3, 1)
    with pytest.raises(ValueError, match="clamp must be above 0"):
        ConditionalAffineCoupling(2, 3, clamp=0)
    with pytest.raises(ValueError, match="blocks must be at least 1"):
        ConditionalFlow(0)
    x, low, pan = images(dtype=torch.float32)
    made = ConditionalFlow(1, 3, 4, 6)
    with pytest.raises(ValueError, match="condition must be an image"):
        made(x)
    with pytest.raises(ValueError, match=r"condition must be a tensor of shape \(2, 4, 6, 8\)"):
        made(x, low)
    with pytest.raises(ValueError, match=r"x must be \(batch, 3, height, width\)"):
        made(x[:, :2], (low, pan))
    with pytest.raises(ValueError, match="condition must be a tensor"):
        made.transforms[0](x)
    with pytest.raises(ValueError, match="condition must be a tensor of shape"):
        made.sample(5, (low, pan))
