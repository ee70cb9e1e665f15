"""Runs steps that can be undone, and differentiates them from what they ended in."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from netwright.errors import CannotReverse
from netwright.modes import random_state, set_random_state

_BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16,
         torch.bfloat16: torch.int16}


class Update:
    """One step of a reversible block: `writes` are changed by what `module` makes of `reads`.

    m = module(*reads, *args, **options);  y = change(x, m);  x = restore(y, m).

    `reads` and `writes` number the streams, and none is in both. On the way back `module` runs
    once more; `restore` and `change` run besides, so they should be cheap. A step that is an
    addition is an `Add`, a module that has an `inverse` a `Whole`.
    """

    def __init__(self, name: str, module: nn.Module | None, reads: Sequence[int],
                 writes: Sequence[int], args: Sequence[Any] = (),
                 options: dict[str, Any] | None = None) -> None:
        self.name, self.module = name, module
        self.reads, self.writes = tuple(reads), tuple(writes)
        self.args, self.options = tuple(args), options or {}

    def make(self, reads: Sequence[Tensor]) -> Any:
        """Return what the change is made with."""
        return None if self.module is None else self.module(*reads, *self.args, **self.options)

    def change(self, x: Sequence[Tensor], made: Any) -> Sequence[Tensor]:
        """Return what stands in place of the written streams `x`."""
        raise TypeError(f"{type(self).__name__} must define change(x, made)")

    def restore(self, y: Sequence[Tensor], made: Any) -> Sequence[Tensor]:
        """Return what `change` was given."""
        raise TypeError(f"{type(self).__name__} must define restore(y, made)")

    def modules(self) -> list[nn.Module]:
        """Return the modules whose parameters the step uses."""
        return [] if self.module is None else [self.module]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.reads} -> {self.writes})"


class Add(Update):
    """The step  y = x + module(reads), the cheapest to undo."""

    def __init__(self, name: str, module: nn.Module | None, reads: Sequence[int], write: int,
                 args: Sequence[Any] = (), options: dict[str, Any] | None = None) -> None:
        super().__init__(name, module, reads, (write,), args, options)

    def change(self, x: Sequence[Tensor], made: Tensor) -> Sequence[Tensor]:
        """Return x + made."""
        return [(x[0] + made).to(x[0].dtype)]

    def restore(self, y: Sequence[Tensor], made: Tensor) -> Sequence[Tensor]:
        """Return y - made."""
        return [(y[0] - made).to(y[0].dtype)]


class Whole(Update):
    """The step of a module that has an `inverse`: that is run, and then the module once more."""

    def __init__(self, name: str, module: nn.Module, args: Sequence[Any] = (),
                 options: dict[str, Any] | None = None) -> None:
        super().__init__(name, module, (), (0,), args, options)

    def make(self, reads: Sequence[Tensor]) -> None:
        """Make nothing: the module is the change itself."""

    def change(self, x: Sequence[Tensor], made: None) -> Sequence[Tensor]:
        """Return module(x)."""
        assert self.module is not None
        return [self.module(x[0], *self.args, **self.options)]

    def restore(self, y: Sequence[Tensor], made: None) -> Sequence[Tensor]:
        """Return module.inverse(y)."""
        assert self.module is not None
        return [self.module.inverse(y[0], *self.args, **self.options)]  # type: ignore[operator]


class Regroup:
    """The step that makes other streams of the same numbers; `back` is its inverse.

    Both must move numbers and change none, as splits and concatenations do: a gradient goes back
    as a value would. Of two steps that follow each other and of which each has the other's
    `undoes`, neither is taken.
    """

    def __init__(self, name: str, there: Callable[[list[Tensor]], list[Tensor]],
                 back: Callable[[list[Tensor]], list[Tensor]], *, kind: Any = None,
                 undoes: Any = None) -> None:
        self.name, self.there, self.back = name, there, back
        self.kind, self.undoes = kind, undoes


class Stored:
    """The step of a function of the only stream that cannot be undone: its input is kept.

    `modules` are those that it runs, `tensors` what else it uses that may need a gradient.
    """

    def __init__(self, name: str, function: Callable[[Tensor], Tensor],
                 modules: Sequence[nn.Module], tensors: Sequence[Tensor] = ()) -> None:
        self.name, self.function = name, function
        self._modules, self.tensors = list(modules), list(tensors)

    def modules(self) -> list[nn.Module]:
        """Return the modules whose parameters the step uses."""
        return self._modules


Step = Update | Regroup | Stored


def chained(parts: Sequence[Sequence[Step]]) -> list[Step]:
    """Return the steps of all `parts`, without a join and a split that follow each other."""
    steps: list[Step] = []
    for step in [step for part in parts for step in part]:
        before = steps[-1] if steps else None
        if (isinstance(step, Regroup) and isinstance(before, Regroup)
                and step.kind is not None and step.undoes == before.kind):
            steps.pop()
        else:
            steps.append(step)
    return steps


@torch.compiler.disable(reason="reconstruction runs modules inside a backward pass; compile the "
                               "modules inside the reversible blocks instead")
def run(steps: Sequence[Step], streams: Sequence[Tensor], *, exact: bool = False,
        first: bool = False) -> list[Tensor]:
    """Return the streams after `steps`, of which only the last are kept for the backward pass.

    It reconstructs the others, last to first. The gradients are those of the same steps under
    autograd: what a step draws at random, the buffers that it changes and the state of autocast
    are the same when it runs again. With `exact` the rounding error of each step's way there and
    back is kept, about one byte a number, so that every stream comes back bit for bit.

    `first` also looks for what takes time to see: a step that cannot be undone, that changes a
    stream in place, or that uses a tensor which needs a gradient and is not its own.

    Where nothing needs a gradient, and inside `torch.func` and forward-mode differentiation, the
    steps just run.

    Raises:
        CannotReverse: a step changed its streams' shapes, or did what `first` looks for, or a
            stream was not finite when it came back though it had ended so.
    """
    known = _Known()
    own = [_tensors(step, known) for step in steps]
    learning = list({id(t): t for tensors in own for t in tensors}.values())
    transformed = (forward_ad._current_level >= 0
                   or torch._C._functorch.maybe_current_level() is not None)
    if (transformed or not torch.is_grad_enabled()
            or not (learning or any(stream.requires_grad for stream in streams))):
        streams = list(streams)
        for step in steps:
            streams = _there(step, streams, _Record(), known, first=first and not transformed)
        return streams
    plan = _Plan(list(steps), own, known, len(streams), exact, first)
    return list(_Run.apply(plan, *streams, *learning))


def undo(steps: Sequence[Step], streams: Sequence[Tensor]) -> list[Tensor]:
    """Return the streams that `steps` would turn into `streams`."""
    streams = list(streams)
    for step in reversed(steps):
        if isinstance(step, Stored):
            raise CannotReverse(f"{step.name} cannot be undone, since it has no inverse")
        if isinstance(step, Regroup):
            streams = step.back(streams)
            continue
        made = step.make([streams[i] for i in step.reads])
        back = step.restore([streams[i] for i in step.writes], made)
        for i, stream in zip(step.writes, back, strict=True):
            streams[i] = stream
    return streams


class _Plan:
    """What the way there leaves for the way back."""

    def __init__(self, steps: list[Step], own: list[list[Tensor]], known: "_Known", streams: int,
                 exact: bool, first: bool) -> None:
        self.steps, self.own, self.known, self.streams = steps, own, known, streams
        self.exact, self.first = exact, first
        self.records: list[_Record] = []
        self.stop = len(steps)  # no step before this one has a gradient to give


class _Known:
    """What modules consist of, looked up once where many steps run the same one."""

    def __init__(self) -> None:
        self._parameters: dict[nn.Module, list[Tensor]] = {}
        self._buffered: dict[nn.Module, list[nn.Module]] = {}

    def parameters(self, root: nn.Module) -> list[Tensor]:
        """Return the parameters that need a gradient."""
        if root not in self._parameters:
            self._parameters[root] = [p for p in root.parameters() if p.requires_grad]
        return self._parameters[root]

    def buffered(self, root: nn.Module) -> list[nn.Module]:
        """Return the modules that have buffers."""
        if root not in self._buffered:
            self._buffered[root] = [m for m in root.modules() if m._buffers]
        return self._buffered[root]


class _Sums:
    """The gradients of tensors that several steps may use."""

    def __init__(self) -> None:
        self._found: dict[int, Tensor] = {}
        self._made: set[int] = set()  # those that are sums made here, which nobody else holds

    def add(self, tensor: Tensor, gradient: Tensor) -> None:
        """Add to the gradient of `tensor`."""
        key, old = id(tensor), self._found.get(id(tensor))
        if old is None:
            self._found[key] = gradient
        elif key in self._made and not gradient.is_sparse:
            old.add_(gradient)
        else:
            self._found[key] = old + gradient
            self._made.add(key)

    def of(self, tensor: Tensor) -> Tensor | None:
        """Return the gradient of `tensor`, None where no step gave one."""
        return self._found.get(id(tensor))


class _Record:
    """What is remembered of one step, small beside its activations."""

    def __init__(self) -> None:
        self.random: Any = None  # the random state before it, if it drew
        self.buffers: list[tuple[nn.Module, str, Tensor]] = []  # those it changed, as they were
        self.norms: list[_BatchNorm] = []
        self.residues: list[_Residue] | None = None
        self.kept: Tensor | None = None
        self.needs: list[bool] = []  # by stream: whether its gradient is wanted


class _Run(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        streams, learning = list(tensors[:plan.streams]), tensors[plan.streams:]
        needs = list(ctx.needs_input_grad[1:1 + plan.streams])
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # a cast made here would have no gradient
        try:
            random = random_state()
            for k, (step, own) in enumerate(zip(plan.steps, plan.own, strict=True)):
                record = _Record()
                record.needs = needs
                if any(needs) or own:
                    plan.stop = min(plan.stop, k)
                if isinstance(step, Stored):
                    record.kept = streams[0]
                streams = _there(step, streams, record, plan.known, exact=plan.exact,
                                 first=plan.first)
                random = _note_random(record, random)
                needs = _needs_after(step, needs, bool(own), len(streams))
                plan.records.append(record)
        finally:
            torch.set_autocast_cache_enabled(cached)
        given = {id(t) for t in tensors}
        streams = [s.view_as(s) if id(s) in given else s for s in streams]
        kept = [record.kept for record in plan.records if record.kept is not None]
        ctx.plan, ctx.autocast, ctx.ends = plan, _autocast(streams), len(streams)
        ctx.save_for_backward(*streams, *kept, *learning)
        return tuple(streams)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *ends: Tensor) -> tuple[Tensor | None, ...]:
        plan, saved = ctx.plan, ctx.saved_tensors  # this also sees to it that no weight has changed
        learning = saved[len(saved) - (len(ctx.needs_input_grad) - 1 - plan.streams):]
        last, found = list(saved[:ctx.ends]), _Sums()
        streams: list[Tensor] = list(last)
        grads: list[Tensor | None] = list(ends)
        random = random_state() if any(r.random is not None for r in plan.records) else None
        try:
            with ctx.autocast():
                for k in range(len(plan.steps) - 1, plan.stop - 1, -1):
                    streams, grads = _back(plan, k, streams, grads, found)
                if not _finite(streams) and _finite(last):
                    raise _where(plan, last)
        finally:
            if random is not None:
                set_random_state(random)
        if plan.stop:
            grads = [None] * plan.streams
        gradients = [*grads, *[found.of(t) for t in learning]]
        return (None, *[g if need else None for g, need in
                        zip(gradients, ctx.needs_input_grad[1:], strict=True)])


def _tensors(step: Step, known: _Known) -> list[Tensor]:
    """Return the tensors of the step that need a gradient: parameters and arguments."""
    if isinstance(step, Regroup):
        return []
    more = step.tensors if isinstance(step, Stored) else tree_leaves((step.args, step.options))
    return [*[p for module in step.modules() for p in known.parameters(module)],
            *[t for t in more if isinstance(t, Tensor) and t.requires_grad]]


def _needs_after(step: Step, needs: list[bool], learns: bool, streams: int) -> list[bool]:
    if not isinstance(step, Update):
        return [any(needs) or learns] * streams
    new = learns or any(needs[i] for i in (*step.reads, *step.writes))
    return [new if i in step.writes else need for i, need in enumerate(needs)]


def _there(step: Step, streams: list[Tensor], record: _Record, known: _Known, *,
           exact: bool = False, first: bool = False) -> list[Tensor]:
    """Return the streams after `step`."""
    if isinstance(step, Regroup):
        return step.there(streams)
    with _noted(step, record, known):
        if isinstance(step, Stored):
            return [step.function(streams[0])]
        reads, x = [streams[i] for i in step.reads], [streams[i] for i in step.writes]
        if first:  # so that a step which writes in place spoils no stream
            reads, x = [r.clone() for r in reads], [s.clone() for s in x]
        before = _versions([*reads, *x])
        made = step.make(reads)
        y = list(step.change(x, made))
    if _versions([*reads, *x]) != before:
        raise CannotReverse(f"{step.name} changes its input in place, so that it cannot be undone; "
                            "use operations that are not in place there, such as "
                            "nn.ReLU(inplace=False)")
    for old, new in zip(x, y, strict=True):
        if not isinstance(new, Tensor) or (old.shape != new.shape and not isinstance(step, Whole)):
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise CannotReverse(f"{step.name} must keep its streams' shapes, got "
                                f"{tuple(old.shape)} and made {got} of it; what is added to a "
                                "stream must have the stream's shape")
    if exact or first:
        _look_back(step, x, y, made, record, exact)
    streams = list(streams)
    for i, stream in zip(step.writes, y, strict=True):
        streams[i] = stream
    return streams


def _look_back(step: Update, x: list[Tensor], y: list[Tensor], made: Any, record: _Record,
               exact: bool) -> None:
    """Note what restoring `y` misses of `x`, and see that it is rounding error."""
    with torch.no_grad(), _again(record):
        back = step.restore(y, made)
    for old, new, got in zip(x, back, y, strict=True):
        if not (isinstance(new, Tensor) and new.shape == old.shape):
            raise CannotReverse(f"the inverse of {step.name} gave another shape than "
                                f"{tuple(old.shape)}; it must undo the step")
        if not (old.is_floating_point() and old.numel()):
            continue
        scale = max(float(old.abs().amax()), float(got.abs().amax()), 1.0)
        error = float((old - new).abs().amax())
        if scale < float("inf") and not error <= scale * torch.finfo(old.dtype).eps ** 0.5:
            raise CannotReverse(f"{step.name} is not invertible here: restoring what it was given "
                                f"misses it by {error:.2g}, where numbers are up to {scale:.2g}; "
                                "check its inverse")
    if exact:
        record.residues = [_Residue(old, new) for old, new in zip(x, back, strict=True)]


def _back(plan: _Plan, k: int, streams: list[Tensor], grads: list[Tensor | None],
          found: "_Sums") -> tuple[list[Tensor], list[Tensor | None]]:
    """Return the streams before step `k` and their gradients; add the tensors' to `found`."""
    step, record, own = plan.steps[k], plan.records[k], plan.own[k]
    if isinstance(step, Regroup):
        filled = [torch.zeros_like(s) if g is None else g
                  for s, g in zip(streams, grads, strict=True)]
        return step.back(streams), list(step.back(filled))
    with _again(record):
        after: list[Tensor | None]
        if isinstance(step, Stored):
            assert record.kept is not None
            streams, reads, needs = [record.kept], [0], record.needs
            given = [_leaf(record.kept, needs[0])]
            with torch.enable_grad():
                outputs = [step.function(given[0])]
            signals, after = grads, [None]
        else:
            reads, needs = [*step.reads], record.needs
            given = [_leaf(streams[i], needs[i]) for i in reads]
            with torch.enable_grad():
                made = step.make(given)
            with torch.no_grad():
                x = list(step.restore([streams[i] for i in step.writes], made))
            if record.residues is not None:
                x = [r.repaired(s) for r, s in zip(record.residues, x, strict=True)]
            streams, after, signals = list(streams), list(grads), [grads[i] for i in step.writes]
            for i, stream in zip(step.writes, x, strict=True):
                streams[i] = stream
            if isinstance(step, Add):
                outputs = [made]
            else:
                reads = [*reads, *step.writes]
                x = [_leaf(stream, needs[i]) for i, stream in zip(step.writes, x, strict=True)]
                given = [*given, *x]
                with torch.enable_grad():
                    outputs = list(step.change(x, made))
                for i in step.writes:
                    after[i] = None
            del made
    if plan.first:
        _no_strangers(step, outputs, [*given, *own])
    pairs = [(o, s.to(o.dtype)) for o, s in zip(outputs, signals, strict=True)
             if s is not None and isinstance(o, Tensor) and o.requires_grad]
    wanted = [(i, t) for i, t in zip(reads, given, strict=True) if t.requires_grad]
    if pairs and (wanted or own):
        gradients = torch.autograd.grad([o for o, _ in pairs], [*[t for _, t in wanted], *own],
                                        [s for _, s in pairs], allow_unused=True)
        for (i, _), g in zip(wanted, gradients, strict=False):
            old = after[i]
            after[i] = g if old is None else old if g is None else old + g
        for t, g in zip(own, gradients[len(wanted):], strict=True):
            if g is not None:
                found.add(t, g)
    return streams, after


