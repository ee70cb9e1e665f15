from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import netwright as nw
from netwright.data import Batches
from netwright.models import mlp
from netwright.objectives.losses import cross_entropy
from netwright.rules import Backprop, StationaryFeedback
from netwright.rules.feedback.stationary_feedback import carried

UNITS = 6


class Net(nn.Module):
    """A recurrent layer read at every step, or at the last."""

    def __init__(self, layer, *, last=False):
        super().__init__()
        self.layer, self.last = layer, last
        width = layer.hidden_size * (1 + layer.bidirectional)
        self.head = nn.Linear(width, 3, dtype=layer.weight_hh_l0.dtype)

    def forward(self, x):
        h, _ = self.layer(x)
        return self.head(h[:, -1] if self.last else h)


def data(steps=9, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(4, steps, 5, generator=generator).to(dtype),
            torch.randint(3, (4, steps), generator=generator))


def gradients(rule, x, y):
    rule.zero_grad()
    loss = rule(x, y)
    return loss, {name: p.grad.clone() for name, p in rule.network.named_parameters()}


def test_the_gradient_of_a_linear_recurrence_with_that_feedback_is_exact():
    torch.manual_seed(0)
    layer = nn.RNN(5, UNITS, nonlinearity="relu", batch_first=True).double()
    with torch.no_grad():
        layer.weight_hh_l0.copy_(torch.rand(UNITS).diag())
        layer.bias_ih_l0.fill_(20)  # so that every unit is above 0
    network, (x, y) = Net(layer), data()
    rule = StationaryFeedback(network, feedback=layer.weight_hh_l0.detach().diag())
    loss, ours = gradients(rule, x, y)
    exact_loss, exact = gradients(Backprop(network), x, y)
    torch.testing.assert_close(loss, exact_loss)
    for name, gradient in exact.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-10)
    _, other = gradients(StationaryFeedback(network, feedback=0.3), x, y)
    assert not torch.allclose(other["layer.weight_ih_l0"], exact["layer.weight_ih_l0"], rtol=0.1)


@pytest.mark.parametrize("steps", [1, 2, 7, 8, 13])
def test_deltas_are_those_of_the_recurrence(steps):
    a, e = torch.rand(3).double(), torch.randn(steps, 2, 3).double()
    h = torch.zeros(steps, 2, 3).double().requires_grad_()
    assert torch.equal(carried(h, a), h)
    carried(h, a).backward(e)
    delta, expected = torch.zeros(2, 3).double(), []
    for step in e.flip(0):
        delta = step + a * delta
        expected.insert(0, delta)
    torch.testing.assert_close(h.grad, torch.stack(expected))


def by_steps(layer, x):
    """Return the outputs of a layer's steps, each in a graph of its own."""
    state, steps = torch.zeros(1, len(x), UNITS).double(), []
    for t in range(x.shape[1]):
        h, state = layer(x[:, t:t + 1], state.detach())
        steps.append(h[:, 0])
    return steps


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU])
def test_gradients_are_those_of_each_step_alone_with_the_deltas_it_should_have(kind):
    torch.manual_seed(0)
    network, (x, y) = Net(kind(5, UNITS, batch_first=True).double()), data()
    rule = StationaryFeedback(network, memory=8)
    _, ours = gradients(rule, x, y)
    rule.zero_grad()
    steps = by_steps(network.layer, x)
    held = torch.stack(steps, 1).detach().requires_grad_()
    cross_entropy(network.head(held), y).backward()
    delta = torch.zeros(4, UNITS).double()
    for t in reversed(range(9)):
        delta = held.grad[:, t] + rule.feedback_0 * delta
        steps[t].backward(delta)
    for name, p in network.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-9, atol=1e-12)


