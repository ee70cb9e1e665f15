"""Runs steps that can be undone, and differentiates them from what they ended in."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils._pytree import tree_leaves, tree_map

from netwright.errors import CannotReverse
from netwright.runtime.random_state import RandomState, random_state, set_random_state

__all__ = ["Add", "Update"]

_BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16,
         torch.bfloat16: torch.int16}
_NARROW = (torch.float16, torch.bfloat16)
_FAR = -128  # stands for a difference of bits that one byte does not hold


class Update:
    """One step of a reversible block: `writes` are changed by what `module` makes of `reads`.

    m = module(*reads, *args, **options);  y = change(x, m);  x = restore(y, m).

    `reads` and `writes` number the streams, and none is in both. On the way back `module` runs
    once more; `restore` and `change` run besides, so they should be cheap. A step that is an
    addition is an `Add`, a module that has an `inverse` a `Whole`.

    `sums` are those of `writes` that every step only adds to and none reads: nothing depends on
    what they were, so `restore` may return them as they are.
    """

    sums: Sequence[int] = ()

    def __init__(self, name: str, module: nn.Module | None, reads: Sequence[int],
                 writes: Sequence[int], args: Sequence[Any] = (),
                 options: dict[str, Any] | None = None) -> None:
        self.name, self.module = name, module
        self.reads, self.writes = tuple(reads), tuple(writes)
        self.args, self.options = tuple(args), options or {}
        self.place = ""  # where errors say that it is

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

    def __str__(self) -> str:
        return f"{self.name} of {self.place}" if self.place else self.name


class Add(Update):
    """The step  y = x + module(reads), the cheapest to undo."""

    def __init__(self, name: str, module: nn.Module | None, reads: Sequence[int], write: int,
                 args: Sequence[Any] = (), options: dict[str, Any] | None = None) -> None:
        super().__init__(name, module, reads, (write,), args, options)

    def change(self, x: Sequence[Tensor], made: Tensor) -> Sequence[Tensor]:
        """Return x + made."""
        if not isinstance(made, Tensor) or made.shape != x[0].shape:
            got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise CannotReverse(f"{self} must return the shape of what it is added to, got {got} "
                                f"for {tuple(x[0].shape)}")
        y = x[0] + made
        return [y if y.dtype == x[0].dtype else y.to(x[0].dtype)]

    def restore(self, y: Sequence[Tensor], made: Tensor) -> Sequence[Tensor]:
        """Return y - made."""
        x = y[0] - made
        return [x if x.dtype == y[0].dtype else x.to(y[0].dtype)]


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
        self.place = ""

    def __str__(self) -> str:
        return f"{self.name} of {self.place}" if self.place else self.name


class Stored:
    """The step of a function of the only stream that cannot be undone: its input is kept.

    `modules` are those that it runs, `tensors` what else it uses that may need a gradient.
    """

    def __init__(self, name: str, function: Callable[[Tensor], Tensor],
                 modules: Sequence[nn.Module], tensors: Sequence[Tensor] = ()) -> None:
        self.name, self.function = name, function
        self._modules, self.tensors = list(modules), list(tensors)
        self.place = ""

    def __str__(self) -> str:
        return self.name

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


def forth(steps: Sequence[Step], streams: Sequence[Tensor]) -> list[Tensor]:
    """Return what `steps` make of `streams`, and nothing more: under autograd all is stored."""
    streams = list(streams)
    for step in steps:
        if isinstance(step, Regroup):
            streams = _regrouped(step, step.there, streams)
        elif isinstance(step, Stored):
            streams = [step.function(streams[0])]
        else:
            made = step.make([streams[i] for i in step.reads])
            changed = step.change([streams[i] for i in step.writes], made)
            for i, stream in zip(step.writes, changed, strict=True):
                streams[i] = stream
    return streams


def undo(steps: Sequence[Step], streams: Sequence[Tensor]) -> list[Tensor]:
    """Return the streams that `steps` would turn into `streams`."""
    streams = list(streams)
    for step in reversed(steps):
        if isinstance(step, Stored):
            raise CannotReverse(f"{step} cannot be undone, since it has no inverse")
        if isinstance(step, Regroup):
            streams = _regrouped(step, step.back, streams)
            continue
        made = step.make([streams[i] for i in step.reads])
        back = step.restore([streams[i] for i in step.writes], made)
        for i, stream in zip(step.writes, back, strict=True):
            streams[i] = stream
    return streams


def run(steps: Sequence[Step], streams: Sequence[Tensor], *, exact: bool = False,
        first: bool = False) -> list[Tensor]:
    """Return the streams after `steps`, of which only the last are kept for the backward pass.

    It reconstructs the others, last to first. The gradients are those of the same steps under
    autograd: what a step draws at random, the buffers and the training flags that it finds, and
    the state of autocast are the same when it runs again. With `exact` the rounding error of each
    step's way there and back is kept, about one byte a number, so that every stream comes back bit
    for bit.

    `first` also looks for what takes time to see: a step that cannot be undone, that changes a
    stream in place, or that uses a tensor which needs a gradient and is not its own.

    Where nothing needs a gradient, in an exported graph, and inside `torch.func` and forward-mode
    differentiation, the steps just run.

    Raises:
        CannotReverse: a step changed its streams' shapes, or did what `first` looks for, or a
            stream was not finite when it came back though it had ended so; buffers, gradients and
            the random state are then as they were.
    """
    if torch.compiler.is_exporting() or (torch.compiler.is_compiling()
                                         and not torch.is_grad_enabled()):
        return forth(steps, streams)
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break("reconstruction runs modules inside a backward pass; compile the "
                                  "modules inside the reversible blocks instead")
        # Wrapped here, since the import of what wraps takes longer than that of this library.
        return list(torch.compiler.disable(_run)(steps, streams, exact, first))
    return _run(steps, streams, exact, first)


def _run(steps: Sequence[Step], streams: Sequence[Tensor], exact: bool,
         first: bool) -> list[Tensor]:
    transformed = (forward_ad._current_level >= 0
                   or torch._C._functorch.maybe_current_level() is not None)
    if transformed or not (first or torch.is_grad_enabled()):
        return forth(steps, streams)
    plan = _Plan(steps, len(streams), exact, first)
    if torch.is_grad_enabled() and (plan.learning or any(s.requires_grad for s in streams)):
        return list(_Run.apply(plan, *streams, *plan.learning))
    return _forward(plan, list(streams)) if first else forth(steps, streams)


class _Plan:
    """The steps of one pass, and what the way there leaves of them for the way back."""

    def __init__(self, steps: Sequence[Step], streams: int, exact: bool, first: bool) -> None:
        self.streams, self.exact, self.first = streams, exact, first
        # A gradient of an argument is found for what stands in for it, so that the hooks of the
        # argument itself are called once.
        given = {id(t): t for step in steps if isinstance(step, Update)
                 for t in _arguments(step) if t.requires_grad}
        deputies = {key: t.detach().requires_grad_() for key, t in given.items()}
        self.steps = [_deputised(step, deputies) if deputies else step for step in steps]
        self.records = [_Record(step) for step in self.steps]
        self.stop = len(self.steps)  # no step before this one has a gradient to give
        # What gradients are found for, and what they belong to.
        self.own = list({id(t): t for record in self.records for t in record.own}.values())
        owners = {id(deputy): given[key] for key, deputy in deputies.items()}
        self.learning = [owners.get(id(t), t) for t in self.own]


class _Record:
    """What is remembered of one step, small beside its activations."""

    def __init__(self, step: Step) -> None:
        self.modules = [] if isinstance(step, Regroup) else _inside(step.modules())
        self.modes: list[bool] = []
        self.parameters: list[tuple[nn.Module, str, nn.Parameter]] = []
        self.buffered: list[nn.Module] = []
        own: dict[int, Tensor] = {}
        self.fixed: list[Tensor] = []  # what needs no gradient, and buffers that stay as they are
        for module in self.modules:
            self.modes.append(module.training)
            if module._buffers:
                self.buffered.append(module)
            for name, p in module._parameters.items():
                if p is not None:
                    self.parameters.append((module, name, p))
        for t in [*[p for _, _, p in self.parameters], *_arguments(step)]:
            if t.requires_grad:
                own[id(t)] = t
            else:
                self.fixed.append(t)
        self.own = list(own.values())
        self.random: RandomState | None = None  # the random state before it
        self.drew = False
        self.changed: list[_Changed] = []
        self.needs: list[bool] = []  # by stream: whether its gradient is wanted
        self.held: list[Tensor] = []  # its input, if it is stored; what is lost, if that is wanted
        self.holds = 0
        self.strides: list[tuple[int, ...]] = []  # of what it wrote over, if that is held


class _Changed(NamedTuple):
    """A buffer that a step changed, and what it had been before."""

    module: nn.Module
    name: str
    buffer: Tensor
    value: Tensor


class _Run(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        needs = list(ctx.needs_input_grad[1:1 + plan.streams])
        streams = _forward(plan, list(tensors[:plan.streams]), needs)
        given = {id(t) for t in tensors}
        streams = [s.view_as(s) if id(s) in given else s for s in streams]
        held = [t for record in plan.records for t in record.held]
        fixed = [t for record in plan.records for t in record.fixed if not t.is_inference()]
        for record in plan.records:  # PyTorch keeps them now, and sees whether they change
            record.holds, record.held, record.fixed = len(record.held), [], []
        ctx.plan, ctx.autocast, ctx.ends = plan, _autocast(streams), len(streams)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*streams, *held, *plan.learning, *fixed)
        return tuple(streams)

    @staticmethod
    def backward(ctx: Any, *ends: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise CannotReverse("what a reversible network returns can be differentiated once, not "
                                "twice (create_graph=True); use nn.Sequential(*network) of the "
                                "same blocks for that")
        plan, rest = ctx.plan, iter(ctx.saved_tensors)
        streams = [next(rest) for _ in range(ctx.ends)]
        held = [[next(rest) for _ in range(record.holds)] for record in plan.records]
        del rest
        ctx.maybe_clear_saved_tensors()  # what it ended in may go as soon as it is undone
        grads, found = list(ends), dict[int, Tensor]()
        sums: list[tuple[Any, Tensor]] = [(None, _sum(s)) for s in streams if _real(s)]
        with _as_before(plan), ctx.autocast():
            random = None
            stop = 0 if plan.first else plan.stop  # even what learns nothing may use a stranger
            for k in range(len(plan.steps) - 1, stop - 1, -1):
                record = plan.records[k]
                if record.random is not None and record.random is not random:
                    random = record.random
                    set_random_state(random)
                _back(plan, k, held.pop(), streams, grads, found, sums)
                if record.drew:
                    random = None
            _see_finite(streams, sums)
        if plan.stop:
            grads = [None] * plan.streams
        gradients = [*grads, *[found.get(id(t)) for t in plan.own]]
        return (None, *[g if need else None for g, need in
                        zip(gradients, ctx.needs_input_grad[1:], strict=True)])


def _forward(plan: _Plan, streams: list[Tensor], needs: list[bool] | None = None) -> list[Tensor]:
    """Return the streams after the steps; where one raises, no buffer and no draw is left."""
    needs = needs or [False] * len(streams)
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # a cast made here would have no gradient
    random = begin = random_state()
    try:
        for k, (step, record) in enumerate(zip(plan.steps, plan.records, strict=True)):
            record.needs, learns = needs, bool(record.own)
            if any(needs) or learns:
                plan.stop = min(plan.stop, k)
            if isinstance(step, Regroup):
                streams = _regrouped(step, step.there, streams)
            else:
                record.random = random
                streams = _there(step, streams, record, plan)
                now = random_state()
                if not _same(random, now):
                    record.drew, random = True, now
            needs = _needs_after(step, needs, learns, len(streams))
    except BaseException as error:
        for record in reversed(plan.records):
            for module, name, buffer, value in record.changed:
                module._buffers[name] = buffer
                buffer.data.copy_(value)  # .data, so that a graph which has saved it may go on
        set_random_state(begin)
        if not isinstance(error, CannotReverse):
            error.add_note(f"This happened in {step}.")
        raise
    finally:
        torch.set_autocast_cache_enabled(cached)
    for record in plan.records:
        record.changed = [c for c in record.changed if not _counts(c.module)]
    return streams


def _inside(roots: Sequence[nn.Module]) -> list[nn.Module]:
    """Return what `modules()` of all the roots do, in a third of the time."""
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = list(roots)
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found[module] = None
            waiting += module._modules.values()
    return list(found)


def _arguments(step: Step) -> list[Tensor]:
    if isinstance(step, Regroup):
        return []
    if isinstance(step, Stored):
        return step.tensors
    if not (step.args or step.options):
        return []
    return [t for t in tree_leaves((step.args, step.options)) if isinstance(t, Tensor)]


def _deputised(step: Step, deputies: dict[int, Tensor]) -> Step:
    if not isinstance(step, Update):
        return step
    step = copy(step)
    step.args, step.options = tree_map(lambda t: deputies.get(id(t), t), (step.args, step.options))
    return step


def _needs_after(step: Step, needs: list[bool], learns: bool, streams: int) -> list[bool]:
    if not isinstance(step, Update):
        return [any(needs) or learns] * streams
    new = learns or any(needs[i] for i in (*step.reads, *step.writes))
    return [new if i in step.writes else need for i, need in enumerate(needs)]


def _regrouped(step: Regroup, function: Callable[[list[Tensor]], list[Tensor]],
               streams: list[Tensor]) -> list[Tensor]:
    try:
        return function(streams)
    except CannotReverse as error:
        raise CannotReverse(f"{step}: {error}") if step.place else error from None


def _there(step: Update | Stored, streams: list[Tensor], record: _Record,
           plan: _Plan) -> list[Tensor]:
    """Return the streams after `step`."""
    if isinstance(step, Stored):
        record.held = [streams[0]]
        with _noted(record) if record.buffered else nullcontext():
            return [step.function(streams[0])]
    reads, x = [streams[i] for i in step.reads], [streams[i] for i in step.writes]
    if plan.first:  # so that a step which writes in place spoils no stream
        reads, x = [r.clone() for r in reads], [s.clone() for s in x]
    before = _versions([*reads, *x])
    with _noted(record) if record.buffered else nullcontext():
        made = step.make(reads)
        middle = random_state() if plan.exact or plan.first else None
        if _versions([*reads, *x]) == before:
            y = list(step.change(x, made))
    if _versions([*reads, *x]) != before:
        raise CannotReverse(f"{step} changes its input in place, so that it cannot be undone; use "
                            "operations that are not in place there, such as "
                            "nn.ReLU(inplace=False)")
    for old, new in zip(x, y, strict=True):
        if not isinstance(new, Tensor) or (old.shape != new.shape and not isinstance(step, Whole)):
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise CannotReverse(f"{step} must keep its streams' shapes, got "
                                f"{tuple(old.shape)} and made {got} of it; what is added to a "
                                "stream must have the stream's shape")
    if middle is not None:
        after = random_state()
        set_random_state(middle)  # an inverse that draws must draw what the module drew
        _look_back(step, x, y, made, record, plan)
        set_random_state(after)
    streams = list(streams)
    for i, stream in zip(step.writes, y, strict=True):
        streams[i] = stream
    return streams


def _look_back(step: Update, x: list[Tensor], y: list[Tensor], made: Any, record: _Record,
               plan: _Plan) -> None:
    """Note what restoring `y` misses of `x`, or see that it is rounding error, or both."""
    with torch.no_grad(), _again(record):
        back = step.restore(y, made)
    back = [old if i in step.sums else new
            for i, old, new in zip(step.writes, x, back, strict=True)]
    for old, new, got in zip(x, back, y, strict=True):
        if not (isinstance(new, Tensor) and new.shape == old.shape):
            raise CannotReverse(f"the inverse of {step} gave another shape than "
                                f"{tuple(old.shape)}; it must undo the step")
        if not (plan.first and _real(old) and old.numel()):
            continue
        scale = max(float(old.abs().amax()), float(got.abs().amax()) if got.numel() else 0, 1.0)
        error = float((old - new).abs().amax())
        if scale < float("inf") and not error <= scale * torch.finfo(old.dtype).eps ** 0.5:
            raise CannotReverse(f"{step} is not invertible here: restoring what it was given "
                                f"misses it by {error:.2g}, where numbers are up to {scale:.2g}; "
                                "check its inverse")
    if plan.exact:
        record.held = [t for old, new in zip(x, back, strict=True) for t in _missing(old, new)]
        record.strides = [old.stride() for old in x]


def _back(plan: _Plan, k: int, held: list[Tensor], streams: list[Tensor],
          grads: list[Tensor | None], found: dict[int, Tensor],
          sums: list[tuple[Any, Tensor]]) -> None:
    """Put `streams` and `grads` back to before step `k`; add the tensors' gradients to `found`."""
    step, record = plan.steps[k], plan.records[k]
    if isinstance(step, Regroup):
        filled = [torch.zeros_like(s) if g is None else g
                  for s, g in zip(streams, grads, strict=True)]
        streams[:], grads[:] = step.back(streams), step.back(filled)
        return
    with _again(record) if record.buffered else nullcontext():
        if isinstance(step, Stored):
            signals, streams[:], grads[:] = list(grads), held, [None]
            with torch.enable_grad():
                reads, given = [0], [_leaf(held[0], record.needs[0])]
                outputs = [step.function(given[0])]
        else:
            signals = [grads[i] for i in step.writes]
            reads, given, outputs = _restore(step, record, held, streams, grads)
            sums += [(step, _sum(streams[i])) for i in step.writes if _real(streams[i])]
    if plan.first:
        _no_strangers(step, outputs, [*given, *record.own])
    # From here on the outputs' numbers are in nobody's way, but where gradients begin.
    starts = [(get_gradient_edge(o), s if s.dtype == o.dtype else s.to(o.dtype))
              for o, s in zip(outputs, signals, strict=True)
              if s is not None and isinstance(o, Tensor) and o.requires_grad]
    del outputs, signals
    wanted = [(i, t) for i, t in zip(reads, given, strict=True) if t.requires_grad]
    own = [t for t in record.own if t.requires_grad]
    if not starts or not (wanted or own):
        return
    # What torch.autograd.grad calls; its checks take as long as a small layer.
    gradients = torch.autograd.Variable._execution_engine.run_backward(
        tuple(o for o, _ in starts), tuple(s for _, s in starts), False, False,
        (*[t for _, t in wanted], *own), allow_unreachable=True, accumulate_grad=False)
    for (i, _), g in zip(wanted, gradients, strict=False):
        old = grads[i]
        grads[i] = g if old is None else old if g is None else old + g
    for t, g in zip(own, gradients[len(wanted):], strict=True):
        if g is not None:
            found[id(t)] = found[id(t)] + g if id(t) in found else g


