from itertools import pairwise

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.data import Batches, digits
from netwright.errors import UnknownName
from netwright.rules import BlockCoordinateDescent

X = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)).double()
Y = torch.arange(30) % 3
LOSSES = ["squared", "hinge", "cross_entropy"]


class Residual(nn.Module):
    def __init__(self, width, activation=nn.ReLU):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), activation())

    def forward(self, h):
        return h + self.inner(h)


def plain():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.Linear(7, 6), nn.ReLU(),
                         nn.Linear(6, 3)).double()


def residual():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), Residual(8), Residual(8, nn.Identity),
                         Residual(8), nn.Linear(8, 3)).double()


CASES = [(plain, "three", loss) for loss in LOSSES] + [(plain, "two", loss) for loss in LOSSES] + [
    (residual, "three", "squared")]


class Run:
    """A rule in the midst of its sweeps over X."""

    def __init__(self, build, splitting="three", loss="squared"):
        torch.manual_seed(1)
        self.rule = BlockCoordinateDescent(build(), splitting=splitting, output_loss=loss,
                                           gamma=0.7, rho=1.3, alpha=0.9)
        with torch.no_grad():
            self.at = self.rule._forward_pass(X)
            self.target, self.labelled = self.rule._target(Y, self.at.V[-1])

    @torch.no_grad()
    def blocks(self, sweeps):
        for _ in range(sweeps):
            yield from self.rule._sweep(self.at, self.target, self.labelled)

    @torch.no_grad()
    def objective(self):
        return float(self.rule._objective(self.at, self.target, self.labelled))

    def variable(self, block):
        """The tensors that a block has, to be set."""
        kind, i = block[0], int(block[2:]) - 1
        if kind == "W":
            linear = self.rule._layers[i].linear
            return [linear.weight, linear.bias]
        return [(self.at.V if kind == "V" else self.at.U)[i]]


@pytest.mark.parametrize(("build", "splitting", "loss"), CASES)
def test_no_block_raises_the_objective(build, splitting, loss):
    run = Run(build, splitting, loss)
    values = [run.objective()]
    for _ in run.blocks(6):
        values.append(run.objective())
    assert all(later <= before + 1e-10 for before, later in pairwise(values))
    assert values[-1] < 0.6 * values[0]


@pytest.mark.parametrize(("build", "loss"), [(plain, "squared"), (plain, "hinge"),
                                             (residual, "squared")])
def test_each_block_of_three_splittings_is_at_its_minimum(build, loss):
    """Any other value of a block, near or far, has a larger objective with what holds it back."""
    run = Run(build, "three", loss)
    for _ in run.blocks(2):  # so that V and U no longer agree with the network
        pass
    generator = torch.Generator().manual_seed(3)
    names = [f"{kind}_{i + 1}" for i in reversed(range(len(run.rule._layers))) for kind in "VUW"]
    held = {"W_", f"V_{len(run.rule._layers)}"} | {
        f"U_{i + 1}" for i in range(len(run.rule._layers) - 1)}
    sweep = run.blocks(1)
    for expected in names:
        before = [v.detach().clone() for v in run.variable(expected)]
        name = next(sweep)
        assert name == expected

        @torch.no_grad()
        def value(before=before, name=name):
            pull = 0.9 / 2 if name in held or name[:2] in held else 0.0
            return run.objective() + pull * sum(float((v - b).square().sum())
                                                for v, b in zip(run.variable(name), before,
                                                                strict=True))
        best, at_minimum = value(), [v.detach().clone() for v in run.variable(name)]
        for size in (1e-3, 0.1, 3.0):
            for _ in range(4):
                with torch.no_grad():
                    for v, m in zip(run.variable(name), at_minimum, strict=True):
                        v.copy_(m + size * torch.randn(m.shape, generator=generator,
                                                       dtype=m.dtype))
                assert value() > best
        with torch.no_grad():
            for v, m in zip(run.variable(name), at_minimum, strict=True):
                v.copy_(m)


def test_the_minimum_over_inner_variables_is_the_least_on_a_grid():
    layer = BlockCoordinateDescent(plain())._layers[0]
    v, a = (4 * torch.rand(2, 200, 1) - 2).double()
    grid = torch.linspace(-4, 4, 80_001).double()
    found = layer.nearest(v, a, 0.6, 1.7)
    def cost(u):
        return 0.6 * (v - u.relu()).square() + 1.7 * (u - a).square()
    assert (cost(found) <= cost(grid).amin(1, keepdim=True) + 1e-12).all()