def test_an_lstm_carries_its_cells_by_one_feedback_and_its_outputs_by_another():
    torch.manual_seed(0)
    network, (x, y) = Net(nn.LSTM(5, UNITS, batch_first=True).double()), data()
    rule = StationaryFeedback(network, memory=8)
    _, ours = gradients(rule, x, y)
    rule.zero_grad()
    layer, h, c, parts = network.layer, torch.zeros(4, UNITS), torch.zeros(4, UNITS), []
    h, c = h.double(), c.double()
    for t in range(9):
        gates = (x[:, t] @ layer.weight_ih_l0.T + layer.bias_ih_l0
                 + h.detach() @ layer.weight_hh_l0.T + layer.bias_hh_l0)
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c.detach() + i.sigmoid() * g.tanh()
        cut = c.detach().requires_grad_()
        h = o.sigmoid() * cut.tanh()
        parts.append((h, c, cut))
    held = torch.stack([h for h, _, _ in parts], 1).detach().requires_grad_()
    cross_entropy(network.head(held), y).backward()
    delta_h = delta_c = torch.zeros(4, UNITS).double()
    for t in reversed(range(9)):
        h, c, cut = parts[t]
        delta_h = held.grad[:, t] + rule.feedback_0 * delta_h
        h.backward(delta_h, retain_graph=True)  # the cells' gates are behind both
        delta_c = cut.grad + rule.feedback_1 * delta_c
        c.backward(delta_c)
    for name, p in network.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layer", [
    nn.RNN(5, UNITS, batch_first=True), nn.RNN(5, UNITS, nonlinearity="relu"),
    nn.GRU(5, UNITS, 2, bidirectional=True, batch_first=True), nn.GRU(5, UNITS, bias=False),
    nn.LSTM(5, UNITS, 3, batch_first=True), nn.LSTM(5, UNITS, bidirectional=True)], ids=str)
def test_losses_and_predictions_are_the_networks_own(layer):
    network, (x, y) = Net(deepcopy(layer).double()), data()
    rule = StationaryFeedback(network)
    torch.testing.assert_close(rule(x, y), cross_entropy(network(x), y).detach())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert torch.equal(rule.predict(x), network(x).detach())
    assert "forward" not in network.layer.__dict__


class Own(nn.Module):
    """Learns its first states, and reads the last ones, of sequences without a batch or with."""

    def __init__(self, kind):
        super().__init__()
        self.layer = kind(5, UNITS).double()
        self.start = nn.Parameter(torch.randn(1, 1, UNITS).double())
        self.head = nn.Linear(UNITS, 3).double()

    def forward(self, x):
        first = self.start.expand(-1, len(x), -1).contiguous()
        lstm = isinstance(self.layer, nn.LSTM)
        _, last = self.layer(x.transpose(0, 1), (first, first) if lstm else first)
        return self.head(last[1][0] if lstm else last[0])


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_states_that_are_given_and_returned_learn(kind):
    torch.manual_seed(0)
    network, (x, y) = Own(kind), data(steps=1)
    _, ours = gradients(StationaryFeedback(network, feedback=0.0), x, y[:, 0])
    _, exact = gradients(Backprop(network), x, y[:, 0])
    for name, gradient in exact.items():  # one step is nothing to carry
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-12)


def test_alignment_is_above_that_of_one_step():
    better = 0
    for seed in range(3):
        torch.manual_seed(seed)
        network, (x, y) = Net(nn.GRU(5, UNITS, batch_first=True).double()), data(steps=20)
        found = []
        for rule in (Backprop(network), StationaryFeedback(network, memory=4),
                     StationaryFeedback(network, feedback=0.0)):
            _, gradient = gradients(rule, x, y)
            found.append(torch.cat([gradient[name].flatten() for name in gradient
                                    if name.startswith("layer")]))
        ours, one = (torch.cosine_similarity(found[0], g, dim=0) for g in found[1:])
        assert ours > 0.5
        better += bool(ours > one)
    assert better == 3


