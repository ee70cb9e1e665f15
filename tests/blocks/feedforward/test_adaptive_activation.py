from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from netwright.blocks.feedforward import AGLU, APA, GLU, FeedForward


@pytest.mark.parametrize(("kappa", "lam"), [(1.0, 1.0), (2.5, 0.3), (-0.7, 2.0), (1.0, 1e-3)])
def test_both_are_their_formulas(kappa, lam):
    z = torch.linspace(-5, 5, 31, dtype=torch.double)
    a = (lam * (-kappa * z).exp() + 1) ** (-1 / lam)
    torch.testing.assert_close(APA(kappa, lam).double()(z), a, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(AGLU(kappa, lam).double()(z), z * a, rtol=1e-6, atol=1e-12)


def test_what_it_becomes_at_the_ends():
    z = torch.linspace(-6, 6, 61)
    torch.testing.assert_close(APA(3.0)(z), (3 * z).sigmoid())
    torch.testing.assert_close(APA(1.0, 1e-4)(z), (-(-z).exp()).exp(), rtol=0, atol=1e-4)
    torch.testing.assert_close(AGLU()(z), nn.functional.silu(z))
    torch.testing.assert_close(AGLU(1e4)(z), z.relu(), rtol=0, atol=1e-4)
    assert (AGLU(1.702)(z) - nn.functional.gelu(z)).abs().max() < 0.021


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("make", [APA, AGLU])
def test_gradients_of_input_and_both_parameters(make, channels):
    torch.manual_seed(0)
    part = make(channels=channels).double()
    nn.init.uniform_(part.kappa, -2, 2)
    nn.init.uniform_(part.lam, 0.01, 2)
    z = torch.randn(1, 4, dtype=torch.double, requires_grad=True)
    names = [name for name, _ in part.named_parameters()]

    def run(z, *values):
        return torch.func.functional_call(part, dict(zip(names, values, strict=True)), (z,))

    assert gradcheck(run, (z, *part.parameters()))
    assert gradgradcheck(run, (z, *part.parameters()))


def test_far_inputs_and_small_lambda_stay_finite():
    for lam in (1e-4, 1e-3, 1.0, 50.0):
        for part in (APA(1.0, lam), AGLU(1.0, lam)):
            z = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
            out = part(z)
            out.sum().backward()
            assert out.isfinite().all()
            assert all(p.grad.isfinite().all() for p in (z, *part.parameters()))
            assert ((APA(1.0, lam)(z) >= 0) & (APA(1.0, lam)(z) <= 1)).all()


def test_a_lambda_that_fell_below_can_return():
    part, z = APA(1.0, 1e-4), torch.linspace(-1, 2, 20)
    least = part(z).detach()
    with torch.no_grad():
        part.lam.fill_(-0.01)
    torch.testing.assert_close(part(z), least, rtol=0, atol=1e-5)
    target, optimizer = z.sigmoid(), torch.optim.SGD([part.lam], 0.5)
    for _ in range(200):
        optimizer.zero_grad()
        (part(z) - target).square().mean().backward()
        optimizer.step()
    assert part.lam.item() > 0.5


def test_channels_learn_apart_and_blocks_take_it():
    part = AGLU(channels=3)
    with torch.no_grad():
        part.kappa.copy_(torch.tensor([1.0, 2.0, 3.0]))
    z = torch.randn(5, 3)
    torch.testing.assert_close(part(z)[:, 1], AGLU(2.0)(z[:, 1]))
    one, two = FeedForward(4, 8, layers=3, activation=AGLU), GLU(
        4, 8, activation=lambda: APA(channels=8))
    assert sum(isinstance(m, AGLU) for m in one) == 2
    assert one(torch.randn(2, 4)).shape == two(torch.randn(2, 4)).shape == (2, 4)
    assert len(list(two.activation.parameters())) == 2


@pytest.mark.parametrize("make", [APA, AGLU])
def test_dtypes_shapes_and_states(make):
    part = make(0.7, 0.2)
    for shape in ((), (3,), (0, 4), (2, 3, 4)):
        assert part(torch.randn(shape)).shape == shape
    z = torch.randn(50)
    half = deepcopy(part).bfloat16()(z.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), part(z), rtol=0.03, atol=0.03)
    with torch.autocast("cpu", torch.bfloat16):
        assert part(z.bfloat16()).dtype == torch.bfloat16
    other = make()
    other.load_state_dict(part.state_dict())
    assert torch.equal(other(z), part(z))


@pytest.mark.parametrize(("run", "says"), [
    (lambda: APA(1.0, 0.0), "lam must be at least 0.0001, got 0.0"),
    (lambda: AGLU(1.0, float("nan")), "lam must be at least"),
    (lambda: APA(channels=0), "channels must be at least 1, got 0"),
    (lambda: AGLU(channels=3)(torch.randn(2, 4)), "z must be .*, 3."),
])
def test_what_cannot_be_is_refused(run, says):
    with pytest.raises(ValueError, match=says):
        run()