def _restore(step: Update, record: _Record, held: list[Tensor], streams: list[Tensor],
             grads: list[Tensor | None]) -> tuple[list[int], list[Tensor], list[Any]]:
    """Restore the written streams; return which streams the step's graph begins at, and its ends.

    An addition passes the gradients of what it writes; those of another step are its graph's.
    """
    reads = [*step.reads]
    with torch.enable_grad():
        given = [_leaf(streams[i], record.needs[i]) for i in reads]
        made = step.make(given)
    middle = random_state() if record.drew and not isinstance(step, Add) else None
    x = list(step.restore([streams[i] for i in step.writes], made))
    if held:
        parts = zip(x, held[::2], held[1::2], record.strides, strict=True)
        x = [_laid_out(_repaired(*part), strides) for *part, strides in parts]
    for i, stream in zip(step.writes, x, strict=True):
        streams[i] = stream
    if isinstance(step, Add):
        return reads, given, [made]
    if middle is not None:
        set_random_state(middle)
    with torch.enable_grad(), _again(record) if made is None else nullcontext():
        x = [_leaf(stream, record.needs[i]) for i, stream in zip(step.writes, x, strict=True)]
        outputs = list(step.change(x, made))
    for i in step.writes:
        grads[i] = None
    return [*reads, *step.writes], [*given, *x], outputs


