from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils._pytree import tree_map_only

from netwright import checks
from netwright.catalogue.facets import method
from netwright.generative.flows.flow import Flow, Transform
from netwright.generative.flows.odeint import TurningField, odeint
from netwright.reversing.engine import Regroup, Step, Stored

__all__ = ["FFJORD"]


@method(
    "generative",
    papers=["001-008"],
    place="whole network",
    takes=("net", "size"),
    search={"trace": ["hutchinson", "exact"]},
    network=lambda: FFJORD(TurningField(), 4, trace="exact", solver="reversible_heun",
                           steps=100),
)
class FFJORD(Flow, Transform):
    """A density that flows: samples move by an equation whose slope is any network.

    dx/dt = net(t, x) for t from 0 to `time`, data to base;  z = x(time);
    log_det = int tr(d net / dx) dt;  log p(x) = log p_base(z) + log_det.

    The trace is exact, by one vector-Jacobian product for each number of a sample, or estimated
    from one product: tr(J) = E[e^T J e], with the same e = +1 or -1 all along a solve, so that
    the log_det of a sample is unbiased and the solver sees a smooth equation. e is drawn from the
    global random state at each call.

    Gradients are those of `odeint`: by torchdiffeq's adjoint for its solvers, by reconstruction
    for "reversible_heun". Either stores nothing between the steps.

    Args:
        net: Takes a time (a tensor without dimensions), x and, where one is given, a condition,
            and returns dx/dt. It must treat the samples of a batch one by one.
        size: The size of a sample.
        solver: Of `odeint`: dopri5 or another of torchdiffeq's, or reversible_heun.
        trace: "hutchinson" or "exact".
        time: Where the flow ends.
        steps: The steps of solvers whose steps are given.
        rtol: The relative error allowed to a step, of solvers that choose their steps.
        atol: The absolute one.
        backward: Of `odeint`.
        base: A distribution of samples of that size, the standard normal one by default.

    Shapes: x and z (batch, *size); net (), (batch, *size)[, condition] -> (batch, *size);
    log_prob and log_det (batch,).

    Raises:
        MissingExtra: `solver` is torchdiffeq's, which is not installed.
        UnknownName: no trace is called so.
        ValueError: `x` has not the size of a sample, or `time` is not above 0.

    Paper: Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud, 2019, FFJORD: Free-form Continuous
    Dynamics for Scalable Reversible Generative Models.

    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.hidden, self.out = nn.Linear(3, 16), nn.Linear(16, 2)
    ...     def forward(self, t, x):
    ...         return self.out(self.hidden(torch.cat([x, t.expand(len(x), 1)], 1)).tanh())
    >>> flow = FFJORD(Net(), size=2, solver="reversible_heun", steps=8)
    >>> flow.log_prob(torch.randn(5, 2)).shape, flow.sample(7).shape
    (torch.Size([5]), torch.Size([7, 2]))
    """

    def __init__(self, net: nn.Module, size: int | Sequence[int], *, solver: str = "dopri5",
                 trace: str = "hutchinson", time: float = 1.0, steps: int | None = None,
                 rtol: float = 1e-5, atol: float = 1e-5, backward: str | None = None,
                 base: Distribution | None = None) -> None:
        super().__init__([], size, base)
        checks.one_of(["hutchinson", "exact"], trace=trace)
        checks.above(0, time=time)
        self.net, self.solver, self.trace, self.time = net, solver, trace, time
        self.options = {"steps": steps or (20 if solver == "reversible_heun" else 1),
                        "rtol": rtol, "atol": atol, "backward": backward}

    def forward(self, x: Tensor, condition: Any = None) -> tuple[Tensor, Tensor]:
        """Return z and log |det dz/dx|, estimated or exact."""
        self._check(x)
        if torch.is_inference_mode_enabled():  # where nothing can be differentiated, not net either
            with torch.inference_mode(False), torch.no_grad():
                return self(x.clone(), tree_map_only(Tensor, Tensor.clone, condition))
        noise = None
        if self.trace == "hutchinson":
            noise = torch.randint_like(x, 2, requires_grad=False).mul_(2).sub_(1)
        start = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], 1)
        # What needs a gradient at the first step as at the others has no leaf inside.
        start = start.requires_grad_() if torch.is_grad_enabled() else start
        z, log_det = self._solve(start, condition, noise, [0.0, self.time], traced=True)
        return z.reshape(x.shape), log_det[:, 0]

    def inverse(self, z: Tensor, condition: Any = None) -> Tensor:
        """Return the x that flows to `z`, as nearly as the solver solves."""
        self._check(z)
        x, _ = self._solve(z.flatten(1), condition, None, [self.time, 0.0], traced=False)
        return x.reshape(z.shape)

    def steps(self, condition: Any = None) -> list[Step]:
        """Return the flow as a step of another flow, which solves it again on the way back."""
        def joined(streams: list[Tensor]) -> list[Tensor]:
            return [torch.cat([streams[0].flatten(1), streams[1][:, None]], 1)]

        def split(streams: list[Tensor]) -> list[Tensor]:
            return [streams[0][:, :-1].reshape(-1, *self.size), streams[0][:, -1]]

        def solved(packed: Tensor) -> Tensor:
            packed = packed + anchor  # so that it needs a gradient, but is no leaf
            z, log_det = self(packed[:, :-1].reshape(-1, *self.size), condition)
            return torch.cat([z.flatten(1), (packed[:, -1] + log_det)[:, None]], 1)
        anchor = torch.zeros((), device=next(self.parameters(), torch.zeros(())).device,
                             requires_grad=True)
        given = [condition] if isinstance(condition, Tensor) and condition.requires_grad else []
        return [Regroup("the join before FFJORD", joined, split),
                Stored("FFJORD", solved, [self.net], [anchor, *given]),
                Regroup("the split after FFJORD", split, joined)]

    def _solve(self, start: Tensor, condition: Any, noise: Tensor | None, times: list[float], *,
               traced: bool) -> tuple[Tensor, Tensor]:
        """Return x at the second time, and what else is in its rows."""
        slope = _Slope(self.net, self.size, noise, condition, traced)
        if slope.carried:
            start = torch.cat([start, condition.flatten(1)], 1)
        ts = torch.tensor(times, dtype=start.dtype, device=start.device)
        options: dict[str, Any] = self.options
        end = odeint(slope, start, ts, solver=self.solver, **options)[-1]
        return end[:, :self.size.numel()], end[:, self.size.numel():]


