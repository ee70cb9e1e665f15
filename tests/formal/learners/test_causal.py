"""Recurrent networks as delayed traces, and derivatives that unroll nothing."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, jvp, vmap

from netwright.formal.learners import Stateful, d_stateful, delayed_trace, pointwise

TIME = 7
CELL = nn.RNNCell(3, 4).double()
READOUT = nn.Linear(4, 2).double()
DELAY = delayed_trace(lambda a, s: (s, a), torch.tensor(0.0).double())


def rnn(cell=CELL):
    """The delayed trace of an Elman cell and a readout."""
    def f(a, s):
        s = cell(a, s)
        return READOUT(s), s
    return delayed_trace(f, torch.zeros(5, 4).double())


def sequence():
    return torch.randn(TIME, 5, 3).double()


def test_it_is_the_recurrent_network():
    whole = nn.RNN(3, 4).double()
    whole.load_state_dict({f"{name}_l0": p for name, p in CELL.state_dict().items()})
    x = sequence()
    torch.testing.assert_close(rnn()(x), READOUT(whole(x)[0]))


def test_gradients_through_it_are_those_of_backpropagation_through_time():
    whole = nn.RNN(3, 4).double()
    whole.load_state_dict({f"{name}_l0": p for name, p in CELL.state_dict().items()})
    x = sequence()
    ours = torch.autograd.grad(rnn()(x).square().sum(), list(CELL.parameters()))
    theirs = torch.autograd.grad(READOUT(whole(x)[0]).square().sum(), list(whole.parameters()))
    for mine, yours in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, yours)


def test_its_derivative_is_that_of_the_unrolled_network():
    x, dx = sequence(), sequence()
    _, expected = jvp(rnn(), (x,), (dx,))
    torch.testing.assert_close(d_stateful(rnn())((x, dx)), expected, rtol=1e-10, atol=1e-12)


def by_parameters():
    """The network as a computation on (parameters, input): parameters are an input that stays."""
    def f(a, s):
        p, x = a
        s = functional_call(CELL, p, (x, s))
        return READOUT(s), s
    return delayed_trace(f, torch.zeros(5, 4).double())


def test_many_directions_at_once_give_the_gradient_of_the_parameters():
    params = {name: p.detach() for name, p in CELL.named_parameters()}
    x, weight = sequence(), torch.randn(TIME, 5, 2).double()
    widths = [p.numel() for p in params.values()]
    basis = torch.eye(sum(widths)).double().split(widths, 1)
    directions = {name: b.unflatten(1, p.shape) for (name, p), b in
                  zip(params.items(), basis, strict=True)}
    still = {name: p.expand(TIME, *p.shape) for name, p in params.items()}

    def along(direction):
        moved = {name: d.expand(TIME, *d.shape) for name, d in direction.items()}
        return (d_stateful(by_parameters())(((still, x), (moved, torch.zeros_like(x))))
                * weight).sum()

    ours = vmap(along)(directions)
    theirs = jacrev(lambda p: (by_parameters()(({name: value.expand(TIME, *value.shape)
                                                  for name, value in p.items()}, x))
                               * weight).sum())(params)
    torch.testing.assert_close(ours, torch.cat([theirs[name].flatten() for name in params]))


def test_the_chain_rule():
    f, g = rnn(), delayed_trace(lambda a, s: (a * s, a + s / 2), torch.ones(5, 2).double())
    x, dx = sequence(), sequence()
    torch.testing.assert_close(d_stateful(f >> g)((x, dx)),
                               d_stateful(g)((f(x), d_stateful(f)((x, dx)))))


def test_second_derivatives_are_symmetric():
    x, u, v, zero = sequence(), sequence(), sequence(), torch.zeros(TIME, 5, 3).double()
    second = d_stateful(d_stateful(rnn()))
    one, other = second(((x, u), (v, zero))), second(((x, v), (u, zero)))
    torch.testing.assert_close(one, other)
    assert one.abs().max() > 1e-3
    _, expected = jvp(lambda x: jvp(rnn(), (x,), (u,))[1], (x,), (v,))
    torch.testing.assert_close(one, expected)


def test_it_is_linear_in_the_direction():
    d, x, u, v = d_stateful(rnn()), sequence(), sequence(), sequence()
    torch.testing.assert_close(d((x, 2 * u + v)), 2 * d((x, u)) + d((x, v)))


def test_the_trace_of_a_swap_is_a_delay():
    """The axiom of yanking would have it be the identity."""
    x = torch.arange(1.0, 6.0).double()
    assert DELAY(x).tolist() == [0, 1, 2, 3, 4]
    assert d_stateful(DELAY)((x, -x)).tolist() == [0, -1, -2, -3, -4]
    assert (DELAY >> DELAY)(x).tolist() == [0, 0, 1, 2, 3]


def test_composites_beside_each_other_and_traces_of_traces():
    x = torch.arange(1.0, 6.0).double()
    negated, delayed = (pointwise(torch.neg) @ DELAY)((x, x))
    assert torch.equal(negated, -x)
    assert torch.equal(delayed, DELAY(x))

    def second_order(a):
        x, s = a
        return s + x, x  # what is fed back is the input, past the delay below

    fibonacci = delayed_trace(pointwise(lambda a: (a[1][0], (a[1][0] + a[1][1], a[1][0]))),
                              (torch.tensor(1.0), torch.tensor(0.0)))
    assert fibonacci(torch.zeros(7)).tolist() == [1, 1, 2, 3, 5, 8, 13]
    inner = delayed_trace(pointwise(second_order), torch.tensor(0.0))
    assert inner(torch.tensor([1.0, 2.0, 3.0])).tolist() == [1, 3, 5]


def test_nothing_is_kept_of_the_past():
    """The control, backpropagation through time, keeps what grows with time."""
    def saved(run, time):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            run(torch.randn(time, 5, 3).double())
        return len(kept)

    def unrolled(x):
        return rnn()(x.requires_grad_())

    def streamed(x):
        with torch.no_grad():
            return d_stateful(rnn())((x, x))

    assert saved(streamed, 10) == saved(streamed, 20) == 0
    assert saved(unrolled, 20) > 1.9 * saved(unrolled, 10) > 0


def test_errors():
    with pytest.raises(ValueError, match=r"one length of at least 1, got \[\(7,\), \(6,\)\]"):
        (DELAY @ DELAY)((torch.zeros(7), torch.zeros(6)))
    with pytest.raises(ValueError, match=r"one length of at least 1, got \[\(0,\)\]"):
        DELAY(torch.zeros(0))
    with pytest.raises(ValueError, match=r"one length of at least 1, got \['float'\]"):
        DELAY(3.0)
    with pytest.raises(ValueError, match=r"keep its shape, \[\(3,\)\], got \[\(2, 3\)\]"):
        delayed_trace(lambda a, s: (s, a), torch.zeros(3))(torch.zeros(4, 2, 3))
    with pytest.raises(ValueError, match="what f returns must be a pair"):
        delayed_trace(lambda a, s: a, torch.zeros(3))(torch.zeros(4, 3))
    whole = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"a must be floating point .* got torch\.int64"):
        d_stateful(DELAY)((whole, whole))
    with pytest.raises(ValueError, match="a must be a pair"):
        d_stateful(DELAY)(torch.zeros(4))
    for composed in (lambda: DELAY >> 3, lambda: DELAY @ 3):
        with pytest.raises(TypeError, match="unsupported operand"):
            composed()
    with pytest.raises(ValueError, match="what step returns must be a pair"):
        Stateful((), lambda s, a: a)(torch.zeros(4))