def _leaf(stream: Tensor, needed: bool) -> Tensor:
    """Return `stream` cut off; no leaf, since PyTorch's flop counter could not hook that."""
    stream = stream.detach()
    return stream.requires_grad_().view_as(stream) if needed and _real(stream) else stream


def _real(stream: Tensor) -> bool:
    return stream.is_floating_point() or stream.is_complex()


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [t._version for t in tensors if not t.is_inference()]


def _same(one: RandomState, other: RandomState) -> bool:
    return (torch.equal(one[0], other[0]) and len(one[1]) == len(other[1])
            and all(map(torch.equal, one[1], other[1])))


def _counts(module: nn.Module) -> bool:
    """Return whether the module only counts in its buffers and normalises by the batch."""
    return (isinstance(module, _BatchNorm) and module.training
            and type(module).forward is _BatchNorm.forward)


@contextmanager
def _noted(record: _Record) -> Iterator[None]:
    """Note in `record` which buffers the body changes, and what they were."""
    before = [(module, name, buffer, buffer._version, buffer.clone())
              for module in record.buffered for name, buffer in module._buffers.items()
              if buffer is not None and not buffer.is_inference()]
    try:
        yield
    finally:
        for module, name, buffer, version, value in before:
            # A norm's kernel writes to running statistics without telling of a new version.
            if (module._buffers.get(name) is not buffer or buffer._version != version
                    or (isinstance(module, _NormBase) and module.training)):
                record.changed.append(_Changed(module, name, buffer, value))
            else:
                record.fixed.append(buffer)


