from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import netwright as nw
from netwright.data import Batches, digits
from netwright.errors import UnknownName
from netwright.models import gpt, mlp
from netwright.objectives.losses import cross_entropy
from netwright.rules import Backprop, PipelinedBackprop
from netwright.rules.exact.pipelined_backprop import scaled_to_batch

PLAIN = {"spike_compensation": False, "prediction": None}
ALL = [PLAIN, {**PLAIN, "stash": True}, {"prediction": None}, {"spike_compensation": False},
       {}, {"prediction": "difference"}, {"horizon": 2.0, "spike_compensation": False}]


def small():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(),
                         nn.Linear(6, 3)).double()


def samples(n=12):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(n, 1, 5, generator=generator).double(),
            torch.randint(3, (n, 1), generator=generator))


def trained(rule, make=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), batches=None):
    optimizer = make(rule.parameters())
    losses = []
    for x, y in zip(*(batches or samples()), strict=True):
        optimizer.zero_grad()
        losses.append(rule(x, y))
        optimizer.step()
    return torch.stack(losses), [p.detach().clone() for p in rule.network.parameters()]


class Pipeline:
    """The paper's equations by hand, for three linear layers with tanh between, one a stage."""

    def __init__(self, network, rate, momentum, *, spike_compensation=True, prediction="velocity",
                 horizon=1.0, stash=False):
        layers = network[0], network[2], network[4]
        self.w = [[p.detach().clone() for p in layer.parameters()] for layer in layers]
        self.v = [[torch.zeros_like(p) for p in pair] for pair in self.w]
        self.last = [[p.clone() for p in pair] for pair in self.w]
        self.queues = [[] for _ in self.w]  # the weights that ran forward, by time
        self.rate, self.momentum, self.compensated = rate, momentum, spike_compensation
        self.prediction, self.horizon, self.stash = prediction, horizon, stash

    def predicted(self, s, delay):
        ahead = self.horizon * delay
        if self.prediction == "velocity":
            return [w - self.rate * ahead * v for w, v in zip(self.w[s], self.v[s], strict=True)]
        if self.prediction == "difference":
            return [w + ahead * (w - old) for w, old in zip(self.w[s], self.last[s], strict=True)]
        return [w.clone() for w in self.w[s]]

    def step(self, x, y):
        forward = []
        for s, queue in enumerate(self.queues):
            queue.append(self.predicted(s, 4 - 2 * s))
            forward.append(queue[max(0, len(queue) - 1 - (4 - 2 * s))])
        backward = forward if self.stash else self.w
        h1 = linear(x, *forward[0]).tanh()
        h2 = linear(h1, *forward[1]).tanh()
        scores = linear(h2, *forward[2]).requires_grad_()
        loss = cross_entropy(scores, y)
        (e3,) = torch.autograd.grad(loss, scores)
        e2 = (e3 @ backward[2][0]) * (1 - h2 ** 2)
        e1 = (e2 @ backward[1][0]) * (1 - h1 ** 2)
        for s, (e, h) in enumerate([(e1, x), (e2, h1), (e3, h2)]):
            delay, m = 4 - 2 * s, self.momentum
            a = m ** delay if self.compensated else 1.0
            b = (1 - m ** delay) / (1 - m) if self.compensated else 0.0
            gradients = [e.T @ h, e.sum(0)]
            self.last[s] = [w.clone() for w in self.w[s]]
            self.v[s] = [m * v + g for v, g in zip(self.v[s], gradients, strict=True)]
            self.w[s] = [w - self.rate * (a * v + b * g) for w, v, g in
                         zip(self.w[s], self.v[s], gradients, strict=True)]
        return loss.detach()