@pytest.mark.parametrize("rows", [4, 30])
def test_weights_are_the_least_squares_solution(rows):
    layer = BlockCoordinateDescent(plain())._layers[0]
    W, b = (v.detach().clone() for v in layer.weights())
    h, aim = X[:rows], torch.randn(rows, 8).double()
    with torch.no_grad():
        layer.fit(h, aim, 1.3, 0.9)
    inputs = torch.cat([h, torch.ones(rows, 1).double()], 1)
    stacked = torch.cat([1.3 ** 0.5 * inputs, 0.9 ** 0.5 * torch.eye(6).double()])
    start = torch.cat([W, b[:, None]], 1)
    wanted = torch.linalg.lstsq(stacked, torch.cat([1.3 ** 0.5 * aim, 0.9 ** 0.5 * start.T])
                                ).solution
    torch.testing.assert_close(layer.linear.weight.detach(), wanted[:5].T)
    torch.testing.assert_close(layer.linear.bias.detach(), wanted[5])


def test_two_splittings_minimise_what_lies_above_and_touches():
    layer = BlockCoordinateDescent(plain(), splitting="two")._layers[0]
    V, u = torch.rand(50, 8).double(), torch.randn(50, 8).double()
    h = torch.randn(50, 5).double()
    aim = layer.aim(h, V)
    now = layer.linear_of(h)
    gap = (V - now.relu()).square()
    torch.testing.assert_close((aim - now).square() - gap,
                               torch.where(now >= 0, 0.0, -V.square()))
    for other in (u, 10 * u, now + 0.1 * u):  # above by a constant where the stage is off
        above = (aim - other).square() + torch.where(now >= 0, 0.0, V.square())
        assert (above >= (V - other.relu()).square() - 1e-12).all()


@pytest.mark.parametrize("splitting", ["three", "two"])
def test_the_smallest_squared_step_falls_at_least_as_one_over_k(splitting):
    rule = BlockCoordinateDescent(plain(), keep=30, splitting=splitting)
    rule(X, Y)
    steps, before = [], {k: v.clone() for k, v in rule.state_dict().items()}
    for _ in range(100):
        rule(X, Y)
        now = {k: v.clone() for k, v in rule.state_dict().items()}
        steps.append(sum(float((now[k] - before[k]).double().square().sum())
                         for k in now if not k.startswith(("kept", "is_kept"))))
        before = now
    least = torch.tensor(steps).cummin(0).values
    k = torch.arange(1, 101).log()
    slope = torch.cov(torch.stack([k, least.log()]))[0, 1] / k.var()
    assert slope < -1


def test_the_variables_of_the_same_batch_stay_and_of_another_do_not():
    def weights(calls, keep=30):
        torch.manual_seed(0)
        rule = BlockCoordinateDescent(plain(), keep=keep)
        for x, y in calls:
            rule(x, y)
        return rule
    same = [(X, Y)] * 3
    at_once = BlockCoordinateDescent(plain(), sweeps=3, keep=30)
    at_once.load_state_dict(weights([]).state_dict())
    at_once(X, Y)
    kept = weights(same)
    for a, b in zip(kept.state_dict().values(), at_once.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(kept.network[0].weight, weights(same, keep=0).network[0].weight)
    other = weights([*same, (X.flip(0), Y.flip(0))])
    fresh = BlockCoordinateDescent(plain(), keep=30)
    fresh.network.load_state_dict(kept.network.state_dict())
    fresh(X.flip(0), Y.flip(0))
    torch.testing.assert_close(other.network[0].weight, fresh.network[0].weight)
    assert kept.objective() < other.objective()
    kept(X[:7], Y[:7])  # another size passes by what is kept
    assert kept.is_kept
    assert torch.equal(kept.kept_x, X)


def test_what_is_kept_survives_a_checkpoint(tmp_path):
    def fit(epochs, folder):
        torch.manual_seed(0)
        rule = BlockCoordinateDescent(plain(), keep=30)
        nw.fit(rule, Batches(X, Y, 30, shuffle=False), epochs=epochs, checkpoint=folder,
               progress=False)
        return rule.state_dict()
    whole = fit(4, tmp_path / "whole")
    fit(2, tmp_path / "parts")
    for name, value in fit(4, tmp_path / "parts").items():
        assert torch.equal(value, whole[name]), name


def test_samples_without_a_label_do_not_count():
    unlabelled = Y.clone()
    unlabelled[::2] = -100
    rule = BlockCoordinateDescent(plain(), keep=30, sweeps=3)
    loss = rule(X, unlabelled)
    assert loss.isfinite()
    assert rule.objective().isfinite()
    assert all(p.isfinite().all() for p in rule.parameters())
    assert rule(X, unlabelled).isfinite()
    none = BlockCoordinateDescent(plain())
    before = none.network[0].weight.clone()
    assert none(X, torch.full_like(Y, -100)) == 0
    torch.testing.assert_close(none.network[0].weight, before)


def test_numbers_as_targets_and_tokens():
    rule = BlockCoordinateDescent(plain(), keep=30)
    target = X[:, :3] * 2 + 1
    first = rule(X, target)
    torch.testing.assert_close(first, (plain_loss(rule, target)), rtol=10, atol=10)
    for _ in range(60):
        last = rule(X, target)
    assert last < 0.3 * first
    tokens = BlockCoordinateDescent(plain())
    assert tokens(X.view(6, 5, 5), Y.view(6, 5)).isfinite()
    with pytest.raises(ValueError, match="y must have a label for each of the 30 rows"):
        tokens(X.view(6, 5, 5), Y[:6])


def plain_loss(rule, target):
    return (rule.predict(X) - target).square().sum(1).mean() / 2


def test_frozen_bias_and_layers_without_one():
    network = nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)).double()
    network[2].weight.requires_grad_(False)
    before = [p.clone() for p in network.parameters()]
    BlockCoordinateDescent(network)(X, Y)
    assert [torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True)] == [
        False, True, False]


