import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from inspect import signature
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn.functional import normalize, softplus
from torch.utils._pytree import tree_leaves

from netwright import checks
from netwright.anatomy.replacing import replace
from netwright.catalogue.facets import method
from netwright.errors import CannotReverse
from netwright.generative.flows.flow import Transform
from netwright.reversing.engine import Step, Update

__all__ = ["LipSwish", "ResidualTransform", "spectral_norm"]

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
STEEPEST = 1 + 1e-4  # what rounding adds to a slope of 1


@method("block", papers=["001-072"], place="activation")
class LipSwish(nn.Module):
    """Swish, scaled so that its slope is nowhere above 1.

    h(x) = x sigmoid(b x) / 1.1;  b = softplus(beta), learnt, softplus(0.5) at first.

    Its second derivative does not vanish where its first is 1, which a residual flow's gradients
    need: they are derivatives of derivatives.

    Shapes: x and h (*).

    Paper: Chen, Behrmann, Duvenaud, Jacobsen, 2019, Residual Flows for Invertible Generative
    Modeling.

    >>> LipSwish()(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Return h(x)."""
        return x * torch.sigmoid(x * softplus(self.beta).to(x.dtype)) / 1.1


@method("companion", papers=["001-072"], keeps_function=False)
def spectral_norm(net: nn.Module, lipschitz: float = 0.98, *,
                  size: int | Sequence[int] | None = None, tolerance: float = 1e-4) -> nn.Module:
    """Return a copy of `net` whose linear and convolutional layers stretch at most by `lipschitz`.

    W -> W min(1, lipschitz / sigma(W));  sigma(W) = max |W v| / |v|, by power iteration: v is kept
    and iterated on until sigma grows by less than `tolerance` of itself, from where it was before.

    A convolution is the linear map of a whole image of the size it sees in a sample of `size`;
    that is what v is then. What has no weights (activations, norms, pools) is run on inputs of
    many scales and may nowhere stretch by more than 1. In a chain with activations of slope up to
    1 the net's Lipschitz constant is at most `lipschitz` to the number of layers.

    Shapes: the copy takes and returns what `net` does.

    Raises:
        ValueError: `lipschitz` is not between 0 and 1; a module is neither linear nor a
            convolution and has weights; an activation or another module without weights
            stretches by more than 1; there are convolutions and no `size`.

    Paper: Chen, Behrmann, Duvenaud, Jacobsen, 2019, Residual Flows for Invertible Generative
    Modeling.

    >>> net = spectral_norm(nn.Linear(4, 4), 0.5)
    >>> (net(torch.ones(1, 4)) - net(torch.zeros(1, 4))).norm() <= 0.51 * 2
    tensor(True)
    """
    checks.between(0, 1, ends=(False, False), lipschitz=lipschitz)
    net = deepcopy(net)
    found = []
    for name, module in net.named_modules():
        if isinstance(module, LAYERS):
            found.append(name)
        elif not isinstance(module, LipSwish) and [*module.parameters(recurse=False)]:
            raise ValueError("net may have weights in linear and convolutional layers only, got "
                             f"{name or 'net'}, {type(module).__name__}, whose Lipschitz constant "
                             "is not bounded; leave it out")
    if size is None and not all(isinstance(net.get_submodule(name), nn.Linear) for name in found):
        raise ValueError("size must be that of a sample where net has convolutions, got None; "
                         "their norms depend on it")
    with torch.random.fork_rng():
        _check_stretch(net, net.get_submodule(found[0]).in_features if found and size is None
                       else size)
    seen = _sizes(net, found, size)
    for name in found:
        layer: Any = net.get_submodule(name)
        bounded = _Bounded(layer, seen.get(name) or (layer.in_features,), lipschitz, tolerance)
        net = replace(net, name, bounded)
    return net


