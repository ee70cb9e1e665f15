"""FFJORD's log_det beside the dense Jacobian's, its gradients, and its densities' integrals."""

import copy
from weakref import WeakSet

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from netwright.errors import UnknownName
from netwright.generative.flows import FFJORD, Flow, Permute

pytest.importorskip("torchdiffeq", reason="needs the extra flows")
WAYS = {"dopri5": {"rtol": 1e-9, "atol": 1e-9},
        "reversible_heun": {"solver": "reversible_heun", "steps": 60}}


class Net(nn.Module):
    def __init__(self, size: int = 2, condition: int = 0) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(size + 1 + condition, 16), nn.Linear(16, size)

    def forward(self, t: Tensor, x: Tensor, *condition: Tensor) -> Tensor:
        rows = [x.flatten(1), t.expand(len(x), 1), *condition]
        return self.b(self.a(torch.cat(rows, 1)).tanh()).view(x.shape)


def made(condition: int = 0, **options) -> FFJORD:
    torch.manual_seed(0)
    return FFJORD(Net(2, condition).double(), 2, **options)


def data(n: int = 4, size: int = 2) -> Tensor:
    return torch.randn(n, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def near(ours, theirs, error: float = 1e-10) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= error


@pytest.mark.parametrize("way", WAYS)
def test_log_det_is_that_of_the_dense_jacobian(way):
    flow, x = made(trace="exact", **WAYS[way]), data(2)
    z, log_det = flow(x)
    dense = [torch.linalg.slogdet(jacobian(lambda v: flow(v[None])[0][0], row))[1] for row in x]
    near([log_det], [torch.stack(dense)], 1e-7 if way == "dopri5" else 1e-5)
    near([flow.inverse(z)], [x], 1e-7)
    near([flow.log_prob(x)], [-0.5 * (z.square().sum(1)) - torch.tensor(2 * torch.pi).log()
                              + log_det], 1e-6)


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_reconstructed_gradients_are_the_stored_ones(trace):
    x = data().requires_grad_()
    found = []
    for backward in ("reconstruct", "store"):
        flow = made(trace=trace, solver="reversible_heun", steps=10, backward=backward)
        torch.manual_seed(2)
        found.append(torch.autograd.grad(flow.log_prob(x).sum(), [x, *flow.parameters()]))
    near(*found)


def test_the_adjoint_is_near_the_stored_gradients():
    found = []
    for backward in ("adjoint", "store"):
        flow = made(trace="exact", backward=backward, **WAYS["dopri5"])
        found.append(torch.autograd.grad(flow.log_prob(data()).sum(), list(flow.parameters())))
    near(*found, 1e-5)


def test_parameters_learn_where_the_input_needs_no_gradient():
    flow, x = made(solver="reversible_heun", steps=6), data()
    before = x.clone()
    for _ in range(2):
        flow.log_prob(x).mean().backward()
        assert all(float(p.grad.abs().sum()) > 0 for p in flow.net.a.parameters())
        flow.zero_grad()
    assert torch.equal(x, before)
    assert not x.requires_grad


@pytest.mark.parametrize("way", WAYS)
def test_a_condition_gets_its_gradient(way):
    condition = data(4, 3).requires_grad_()
    found = []
    for backward in (None, "store"):
        flow = made(3, trace="exact", backward=backward, **WAYS[way])
        inside = condition * 1
        found.append(torch.autograd.grad(flow.log_prob(data(), inside).sum(),
                                         [condition, *flow.parameters()]))
        near([flow.inverse(flow(data(), inside)[0], inside)], [data()], 1e-6)
    near(*found, 1e-10 if way == "reversible_heun" else 1e-4)
    assert float(found[0][0].abs().sum()) > 0


def test_the_stochastic_log_det_is_unbiased():
    flow, x = made(solver="reversible_heun", steps=10), data()
    with torch.no_grad():
        draws = flow.log_det(x.repeat(4000, 1)).view(4000, 4)
        flow.trace = "exact"
        off = (draws.mean(0) - flow.log_det(x)) / (draws.std(0) / 4000 ** 0.5)
    assert float(draws.std(0).min()) > 0
    assert float(off.abs().max()) < 4


def test_the_noise_is_fixed_during_a_solve_and_follows_the_seed():
    flow, x = made(**WAYS["dopri5"]), data()

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return flow.log_det(x)
    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_the_density_integrates_to_one():
    flow = made(trace="exact", rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(1.5)
        side = torch.linspace(-9, 9, 91, dtype=torch.float64)
        density = flow.log_prob(torch.cartesian_prod(side, side)).exp()
    assert abs(float(density.sum() * (side[1] - side[0]) ** 2) - 1) < 1e-3
    assert float((density - density.flip(0)).abs().max()) > 1e-3  # not the base itself


@pytest.mark.parametrize("way", WAYS)
def test_inside_another_flow(way):
    x, found = data(), []
    for stored in (False, True):
        torch.manual_seed(0)
        net = Net().double()
        flow = Flow([Permute([1, 0]), FFJORD(net, 2, **WAYS[way]), Permute([1, 0])], 2,
                    stored=stored)
        torch.manual_seed(5)
        value = flow.log_prob(x)
        found.append([value, *torch.autograd.grad(value.sum(), list(net.parameters()))])
        near([flow.inverse(flow(x)[0])], [x], 1e-6)
    near(*found)


def test_samples_other_sizes_dtypes_and_copies():
    torch.manual_seed(0)
    flow = FFJORD(Net(12), (3, 2, 2), solver="reversible_heun", steps=4)
    assert flow.sample(5).shape == (5, 3, 2, 2)
    x = flow.sample(6)
    assert flow.log_prob(x).shape == (6,)
    torch.manual_seed(1)
    first = flow.log_prob(x)
    twin = copy.deepcopy(flow)
    twin.load_state_dict(flow.state_dict())
    torch.manual_seed(1)
    assert torch.equal(twin.log_prob(x), first)
    flow.trace = "exact"
    with torch.no_grad():
        half = copy.deepcopy(flow).bfloat16().log_prob(x.bfloat16())
        assert (half - flow.log_prob(x)).abs().max() < 0.3
    with torch.autocast("cpu", torch.bfloat16):
        flow.log_prob(x).sum().backward()
    assert flow.net.a.weight.grad.isfinite().all()


class Drift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.speed = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.speed.expand_as(x)


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_a_slope_that_is_the_same_everywhere_changes_no_volume(trace):
    flow = FFJORD(Drift(), 2, trace=trace)
    z, log_det = flow(data())
    near([z, log_det], [data() + 1, torch.zeros(4, dtype=torch.float64)])
    flow.log_prob(data()).sum().backward()
    assert flow.net.speed.grad.isfinite().all()


@pytest.mark.parametrize("way", WAYS)
def test_under_inference_mode_the_density_is_the_same(way):
    flow = made(trace="exact", **WAYS[way])
    with torch.inference_mode():
        inside = flow.log_prob(data())
        assert flow.sample(3).shape == (3, 2)
    near([inside.clone()], [flow.log_prob(data()).detach()])


class Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_stored_bytes_do_not_grow_with_the_steps():
    def saved(steps: int, backward: str) -> int:
        flow, kept = made(solver="reversible_heun", steps=steps, backward=backward), WeakSet()
        flow.log_prob(data(64))  # the first call looks closely

        def pack(tensor: Tensor) -> Kept:
            kept.add(found := Kept(tensor))
            return found
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda found: found.tensor):
            result = flow.log_prob(data(64))
        assert result.requires_grad
        return sum(found.tensor.nbytes for found in kept)
    assert saved(24, "reconstruct") <= 1.05 * saved(3, "reconstruct")
    assert saved(24, "store") > 4 * saved(3, "store")


def test_training_moves_the_density_to_the_data():
    torch.manual_seed(0)
    flow = FFJORD(Net(), 2, solver="reversible_heun", steps=5)
    x = torch.randn(256, 2) * torch.tensor([0.3, 1.0]) + torch.tensor([1.0, -1.0])
    optimizer = torch.optim.Adam(flow.parameters(), 0.02)
    losses = []
    for _ in range(60):
        loss = -flow.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert (flow.sample(500).mean(0) - torch.tensor([1.0, -1.0])).abs().max() < 0.4


def test_errors_name_what_was_wrong():
    with pytest.raises(UnknownName, match="did you mean exact"):
        made(trace="exakt")
    with pytest.raises(ValueError, match="time must be above 0"):
        made(time=0.0)
    with pytest.raises(ValueError, match="x must be"):
        made().log_prob(data(4, 3))
    with pytest.raises(UnknownName, match="dopri5"):
        made(solver="dopri").log_prob(data())