@contextmanager
def _again(record: _Record) -> Iterator[None]:
    """Let the body run a step as it ran before, and leave no trace in its buffers."""
    norms: list[Any] = [m for m in record.buffered if _counts(m) and m.track_running_stats]
    changed = [c for c in record.changed if not _counts(c.module)]
    now = [(c.module, c.name, c.module._buffers[c.name]) for c in changed]
    for norm in norms:
        norm.track_running_stats = False  # it normalises as before, and counts nothing
    for module, name, _, value in changed:
        module._buffers[name] = value.clone()
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        for module, name, buffer in now:
            module._buffers[name] = buffer


@contextmanager
def _as_before(plan: _Plan) -> Iterator[None]:
    """Give the modules the parameters and the modes that they had, and then their own again."""
    random = random_state()
    other_mode = [module for record in plan.records
                  for module, mode in zip(record.modules, record.modes, strict=True)
                  if module.training != mode]
    swapped = [(module._parameters, name, module._parameters[name], p) for record in plan.records
               for module, name, p in record.parameters if module._parameters.get(name) is not p]
    hooks = [(t._backward_hooks, dict(t._backward_hooks)) for t in plan.own if t._backward_hooks]
    for module in other_mode:
        module.training = not module.training
    for parameters, name, _, p in swapped:
        parameters[name] = p  # functional_call, for one, has put others in
    for live, _ in hooks:
        live.clear()  # they are called with the whole gradient, when that is returned
    try:
        yield
    finally:
        for live, kept in hooks:
            live.update(kept)
        for parameters, name, now, _ in swapped:
            parameters[name] = now
        for module in other_mode:
            module.training = not module.training
        set_random_state(random)


