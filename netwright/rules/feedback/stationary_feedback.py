from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import dropout, linear
from torch.nn.utils.rnn import PackedSequence

from netwright import checks
from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.rule import Rule, checked, output_for
from netwright.stages import Stages

__all__ = ["StationaryFeedback"]

RECURRENT = (nn.RNN, nn.GRU, nn.LSTM)


@method(
    "rule",
    papers=["003-183"],
    saves=["backpropagation"],
    needs=["labels", "a recurrent network"],
    search={"memory": (2.0, 200.0)},
    variants={"plain": {}, "fixed feedback": {"feedback": 0.5}},
    network=lambda: nn.Sequential(nn.Linear(20, 16), _Last(), nn.Linear(16, 12), nn.Tanh(),
                                  nn.Linear(12, 3)),
)
class StationaryFeedback(Rule):
    """Train recurrent layers with a gradient that a fixed diagonal matrix carries back in time.

    h_t = cell(x_t, h_{t-1});  e_t = what reaches h_t from above at time t;
    delta_t := e_t + a delta_{t+1} in place of e_t + (dh_{t+1}/dh_t)^T delta_{t+1};
    dL/dw := sum_t (dh_t/dw)^T delta_t, dL/dx_t := (dh_t/dx_t)^T delta_t, with h_{t-1} held.

    a is a number for each unit and the same at all times, so that the deltas are found for all
    times in log2(steps) additions, and one cell run over all steps at once gives every gradient:
    backward takes nothing in turn. Forward runs twice, in turn for the states and at once for
    the graph, and loses no step of memory in between. All else in the network gets the exact
    gradient of what reaches it.

    By default a is what each unit keeps of itself where its gates are at their biases: the sigmoid
    of the update gate's bias in a GRU and of the forget gate's in an LSTM's c_t, 0 for its h_t,
    and the diagonal of W_hh, within -1 and 1, without gates. With `memory` a = exp(-1 / tau), the
    tau spread evenly on a logarithmic scale from 1 step to `memory` and dealt out to the units at
    random: longer than what the layer itself keeps, which turns the gradient away from the exact
    one, and reaches back where that fades (the paper's own choice of values was not to be had).
    `feedback` gives a instead, a number or a tensor of one for each unit; 0 is backpropagation
    cut off after one step.

    An LSTM has two states, and each its own a: deltas of c_t are carried by one, those of
    h_t = o_t tanh(c_t) by the other. Stacked and bidirectional layers each have theirs, every
    layer's deltas passing exactly to the layer below. Where `feedback` is W of a linear recurrence
    h_t = W h_{t-1} + ..., W diagonal, the gradient is exact.

    Args:
        memory: the longest tau, in steps of time, at least 1; by default a follows the layer.
        feedback: a, in its place: a number or one for each unit.

    Shapes: x_t (batch, inputs), h_t and delta_t (batch, units), a (units,); x and y as the network
    and the loss take them.

    Raises:
        ValueError: the network holds no nn.RNN, nn.GRU or nn.LSTM, or one with `proj_size`; one
            is given a PackedSequence; `memory` is below 1, `feedback` has not a number for each
            unit, or nothing in the network is trainable.

    Paper: Caillon, Fagnou, Allauzen, 2025, Fast Training of Recurrent Neural Networks with
    Stationary State Feedbacks.

    >>> from torch import nn
    >>> class Last(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.gru, self.head = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 3)
    ...     def forward(self, x):
    ...         return self.head(self.gru(x)[0][:, -1])
    >>> rule = StationaryFeedback(Last(), memory=20)
    >>> rule(torch.randn(2, 15, 4), torch.tensor([0, 2])).requires_grad
    False
    >>> rule.feedback_0.shape
    torch.Size([8])
    """

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 memory: float | None = None, feedback: float | Tensor | None = None,
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        checks.at_least(1, memory=memory, optional=True, advice="it is a number of steps; try as "
                        "many as the network has to look back")
        self.loss, self.memory = loss, memory
        found = [(name, module) for name, module in self.network.named_modules()
                 if isinstance(module, RECURRENT)]
        if not found:
            raise ValueError("network must hold an nn.RNN, nn.GRU or nn.LSTM to carry gradients "
                             f"back in time in, got none in {type(self.network).__name__}; train "
                             "it with another rule, such as Backprop")
        self._recurrent: list[tuple[nn.RNNBase, int]] = []  # with the number of its first feedback
        count = 0
        for name, module in found:
            if module.proj_size:
                raise ValueError(f"{name} must have states of one size, got proj_size="
                                 f"{module.proj_size}; project by a linear layer behind it")
            self._recurrent.append((module, count))
            states = 2 if isinstance(module, nn.LSTM) else 1
            for i in range(module.num_layers * (1 + module.bidirectional) * states):
                a = (_given(feedback, module) if feedback is not None
                     else _kept(module, *divmod(i, states)) if memory is None
                     else self._spread(module, memory))
                self.register_buffer(f"feedback_{count}", a)
                count += 1

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add the approximate gradient to `.grad`; return the detached loss."""
        with self._carrying():
            loss = checked(self.loss, output_for(self.loss, self.network, x), y)
        if not loss.requires_grad:
            raise ValueError("network has no trainable parameters; set requires_grad on some")
        loss.backward()
        return loss.detach()

    def _spread(self, module: nn.RNNBase, memory: float) -> Tensor:
        like, units = _like(module), module.hidden_size
        device = like.device if self.generator is None else self.generator.device
        places = torch.randperm(units, generator=self.generator, device=device).to(like.device)
        share = (places + 0.5) / units
        return torch.exp(-memory ** -share.double()).to(like.dtype)

    @contextmanager
    def _carrying(self) -> Iterator[None]:
        """Let the recurrent layers run so that backward takes the fixed way."""
        before = [module.__dict__.get("forward") for module, _ in self._recurrent]
        try:
            for module, first in self._recurrent:
                module.__dict__["forward"] = self._runner(module, first)
            yield
        finally:
            for (module, _), own in zip(self._recurrent, before, strict=True):
                del module.__dict__["forward"]
                if own is not None:
                    module.__dict__["forward"] = own

    def _runner(self, module: nn.RNNBase, first: int) -> Callable[..., tuple[Tensor, Any]]:
        def run(x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
            return _run(module, x, hx, lambda i: self.get_buffer(f"feedback_{first + i}"))
        return run


def carried(h: Tensor, a: Tensor) -> Tensor:
    """Return `h`, whose gradient at each step will be its own and `a` times the next step's.

    delta_t = e_t + a delta_{t+1}

    Shapes: h (steps, *, units); a (units,).

    >>> h = torch.zeros(3, 1, requires_grad=True)
    >>> carried(h, torch.tensor([0.5]))[-1].sum().backward()
    >>> h.grad.flatten()
    tensor([0.2500, 0.5000, 1.0000])
    """
    return _Carried.apply(h, a)


class _Carried(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor, None]:
        (a,) = ctx.saved_tensors
        delta, shift = e, 1
        a = a.to(e.dtype)
        while shift < len(e):  # delta sums over 2 shift steps after this
            nearer = delta.clone()
            nearer[:-shift].addcmul_(delta[shift:], a)
            delta, shift, a = nearer, 2 * shift, a * a
        return delta, None


def _given(feedback: float | Tensor, module: nn.RNNBase) -> Tensor:
    like = _like(module)
    a = torch.as_tensor(feedback, dtype=like.dtype, device=like.device)
    if a.ndim and a.shape != (module.hidden_size,):
        raise ValueError(f"feedback must be a number, or a tensor of {module.hidden_size}, one for "
                         f"each unit, got {tuple(a.shape)}")
    return a.expand(module.hidden_size).clone()


@torch.no_grad()
def _kept(module: nn.RNNBase, layer: int, state: int) -> Tensor:
    """Return the share of itself that each unit keeps from step to step, its gates at their biases.

    `state` is 0 for h_t, 1 for an LSTM's c_t.
    """
    weights = [getattr(module, name) for name in module._all_weights[layer]]
    if isinstance(module, nn.LSTM) and not state:
        return torch.zeros_like(weights[1][0])
    if not isinstance(module, (nn.LSTM, nn.GRU)):
        return weights[1].diagonal().clamp(-1, 1).clone()
    if not module.bias:
        return torch.full_like(weights[1][0], 0.5)
    # the second gate of both: the GRU's update gate, the LSTM's forget gate
    bias = weights[2] + weights[3]
    return bias[module.hidden_size:2 * module.hidden_size].sigmoid()


def _like(module: nn.RNNBase) -> Tensor:
    return module.get_parameter("weight_hh_l0").detach()


def _run(module: nn.RNNBase, x: Tensor, hx: Any,
         feedback: Callable[[int], Tensor]) -> tuple[Tensor, Any]:
    """Return what `module(x, hx)` returns, in a graph whose gradients take the fixed way."""
    if isinstance(x, PackedSequence):
        raise ValueError(f"{type(module).__name__} must be given a padded tensor, got a "
                         "PackedSequence; leave the packing out, and padding out of the loss")
    single, lstm = x.ndim == 2, isinstance(module, nn.LSTM)
    if single:
        x = x.unsqueeze(1)
    elif module.batch_first:
        x = x.transpose(0, 1)
    if x.ndim != 3 or x.shape[-1] != module.input_size:
        raise ValueError(f"{type(module).__name__} takes {module.input_size} features a step, got "
                         f"an input of shape {tuple(x.shape)}")
    directions, names = 1 + module.bidirectional, module._all_weights
    if hx is None:
        zeros = x.new_zeros(module.num_layers * directions, x.shape[1], module.hidden_size)
        starts = [zeros] * (1 + lstm)
    else:
        given: list[Tensor] = [hx] if isinstance(hx, Tensor) else list(hx)
        starts = [start.unsqueeze(1) if single else start for start in given]
    ends: list[tuple[Tensor, ...]] = []
    for layer in range(module.num_layers):
        if layer and module.dropout:
            x = dropout(x, module.dropout, module.training)
        outputs = []
        for direction in range(directions):
            i = layer * directions + direction
            weights = [getattr(module, name) for name in names[i]]
            reads = x.flip(0) if direction else x
            carriers = [feedback(i * len(starts) + k) for k in range(len(starts))]
            states = _layer(module, weights, reads, [start[i] for start in starts], carriers)
            ends.append(tuple(state[-1] for state in states))
            outputs.append(states[0].flip(0) if direction else states[0])
        x = torch.cat(outputs, -1) if directions == 2 else outputs[0]
    last = [torch.stack(parts) for parts in zip(*ends, strict=True)]
    if single:
        x, last = x.squeeze(1), [part.squeeze(1) for part in last]
    elif module.batch_first:
        x = x.transpose(0, 1)
    return x, (tuple(last) if lstm else last[0])


def _layer(module: nn.RNNBase, weights: Sequence[Tensor], x: Tensor, starts: Sequence[Tensor],
           carriers: Sequence[Tensor]) -> list[Tensor]:
    """Return the states h, and c of an LSTM, at all steps."""
    w_in, w_back = weights[:2]
    b_in, b_back = weights[2:] if module.bias else (None, None)
    with torch.no_grad():
        start = [state.to(x.dtype).unsqueeze(0) for state in starts]
        kind = module.mode.lower()
        states, *_ = getattr(torch, kind)(x, start if len(start) == 2 else start[0], list(weights),
                                          module.bias, 1, 0.0, False, False, False)
    before = torch.cat([starts[0].unsqueeze(0).to(states.dtype), states[:-1]])
    read, back = linear(x, w_in, b_in), linear(before, w_back, b_back)
    if isinstance(module, nn.LSTM):
        write, keep, new, show = (read + back).chunk(4, -1)
        write, keep, new, show = write.sigmoid(), keep.sigmoid(), new.tanh(), show.sigmoid()
        with torch.no_grad():
            cells, added = [starts[1].to(states.dtype)], write * new
            for t in range(len(x) - 1):
                cells.append(torch.addcmul(added[t], keep[t], cells[-1]))
        kept = torch.stack(cells)
        if starts[1].requires_grad:
            kept = torch.cat([starts[1].unsqueeze(0), kept[1:]])
        c = carried(keep * kept + write * new, carriers[1])
        return [carried(show * c.tanh(), carriers[0]), c]
    if isinstance(module, nn.GRU):
        (r, z, n), (r_back, z_back, n_back) = read.chunk(3, -1), back.chunk(3, -1)
        update = (z + z_back).sigmoid()
        new = (n + (r + r_back).sigmoid() * n_back).tanh()
        return [carried((1 - update) * new + update * before, carriers[0])]
    active = torch.relu if module.nonlinearity == "relu" else torch.tanh
    return [carried(active(read + back), carriers[0])]


class _Last(nn.Module):
    """Reads 16 features as 4 steps of 4, and gives the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 16, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        last: Tensor = self.gru(h.unflatten(1, (4, 4)))[0][:, -1]
        return last