def recall(seed, make, steps=12):
    """Learn to say which of 3 symbols came first, noise having followed; return the accuracy."""
    torch.manual_seed(seed)
    y = torch.randint(3, (1200,))
    x = 0.3 * torch.randn(1200, steps, 5)
    x[:, 0, :3] += 2 * nn.functional.one_hot(y, 3)
    x[:, 1:, 3] += 1
    rule = make(Net(nn.GRU(5, 16, batch_first=True), last=True))
    nw.fit(rule, Batches(x[:1000], y[:1000], 50, seed=seed), epochs=6, progress=False,
           optimizer=lambda p: torch.optim.Adam(p, 0.02))
    return (rule.predict(x[1000:]).argmax(1) == y[1000:]).float().mean().item()


def test_recalls_what_one_step_of_gradient_does_not():
    for seed in range(3):
        ours = recall(seed, lambda net: StationaryFeedback(net, memory=24))
        control = recall(seed, lambda net: StationaryFeedback(net, feedback=0.0))
        assert ours > 0.9
        assert ours > control + 0.15


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_autocast(kind):
    network, (x, y) = Net(kind(5, UNITS, 2, batch_first=True)), data(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert StationaryFeedback(network)(x, y).isfinite()
    assert all(p.grad.dtype == torch.float32 for p in network.parameters())


def test_the_generator_deals_out_the_time_constants():
    def dealt(seed):
        rule = StationaryFeedback(Net(nn.GRU(5, 50)), memory=100,
                                  generator=torch.Generator().manual_seed(seed))
        return rule.feedback_0
    assert torch.equal(dealt(1), dealt(1))
    assert not torch.equal(dealt(1), dealt(2))
    steps = -1 / dealt(1).log()
    torch.testing.assert_close(steps.sort().values, 100 ** ((torch.arange(50) + 0.5) / 50),
                               rtol=1e-3, atol=1e-3)


def test_errors():
    layer = nn.GRU(5, UNITS, batch_first=True)
    with pytest.raises(ValueError, match=r"must hold an nn\.RNN, nn\.GRU or nn\.LSTM"):
        StationaryFeedback(mlp(5, 3))
    with pytest.raises(ValueError, match=r"memory must be at least 1, got 0.5; .* steps"):
        StationaryFeedback(Net(layer), memory=0.5)
    with pytest.raises(ValueError, match=r"a tensor of 6, one for each unit, got \(5,\)"):
        StationaryFeedback(Net(layer), feedback=torch.ones(5))
    with pytest.raises(ValueError, match="proj_size=2"):
        StationaryFeedback(nn.Sequential(nn.LSTM(5, UNITS, proj_size=2)))
    network, (x, y) = Net(layer), data(dtype=torch.float32)
    rule = StationaryFeedback(network)
    with pytest.raises(ValueError, match=r"takes 5 features a step, got .* \(9, 4, 4\)"):
        rule(x[..., :4], y)

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(pack_padded_sequence(x, torch.tensor([9] * 4), batch_first=True))

    with pytest.raises(ValueError, match="must be given a padded tensor"):
        StationaryFeedback(Packed())(x, y)
    assert "forward" not in layer.__dict__
    network.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        rule(x, y)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_by_default_it_is_nearer_to_the_exact_gradient_than_cutting_off_and_as_long(kind):
    torch.manual_seed(0)
    network = Net(kind(5, 24, batch_first=True), last=True)
    x, y = torch.randn(8, 20, 5), torch.randint(3, (8,))

    def gradient(rule):
        network.zero_grad()
        rule(x, y)
        return torch.cat([p.grad.flatten() for p in network.parameters()])

    exact = gradient(Backprop(network))
    ours = gradient(StationaryFeedback(network))
    cut = gradient(StationaryFeedback(network, feedback=0.0))
    # A plain cell has no gates: its diagonal is next to nothing beside the other entries.
    assert (ours - exact).norm() < (1.05 if kind is nn.RNN else 0.8) * (cut - exact).norm()
    assert 0.7 < ours.norm() / exact.norm() < 1.4