@method(
    "generative",
    papers=["001-072"],
    place="transform",
    takes=("net",),
    search={"log_det_by": ["roulette", "series", "exact"]},
    network=lambda: ResidualTransform(
        nn.Sequential(nn.Linear(4, 8), LipSwish(), nn.Linear(8, 4)), "exact"),
)
class ResidualTransform(Transform):
    """Add to a sample what a network makes of it that stretches less than 1.

    z = x + g(x),  Lip(g) < 1;  inverse: x <- z - g(x) until it stays.
    log |det(I + J)| = sum_k (-1)^(k+1) tr(J^k) / k,  J = dg/dx.

    How the log-determinant is found:

    - "roulette": the sum is stopped after n terms, n = exact_terms + Geometric(p), term k divided
      by P(n >= k), each trace estimated by v'J^k v with one v ~ N(0, I): right on average. In
      evaluation 20 terms are exact, unless `exact_terms` is more.
    - "series": the first `terms` terms, traces estimated alike: biased.
    - "exact": the dense Jacobian, for samples of up to a few dozen numbers.

    The gradient is that of another series, sum_k (-1)^k v'J^k (dJ) v, k = 0 to n, of which the
    front is summed without a graph: one graph is needed at any n. In a `Flow` it is made when the
    backward pass comes to the transform, used and freed; every sample's log-determinant may have a
    weight of its own in the loss. (The paper computes it in the forward pass, for which all samples
    must weigh alike.) The draws are the same whenever the step runs again.

    `net` is copied with `spectral_norm`, as `g`. It must treat samples one by one and draw nothing.
    Under autocast it runs in its own dtype, so that the inverse is as exact as that.

    Args:
        net: Keeps a sample's size; linear and convolutional layers, activations of slope up to 1.
        log_det_by: "roulette", "series" or "exact".
        lipschitz: The bound on each layer.
        size: The size of a sample, needed where net has convolutions.
        exact_terms: How many terms are computed at least.
        p: The parameter of the geometric distribution.
        terms: The terms of "series".
        iterations: After how many the inverse gives up.

    Shapes: x and z (batch, *size); log_det (batch,); a condition is a second argument of net.

    Raises:
        CannotReverse: the inverse does not converge.
        ValueError: an option is out of its range, or net cannot be normalised.

    Paper: Chen, Behrmann, Duvenaud, Jacobsen, 2019, Residual Flows for Invertible Generative
    Modeling.

    >>> net = nn.Sequential(nn.Linear(2, 16), LipSwish(), nn.Linear(16, 2))
    >>> transform, x = ResidualTransform(net), torch.randn(5, 2)
    >>> z, log_det = transform(x)
    >>> torch.allclose(transform.inverse(z), x, atol=1e-5), log_det.shape
    (True, torch.Size([5]))
    """

    gradient_tolerance = 1e-2  # the norms of weights are found by iteration, up to 1e-4 of them

    def __init__(self, net: nn.Module, log_det_by: Literal["roulette", "series", "exact"]
                 = "roulette", *, lipschitz: float = 0.98,
                 size: int | Sequence[int] | None = None, exact_terms: int = 2, p: float = 0.5,
                 terms: int = 10, iterations: int = 2000) -> None:
        super().__init__()
        checks.one_of(["roulette", "series", "exact"], way_to_find_log_det=log_det_by)
        checks.between(0, 1, ends=(False, False), p=p)
        checks.count(0, exact_terms=exact_terms)
        checks.count(1, terms=terms, iterations=iterations)
        self.g = spectral_norm(net, lipschitz, size=size)
        self.log_det_by, self.exact_terms, self.p = log_det_by, exact_terms, p
        self.terms, self.iterations = terms, iterations

    def steps(self, condition: Any = None) -> list[Step]:
        """Return the one step."""
        return [_Residual(self, () if condition is None else (condition,))]

    def inverse(self, z: Tensor, condition: Any = None) -> Tensor:
        """Return the x that the transform maps to `z`."""
        return self._solved(z, () if condition is None else (condition,))

    @torch.no_grad()
    def _solved(self, z: Tensor, args: Sequence[Any]) -> Tensor:
        x, before = z, math.inf
        if not z.numel():
            return z
        with _plain(z), _held(self.g):
            for _ in range(self.iterations):
                new = z - self.g(x, *args).to(z.dtype)
                # The longest step of a sample shrinks by Lip(g) each time, down to rounding.
                moved = float((new - x).flatten(1).norm(dim=1).amax())
                x, size = new, float(new.flatten(1).norm(dim=1).amax())
                rounding = torch.finfo(z.dtype).eps * size
                if moved <= rounding:
                    return x
                if not moved < before:
                    if moved <= rounding ** 0.5:
                        return x
                    break
                before = moved
        raise CannotReverse(f"x <- z - g(x) still moves by {moved:.2g}, where it must settle "
                            f"within {self.iterations} iterations: g must stretch less than 1 and "
                            "be the same whenever it is run; lower lipschitz, or give more "
                            "iterations")

    def _value(self, x: Tensor, seed: int, args: Sequence[Any],
               learns: bool) -> tuple[Tensor, Tensor]:
        """Return g(x) and the log-determinant, with their graphs where it `learns`."""
        known = [t for t in (x, *self.g.parameters(), *tree_leaves(list(args)))
                 if isinstance(t, Tensor) and t.requires_grad]
        learns = learns and bool(known)
        with _plain(x), torch.enable_grad():
            x = _Watched.apply(x, *known) if learns else x.detach().requires_grad_()
            made = self.g(x, *args)
            if made.shape != x.shape:
                raise ValueError(f"net must keep the shape {tuple(x.shape)} of what it is given, "
                                 f"got {tuple(made.shape)}")
            found = (_dense(made, x, learns) if self.log_det_by == "exact"
                     else self._estimated(made, x, seed, learns))
        return (made, found) if learns else (made.detach(), found.detach())

    def _estimated(self, made: Tensor, x: Tensor, seed: int, learns: bool) -> Tensor:
        draw = Generator().manual_seed(seed)
        v = torch.randn(x.shape, generator=draw, dtype=x.dtype).to(x.device)
        if self.log_det_by == "series":
            weights, n = [1.0] * (self.terms + 1), self.terms
        else:
            # The paper's code evaluates with 20 terms that are surely computed.
            sure = self.exact_terms if self.training else max(20, self.exact_terms)
            n = sure + int(torch.empty(()).geometric_(self.p, generator=draw))
            weights = [(1 - self.p) ** -max(0, k - sure - 1) for k in range(n + 1)]
        power, front, value = v, v, torch.zeros_like(v)
        for k in range(1, n + 1):
            (power,) = torch.autograd.grad(made, x, power, retain_graph=True)
            value = value + (-1) ** (k + 1) * weights[k] / k * power
            if self.log_det_by == "roulette" or k < n:
                front = front + (-1) ** k * weights[k] * power
        log_det = (value * v).flatten(1).sum(1)
        if not learns:
            return log_det
        (last,) = torch.autograd.grad(made, x, front, create_graph=True)
        slope = (last * v).flatten(1).sum(1)
        return log_det + (slope - slope.detach())