def test_learns_by_its_hidden_layers_too():
    split = digits()
    x, y = split.x_train.flatten(1)[:500], split.y_train[:500]
    def accuracy(network, labels):
        rule = BlockCoordinateDescent(network, sweeps=40)
        rule(x, labels)
        right = rule.predict(split.x_test.flatten(1)).argmax(1) == split.y_test
        return right.float().mean()
    for seed in range(3):
        def network(seed=seed):
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(),
                                 nn.Linear(24, 10))
        frozen = network()
        frozen[:4].requires_grad_(False)
        learned = accuracy(network(), y)
        assert learned > 0.75
        assert learned > accuracy(frozen, y) + 0.1
        assert accuracy(network(), y[torch.randperm(500)]) < 0.3


def test_images_and_fit():
    split = digits()
    network = nw.models.mlp(64, 10, hidden=(32,))
    rule = BlockCoordinateDescent(network, sweeps=2)
    history = nw.fit(rule, Batches(split.x_train[:512], split.y_train[:512], 128, seed=0),
                     epochs=3, progress=False)
    assert history.epochs[-1].loss < history.epochs[0].loss
    assert rule.predict(split.x_test).shape == (len(split.y_test), 10)


def test_it_is_compared_where_it_can_run():
    from optuna.storages import InMemoryStorage

    found = nw.compare(["digits-mlp", "digits-cnn"], ["BlockCoordinateDescent"], seeds=1, trials=1,
                       epochs=1, storage=InMemoryStorage(), progress=False)
    mlp, cnn = found.rows
    assert mlp.mean > 0.3
    assert "stage 0 has Conv2d, MaxPool2d; there is no closed form" in cnn.failure


@pytest.mark.parametrize(("network", "match"), [
    (nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), "stage 0 has Tanh, Linear"),
    (nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
     "stage 0 has BatchNorm1d, Linear; there is no closed form"),
    (nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(6, 3)), "stage 0 has Conv1d"),
    (nn.Sequential(nn.Linear(5, 8), nn.ReLU()), "network must end in a linear layer"),
    (nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3)), "stage 0 is lazy"),
    (nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.ReLU(), nn.Flatten(), Residual(5), Residual(5),
                   nn.Linear(5, 3)), None),
])
def test_networks(network, match):
    if match is None:
        assert BlockCoordinateDescent(network)._layers[2].residual
        return
    with pytest.raises(ValueError, match=match):
        BlockCoordinateDescent(network)


def test_errors():
    shared = nn.Linear(5, 5)
    with pytest.raises(ValueError, match="weights of its own in each layer"):
        BlockCoordinateDescent(nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(),
                                             nn.Linear(5, 3)))
    with pytest.raises(ValueError, match="splitting must be 'three' for residual stages"):
        BlockCoordinateDescent(residual(), splitting="two")
    with pytest.raises(UnknownName, match="did you mean three"):
        BlockCoordinateDescent(plain(), splitting="tree")
    with pytest.raises(UnknownName, match="did you mean hinge"):
        BlockCoordinateDescent(plain(), output_loss="hing")
    with pytest.raises(ValueError, match="gamma must be above 0, got 0"):
        BlockCoordinateDescent(plain(), gamma=0)
    with pytest.raises(ValueError, match=r"alpha must be at least 0.5, got .* output_loss="):
        BlockCoordinateDescent(plain(), output_loss="cross_entropy", alpha=0.1)
    with pytest.raises(ValueError, match="sweeps must be at least 1, got 0"):
        BlockCoordinateDescent(plain(), sweeps=0)
    with pytest.raises(ValueError, match="keep must be the number of samples of the last batch"):
        BlockCoordinateDescent(plain()).objective()