def _leaf(stream: Tensor, needed: bool) -> Tensor:
    """Return `stream` cut off; no leaf, since PyTorch's flop counter could not hook that."""
    stream = stream.detach()
    if not (needed and _real(stream)):
        return stream
    with torch.enable_grad():
        return stream.requires_grad_().view_as(stream)


def _real(stream: Tensor) -> bool:
    return stream.is_floating_point() or stream.is_complex()


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [t._version for t in tensors if not t.is_inference()]


@contextmanager
def _noted(step: Update | Stored, record: _Record, known: _Known) -> Iterator[None]:
    """Note in `record` which buffers the body changes, and what they were."""
    before = []
    for root in step.modules():
        for module in known.buffered(root):
            if isinstance(module, _BatchNorm) and module.training:
                record.norms.append(module)
                continue
            before += [(module, name, buffer, buffer._version, buffer.clone())
                       for name, buffer in module._buffers.items()
                       if buffer is not None and not buffer.is_inference()]
    yield
    record.buffers = [(module, name, value) for module, name, buffer, version, value in before
                      if module._buffers.get(name) is not buffer or buffer._version != version]


def _note_random(record: _Record, before: Any) -> Any:
    after = random_state()
    same = torch.equal(before[0], after[0]) and all(map(torch.equal, before[1], after[1]))
    record.random = None if same else before
    return after