class _Slope(nn.Module):
    """The slope of rows that hold a sample, its log_det where it is traced, and its condition.

    The condition is in the rows where it needs a gradient, so that all ways back give it one.
    """

    def __init__(self, net: nn.Module, size: torch.Size, noise: Tensor | None, condition: Any,
                 traced: bool) -> None:
        super().__init__()
        self.net, self.size, self.noise, self.traced = net, size, noise, traced
        self.condition = condition
        self.carried = isinstance(condition, Tensor) and condition.requires_grad

    @property
    def origin(self) -> nn.Module:
        """The module that is looked at once, though this one is made for each solve."""
        return self.net

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        n, learning = self.size.numel(), torch.is_grad_enabled()
        with torch.set_grad_enabled(learning or self.traced):
            x = y[:, :n].reshape(-1, *self.size)
            if self.traced and not x.requires_grad:
                x = x.detach().requires_grad_()
            given = self.condition
            if self.carried:
                given = y[:, n + self.traced:].reshape(self.condition.shape)
            slope = self.net(t, x) if given is None else self.net(t, x, given)
            parts = [slope.flatten(1)]
            if self.traced:
                parts.append(_trace(slope, x, self.noise, learning)[:, None])
            if self.carried:
                parts.append(torch.zeros_like(y[:, n + self.traced:]))
            row = torch.cat(parts, 1)
        return row if learning else row.detach()


def _trace(slope: Tensor, x: Tensor, noise: Tensor | None, learning: bool) -> Tensor:
    """Return tr(d slope / dx) of each sample, or its estimate along `noise`."""
    if not slope.requires_grad:
        return x.new_zeros(len(x))
    if noise is not None:
        product = torch.autograd.grad(slope, x, noise, create_graph=learning, allow_unused=True)[0]
        if product is None:
            return x.new_zeros(len(x))
        return (product * noise).flatten(1).sum(1)
    flat = slope.flatten(1)
    units = torch.eye(flat.shape[1], dtype=flat.dtype, device=flat.device)
    rows = torch.autograd.grad(flat, x, units[:, None].expand(-1, len(x), -1),
                               create_graph=learning, is_grads_batched=True, allow_unused=True)[0]
    return x.new_zeros(len(x)) if rows is None else torch.einsum("ibi->b", rows.flatten(2))