@pytest.mark.parametrize("options", ALL, ids=str)
def test_losses_and_weights_are_those_of_the_papers_equations(options):
    torch.manual_seed(0)
    network = small()
    by_hand = Pipeline(network, 0.1, 0.9, **options)
    losses, weights = trained(PipelinedBackprop(network, **options))
    expected = torch.stack([by_hand.step(x, y) for x, y in zip(*samples(), strict=True)])
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(weights, [p for pair in by_hand.w for p in pair], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_equations_tell_every_variant_from_every_other():
    torch.manual_seed(0)
    network = small()
    ends = [trained(PipelinedBackprop(deepcopy(network), **options))[1][0] for options in ALL]
    for i, a in enumerate(ends):
        for b in ends[:i]:
            assert (a - b).abs().max() > 1e-5


class Signals(nn.Module):
    """What a queue of activations gives: each stage at each time, as a pipeline runs."""

    def __init__(self, network, rate):
        super().__init__()
        self.layers, self.rate = [network[:2], network[2:4], network[4:]], rate

    def run(self, batches):
        waiting, graphs, labels = {0: {}, 1: {}, 2: {}}, [{}, {}, {}], {}
        errors = {0: {}, 1: {}}
        n = len(batches[0])
        for time in range(n + 4):
            steps = []
            if time < n:
                waiting[0][time], labels[time] = batches[0][time], batches[1][time]
            for s, layer in enumerate(self.layers):
                sample = time - s
                if sample in waiting[s]:
                    copy = deepcopy(layer)  # backward must not see these weights, save in stash
                    start = waiting[s].pop(sample).detach().requires_grad_()
                    graphs[s][sample] = (start, copy(start), copy)
            for s in (2, 1, 0):
                sample = time - 4 + s
                if sample in graphs[s] and (s == 2 or sample in errors[s]):
                    steps.append((s, sample))
            for s in (0, 1):
                sample = time - s
                if sample in graphs[s]:
                    waiting[s + 1][sample] = graphs[s][sample][1]
            for s, sample in steps:
                start, end, copy = graphs[s].pop(sample)
                if s == 2:
                    cross_entropy(end, labels[sample]).backward()
                else:
                    end.backward(errors[s].pop(sample))
                if s:
                    errors[s - 1][sample] = start.grad
                with torch.no_grad():
                    for p, q in zip(self.layers[s].parameters(), copy.parameters(), strict=True):
                        p -= self.rate * q.grad


def test_it_does_what_a_pipeline_with_queues_of_activations_does():
    torch.manual_seed(0)
    network = small()
    ours = deepcopy(network)
    Signals(network, 0.1).run(samples())
    rule = PipelinedBackprop(ours, **PLAIN, stash=True)
    trained(rule, lambda p: torch.optim.SGD(p, 0.1))
    for a, b in zip(ours.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
                                  lambda p: torch.optim.AdamW(p, 0.01)])
def test_without_delay_it_is_backpropagation_bit_for_bit(make):
    torch.manual_seed(0)
    network = small()
    loss, weights = trained(Backprop(deepcopy(network)), make)
    ours = trained(PipelinedBackprop(network, delays=[0, 0, 0]), make)
    assert torch.equal(ours[0], loss)
    assert all(map(torch.equal, ours[1], weights))


def test_the_two_predictions_are_one_without_spike_compensation():
    torch.manual_seed(0)
    network = small()
    ends = [trained(PipelinedBackprop(deepcopy(network), spike_compensation=False,
                                      prediction=form))[1] for form in ("velocity", "difference")]
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_spike_compensation_moves_a_constant_gradient_as_far_in_the_end():
    weight = nn.Linear(1, 1, bias=False).double()
    network = nn.Sequential(weight, nn.Linear(1, 1, bias=False).double())
    moved = {}
    for compensated in (True, False):
        model = deepcopy(network)
        rule = PipelinedBackprop(model, momentum=0.5, delays=[6, 0], prediction=None,
                                 spike_compensation=compensated,
                                 loss=lambda scores, y: scores.mean())
        model[1].requires_grad_(False)
        optimizer = torch.optim.SGD(rule.parameters(), 0.1, momentum=0.5)
        before = model[0].weight.item()
        for t in range(40):
            optimizer.zero_grad()
            rule(torch.full((1, 1), float(t == 0), dtype=torch.float64), torch.zeros(1))
            optimizer.step()
            if not t:
                first = model[0].weight.item() - before
        moved[compensated] = first, model[0].weight.item() - before
    (first, end), (plain_first, plain_end) = moved[True], moved[False]
    assert end == pytest.approx(plain_end, rel=1e-9)  # a gradient counts as much in all
    a, b = 0.5 ** 6, (1 - 0.5 ** 6) / 0.5
    assert first == pytest.approx((a + b) * plain_first, rel=1e-9)  # and what is late at once


