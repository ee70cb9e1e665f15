import io
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from rich.console import Console
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

import netwright as nw
from netwright.data import Batches
from netwright.errors import Diverged
from netwright.rules import Backprop, Rule
from netwright.training.checkpoints import load

X = torch.randn(40, 6, generator=Generator().manual_seed(1))
Y = X[:, :3].argmax(1)


def network(*norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), *norm, nn.ReLU(), nn.Linear(12, 3))


def sgd(parameters: list) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def same(a: nn.Module, b: nn.Module, tolerance: float = 0) -> bool:
    return all(torch.allclose(p, q, rtol=tolerance, atol=tolerance)
               for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def bare_loop(net: nn.Module, batches: list, optimizer: torch.optim.Optimizer, epochs: int, *,
              each_step: Callable = lambda: None, each_epoch: Callable = lambda: None) -> None:
    net.train()
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            optimizer.step()
            each_step()
        each_epoch()


# What a loop by hand would have given


@pytest.mark.parametrize("make", [sgd, torch.optim.Adam, torch.optim.RMSprop])
def test_the_weights_are_those_of_a_bare_loop(make: Callable) -> None:
    batches = list(Batches(X, Y, 16))
    ours, theirs = network(nn.BatchNorm1d(12)), network(nn.BatchNorm1d(12))
    nw.fit(ours, batches, epochs=3, optimizer=make)
    bare_loop(theirs, batches, make(theirs.parameters()), 3)
    assert same(ours, theirs)
    assert not same(ours, network(nn.BatchNorm1d(12)))


def test_adam_is_the_default() -> None:
    ours, theirs = network(), network()
    nw.fit(ours, [(X, Y)], epochs=3)
    bare_loop(theirs, [(X, Y)], torch.optim.Adam(theirs.parameters(), 1e-3), 3)
    assert same(ours, theirs)


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_schedules_are_stepped_in_their_unit(unit: str) -> None:
    batches = list(Batches(X, Y, 16))
    ours, theirs = network(), network()
    history = nw.fit(ours, batches, epochs=3, optimizer=sgd, scheduler_unit=unit,
                     scheduler=lambda optimizer: ExponentialLR(optimizer, 0.7))
    optimizer = sgd(theirs.parameters())
    scheduler = ExponentialLR(optimizer, 0.7)
    bare_loop(theirs, batches, optimizer, 3, **{f"each_{unit}": scheduler.step})
    assert same(ours, theirs)
    rates = [0.1 * 0.7 ** (3 * i if unit == "step" else i - 1) for i in (1, 2, 3)]
    assert [e.learning_rate for e in history.epochs] == pytest.approx(rates)


def test_a_plateau_lowers_the_rate() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 1e-6)
    plateau = ReduceLROnPlateau(optimizer, mode="max", patience=0, eps=0)
    history = nw.fit(net, [(X, Y)], epochs=4, optimizer=optimizer, validation=[(X, Y)],
                     scheduler=plateau)
    assert [e.learning_rate for e in history.epochs] == pytest.approx([1e-6, 1e-6, 1e-7, 1e-8])


def test_accumulated_batches_make_the_step_of_one_large_batch() -> None:
    ours, theirs = network().double(), network().double()
    x, y = X.double(), Y.clone()
    y[::3] = -100  # so that batches of one size count differently
    parts = [(x[:16], y[:16]), (x[16:26], y[16:26]), (x[26:], y[26:])]
    nw.fit(ours, parts, epochs=2, optimizer=sgd, accumulate=2)
    bare_loop(theirs, [(x[:26], y[:26]), parts[2]], sgd(theirs.parameters()), 2)
    assert same(ours, theirs, tolerance=1e-12)


def test_clip_bounds_the_gradient() -> None:
    ours, theirs = network(), network()
    nw.fit(ours, [(X, Y)], epochs=1, optimizer=lambda p: torch.optim.SGD(p, 1.0), clip=0.01)
    moved = torch.cat([(p - q).flatten() for p, q in
                       zip(ours.parameters(), theirs.parameters(), strict=True)])
    assert float(moved.detach().norm()) == pytest.approx(0.01, rel=1e-3)


def test_lbfgs_finds_a_better_fit_in_fewer_passes() -> None:
    history = nw.fit(network(), [(X, Y)], epochs=3, optimizer=lambda p: torch.optim.LBFGS(
        p, line_search_fn="strong_wolfe"))
    assert history[-1].loss < 0.01
    assert nw.fit(network(), [(X, Y)], epochs=3, optimizer=sgd)[-1].loss > 0.1