@contextmanager
def _again(record: _Record) -> Iterator[None]:
    """Let the body run a step as it ran before, and leave no trace in its buffers."""
    if record.random is not None:
        set_random_state(record.random)
    norms = [norm for norm in record.norms if norm.track_running_stats]
    now = [(module, name, module._buffers[name]) for module, name, _ in record.buffers]
    for norm in norms:
        norm.track_running_stats = False  # it normalises as before, and counts nothing
    for module, name, value in record.buffers:
        module._buffers[name] = value.clone()
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        for module, name, buffer in now:
            module._buffers[name] = buffer


def _autocast(streams: list[Tensor]) -> Callable[[], Any]:
    """Return what brings back the state in which autocast is for the streams' device."""
    kind = streams[0].device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype, enabled, cache_enabled=False)


def _finite(streams: Sequence[Tensor]) -> bool:
    # A sum is one pass without a mask; it may overflow where no number is infinite.
    real = [s for s in streams if s.is_floating_point()]
    return (all(bool(s.sum(dtype=torch.float64 if s.dtype == torch.float64 else
                                 torch.float32).isfinite()) for s in real)
            or all(bool(s.isfinite().all()) for s in real))


@torch.no_grad()
def _where(plan: _Plan, last: list[Tensor]) -> CannotReverse:
    """Return the error that names the step before which a stream is not finite."""
    streams, name = last, "a step"
    for step, record in zip(reversed(plan.steps), reversed(plan.records), strict=True):
        with _again(record):
            streams = [record.kept] if record.kept is not None else undo([step], streams)
        name = step.name
        if not _finite(streams):
            break
    return CannotReverse(f"what {name} was given is no longer finite when it is reconstructed, "
                         "though what the steps ended in is; its numbers span too wide a range "
                         "for the dtype: bound its scale, use a wider dtype, or exact=True")