def test_calls_between_steps_are_one_update():
    torch.manual_seed(0)
    network, (x, y) = small(), samples()
    copy = deepcopy(network)
    one = PipelinedBackprop(network, loss=lambda scores, y: 2 * cross_entropy(scores, y))
    two = PipelinedBackprop(copy)
    halves = [x.view(6, 2, 5), y.view(6, 2)]
    trained(one, batches=halves)
    optimizer = torch.optim.SGD(two.parameters(), 0.1, momentum=0.9)
    for a, b in zip(*halves, strict=True):
        optimizer.zero_grad()
        for i in range(2):
            two(a[i:i + 1], b[i:i + 1])
        optimizer.step()
    assert int(two.updates) == int(one.updates) == 5
    for p, q in zip(network.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [PLAIN, {}, {"prediction": "difference"}], ids=str)
def test_half_a_training_and_its_state_make_a_whole_one(options):
    torch.manual_seed(0)
    network = small()
    x, y = samples()
    whole = deepcopy(network)
    trained(PipelinedBackprop(whole, **options), lambda p: torch.optim.SGD(p, 0.1))
    rule = PipelinedBackprop(network, **options)
    trained(rule, lambda p: torch.optim.SGD(p, 0.1), (x[:7], y[:7]))
    again = PipelinedBackprop(small(), **options)
    again.load_state_dict(rule.state_dict())
    trained(again, lambda p: torch.optim.SGD(p, 0.1), (x[7:], y[7:]))
    assert all(map(torch.equal, again.network.parameters(), whole.parameters()))


def test_weights_put_in_before_the_first_call_are_where_the_pipeline_begins():
    torch.manual_seed(0)
    other = small()
    rule = PipelinedBackprop(small())
    rule.network.load_state_dict(other.state_dict())
    ours, exact = trained(rule), trained(PipelinedBackprop(other))
    assert torch.equal(ours[0], exact[0])
    assert all(map(torch.equal, ours[1], exact[1]))


def test_a_parameter_of_several_stages_has_the_first_ones_delay():
    shared = nn.Linear(6, 6)
    network = nn.Sequential(nn.Linear(5, 6), shared, nn.Tanh(), shared, nn.Linear(6, 3)).double()
    rule = PipelinedBackprop(network)
    assert rule.delays == [6, 4, 2, 0]
    assert rule.forward_weights_1.shape == (5, 6 * 6 + 6)
    assert trained(rule)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_tokens_and_mixed_precision(dtype):
    torch.manual_seed(0)
    network = gpt(12, 6, width=8, depth=3)
    network[1].mlp_in.to(dtype)
    network[1].mlp_in.register_forward_pre_hook(lambda _, h: (h[0].to(dtype),))
    network[1].mlp_in.register_forward_hook(lambda _m, _i, out: out.float())
    x = torch.randint(12, (8, 1, 6))
    losses, weights = trained(PipelinedBackprop(network, x[0]),
                              lambda p: torch.optim.SGD(p, 0.01, momentum=0.9), (x, x))
    assert losses.isfinite().all()
    assert {w.dtype for w in weights} == {torch.float32, dtype}


def test_recurrent_layers_and_autocast():
    torch.manual_seed(0)

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.head = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.gru(x)[0])

    network, x, y = Recurrent(), torch.randn(9, 1, 5, 4), torch.randint(3, (9, 1, 5))
    rule = PipelinedBackprop(nw.stages(network, x[0], cuts=["gru", "head"]))
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = trained(rule, lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), (x, y))
    assert losses.isfinite().all()
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32
               for p in network.parameters())