def _autocast(streams: list[Tensor]) -> Callable[[], Any]:
    """Return what brings back the state in which autocast is for the streams' device."""
    kind = streams[0].device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype, enabled, cache_enabled=False)


def _sum(stream: Tensor) -> Tensor:
    # One pass without a mask, while the numbers are at hand; finite where all of them are.
    return stream.sum(dtype=torch.float32 if stream.dtype in _NARROW else None)


def _see_finite(streams: Sequence[Tensor], sums: Sequence[tuple[Any, Tensor]]) -> None:
    """Raise CannotReverse, with the step, where the steps ended finite and began otherwise.

    `sums` are of what they ended in, and then of what each step restored.
    """
    if all(bool(_sum(s).isfinite()) or bool(s.isfinite().all()) for s in streams if _real(s)):
        return
    culprit = next((step for step, total in sums if not total.isfinite()), None)
    if culprit is not None:
        raise CannotReverse(
            f"what {culprit} was given is no longer finite when it is reconstructed, though what "
            "the steps ended in is; its numbers span too wide a range for the dtype: bound its "
            "scale, use a wider dtype, or exact=True")


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
            raise CannotReverse(f"{step} uses a tensor of shape {tuple(leaf.shape)} that "
                                "needs a gradient but is neither a parameter of it nor an "
                                "argument; make it one, or its gradient would be lost")
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                nodes.append(below)