def test_the_history_says_what_happened() -> None:
    history = nw.fit(network(), Batches(X, Y, 16), epochs=20, optimizer=sgd,
                     validation=Batches(X, Y, 7, shuffle=False))
    net = network()
    nw.fit(net, Batches(X, Y, 16), epochs=20, optimizer=sgd)
    assert len(history) == 20
    assert history.steps == 60
    assert history.stopped == "epochs"
    assert history[-1].metric == pytest.approx(float((net(X).argmax(1) == Y).float().mean()))
    assert history[-1].loss < history[0].loss / 2
    assert all(0 < a.seconds < b.seconds for a, b in zip(history.epochs, history.epochs[1:],
                                                         strict=False))


def test_the_epochs_loss_is_the_mean_over_samples() -> None:
    net = network()
    history = nw.fit(net, [(X[:30], Y[:30]), (X[30:], Y[30:])], epochs=1,
                     optimizer=lambda p: torch.optim.SGD(p, 0.0))
    assert history[0].loss == pytest.approx(cross_entropy(net(X), Y).item(), rel=1e-5)


# Early stopping


def test_patience_puts_the_best_weights_back() -> None:
    net, weights, scores = network(), [], iter([0.1, 0.5, 0.4, 0.5, 0.9])

    def scripted(_: Tensor, __: Tensor) -> float:
        weights.append([p.detach().clone() for p in net.parameters()])
        return next(scores)

    history = nw.fit(net, [(X, Y)], epochs=5, optimizer=sgd, validation=[(X, Y)], patience=2,
                     metric=scripted)
    assert history.stopped == "patience"
    assert [e.metric for e in history.epochs] == [0.1, 0.5, 0.4, 0.5]
    assert history.best.epoch == 2
    assert history.metric == "scripted"
    assert all(map(torch.equal, net.parameters(), weights[1]))
    assert not all(map(torch.equal, net.parameters(), weights[3]))


def test_lower_can_be_better() -> None:
    scores = iter([3.0, 2.0, 2.5, 2.5])
    history = nw.fit(network(), [(X, Y)], epochs=9, validation=[(X, Y)], patience=2,
                     metric=lambda scores_, y: next(scores), higher_is_better=False)
    assert len(history) == 4
    assert history.best.metric == 2.0


# What can be trained, and on what


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.first(left) + self.second(right)


@pytest.mark.parametrize("x", [(X, -X), {"left": X, "right": -X}])
def test_inputs_may_be_several(x: Any) -> None:
    history = nw.fit(TwoInputs(), Batches(x, Y, 10), epochs=10, optimizer=sgd,
                     validation=Batches(x, Y, 10, shuffle=False))
    assert history[-1].metric > 0.9


def test_a_whole_graph_is_one_batch() -> None:
    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            return self.linear(x + torch.zeros_like(x).index_add(0, edges[1], x[edges[0]]))

    edges = torch.randint(40, (2, 60))
    y = torch.where(torch.arange(40) < 20, Y, -100)
    data = [((X, edges), y)]
    history = nw.fit(Mix(), data, epochs=30, optimizer=sgd, validation=data)
    assert history[-1].loss < history[0].loss


def test_a_data_loader_serves() -> None:
    history = nw.fit(network(), DataLoader(TensorDataset(X, Y), 8, shuffle=True), epochs=15,
                     optimizer=sgd, validation=DataLoader(TensorDataset(X, Y), 8))
    assert history[-1].metric > 0.9


def test_frozen_and_shared_weights() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    net[2].weight = net[0].weight
    net[4].requires_grad_(False)
    before = net[4].weight.clone()
    history = nw.fit(net, Batches(X, Y, 10), epochs=10, optimizer=sgd)
    assert torch.equal(net[4].weight, before)
    assert net[2].weight is net[0].weight
    assert history[-1].loss < history[0].loss


def test_an_optimizer_may_step_some_of_the_weights() -> None:
    net = network()
    before = net[2].weight.clone()
    nw.fit(net, Batches(X, Y, 10), epochs=2, optimizer=sgd(net[0].parameters()))
    assert torch.equal(net[2].weight, before)
    largest = net[2].weight.grad.abs().max()
    assert largest < 1  # one batch's gradient, not the sum of all


