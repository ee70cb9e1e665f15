from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag, linear

from netwright import checks
from netwright.anatomy.layers import beyond_weights
from netwright.blocks.feedforward.feed_forward import (
    GLU,
    Activation,
    FeedForward,
    activation_module,
)
from netwright.catalogue.facets import method

__all__ = ["GLUExperts"]

_aten = torch.ops.aten
# By an activation's type: its slope times `grad`, of its input and its output.
_SLOPES: dict[type[nn.Module], Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    nn.SiLU: lambda grad, x, y: _aten.silu_backward(grad, x),
    nn.GELU: lambda grad, x, y: _aten.gelu_backward(grad, x),
    nn.ReLU: lambda grad, x, y: _aten.threshold_backward(grad, y, 0),
    nn.Sigmoid: lambda grad, x, y: _aten.sigmoid_backward(grad, y),
    nn.Tanh: lambda grad, x, y: _aten.tanh_backward(grad, y),
    nn.Identity: lambda grad, x, y: grad}
_PARTS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")


@method("block", papers=["003-001"], place="experts", takes=("dim", "hidden", "n_experts"),
        batch=lambda: (torch.randn(6, 8), torch.tensor([2, 0, 3, 1])))
class GLUExperts(nn.Module):
    """Gated feed-forward experts whose weights lie in one tensor for each layer.

    y = W2_e (s(W_e x) * (V_e x)),  e being the row's expert.

    The same experts as a list of `GLU`s, with three parameters where that has three for each.

    Args:
        dim: size of a row.
        hidden: size of each branch, as for `GLU`.
        n_experts: how many experts.
        activation: a name, or what makes a module.
        out: size of the result, `dim` where none is given.
        bias: whether the layers have one.
        generator: draws the weights; the global state without one.

    Shapes: rows (rows, dim), sorted by expert; counts, the rows of each expert; y (rows, out).

    Raises:
        ValueError: a size is below 1.
        UnknownName: no activation is called that.

    Paper: Jiang, Sablayrolles, Roux, et al., 2024, Mixtral of Experts.

    >>> GLUExperts(16, 32, n_experts=3)(torch.zeros(10, 16), [5, 0, 5]).shape
    torch.Size([10, 16])
    """

    def __init__(self, dim: int, hidden: int | None = None, n_experts: int = 8, *,
                 activation: Activation = "silu", out: int | None = None, bias: bool = False,
                 generator: Generator | None = None) -> None:
        super().__init__()
        hidden = 8 * -(-dim // 3) if hidden is None else hidden
        out = dim if out is None else out
        checks.count(1, dim=dim, hidden=hidden, n_experts=n_experts, out=out)
        self.dim, self.n_experts, self.out = dim, n_experts, out
        self.activation = activation_module(activation)
        for name, rows, inputs in (("gate", hidden, dim), ("up", hidden, dim),
                                   ("down", out, hidden)):
            for part, shape in ((name, (rows, inputs)), (name + "_bias", (rows,))):
                weight = nn.Parameter(torch.empty(n_experts, *shape))
                nn.init.uniform_(weight, -inputs ** -0.5, inputs ** -0.5, generator=generator)
                self.register_parameter(part, None if part.endswith("bias") and not bias
                                        else weight)

    def forward(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Return (rows, out); the first counts[0] rows are the first expert's, and so on."""
        return torch.cat([self.expert(i, part) for i, part in enumerate(rows.split(list(counts)))])

    def expert(self, i: int, x: Tensor) -> Tensor:
        """Return what expert `i` makes of x (rows, dim)."""
        parts: list[Any] = [getattr(self, name) for name in _PARTS]
        mine: list[Any] = [None if p is None else p[i] for p in parts]
        gate, up, down, *biases = mine
        gated = self.activation(linear(x, gate, biases[0])) * linear(x, up, biases[1])
        return linear(gated, down, biases[2])


class Bank(NamedTuple):
    """The weights of experts that one pass can run."""

    activation: nn.Module
    parameters: list[Tensor | None]  # gate, up, down and their biases, stacked or expert by expert
    stacked: bool

    def cast(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, "Bank"]:
        """Return x and the weights in another type."""
        return x.to(dtype), self._replace(parameters=[
            None if p is None else p.to(dtype) for p in self.parameters])

    def run(self, x: Tensor, weights: Tensor, rows: Tensor, inverse: Tensor | None,
            counts: Sequence[int]) -> Tensor:
        """Return (tokens, out): each token's sum of its experts' outputs times their weights.

        The pairs are sorted by expert: weights and rows (the tokens) (pairs,); inverse (tokens, k)
        says where each token's pairs lie, or is None where tokens differ in how many they have.
        """
        kept = torch.is_grad_enabled() and any(
            p is not None and p.requires_grad for p in (x, weights, *self.parameters))
        result: Tensor = _GroupedGLU.apply(x, weights, rows, inverse, counts, self.activation,
                                           self.stacked, kept, *self.parameters)
        return result


def bank_of(experts: nn.Module) -> tuple[Bank | None, int]:
    """Return the weights of the experts that can be run in one pass, and how many they are.

    They can where all are `GLUExperts`; else those from the first on that are `GLU`, or two-layer
    `FeedForward`, with the same sizes and the same activation, without dropout to be drawn, and
    of which nothing has more to it than its weights: no hooks, no `forward` of its own, as
    offloading gives it, and no quantised or distributed parameters.
    """
    if isinstance(experts, GLUExperts):
        plain = type(experts) is GLUExperts and _known(experts.activation) and not (
            beyond_weights(experts))
        parts = [getattr(experts, name) for name in _PARTS]
        return (Bank(experts.activation, parts, True), experts.n_experts) if plain else (None, 0)
    found: list[Tensor | None] = []
    activation, kind, many = None, None, 0
    for expert in experts.children():
        layers = _layers(expert)
        if layers is None:
            break
        mine = type(layers[0]), [None if p is None else (p.shape, p.dtype) for p in layers[1]]
        if kind not in (None, mine):
            break
        activation, kind, many = layers[0], mine, many + 1
        found += layers[1]
    return (None, 0) if activation is None else (Bank(activation, found, False), many)


def _layers(expert: nn.Module) -> tuple[nn.Module, list[Tensor | None]] | None:
    layers: list[Any]
    if type(expert) is GLU and (not expert.dropout.p or not expert.training):
        activation, layers = expert.activation, [expert.gate, expert.up, expert.down]
    elif type(expert) is FeedForward and len(expert) == 3:
        activation, layers = expert[1], [None, expert[0], expert[2]]
    else:
        return None
    if (not _known(activation) or any(map(beyond_weights, expert.modules()))
            or any(layer is not None and (type(layer) is not nn.Linear or "weight" not in
                                          layer._parameters) for layer in layers)):
        return None
    return activation, [*(None if layer is None else layer.weight for layer in layers),
                        *(None if layer is None else layer.bias for layer in layers)]


def _known(activation: nn.Module) -> bool:
    return (type(activation) in _SLOPES and not getattr(activation, "inplace", False)
            and getattr(activation, "approximate", "none") == "none"
            and not beyond_weights(activation))


class _GroupedGLU(torch.autograd.Function):
    """Every expert on its rows, with only the two branches kept for the backward pass.

    The backward pass gathers x and the gradient again, makes the gated product again, and has the
    weights' gradient without the experts' outputs: <dy, W2 h> = <W2^T dy, h>.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, rows: Tensor,
                inverse: Tensor | None, counts: Sequence[int], activation: nn.Module,
                stacked: bool, kept: bool, *parameters: Tensor | None) -> Tensor:
        ctx.counts, ctx.activation, ctx.stacked = counts, activation, stacked
        gate, up, down, *biases = _banks(parameters, stacked)
        size, hidden = (len(rows) if kept else max(counts)), down[0].shape[1]
        ups = x.new_empty(size, hidden)
        gates = None if gate[0] is None else torch.empty_like(ups)
        y = x.new_empty(len(rows), len(down[0]))
        for e, here in _segments(counts):
            mine = x.index_select(0, rows[here])
            place = here if kept else slice(0, len(mine))
            u = _product(mine, up[e], biases[1][e], ups[place])
            if gates is None:
                h = activation(u)
            else:
                g = _product(mine, gate[e], biases[0][e], gates[place])
                h = activation(g)
                h = h * u if h is g else h.mul_(u)  # an identity returns what is kept
            _product(h, down[e], biases[2][e], y[here]).mul_(weights[here, None])
        if kept:
            ctx.save_for_backward(x, weights, rows, inverse, gates, ups, *parameters)
        return _gathered(y, rows, inverse, len(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weights, rows, inverse, gates, ups, *parameters = ctx.saved_tensors
        gate, up, down, *biases = _banks(parameters, ctx.stacked)
        needs = ctx.needs_input_grad[8:]
        grads = [torch.empty_like(p) if ctx.stacked and need else None
                 for p, need in zip(parameters, needs, strict=True)]
        for whole in grads:
            for e, count in enumerate(ctx.counts):
                if whole is not None and not count:
                    whole[e].zero_()
        dx = x.new_empty(len(rows), x.shape[1]) if ctx.needs_input_grad[0] else None
        dweights = torch.empty_like(weights) if ctx.needs_input_grad[1] else None

        def into(part: int, e: int) -> Tensor | None:
            """Where the gradient of a part of expert e is to be written."""
            i = part if ctx.stacked else e * len(_PARTS) + part
            if not needs[i]:
                return None
            if not ctx.stacked:
                grads[i] = torch.empty_like(parameters[i])
                return grads[i]
            whole = grads[i]
            return None if whole is None else whole[e]

        for e, here in _segments(ctx.counts):
            mine, signal = x.index_select(0, rows[here]), grad.index_select(0, rows[here])
            w, u, g = weights[here, None], ups[here], None if gates is None else gates[here]
            a = ctx.activation(u if g is None else g)
            h = a if g is None else a * u
            dh = signal @ down[e]
            if dweights is not None:
                dweights[here] = torch.linalg.vecdot(dh, h)
                if biases[2][e] is not None:
                    dweights[here] += signal @ biases[2][e]
            signal.mul_(w)
            _write(into(2, e), into(5, e), signal, h)
            dh.mul_(w)
            slope = _SLOPES[type(ctx.activation)]
            if g is None:
                du = slope(dh, u, a)
            else:
                dg = slope(dh * u, g, a)
                du = dh.mul_(a)
                _write(into(0, e), into(3, e), dg, mine)
            _write(into(1, e), into(4, e), du, mine)
            if dx is not None:
                torch.mm(du, up[e], out=dx[here])
                if g is not None:
                    dx[here].addmm_(dg, gate[e])
        dx = None if dx is None else _gathered(dx, rows, inverse, len(x))
        return dx, dweights, None, None, None, None, None, None, *grads


def _banks(parameters: Sequence[Any], stacked: bool) -> list[Any]:
    """Return, for each part, what gives that of expert e when indexed with e."""
    parts = len(_PARTS)
    if stacked:
        return [_Nothing() if p is None else p for p in parameters]
    return [parameters[i::parts] for i in range(parts)]


class _Nothing:
    def __getitem__(self, e: int) -> None:
        return None


def _segments(counts: Sequence[int]) -> list[tuple[int, slice]]:
    """Return each expert that has rows, and where they lie."""
    found, start = [], 0
    for e, count in enumerate(counts):
        if count:
            found.append((e, slice(start, start + count)))
        start += count
    return found


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def _write(weight: Tensor | None, bias: Tensor | None, signal: Tensor, x: Tensor) -> None:
    if weight is not None:
        torch.mm(signal.t(), x, out=weight)
    if bias is not None:
        torch.sum(signal, 0, out=bias)


def _gathered(y: Tensor, rows: Tensor, inverse: Tensor | None, tokens: int) -> Tensor:
    """Return each token's sum of its rows of y."""
    if inverse is not None and inverse.numel():
        return embedding_bag(inverse, y, mode="sum")
    return y.new_zeros(tokens, y.shape[1]).index_add_(0, rows, y)