def _no_strangers(step: Update | Stored, outputs: Sequence[Any], known: Sequence[Tensor]) -> None:
    """Raise CannotReverse where a gradient would be lost: in a tensor that is not the step's."""
    own = {t.grad_fn for t in known if t.grad_fn is not None}
    leaves = {id(t) for t in known}
    nodes: list[Node] = [o.grad_fn for o in outputs if isinstance(o, Tensor) and o.grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node in own:
            continue
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in leaves:
            raise CannotReverse(f"{step.name} uses a tensor of shape {tuple(leaf.shape)} that "
                                "needs a gradient but is neither a parameter of it nor an "
                                "argument; make it one, or its gradient would be lost")
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                nodes.append(below)


class _Residue:
    """What a restored stream misses of the true one, in units in the last place.

    One byte a number, and the whole difference where that does not hold it.
    """

    far = -128

    def __init__(self, true: Tensor, restored: Tensor) -> None:
        self.near: Tensor | None = None
        kind = _BITS.get(true.dtype)
        if kind is None:
            return
        missing = true.contiguous().view(kind) - restored.contiguous().view(kind)
        if not bool(missing.any()):
            return
        fits = missing.abs() < -self.far  # the most negative number is its own absolute value
        fits &= missing > self.far
        self.near = torch.where(fits, missing, self.far).to(torch.int8)
        self.beyond = missing[~fits]

    def repaired(self, restored: Tensor) -> Tensor:
        """Return the true stream."""
        if self.near is None:
            return restored
        bits = restored.contiguous().view(_BITS[restored.dtype])
        missing = self.near.to(bits.dtype)
        missing[self.near == self.far] = self.beyond
        return (bits + missing).view(restored.dtype)