def test_autocast_computes_in_bfloat16() -> None:
    seen = []

    class Watch(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            seen.append(h.dtype)
            return h

    history = nw.fit(network(Watch()), Batches(X, Y, 10), epochs=10, optimizer=sgd,
                     autocast=torch.bfloat16, validation=Batches(X, Y, 40))
    assert set(seen) == {torch.bfloat16}
    assert history[-1].metric > 0.9


class Perceptron(Rule):
    """A rule that changes the weights itself."""

    updates_weights = True

    @torch.no_grad()
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        error = nn.functional.one_hot(y, 3) - self.network(x).softmax(1)
        self.network.weight += 0.01 * error.T @ x
        return error.square().mean()


def test_a_rule_may_change_the_weights_itself() -> None:
    history = nw.fit(Perceptron(nn.Linear(6, 3)), Batches(X, Y, 10), epochs=30,
                     validation=Batches(X, Y, 10))
    assert history[-1].metric > 0.8
    assert math.isnan(history[-1].learning_rate)


def test_modes_are_put_back() -> None:
    modes = []

    class Watch(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            modes.append(self.training)
            return h

    net = network(Watch()).eval()
    nw.fit(net, [(X, Y)], epochs=1, validation=[(X, Y)])
    assert modes == [True, False]
    assert not any(module.training for module in net.modules())


def test_what_is_frozen_in_eval_mode_stays_so() -> None:
    modes: list[bool] = []

    class Watch(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            modes.append(self.training)
            return h

    frozen = nn.Sequential(nn.BatchNorm1d(12), nn.Dropout(0.9), Watch()).eval()
    net = network(frozen, nn.BatchNorm1d(12))
    nw.fit(net, Batches(X + 3, Y, 10), epochs=2, validation=[(X, Y)], metric=lambda *_: 0.0)
    assert set(modes) == {False}
    assert torch.equal(frozen[0].running_mean, torch.zeros(12))
    assert not torch.equal(net[2].running_mean, torch.zeros(12))
    assert [module.training for module in net] == [True, False, True, True, True]


def test_masks_of_minus_infinity_are_no_divergence(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("never", torch.tensor([0.0, 0.0, -math.inf]))
            self.register_buffer("unknown", torch.tensor([math.nan]))
            self.cached: Tensor | None

        def forward(self, h: Tensor) -> Tensor:
            self.register_buffer("cached", torch.full((2,), -math.inf), persistent=False)
            return h + self.never

    net = nn.Sequential(nn.Linear(6, 3), Masked())
    y = Y % 2
    assert len(nw.fit(net, [(X, y)], epochs=2, checkpoint=tmp_path)) == 2
    net[1].never[0] = math.nan
    with pytest.raises((Diverged, ValueError)):
        nw.fit(net, [(X, y)], epochs=1)


def test_a_buffer_that_overflows_is_a_divergence() -> None:
    class Overflow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.ones(2))

        def forward(self, h: Tensor) -> Tensor:
            self.count.mul_(1e30)
            return h

    with pytest.raises(Diverged, match=r"1\.count is not finite"):
        nw.fit(nn.Sequential(nn.Linear(6, 3), Overflow()), [(X, Y)] * 3, epochs=1)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(zip(X, Y, strict=True))


def test_a_stream_without_a_length_trains_and_resumes(tmp_path: Path) -> None:
    def train(epochs: int, folder: Path) -> tuple[nw.History, nn.Module]:
        net = network(nn.Dropout(0.5))
        history = nw.fit(net, DataLoader(Stream(), batch_size=16), epochs=epochs, seed=1,
                         validation=DataLoader(Stream(), batch_size=16), checkpoint=folder)
        return history, net

    history, whole = train(3, tmp_path / "whole")
    assert history.steps == 9
    train(1, tmp_path / "broken")
    assert same(train(3, tmp_path / "broken")[1], whole)


def test_sparse_gradients_are_accumulated_and_clipped() -> None:
    tokens = torch.randint(9, (12, 4), generator=Generator().manual_seed(0))
    y = tokens.sum(1) % 3

    def train(sparse: bool, **options: Any) -> Tensor:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(9, 5, sparse=sparse), nn.Flatten(), nn.Linear(20, 3))
        nw.fit(net, Batches(tokens, y, 4, shuffle=False), epochs=2,
               optimizer=lambda p: torch.optim.SGD(p, 1.0), **options)
        return net[0].weight.detach()

    for options in ({"clip": 0.01}, {"accumulate": 2}, {"accumulate": 2, "clip": 0.01}):
        torch.testing.assert_close(train(True, **options), train(False, **options))
    assert not torch.allclose(train(True, clip=0.01), train(True))


class Shuffled(Sampler):
    """A sampler that draws from a source of random numbers of one's own, or from a global one."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(X)

    def __iter__(self) -> Any:
        order = list(range(len(X)))
        self.source.shuffle(order)
        yield from order


class Noisy(Dataset):
    """Samples with noise from a generator that lies in another object, or in a closure."""

    def __init__(self) -> None:
        noise = numpy.random.default_rng(5)
        self.transforms = [lambda x: x + noise.normal()]

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.transforms[0](X[i]), Y[i]


@pytest.mark.parametrize("make", [
    lambda: DataLoader(TensorDataset(X, Y), 16, sampler=Shuffled(random)),
    lambda: DataLoader(TensorDataset(X, Y), 16, sampler=Shuffled(random.Random(3))),
    lambda: DataLoader(TensorDataset(X, Y), 16, sampler=Shuffled(numpy.random)),
    lambda: DataLoader(TensorDataset(X, Y), 16, sampler=Shuffled(numpy.random.default_rng(3))),
    lambda: DataLoader(TensorDataset(X, Y), 16, sampler=Shuffled(numpy.random.RandomState(3))),
    lambda: DataLoader(Noisy(), 16, shuffle=True),
    lambda: DataLoader(Noisy(), 16, shuffle=True, num_workers=1, persistent_workers=True),
], ids=["random", "Random", "numpy", "numpy Generator", "RandomState", "closure", "workers"])
def test_every_source_of_random_numbers_resumes(make: Callable, tmp_path: Path) -> None:
    class Stopped(torch.optim.SGD):
        steps = 0

        def step(self, closure: Any = None) -> None:
            if self.steps == self.stop:
                raise KeyboardInterrupt
            self.steps += 1
            super().step(closure)

    def train(stop: int, folder: Path) -> nn.Module:
        net = network()
        Stopped.stop = stop
        nw.fit(net, make(), epochs=3, seed=1, checkpoint=folder, checkpoint_every=1,
               optimizer=lambda p: Stopped(p, 0.1), validation=make(), progress=False)
        return net

    whole = train(99, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(4, tmp_path / "broken")
    random.seed(77)
    numpy.random.seed(77)
    torch.manual_seed(77)
    assert same(train(99, tmp_path / "broken"), whole)


def test_several_outputs_and_targets() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.first(x), self.second(x)

    def loss(outputs: tuple[Tensor, Tensor], y: dict[str, Tensor]) -> Tensor:
        return cross_entropy(outputs[0], y["kind"]) + (outputs[1] - y["size"]).square().mean()

    def metric(outputs: tuple[Tensor, Tensor], y: dict[str, Tensor]) -> float:
        return float((outputs[0].argmax(1) == y["kind"]).float().mean())

    batches = [(X[i:j], {"kind": Y[i:j], "size": X[i:j, :1]}) for i, j in ((0, 16), (16, 40))]
    history = nw.fit(Backprop(Two(), loss=loss), batches, epochs=30, optimizer=sgd,
                     validation=batches, metric=metric, accumulate=2)
    assert history[-1].loss < history[0].loss / 2
    assert history[-1].metric > history[0].metric


def test_a_seed_decides() -> None:
    def trained(seed: int) -> list[float]:
        data = DataLoader(TensorDataset(X, Y), 8, shuffle=True)
        return [e.loss for e in nw.fit(network(nn.Dropout()), data, epochs=2, seed=seed).epochs]

    assert trained(1) == trained(1)
    assert trained(1) != trained(2)


def test_on_epoch_is_told_and_may_stop_by_raising() -> None:
    told = []

    def stop(record: nw.training.Epoch) -> None:
        told.append(record.epoch)
        if record.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nw.fit(network(), [(X, Y)], epochs=9, on_epoch=stop)
    assert told == [1, 2]


# What goes wrong


@pytest.mark.parametrize(("options", "said"), [
    ({"epochs": 0}, "epochs must be at least 1, got 0"),
    ({"epochs": 1.5}, "epochs must be a whole number of at least 1, got 1.5"),
    ({"accumulate": 0}, "accumulate must be"),
    ({"patience": 2}, "patience=2 needs validation="),
    ({"checkpoint_every": 2}, "needs checkpoint="),
    ({"checkpoint": __file__}, "must be a folder, got the file"),
    ({"clip": 0}, "clip must be above 0, got 0"),
    ({"autocast": torch.float16}, "autocast must be torch.bfloat16 or None"),
    ({"scheduler_unit": "batch"}, "no scheduler unit is called 'batch'; known are epoch, step"),
    ({"optimizer": lambda p: None}, "optimizer must be a torch.optim.Optimizer"),
    ({"optimizer": sgd([nn.Parameter(torch.ones(1))])}, "none of the rule's parameters"),
    ({"optimizer": torch.optim.LBFGS, "accumulate": 2}, "cannot be used with LBFGS"),
    ({"scheduler": lambda o: 1}, "scheduler must be a learning-rate scheduler"),
    ({"scheduler": ExponentialLR(sgd([nn.Parameter(torch.ones(1))]), 0.5)}, "another optimizer"),
    ({"scheduler": ReduceLROnPlateau, "validation": [(X, Y)]}, "mode='max'"),
    ({"scheduler": ReduceLROnPlateau, "scheduler_unit": "step"}, "with ReduceLROnPlateau"),
    ({"train": []}, "train yielded no batches"),
    ({"train": iter([(X, Y)])}, "used up after one; use list"),
    ({"train": X}, "train must be an iterable of"),
    ({"train": None}, "train must be an iterable of"),
    ({"train": [X]}, r"a batch must be a pair \(x, y\)"),
    ({"train": [(X, X, Y)]}, "several inputs go into x"),
    ({"validation": []}, "validation yielded no batches"),
    ({"validation": [(X[:, :4], Y)]}, "validation cannot be judged: x is float32"),
    ({"validation": [(X, Y.float()[:, None].expand(40, 7))]}, "validation cannot be judged"),
    ({"validation": [X]}, r"a batch must be a pair \(x, y\)"),
    ({"validation": Batches(X[:, :4], Y, 8)}, "validation cannot be judged"),
    ({"validation": DataLoader(TensorDataset(X.double(), Y), 8)}, "validation cannot be judged"),
    ({"metric": 3}, "metric must be a function"),
    ({"on_epoch": 3}, "on_epoch must be a function"),
    ({"device": torch.float64}, "device must be one of this machine's"),
    ({"device": "gpu"}, "device must be one of this machine's"),
    ({"device": 1.5}, "device must be one of this machine's"),
    ({"checkpoint": ""}, "checkpoint must be the path of a folder, got ''"),
    ({"checkpoint": 3}, "checkpoint must be the path of a folder, got 3"),
    ({"tensorboard": __file__}, "tensorboard must be a folder, got the file"),
    ({"seed": -1}, "seed must be"),
    ({"seed": 1.5}, "seed must be"),
    ({"seed": 2**70}, "seed must be"),
])
def test_bad_arguments_change_nothing(options: dict, said: str) -> None:
    net = network()
    with pytest.raises(ValueError, match=said):
        nw.fit(net, **{"train": [(X, Y)], "epochs": 1, **options})
    assert same(net, network())
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in net.parameters())


@pytest.mark.parametrize("rule", [3, "model", None, nn.Linear])
def test_what_is_no_module_is_refused(rule: Any) -> None:
    with pytest.raises(ValueError, match="rule must be a rule, or a module"):
        nw.fit(rule, [(X, Y)], epochs=1)


def test_a_training_that_fails_before_its_first_step_leaves_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="check that x fits"):
        nw.fit(network(), [(X[:, :5], Y)], epochs=1, checkpoint=tmp_path / "made")
    assert not (tmp_path / "made").exists()
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="check that x fits"):
        nw.fit(network(), [(X[:, :5], Y)], epochs=1, checkpoint=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert len(nw.fit(network(), [(X, Y)], epochs=1, checkpoint=tmp_path)) == 1


def test_frozen_networks_and_needless_optimizers_are_refused() -> None:
    with pytest.raises(ValueError, match="no parameter to train"):
        nw.fit(network().requires_grad_(False), [(X, Y)], epochs=1)
    with pytest.raises(ValueError, match="Perceptron changes the weights itself"):
        nw.fit(Perceptron(nn.Linear(6, 3)), [(X, Y)], epochs=1, optimizer=sgd)


@pytest.mark.parametrize(("batch", "said"), [
    ((X[:, :5], Y), r"x is float32 \(40, 5\) and y is int64 \(40,\).*mat1 and mat2"),
    ((X, Y[:30]), r"Expected input batch_size \(40\) to match target batch_size \(30\)"),
    ((X, Y + 1), "y must be between 0 and 2"),
    ((X, Y.int()), "dtype int64"),
    ((X.double(), Y), "check that x fits the first layer"),
    ((X[:0], Y[:0]), "the batch holds no targets"),
    ((X, torch.full_like(Y, -100)), "every target in y is -100"),
    ((X.where(X < 2, torch.nan), Y), "x holds NaN in sample"),
    ((X.where(torch.arange(40)[:, None] != 5, torch.inf), Y), "x holds infinity in sample 5"),
])
def test_a_bad_batch_is_told_apart(batch: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        nw.fit(network(), [(X, Y), batch], epochs=1)
    notes = "".join(getattr(caught.value, "__notes__", []))
    assert "epoch 1, step 2" in str(caught.value) + notes


class Explode(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h * 1e30 * 1e30


def test_divergence_names_step_stage_and_checkpoint(tmp_path: Path) -> None:
    net = network(Explode())
    with pytest.raises(Diverged, match="loss is nan at epoch 1, step 1: stage '0' is the first"):
        nw.fit(net, [(X, Y)], epochs=1)
    assert same(net, network(Explode()))

    net = network()
    hot = torch.optim.SGD(net.parameters(), 1e30)
    with pytest.raises(Diverged, match=r"at epoch 2, step 2: .*stage '\d'.*" + str(tmp_path)):
        nw.fit(net, [(X, Y)], epochs=5, optimizer=hot, checkpoint=tmp_path)
    stored = load(tmp_path)
    assert stored is not None
    assert all(value.isfinite().all() for value in stored["rule"].values())


def test_divergence_of_a_network_without_stages_names_the_module() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(6, 3), nn.Sequential(nn.Linear(6, 3), Explode())

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) * self.right(x)

    with pytest.raises(Diverged, match=r"stage 'right(\.1)?' is the first|stage 'left'"):
        nw.fit(Net(), [(X, Y)], epochs=1)


def test_a_rules_own_loss_may_be_what_diverges() -> None:
    rule = Backprop(network(), loss=lambda scores, y: scores.sum() * math.inf)
    with pytest.raises(Diverged, match="output of every stage is finite"):
        nw.fit(rule, [(X, Y)], epochs=1)


def test_weights_that_are_not_finite_are_never_kept(tmp_path: Path) -> None:
    class Spoil(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            self.param_groups[0]["params"][1].data[0] = math.nan

    with pytest.raises(Diverged, match=r"network\.0\.bias is not finite after epoch 1, step 1"):
        nw.fit(network(), [(X, Y)], epochs=1, optimizer=Spoil, checkpoint=tmp_path)
    stored = load(tmp_path)
    assert stored is not None
    assert stored["at"]["step"] == 0
    with pytest.raises(Diverged, match="no checkpoint was kept"):
        nw.fit(network(), [(X, Y)], epochs=1, optimizer=Spoil)


def test_weights_without_a_shape_yet_are_not_looked_at() -> None:
    lazy = nn.Sequential(nn.Linear(X.shape[1], 8), nn.ReLU(), nn.LazyLinear(3))
    assert nw.fit(lazy, [(X, Y)], epochs=1).epochs[0].loss > 0


# What is shown


def test_tensorboard_gets_every_epoch(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    history = nw.fit(network(), Batches(X, Y, 10), epochs=3, validation=Batches(X, Y, 40),
                     tensorboard=tmp_path)
    log = EventAccumulator(str(tmp_path))
    log.Reload()
    logged = [event.value for event in log.Scalars("training/loss")]
    assert logged == pytest.approx([e.loss for e in history.epochs], rel=1e-5)
    assert [event.step for event in log.Scalars("validation/accuracy")] == [1, 2, 3]


def test_a_missing_tensorboard_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"netwright\[tensorboard\]"):
        nw.fit(network(), [(X, Y)], epochs=1, tensorboard=tmp_path)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_in_a_terminal_alone(terminal: bool,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=120)
    monkeypatch.setattr("rich.console.Console", lambda **_: console)
    nw.fit(network(), Batches(X, Y, 10), epochs=2, validation=[(X, Y)])
    assert ("epoch 2/2" in shown.getvalue()) == terminal
    assert ("accuracy" in shown.getvalue()) == terminal
    nw.fit(network(), Batches(X, Y, 10), epochs=1, progress=False)
    assert "epoch 1/1" not in shown.getvalue()