def test_compensation_wins_back_what_delays_lose():
    """A quadratic with a delay of 8 steps, where the paper finds how fast each can be."""
    ends = {}
    for name, options in [("exact", {**PLAIN, "delays": [0, 0]}), ("late", PLAIN), ("ours", {}),
                          ("predicted", {"spike_compensation": False}),
                          ("compensated", {"prediction": None})]:
        network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
        nn.init.ones_(network[0].weight)
        nn.init.ones_(network[1].weight).requires_grad_(False)
        rule = PipelinedBackprop(network, **{"delays": [8, 0], **options},
                                 loss=lambda scores, y: (scores - y).square().sum() / 2)
        ones, zeros = torch.ones(120, 1, 1).double(), torch.zeros(120, 1, 1).double()
        losses, _ = trained(rule, lambda p: torch.optim.SGD(p, 0.01, momentum=0.9), (ones, zeros))
        ends[name] = losses[-20:].max().item()
    assert ends["exact"] < 1e-4
    assert ends["late"] > 0.02
    for name in ("ours", "predicted", "compensated"):
        assert ends[name] < 0.05 * ends["late"]


def test_learns_what_frozen_hidden_layers_do_not():
    split = digits()
    x, y = split.x_train.flatten(1), split.y_train

    def train(network, labels):
        rule = PipelinedBackprop(network)
        optimizer = torch.optim.Adam([p for p in rule.parameters() if p.requires_grad], 5e-3)
        for _ in range(150):
            batch = torch.randint(len(x), (32,))
            optimizer.zero_grad()
            rule(x[batch], labels[batch])
            optimizer.step()
        scores = rule.predict(split.x_test.flatten(1))
        return (scores.argmax(1) == split.y_test).float().mean().item()

    for seed in range(3):
        torch.manual_seed(seed)
        frozen = mlp(64, 10, hidden=(64, 16))
        frozen[:-1].requires_grad_(False)
        learned = train(mlp(64, 10, hidden=(64, 16)), y)
        assert learned > 0.7
        assert learned > train(frozen, y) + 0.1
        assert train(mlp(64, 10, hidden=(64, 16)), y[torch.randperm(len(y))]) < 0.35


def test_it_trains_by_fit():
    x, y = samples(20)
    rule = PipelinedBackprop(small())
    history = nw.fit(rule, Batches(x[:, 0], y[:, 0], 4), epochs=2, progress=False,
                     validation=Batches(x[:, 0], y[:, 0], 20, shuffle=False))
    assert len(history) == 2
    assert int(rule.updates) == 9  # that of the tenth step would be seen by an eleventh call
    assert rule.predict(x[:, 0]).shape == (20, 3)


def test_scaled_hyperparameters():
    assert scaled_to_batch(0.1, 0.9, 32, 32) == (pytest.approx(0.1), pytest.approx(0.9))
    rate, momentum = scaled_to_batch(0.1, 0.9, 32)
    assert momentum ** 32 == pytest.approx(0.9)
    # the same sum of steps for each sample
    assert rate / (1 - momentum) == pytest.approx(0.1 / (1 - 0.9) / 32)
    assert scaled_to_batch(rate, momentum, 1, 32) == (pytest.approx(0.1), pytest.approx(0.9))
    with pytest.raises(ValueError, match="momentum must be at least 0 and below 1, got 1"):
        scaled_to_batch(0.1, 1, 32)
    with pytest.raises(ValueError, match="new_batch_size must be at least 1, got 0"):
        scaled_to_batch(0.1, 0.9, 32, 0)


def test_errors():
    network = mlp(5, 3, hidden=(6,))
    with pytest.raises(ValueError, match="momentum must be at least 0 and below 1, got 1"):
        PipelinedBackprop(network, momentum=1.0)
    with pytest.raises(UnknownName, match="did you mean velocity"):
        PipelinedBackprop(network, prediction="velocty")
    with pytest.raises(ValueError, match="horizon must be at least 0"):
        PipelinedBackprop(network, horizon=-1)
    with pytest.raises(ValueError, match=r"delays must be 2 whole numbers .* got \[1\]"):
        PipelinedBackprop(network, delays=[1])
    with pytest.raises(ValueError, match="weight must have a shape"):
        PipelinedBackprop(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3)))
    rule, (x, y) = PipelinedBackprop(network), samples()
    before = deepcopy(rule.state_dict())
    with pytest.raises(ValueError, match="between 0 and 2"):
        rule(x[0].float(), y[0] + 3)
    assert all(torch.equal(before[name], value) for name, value in rule.state_dict().items())
    network.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        rule(x[0].float(), y[0])
