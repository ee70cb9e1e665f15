"""The reversible SDE solver: there and back, its law on a problem that is solved, its gradients."""

import pytest
import torch
from torch import Tensor, nn

from netwright.errors import CannotReverse
from netwright.generative.flows import ReversibleSDESolver
from netwright.generative.flows.reversible_sde import linear_schedule

SPREAD = 0.5


def score(x: Tensor, t: Tensor) -> Tensor:
    """That of normal data of mean 1 and deviation `SPREAD`."""
    alpha, sigma = linear_schedule(t.double())
    return (alpha - x) / ((alpha * SPREAD) ** 2 + sigma ** 2).to(x.dtype)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.b(self.a(torch.cat([x, t.expand(len(x), 1)], 1)).tanh()) - x


def drawn(steps: int, batch: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (1 + SPREAD * torch.randn(batch, 2, dtype=torch.float64, generator=generator),
            torch.randn(steps, batch, 2, dtype=torch.float64, generator=generator))


@pytest.mark.parametrize("steps", [10, 64, 200])
def test_decode_undoes_encode(steps):
    x, noise = drawn(steps)
    before = x.clone()
    solver = ReversibleSDESolver(score, steps=steps)
    z = solver.encode(x, noise)
    assert (solver.decode(z, noise) - x).abs().max() < 1e-9
    assert torch.equal(x, before)
    assert (solver.decode(z, noise.flip(0)) - x).abs().max() > 0.01  # another path of noise


def test_encode_undoes_decode():
    z, noise = drawn(40)
    solver = ReversibleSDESolver(score, steps=40)
    ends = solver.decode(z, noise, both=True)
    back = solver.encode(ends, noise)
    assert torch.equal(ends[0], solver.decode(z, noise))
    for stream in back:
        assert (stream - z).abs().max() < 1e-6
    one = solver.encode(ends[0], noise)  # from one stream only as nearly as the solver solves
    assert (one[0] - z).abs().max() > 1e-3


def test_single_precision_comes_back_within_a_bound():
    x, noise = (value.float() for value in drawn(64, 100))
    solver = ReversibleSDESolver(score, steps=64)
    assert (solver.decode(solver.encode(x, noise), noise) - x).abs().max() < 0.05


def test_samples_have_the_law_of_the_data():
    torch.manual_seed(0)
    solver = ReversibleSDESolver(score, steps=30)
    samples = solver.decode(torch.randn(20000, 2), torch.randn(30, 20000, 2))
    assert (samples.mean(0) - 1).abs().max() < 0.03
    assert (samples.std(0) - SPREAD).abs().max() < 0.03
    # Without the noise in the steps they have not.
    still = solver.decode(torch.randn(20000, 2), torch.zeros(30, 20000, 2))
    assert (still.std(0) - SPREAD).abs().min() > 0.1


def test_gradients_are_those_of_the_stored_steps():
    torch.manual_seed(0)
    net = Net().double()
    z, noise = drawn(8)
    z.requires_grad_()
    solver = ReversibleSDESolver(net, steps=8, end=0.1)
    for _ in range(2):  # the first call looks closely
        ours = solver.decode(z, noise)
        streams = solver(solver._scaled(z, noise, 0), noise)
        theirs = solver._unscaled(streams, -1)[0]
        assert (ours - theirs).abs().max() < 1e-10
        tensors = [z, *net.parameters()]
        for a, b in zip(torch.autograd.grad(ours.sum(), tensors),
                        torch.autograd.grad(theirs.sum(), tensors), strict=True):
            assert (a - b).abs().max() <= 1e-10 * max(1.0, float(b.abs().max()))


def test_stored_bytes_do_not_grow_with_the_steps():
    net = Net().double()

    def saved(steps: int, stored: bool = False) -> int:
        solver, sizes = ReversibleSDESolver(net, steps=steps), []
        z, noise = drawn(steps, 64)
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            solver((z, z), noise) if stored else solver.decode(z, noise)
        return sum(sizes)
    assert saved(16) <= 1.05 * saved(4)
    assert saved(16, stored=True) > 3 * saved(4, stored=True)


def test_the_schedule_is_one_of_variance_preservation_and_times_fall():
    alpha, sigma = linear_schedule(torch.linspace(0, 1, 9, dtype=torch.float64))
    assert torch.allclose(alpha ** 2 + sigma ** 2, torch.ones(9, dtype=torch.float64))
    solver = ReversibleSDESolver(score, steps=5)
    alpha, sigma = linear_schedule(solver.times)
    gaps = (alpha / sigma).log().diff()
    assert torch.allclose(gaps, gaps.mean().expand(5))
    assert solver.times[0] == 1
    assert solver.times[-1] == 1e-3


def test_errors_name_what_was_wrong():
    def bad(call, words: str, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=words):
            call()
    x, noise = drawn(4)
    bad(lambda: ReversibleSDESolver(score, steps=0), "steps must be at least 1")
    bad(lambda: ReversibleSDESolver(score, coupling=0.0), "coupling must be above 0")
    bad(lambda: ReversibleSDESolver(score, begin=0.1, end=0.5), "grow from begin=0.1")
    bad(lambda: ReversibleSDESolver(score, end=0.0), "finite at begin and end")
    bad(lambda: ReversibleSDESolver(score, steps=5).encode(x, noise), r"noise must be \(steps")
    bad(lambda: ReversibleSDESolver(lambda x, t: x[:, :1], steps=4).decode(x, noise),
        "score must return the shape of x")
    loose = torch.ones(2, dtype=torch.float64, requires_grad=True)
    stranger = ReversibleSDESolver(lambda x, t: x * loose, steps=4)
    bad(lambda: stranger.decode(x.requires_grad_(), noise).sum().backward(),
        "neither a parameter", CannotReverse)
