import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.blocks.reversible.block import ReversibleBlock
from netwright.catalogue.facets import method
from netwright.errors import MissingExtra, UnknownName
from netwright.reversing.engine import Add, Update, no_strangers, run
from netwright.runtime.modes import rehearsing

__all__ = ["ReversibleHeun", "odeint"]

State = Tensor | Sequence[Tensor]

_checked: weakref.WeakKeyDictionary[nn.Module, set[tuple[bool, bool]]] = (
    weakref.WeakKeyDictionary())


@method(
    "block",
    papers=["001-013"],
    place="residual stream",
    takes=("f", "ts"),
    saves=["training memory"],
    network=lambda: ReversibleHeun(TurningField(), torch.tensor([0.0, 1.0]), steps=2),
    batch=lambda: ((torch.randn(3, 4), torch.randn(3, 4)),),
)
class ReversibleHeun(ReversibleBlock):
    """Solve dy/dt = f(t, y) by a method whose every step can be undone.

    As published, on the solution y and a second estimate z, with one evaluation f_n = f(t_n, z_n)
    for each step: z_{n+1} = 2 y_n - z_n + h f_n;  y_{n+1} = y_n + h (f_n + f_{n+1}) / 2.

    Here the y are eliminated: z_{n+1} = z_{n-1} + (h_{n-1} + h_n) f(t_n, z_n), so that a step is
    one addition and the two streams are the last two z. With h = 0 before the first and after the
    last step, their mean is y: a solve starts in (y_0, y_0), and y_N is half the sum of what
    it ends in. It takes one evaluation for each step, and one more.

    The error falls with the square of the step. The method damps nothing: where f pulls solutions
    together, the two streams drift apart, so that stiff problems need short steps.

    Args:
        f: A module that takes a time and y, and returns dy/dt.
        ts: The times, rising or falling, of which the first and the last matter, and where
            `steps` change their length.
        steps: The steps from each time to the next.

    Shapes: two streams of any one shape in, the same out; ts (times,); f (), shape -> shape.

    Raises:
        ValueError: `ts` or `steps` cannot be what they are, or f changes its input's shape.

    Paper: Kidger, Foster, Li, Lyons, 2021, Efficient and Accurate Gradients for Neural SDEs.

    >>> class Decay(nn.Module):
    ...     def forward(self, t, y):
    ...         return -y
    >>> solve, y0 = ReversibleHeun(Decay(), torch.tensor([0., 1.]), steps=100), torch.ones(3)
    >>> ends = solve((y0, y0))
    >>> torch.allclose((ends[0] + ends[1]) / 2, torch.tensor(-1.0).exp(), atol=1e-4)
    True
    >>> torch.allclose(solve.inverse(ends)[0], y0, atol=1e-4)
    True
    """

    streams = None
    ts: Tensor

    def __init__(self, f: nn.Module, ts: Tensor, steps: int = 1) -> None:
        super().__init__()
        _check(f, ts, steps)
        self.f, self.number = f, steps
        self.register_buffer("ts", ts, persistent=False)

    def updates(self, outputs: bool = False) -> list[Update]:
        """Return the steps; with `outputs`, also what fills one more stream for each inner time."""
        ts, number = self.ts, self.number
        gaps = ts.diff() / number
        inner = ts[:-1, None] + gaps[:, None] * torch.arange(number, device=ts.device)
        times = torch.cat([inner.flatten(), ts[-1:]]).unbind()
        lengths: Any = gaps.repeat_interleave(number)
        lengths = list(lengths.unbind()) if ts.requires_grad else lengths.tolist()
        found: list[Update] = []
        for n, (t, before, after) in enumerate(zip(times, [0.0, *lengths], [*lengths, 0.0],
                                                   strict=True)):
            write = n % 2
            reads, name = (1 - write,), f"step {n} of the solver"
            if outputs and n % number == 0 and 0 < n < len(lengths):
                found.append(_Output(name, self.f, reads, (write, 1 + n // number),
                                     (t, before, after)))
            else:
                found.append(_Step(name, self.f, reads, write, (t, before + after)))
        return found


@method("companion", papers=["001-013"], saves=["training memory"])
def odeint(f: nn.Module, y0: State, ts: Tensor, *, solver: str = "reversible_heun",
           backward: str | None = None, steps: int = 1, rtol: float = 1e-7, atol: float = 1e-9,
           options: dict[str, Any] | None = None) -> Any:
    """Return the solution of dy/dt = f(t, y), y(ts[0]) = y0, at every time of `ts`.

    The gradients for y0, the parameters of f and, by `ReversibleHeun`, `ts` come by one of three
    ways back. "reconstruct" undoes the solver's steps, so that nothing is stored between the
    times, and gives the gradients of what was computed, to rounding. "store" keeps all that
    every evaluation made, and gives the same. "adjoint" solves an equation for the gradients
    backwards in time: its memory does not grow either, but the gradients are off by what both
    solves miss.

    Args:
        f: A module that takes a time (a tensor without dimensions) and y, and returns dy/dt.
        y0: The state at ts[0]: a tensor, or a tuple of tensors that f takes and returns.
        ts: The times, rising or falling.
        solver: "reversible_heun", or the name of one of torchdiffeq's solvers: dopri5, rk4, ...
        backward: "reconstruct", "store" or "adjoint"; by default "reconstruct" where the solver is
            reversible, which only reversible_heun is, else "adjoint".
        steps: The steps from each time to the next, of solvers whose steps are given.
        rtol: The relative error that is allowed to a step, of solvers that choose their steps.
        atol: The absolute one.
        options: What torchdiffeq takes as `options`.

    Shapes: y0 (*size); ts (times,); returns (times, *size), or a tuple of such.

    Raises:
        MissingExtra: `solver` is torchdiffeq's, which is not installed.
        UnknownName: no solver, or no way back, is called so.
        ValueError: `backward` is not one that the solver has; y0, ts or steps cannot be what they
            are; f does not return the shape of y.
        CannotReverse: f changes y in place, or uses a tensor that needs a gradient and is not
            its own parameter.

    Paper: Kidger, 2022, On Neural Differential Equations.

    >>> class Spiral(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.turn = nn.Linear(2, 2, bias=False)
    ...     def forward(self, t, y):
    ...         return self.turn(y)
    >>> f, y0, ts = Spiral(), torch.randn(16, 2), torch.linspace(0, 1, 5)
    >>> ys = odeint(f, y0, ts, steps=10)
    >>> ys[-1].square().mean().backward()
    >>> ys.shape, f.turn.weight.grad.shape
    (torch.Size([5, 16, 2]), torch.Size([2, 2]))
    """
    if not isinstance(y0, Tensor):
        packed = _Packed(f, y0)
        ys = odeint(packed, packed.pack(y0), ts, solver=solver, backward=backward, steps=steps,
                    rtol=rtol, atol=atol, options=options)
        return packed.unpack(ys)
    reversible = solver == "reversible_heun"
    backward = backward or ("reconstruct" if reversible else "adjoint")
    checks.one_of(["reconstruct", "store", "adjoint"], way_back=backward)
    if backward == ("adjoint" if reversible else "reconstruct"):
        raise ValueError(f"backward={backward!r} is none of the ways back from {solver!r}; "
                         + ("take 'reconstruct' or 'store', or one of torchdiffeq's solvers"
                            if reversible else "take 'adjoint' or 'store', or reversible_heun"))
    if not y0.is_floating_point():
        raise ValueError(f"y0 must have a floating-point dtype, got {y0.dtype}; make it .float()")
    _check(f, ts, steps)
    origin: nn.Module = getattr(f, "origin", f)
    seen = _checked.setdefault(origin, set())
    kind = torch.is_grad_enabled(), origin.training  # what one does not show may be in another
    first = kind not in seen
    if not reversible:
        if first and backward == "adjoint" and torch.is_grad_enabled():
            _see_parameters(f, y0, ts)
        ys = _by_torchdiffeq(f, y0, ts, solver, backward, steps, rtol, atol, options)
    else:
        ys = _solved(ReversibleHeun(f, ts.to(y0), steps), y0, backward, first=first)
    seen.add(kind)
    return ys


def _see_parameters(f: nn.Module, y0: Tensor, ts: Tensor) -> None:
    """Raise CannotReverse where f uses what needs a gradient and is not its own parameter.

    The adjoint solves for the gradients of f's parameters, y0 and ts alone.
    """
    with rehearsing(f), torch.enable_grad():
        y = y0.detach().requires_grad_().view_as(y0)
        t = ts[0].detach().to(y0).requires_grad_()
        no_strangers(f"f, {type(f).__name__}", [f(t, y)], [y, t, *f.parameters()])


def _solved(solver: ReversibleHeun, y0: Tensor, backward: str, *, first: bool) -> Tensor:
    """Return y at every time of the solver; `first` looks for what takes time to see."""
    streams = [y0, y0, *[torch.zeros_like(y0) for _ in solver.ts[1:-1]]]
    if backward == "store":
        a, b, *inner = solver(streams, outputs=True)
    else:
        a, b, *inner = run(solver.updates(outputs=True), streams, first=first)
    return torch.stack([y0, *inner, (a + b) / 2])


class _Step(Add):
    """z_{n+1} = z_{n-1} + (h_{n-1} + h_n) f(t_n, z_n)."""

    def make(self, reads: Sequence[Tensor]) -> Tensor:
        """Return what is added."""
        t, length = self.args
        return _slope(self.module, t, reads[0]) * length


class _Output(Update):
    """The same step, and  y_n = (z_{n-1} + z_n + h_{n-1} f(t_n, z_n)) / 2  for the caller."""

    def make(self, reads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return f(t_n, z_n) and z_n."""
        return _slope(self.module, self.args[0], reads[0]), reads[0]

    def change(self, x: Sequence[Tensor], made: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Return z_{n+1} and y_n."""
        (slope, z), (_, before, after) = made, self.args
        return [(x[0] + (before + after) * slope).to(x[0].dtype),
                x[1] + ((x[0] + z + before * slope) / 2).to(x[1].dtype)]

    def restore(self, y: Sequence[Tensor], made: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Return z_{n-1} and the zeros in the place of y_n."""
        slope, (_, before, after) = made[0], self.args
        return [(y[0] - (before + after) * slope).to(y[0].dtype), torch.zeros_like(y[1])]


def _slope(f: nn.Module | None, t: Tensor, y: Tensor) -> Tensor:
    assert f is not None
    slope = f(t, y)
    if not isinstance(slope, Tensor) or slope.shape != y.shape:
        got = tuple(slope.shape) if isinstance(slope, Tensor) else type(slope).__name__
        raise ValueError(f"f must return dy/dt in the shape of y, {tuple(y.shape)}, got {got}")
    return slope


class _Packed(nn.Module):
    """A module of several states as one of a single vector."""

    def __init__(self, f: nn.Module, states: Sequence[Tensor]) -> None:
        super().__init__()
        self.f, self.shapes = f, [state.shape for state in states]

    @property
    def origin(self) -> nn.Module:
        """The module that is looked at once, though this one is made for each solve."""
        return self.f

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        slopes = self.f(t, self.unpack(y))
        if [slope.shape for slope in slopes] != self.shapes:
            raise ValueError("f must return the slope of each state in its shape, "
                             f"{[tuple(s) for s in self.shapes]}, got "
                             f"{[tuple(slope.shape) for slope in slopes]}")
        return self.pack(slopes)

    def pack(self, states: Sequence[Tensor]) -> Tensor:
        return torch.cat([state.flatten() for state in states])

    def unpack(self, y: Tensor) -> tuple[Tensor, ...]:
        parts = y.split([shape.numel() for shape in self.shapes], -1)
        return tuple(part.unflatten(-1, shape) if len(shape) else part.squeeze(-1)
                     for part, shape in zip(parts, self.shapes, strict=True))


def _check(f: nn.Module, ts: Tensor, steps: int) -> None:
    if not isinstance(f, nn.Module):
        raise ValueError(f"f must be an nn.Module, so that its parameters are known, got "
                         f"{type(f).__name__}; put it into the forward of one")
    if ts.ndim != 1 or len(ts) < 2 or not ts.is_floating_point():
        raise ValueError(f"ts must be at least two times in one dimension, of a floating-point "
                         f"dtype, got {tuple(ts.shape)} of {ts.dtype}")
    gaps = ts.detach().diff()
    if not (bool((gaps > 0).all()) or bool((gaps < 0).all())):
        raise ValueError("ts must rise, or fall, from each time to the next, got "
                         f"{ts.detach().tolist()[:6]}")
    checks.count(1, steps=steps)


def _by_torchdiffeq(f: nn.Module, y0: Tensor, ts: Tensor, solver: str, backward: str, steps: int,
                    rtol: float, atol: float, options: dict[str, Any] | None) -> Tensor:
    try:
        import torchdiffeq
        from torchdiffeq._impl.odeint import SOLVERS
        from torchdiffeq._impl.solvers import FixedGridODESolver
    except ImportError as error:
        raise MissingExtra(f"solver={solver!r} needs torchdiffeq, which is not installed ({error});"
                           " pip install 'netwright[flows]', or take reversible_heun") from error
    if solver not in SOLVERS:
        raise UnknownName("solver", solver, ["reversible_heun", *SOLVERS])
    if steps != 1 and not issubclass(SOLVERS[solver], FixedGridODESolver):
        raise ValueError(f"steps must be 1 with {solver!r}, which chooses its steps by rtol and "
                         f"atol, got {steps}; add times to ts for more outputs")
    options = dict(options or {})
    if steps != 1:
        options["grid_constructor"] = lambda f, y, t: _grid(t, steps)
    solve = torchdiffeq.odeint_adjoint if backward == "adjoint" else torchdiffeq.odeint
    return solve(f, y0, ts.to(y0), rtol=rtol, atol=atol, method=solver, options=options)


def _grid(ts: Tensor, steps: int) -> Tensor:
    inner = ts[:-1, None] + ts.diff()[:, None] * torch.arange(steps, device=ts.device) / steps
    return torch.cat([inner.flatten(), ts[-1:]])


class TurningField(nn.Module):
    """A field of four numbers that turns with time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        field: Tensor = torch.tanh(self.layer(y)) * torch.cos(t)
        return field
