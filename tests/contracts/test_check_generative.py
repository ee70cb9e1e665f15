"""Generative models that break the contract in one way each, and what is said of them."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import netwright as nw
from netwright.errors import BrokenContract
from netwright.generative.flows import AffineCouplingTransform, Flow, Transform


class Stretch(Transform):
    """Scales every entry, with one thing changed by each transform below."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4) + 0.5)

    def map(self, x, condition=None):
        return x * self.scale, self.scale.abs().log().sum().expand(len(x))

    def inverse(self, z, condition=None):
        return z / self.scale


class WrongInverse(Stretch):
    def inverse(self, z, condition=None):
        return z * self.scale


class NoVolume(Stretch):
    def map(self, x, condition=None):
        return x * self.scale, x.new_zeros(len(x))


class Writes(Stretch):
    def map(self, x, condition=None):
        z, log_det = super().map(x)
        x.data.mul_(0.5)
        return z, log_det


class Density(nn.Module):
    """Independent normal numbers, with one thing changed by each density below."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.randn(4))

    def log_prob(self, x):
        return -0.5 * (x - self.mean).square().sum(1)

    @torch.no_grad()
    def sample(self, n, *, generator=None):
        return self.mean + torch.randn(n, 4, generator=generator)


class Whole(Density):
    def log_prob(self, x):
        return super().log_prob(x).sum()


class Careless(Density):
    def sample(self, n, *, generator=None):
        return self.mean.detach() + torch.randn(n, 4)


class Deaf(Density):
    def log_prob(self, x):
        return super().log_prob(x).detach() + 0 * self.mean.sum()


class Forgets(Density):
    def __init__(self):
        super().__init__()
        self.shift = torch.randn(4)

    def log_prob(self, x):
        return super().log_prob(x - self.shift)


class Mixed(Density):
    def log_prob(self, x):
        return super().log_prob(x).float()


@pytest.mark.parametrize(("model", "check", "words"), [
    (WrongInverse, "it maps back what it maps forward", "mend the inverse"),
    (NoVolume, "log det is that of the jacobian", "add every change of volume"),
    (Whole, "log prob is a finite number for each sample", r"got \(\)"),
    (Careless, "samples come from the generator alone", "draw from generator"),
    (Deaf, "fit trains it on inputs without labels", "a gradient"),
    (Deaf, "its gradients are those of finite differences", "mend the backward pass"),
    (Forgets, "state goes into a fresh model that says the same", "as a parameter, a buffer"),
    (Writes, "what goes in is left as it was", "work on copies"),
    (Mixed, "it runs in float64 and without gradients", "got torch.float32"),
])
def test_what_is_broken_is_named_and_how_to_mend_it(model, check, words):
    single = {str(check): check for check in nw.contracts.checks("generative")}[check]
    with pytest.raises(BrokenContract, match=words) as broken:
        single(model)
    assert str(broken.value).startswith(f"{model.__name__}: {check}: expected ")
    single(Stretch)  # the controls
    single(Density)


def flow():
    torch.manual_seed(0)
    return Flow([AffineCouplingTransform(nn.Linear(1, 2), (1, 1)),
                 AffineCouplingTransform(nn.Linear(1, 2), (1, 1), flip=True)], 2)


def test_fit_trains_a_density_on_inputs_alone_whatever_holds_them():
    x = 3 + 2 * torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
    ends = []
    for train in ([x[:20], x[20:]], DataLoader(x, 20),
                  DataLoader(torch.utils.data.TensorDataset(x), 20)):
        model = flow()
        history = nw.fit(model, train, epochs=30, validation=[x], progress=False,
                         optimizer=lambda p: torch.optim.Adam(p, 0.05))
        assert history.metric == "mean_score"
        assert history.epochs[-1].metric == pytest.approx(model.log_prob(x).mean().item(), rel=1e-4)
        assert history.epochs[-1].loss < history.epochs[0].loss - 1
        ends.append(model.log_prob(x))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_a_condition_goes_with_its_inputs():
    x, condition = torch.rand(12, 2), torch.randn(12, 5)
    model = nw.flows.LabelFlow(2, cond_dim=5, blocks=2, hidden=8)
    history = nw.fit(model, [(x, condition)], epochs=10, progress=False,
                     optimizer=lambda p: torch.optim.Adam(p, 0.01))
    assert history.epochs[-1].loss < history.epochs[0].loss
    with pytest.raises(ValueError, match="a batch must hold a tensor of samples"):
        nw.fit(flow(), [["x"]], epochs=1, progress=False)