class _Residual(Update):
    """The step of a residual transform: what is drawn once is a seed, so that draws come again."""

    def __init__(self, transform: ResidualTransform, args: Sequence[Any]) -> None:
        super().__init__("ResidualTransform", transform, (), (0, 1), args)

    def make(self, reads: Sequence[Tensor]) -> int:
        """Return the seed of this run's draws."""
        assert isinstance(self.module, ResidualTransform)
        if self.module.log_det_by == "exact":
            return 0
        return int(torch.randint(2 ** 62, ()))

    def change(self, x: Sequence[Tensor], made: int) -> list[Tensor]:
        """Return x + g(x), and log_det with the transform's added."""
        assert isinstance(self.module, ResidualTransform)
        g, log_det = self.module._value(x[0], made, self.args, torch.is_grad_enabled())
        return [(x[0] + g).to(x[0].dtype), x[1] + log_det.to(x[1].dtype)]

    @torch.no_grad()
    def restore(self, y: Sequence[Tensor], made: int) -> list[Tensor]:
        """Return x, and log_det with the transform's taken away."""
        assert isinstance(self.module, ResidualTransform)
        x = self.module._solved(y[0], self.args)
        return [x, y[1] - self.module._value(x, made, self.args, False)[1].to(y[1].dtype)]