def _missing(true: Tensor, restored: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a restored stream misses of the true one, in units in the last place.

    The first tensor has one byte a number, the second those which that does not hold; the first
    is empty where nothing is missing.
    """
    if true.dtype not in _BITS and not true.is_complex():
        return true.new_empty(0), true.new_empty(0)
    missing = _bits(true) - _bits(restored)
    near = missing.to(torch.int8)
    far = (near != missing).logical_or_(near == _FAR)
    beyond = missing[far]
    if not (beyond.numel() or bool(near.any())):
        return beyond, beyond
    return near.masked_fill_(far, _FAR), beyond


def _repaired(restored: Tensor, near: Tensor, beyond: Tensor) -> Tensor:
    """Return the true stream."""
    if not near.numel():
        return restored
    missing = near.to(beyond.dtype)
    missing[near == _FAR] = beyond
    true = _bits(restored) + missing
    return (torch.view_as_complex(true.view(restored.real.dtype)) if restored.is_complex()
            else true.view(restored.dtype))


def _laid_out(stream: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return `stream` laid out by `strides`, since kernels round by the layout."""
    if stream.stride() == strides:
        return stream
    return stream.new_empty_strided(stream.shape, strides).copy_(stream)


def _bits(stream: Tensor) -> Tensor:
    stream = torch.view_as_real(stream) if stream.is_complex() else stream
    return stream.view(_BITS[stream.dtype])