class _Watched(torch.autograd.Function):
    """x itself, with a node that can be differentiated by, which a new leaf would hide."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *known: Tensor) -> Tensor:
        ctx.known = len(known)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *[None] * ctx.known


def _dense(made: Tensor, x: Tensor, learns: bool) -> Tensor:
    """Return log |det(I + J)| of the Jacobian, whose rows are pulled back at once."""
    batch, size = len(x), x[0].numel()
    rows = torch.eye(size, dtype=made.dtype, device=made.device)
    rows = rows[:, None].expand(size, batch, size).reshape(size, *made.shape)
    (jacobian,) = torch.autograd.grad(made, x, rows, create_graph=learns, retain_graph=True,
                                      is_grads_batched=True)
    jacobian = jacobian.reshape(size, batch, size).transpose(0, 1)
    return torch.linalg.slogdet(jacobian + torch.eye(size, dtype=x.dtype, device=x.device))[1]


class _Bounded(nn.Module):
    """A linear or convolutional layer whose weight is shrunk to its bound."""

    direction: Tensor

    def __init__(self, layer: Any, size: Sequence[int], lipschitz: float,
                 tolerance: float) -> None:
        super().__init__()
        self.layer: Any = layer
        self.lipschitz, self.tolerance = lipschitz, tolerance
        weight = layer.weight
        start = torch.randn(1, *size, generator=Generator().manual_seed(0), dtype=torch.float64)
        self.register_buffer("direction", _unit(start).to(weight.device, torch.promote_types(
            weight.dtype, torch.float32)))
        self.held: Tensor | None = None
        with torch.no_grad():
            self._weight()

    def forward(self, x: Tensor) -> Tensor:
        weight = self._weight() if self.held is None else self.held
        return functional_call(self.layer, {"weight": weight}, (x,))

    def _weight(self) -> Tensor:
        """Return the weight, shrunk to the bound; keep the direction in which it stretches most.

        Where that direction is good enough already, it stays: to run again changes nothing.
        """
        with _plain(self.direction):
            weight = self.layer.weight.to(torch.promote_types(self.layer.weight.dtype,
                                                              torch.float32))
            with torch.no_grad():
                v = self.direction.to(weight.dtype)
                u = self._map(weight, v)
                start = v
                for _ in range(1000):
                    before, v = v, _unit(self._pulled(weight, u))
                    old, u = u.norm(), self._map(weight, v)
                    if u.norm() - old <= self.tolerance * old:
                        break
                if before is not start:  # from `before` on, one step is enough
                    self.direction = before.to(self.direction.dtype)
            sigma = (_unit(u) * self._map(weight, v)).sum()
            scale = self.lipschitz / sigma.clamp(min=self.lipschitz)
            return (weight * scale).to(self.layer.weight.dtype)

    def _map(self, weight: Tensor, v: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return v @ weight.T
        given = {"weight": weight}
        if self.layer.bias is not None:
            given["bias"] = torch.zeros_like(self.layer.bias, dtype=v.dtype)
        return functional_call(self.layer, given, (v,))

    def _pulled(self, weight: Tensor, u: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return u @ weight
        with torch.enable_grad():
            v = torch.zeros_like(self.direction, dtype=u.dtype, requires_grad=True)
            return torch.autograd.grad(self._map(weight.detach(), v), v, u)[0]


def _arguments(net: nn.Module) -> int:
    return sum(given.default is given.empty and given.kind is not given.VAR_KEYWORD
               for given in signature(net.forward).parameters.values())


def _check_stretch(net: nn.Module, size: Any) -> None:
    """Refuse modules without weights that stretch by more than 1, whatever they are."""
    size = (64,) if size is None else (size,) if isinstance(size, int) else tuple(size)
    names = [name for name, module in net.named_modules()
             if name and not [*module.children()] and not [*module.parameters()]]
    # A net with a condition is not run, since nobody knows what that is.
    shapes = _seen(net, names, size) if _arguments(net) == 1 else dict.fromkeys(names, size)
    for name, shape in shapes.items():
        module = net.get_submodule(name)
        stretch = _stretch(deepcopy(module).double().train(), shape)
        if stretch > STEEPEST:
            raise ValueError("net may have no activation, norm or other module that stretches by "
                             f"more than 1, got {name}, {type(module).__name__}, which "
                             f"stretches by {stretch:.3g}; use LipSwish or Tanh, and no norm")


def _stretch(module: nn.Module, shape: Sequence[int]) -> float:
    """Return the most by which a small change of an input was seen to grow, at six scales."""
    return max(_stretch_at(module, shape, 10.0 ** power) for power in range(-3, 3))


def _stretch_at(module: nn.Module, shape: Sequence[int], scale: float) -> float:
    """Return the largest singular value of the Jacobians at inputs of `scale`, iterated on."""
    draw = Generator().manual_seed(0)
    count = max(4, 2 ** 13 // math.prod(shape))
    start = normalize(torch.randn(count, math.prod(shape), generator=draw, dtype=torch.float64))
    start = start.view(count, *shape)
    x = scale * torch.randn(start.shape, generator=draw, dtype=start.dtype)
    v, most = start, 0.0
    with torch.enable_grad():
        for _ in range(20):
            at = x.clone().requires_grad_()
            made = module(at * 1)  # a copy, for what works in place
            u = torch.zeros_like(made, requires_grad=True)
            (back,) = torch.autograd.grad(made, at, u, create_graph=True)
            (along,) = torch.autograd.grad(back, u, v, retain_graph=True)  # J v
            most = max(most, float(along.flatten(1).norm(dim=1).amax()))
            (v,) = torch.autograd.grad(made, at, along.detach())
            length = v.flatten(1).norm(dim=1).view(-1, *[1] * len(shape))
            v = torch.where(length > 1e-100, v / length, start)
    return most


def _plain(x: Tensor) -> torch.autocast:
    """Leave autocast: what is solved for cannot be more exact than g is."""
    return torch.autocast(x.device.type, enabled=False)


@contextmanager
def _held(net: nn.Module) -> Iterator[None]:
    """Let the net's weights be shrunk once, for many runs."""
    layers = [m for m in net.modules() if isinstance(m, _Bounded)]
    for layer in layers:
        layer.held = layer._weight()
    try:
        yield
    finally:
        for layer in layers:
            layer.held = None


def _unit(x: Tensor) -> Tensor:
    return normalize(x.flatten(), dim=0).view_as(x)


def _sizes(net: nn.Module, names: Sequence[str],
           size: int | Sequence[int] | None) -> dict[str, tuple[int, ...]]:
    """Return what size each named layer's input has, given a sample of `size`."""
    if size is None:
        return {}
    return {name: shape[-1:] if isinstance(net.get_submodule(name), nn.Linear) else shape
            for name, shape in _seen(net, names, size).items()}


def _seen(net: nn.Module, names: Sequence[str],
          size: int | Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return the size of a sample of each named module's input, given one of `size`."""
    seen: dict[str, tuple[int, ...]] = {}

    def note(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[name] = tuple(args[0].shape[1:])

    hooks = [net.get_submodule(name).register_forward_pre_hook(partial(note, name))
             for name in names]
    like = next(net.parameters(), torch.zeros(()))
    try:
        with torch.no_grad():
            net(like.new_zeros(2, *([size] if isinstance(size, int) else size)))
    finally:
        for hook in hooks:
            hook.remove()
    return seen
