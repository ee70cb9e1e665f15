"""Runs steps that can be undone, and differentiates them from what they ended in."""

import cmath
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import cache
from itertools import pairwise, repeat
from typing import Any, NamedTuple, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils._pytree import tree_leaves, tree_map

from netwright.errors import CannotReverse
from netwright.runtime.attributes import Attributes
from netwright.runtime.modes import transformed
from netwright.runtime.passes import as_the_first
from netwright.runtime.random_state import (
    random_state,
    same_draws,
    same_draws_elsewhere,
    same_torch_draws,
    set_random_state,
    set_torch_random_state,
    torch_random_state,
)
from netwright.runtime.recomputing import stores

__all__ = ["Add", "Update"]

_BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16,
         torch.bfloat16: torch.int16}
_NARROW = (torch.float16, torch.bfloat16)
_FAR = -128  # stands for a difference of bits that one byte does not hold
_SAMPLED = 64  # numbers of what a step made that tell whether it makes it again
_ROUNDED = 0.3  # how far they may be off, of their norm, by what rounding does to a choice
_NEAR = 1e-3  # how far what it was given may be off, of its norm


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
    autograd, and are handed over place by place: `.grad` has those of later steps while earlier
    ones are still to come. What a step draws at random (from PyTorch, Python and numpy), the
    buffers, attributes and training flags that it finds, and the state of autocast are the same
    when it runs again. With `exact` the rounding error of each step's way there and back is kept,
    about one byte a number, so that every stream comes back bit for bit.

    `first` also looks for what takes time to see: a step that cannot be undone, that makes
    something else when it runs again, that changes a stream in place, or that uses a tensor which
    needs a gradient and is not its own.

    Where nothing needs a gradient, in an exported graph, and inside `torch.func` and forward-mode
    differentiation, the steps just run.

    Raises:
        CannotReverse: a step changed its streams' shapes, or did what `first` looks for, or a
            stream was not finite when it came back though it had ended so; buffers, attributes and
            random states are then as they were, and no gradient of that place is handed over.
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
    if stores() or transformed() or not (first or torch.is_grad_enabled()):
        return forth(steps, streams)
    wanted = torch.is_grad_enabled()
    everything = first or _elsewhere[0]
    begin = None if everything else random_state()
    plan = _Plan(steps, streams, exact, first, everything)
    if not (wanted and (plan.learns or any(s.requires_grad for s in streams))):
        return _guarded(plan, _unrecorded) if first else forth(steps, streams)
    ends = _guarded(plan, _recorded)
    if begin is not None and not same_draws_elsewhere(begin, random_state()):
        # Of draws from Python and numpy nothing is noted until some have been seen.
        _elsewhere[0] = True
        plan.undo()
        set_random_state(begin)
        plan = _Plan(steps, streams, exact, first, everything=True)
        ends = _guarded(plan, _recorded)
    for record in plan.records:
        record.changed = [c for c in record.changed if not _counts(c.module)]
    return ends


_elsewhere = [False]  # whether a step has drawn from Python or numpy, which takes time to note


class _Source(NamedTuple):
    """How random states are noted, compared and set: PyTorch's alone, or all."""

    read: Callable[[], Any]
    same: Callable[[Any, Any], bool]
    write: Callable[[Any], None]


_TORCH = _Source(torch_random_state, same_torch_draws, set_torch_random_state)
_EVERY = _Source(random_state, same_draws, set_random_state)


class _Plan:
    """The steps of one pass, and what the way there leaves of them for the way back."""

    def __init__(self, steps: Sequence[Step], streams: Sequence[Tensor], exact: bool, first: bool,
                 everything: bool) -> None:
        self.streams, self.exact, self.first = list(streams), exact, first
        self.source = _EVERY if everything else _TORCH
        self.begin = self.source.read()
        self.autocast = _autocast(self.streams)
        # A gradient of an argument is found for what stands in for it, so that the hooks of the
        # argument itself are called once.
        given = {id(t): t for step in steps if isinstance(step, Update)
                 for t in _arguments(step) if t.requires_grad}
        deputies = {key: t.detach().requires_grad_() for key, t in given.items()}
        self.steps = [_deputised(step, deputies) if deputies else step for step in steps]
        self.records = [_Record(step) for step in self.steps]
        self.stop = len(self.steps)  # no step before this one has a gradient to give
        owners = {id(deputy): given[key] for key, deputy in deputies.items()}
        # A first pass hands over all together, so that what it finds wrong changes nothing; but for
        # one that a checkpoint runs again, when it is no longer the first.
        listened = torch._C._autograd._top_saved_tensors_default_hooks(True)
        bounds = self._bounds() if listened or not first else [0]
        self.links: list[_Link] = [
            _Link(self.records[start:end], start, end, owners)
            for start, end in pairwise([*bounds, len(self.steps)])]
        self.learns = any(link.learning for link in self.links)
        # On the way back: the streams, their gradients, and whether the steps ended finite.
        self.back, self.grads = list[Tensor](), list[Tensor | None]()
        self.sound, self.sums = True, list[tuple[Any, Tensor]]()

    def _bounds(self) -> list[int]:
        """Return where links begin: at each place that learns, after another that does."""
        bounds, place, learns = [0], None, False
        for k, (step, record) in enumerate(zip(self.steps, self.records, strict=True)):
            if isinstance(step, Regroup):
                continue
            if learns and record.own and step.place != place:
                bounds.append(k)
            place, learns = step.place, learns or bool(record.own)
        return bounds

    def undo(self) -> None:
        """Put buffers and attributes back to before the steps that have run."""
        for record in reversed(self.records):
            for module, name, buffer, value in record.changed:
                module._buffers[name] = buffer
                buffer.data.copy_(value)  # .data, so that a graph which has saved it may go on
            if record.before is not None:
                record.before.put_back()


class _Link:
    """Steps from `start` to `end` that hand over their gradients together."""

    def __init__(self, records: Sequence["_Record"], start: int, end: int,
                 owners: dict[int, Tensor]) -> None:
        self.records, self.start, self.end = records, start, end
        # What gradients are found for, and what they belong to.
        self.own: list[Tensor] = list({
            id(t): t for record in records for t in record.own}.values())
        self.learning: list[Tensor] = [owners.get(id(t), t) for t in self.own]


class _Record:
    """What is remembered of one step, small beside its activations."""

    def __init__(self, step: Step) -> None:
        self.modules = [] if isinstance(step, Regroup) else _inside(step.modules())
        self.modes: list[bool] = []
        self.parameters: list[tuple[nn.Module, str, nn.Parameter]] = []
        self.buffered: list[nn.Module] = []
        self.remember: list[nn.Module] = []  # those that may set attributes of their own
        own: dict[int, Tensor] = {}
        self.fixed: list[Tensor] = []  # what needs no gradient, and buffers that stay as they are
        for module in self.modules:
            self.modes.append(module.training)
            kind: Any = type(module)
            if not _plain(kind) or module._forward_hooks or module._forward_pre_hooks:
                self.remember.append(module)
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
        self.before: Attributes | None = None  # what the modules held before it
        self.random: Any = None  # the random state before it
        self.drew = False
        self.changed: list[_Changed] = []
        self.needs: list[bool] = []  # by stream: whether its gradient is wanted
        self.writes = False  # whether it writes to the input that is kept, in a copy
        self.given: list[Tensor] = []  # some numbers of what it was given and made at first
        self.made: list[Tensor] = []
        self.held: list[Tensor] = []  # its input, if it is stored; what is lost, if that is wanted
        self.holds = 0
        self.strides: list[tuple[int, ...]] = []  # of what it wrote over, if that is held


class _Changed(NamedTuple):
    """A buffer that a step changed, and what it had been before."""

    module: nn.Module
    name: str
    buffer: Tensor
    value: Tensor


class _Linked(torch.autograd.Function):
    """Runs a link. The first of a chain takes the streams, the last returns them.

    Between them goes a token without numbers, so that autograd asks them in turn and no stream is
    kept for it.
    """

    @staticmethod
    def forward(ctx: Any, plan: _Plan, link: _Link, needs: list[bool], taken: int,
                *tensors: Tensor) -> tuple[Tensor, ...]:
        streams = _through(plan, link, needs)
        ctx.last = link is plan.links[-1]
        ctx.plan, ctx.link, ctx.taken, ctx.ends = plan, link, taken, len(streams) * ctx.last
        held = [t for record in link.records for t in record.held]
        fixed = [t for record in link.records for t in record.fixed if not t.is_inference()]
        for record in link.records:  # PyTorch keeps them now, and sees whether they change
            record.holds, record.held, record.fixed = len(record.held), [], []
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*streams[:ctx.ends], *held, *link.learning, *fixed)
        if not ctx.last:
            return (streams[0].new_zeros((), dtype=torch.float32),)
        plan.streams = []
        return tuple(s.clone() for s in streams)  # which others may change in place

    @staticmethod
    def backward(ctx: Any, *ends: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise CannotReverse("what a reversible network returns can be differentiated once, not "
                                "twice (create_graph=True); use nn.Sequential(*network) of the "
                                "same blocks for that")
        plan, link, rest = ctx.plan, ctx.link, iter(ctx.saved_tensors)
        kept = [next(rest) for _ in range(ctx.ends)]
        if ctx.last:
            plan.back, plan.grads = kept, list(ends)
            plan.sums = [(None, _sum(s)) for s in kept if _real(s)]
            plan.sound = kept[0].is_cuda or _finite(kept)
        del kept, ends
        held = [[next(rest) for _ in range(record.holds)] for record in link.records]
        del rest
        ctx.maybe_clear_saved_tensors()  # what it ended in may go as soon as it is undone
        found = dict[int, Tensor]()
        with _as_before(plan, link), plan.autocast():
            random = None
            stop = link.start if plan.first else max(link.start, plan.stop)
            for k in range(link.end - 1, stop - 1, -1):
                record = plan.records[k]
                if record.random is not None and record.random is not random:
                    random = record.random
                    plan.source.write(random)
                _back(plan, k, held.pop(), found)
                if record.drew:
                    random = None
            if ctx.taken and plan.back[0].is_cuda:
                _see_finite(plan.back, plan.sums)
        streams = [None] * ctx.taken
        if ctx.taken:
            streams = [None] * ctx.taken if plan.stop else plan.grads
            plan.back, plan.grads, plan.sums = [], [], []
        gradients = [*streams[:ctx.taken], *([] if ctx.taken else [None]),
                     *[found.get(id(t)) for t in link.own]]
        return (None, None, None, None, *[
            g if need else None
            for g, need in zip(gradients, ctx.needs_input_grad[4:], strict=True)])


def _recorded(plan: _Plan) -> list[Tensor]:
    """Return the streams after the steps, with the graph that leads back."""
    needs = [s.requires_grad for s in plan.streams]
    token: Tensor | None = None
    ends: tuple[Tensor, ...] = ()
    for link in plan.links:
        if token is None and not (link.learning or any(needs)):
            with torch.no_grad():
                _through(plan, link, needs)
            continue
        given = plan.streams if token is None else [token]
        ends = _Linked.apply(plan, link, needs, len(given) if token is None else 0, *given,
                             *link.learning)
        token = ends[0]
    return list(ends)


def _unrecorded(plan: _Plan) -> list[Tensor]:
    """Return the streams after the steps, where nothing needs a gradient."""
    for link in plan.links:
        _through(plan, link, [False] * len(plan.streams))
    return plan.streams


def _guarded(plan: _Plan, run: Callable[[_Plan], list[Tensor]]) -> list[Tensor]:
    """Run the plan; where a step raises, no buffer, no attribute and no draw is left."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # a cast made here would have no gradient
    try:
        ends = run(plan)
    except BaseException:
        plan.undo()
        plan.source.write(plan.begin)
        raise
    finally:
        torch.set_autocast_cache_enabled(cached)
    return ends


def _through(plan: _Plan, link: _Link, needs: list[bool]) -> list[Tensor]:
    """Run the link's steps on the plan's streams; change `needs` to those after them."""
    streams, random = plan.streams, plan.source.read()
    for k in range(link.start, link.end):
        step, record = plan.steps[k], plan.records[k]
        record.needs, learns = [*needs], bool(record.own)
        if any(needs) or learns:
            plan.stop = min(plan.stop, k)
        try:
            if isinstance(step, Regroup):
                streams = _regrouped(step, step.there, streams)
            else:
                record.random = random
                streams = _there(step, streams, record, plan)
                now = plan.source.read()
                if not plan.source.same(random, now):
                    record.drew, random = True, now
        except CannotReverse:
            raise
        except BaseException as error:
            error.add_note(f"This happened in {step}.")
            raise
        needs[:] = _needs_after(step, needs, learns, len(streams))
    plan.streams = streams
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
    record.before = Attributes(record.remember)
    weights = _versions([p for _, _, p in record.parameters])
    if isinstance(step, Stored):
        streams = [_stored(step, streams[0], record, plan)]
    else:
        streams = _updated(step, streams, record, plan)
    if _versions([p for _, _, p in record.parameters]) != weights:
        # It has begun, by what it was given first, and runs again as one that has.
        record.before = Attributes(record.remember)
    return streams


def _stored(step: Stored, x: Tensor, record: _Record, plan: _Plan) -> Tensor:
    """Return what a step whose input is kept makes of it; it may write to a copy."""
    key = record.modules[0] if record.modules else None
    given = x.clone() if plan.first or key is None or key in _writing else x
    before = _versions([given])
    record.held = [x]
    with _noted(record) if record.buffered else nullcontext():
        y = step.function(given)
    if _versions([given]) != before:
        if given is x:
            raise CannotReverse(f"{step} changes its input in place, as it did not at first, so "
                                "that it cannot run again; use operations that are not in place "
                                "there, such as nn.ReLU(inplace=False)")
        record.writes = True
        if key is not None:
            _writing.add(key)
    if plan.first and isinstance(y, Tensor):
        record.given, record.made = _samples([x]), _samples([y])
    return y


_writing: WeakSet[nn.Module] = WeakSet()  # what has changed its input in place


def _updated(step: Update, streams: list[Tensor], record: _Record, plan: _Plan) -> list[Tensor]:
    reads, x = [streams[i] for i in step.reads], [streams[i] for i in step.writes]
    if plan.first:  # so that a step which writes in place spoils no stream
        reads, x = [r.clone() for r in reads], [s.clone() for s in x]
    before = _versions([*reads, *x])
    with _noted(record) if record.buffered else nullcontext():
        made = step.make(reads)
        middle = plan.source.read() if plan.exact or plan.first else None
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
    if plan.first:
        record.given = _samples(reads or x)  # what it writes comes back by what it makes
        record.made = _samples([made] if isinstance(step, Add) else y)
    if middle is not None:
        after = plan.source.read()
        plan.source.write(middle)  # an inverse that draws must draw what the module drew
        _look_back(step, x, y, made, record, plan)
        plan.source.write(after)
    streams = list(streams)
    for i, stream in zip(step.writes, y, strict=True):
        streams[i] = stream
    return streams


def _see_same(step: Update | Stored, record: _Record, given: Sequence[Tensor],
              outputs: Sequence[Tensor]) -> None:
    """Raise CannotReverse where a step made something else than at first of the same."""
    if any(map(_off, record.given, _samples(given), repeat(_NEAR))):
        return  # it was given something else, by what rounding has come to
    sums = step.sums if isinstance(step, Update) else ()
    largest = max((float(old.norm()) for old in record.made), default=0.0)
    for i, old, new in zip(step.writes if isinstance(step, Update) else (0,), record.made,
                           _samples(outputs), strict=True):
        # A stream that is all but zero beside another is rounding itself.
        if i not in sums and _off(old, new, _ROUNDED) and (new - old).norm() > _NEAR * largest:
            raise CannotReverse(
                f"{step} must make the same when it runs again, got something else; what it "
                "draws from, counts or remembers must be an attribute of the module, or the "
                "global random state of PyTorch, Python or numpy")


def _off(old: Tensor, new: Tensor, allowed: float) -> bool:
    return bool((new - old).norm() > allowed * old.norm())  # not where one is not finite


def _samples(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return some numbers of each tensor."""
    flat = [t.detach().reshape(-1) for t in tensors]
    flat = [t[::max(1, len(t) // _SAMPLED)].clone() for t in flat]
    return [torch.view_as_real(t) if t.is_complex() else t.double() for t in flat]


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
        old, new, got = old.detach(), new.detach(), got.detach()
        scale = max(float(old.abs().amax()), float(got.abs().amax()) if got.numel() else 0, 1.0)
        error = float((old - new).abs().amax())
        if scale < float("inf") and not error <= scale * torch.finfo(old.dtype).eps ** 0.5:
            raise CannotReverse(f"{step} is not invertible here: restoring what it was given "
                                f"misses it by {error:.2g}, where numbers are up to {scale:.2g}; "
                                "check its inverse")
    if plan.exact:
        record.held = [t for old, new in zip(x, back, strict=True) for t in _missing(old, new)]
        record.strides = [old.stride() for old in x]


def _back(plan: _Plan, k: int, held: list[Tensor], found: dict[int, Tensor]) -> None:
    """Put streams and gradients back to before step `k`; add the tensors' gradients to `found`."""
    step, record, streams, grads = plan.steps[k], plan.records[k], plan.back, plan.grads
    if isinstance(step, Regroup):
        filled = [torch.zeros_like(s) if g is None else g
                  for s, g in zip(streams, grads, strict=True)]
        streams[:], grads[:] = step.back(streams), step.back(filled)
        return
    with _again(record):
        if isinstance(step, Stored):
            signals, streams[:], grads[:] = list(grads), held, [None]
            with torch.enable_grad():
                reads, given = [0], [_leaf(held[0], record.needs[0])]
                outputs = [step.function(given[0].clone() if record.writes else given[0])]
        else:
            signals = [grads[i] for i in step.writes]
            reads, given, outputs = _restore(step, record, held, plan)
            for i in step.writes:
                _see_sound(step, streams[i], plan)
    if record.made:
        before = held if isinstance(step, Stored) else [
            streams[i] for i in step.reads or step.writes]
        _see_same(step, record, before, outputs)
    if plan.first:
        no_strangers(step, outputs, [*given, *record.own])
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


def _restore(step: Update, record: _Record, held: list[Tensor],
             plan: _Plan) -> tuple[list[int], list[Tensor], list[Any]]:
    """Restore the written streams; return which streams the step's graph begins at, and its ends.

    An addition passes the gradients of what it writes; those of another step are its graph's.
    """
    reads, streams = [*step.reads], plan.back
    with torch.enable_grad():
        given = [_leaf(streams[i], record.needs[i]) for i in reads]
        made = step.make(given)
    middle = plan.source.read() if record.drew and not isinstance(step, Add) else None
    x = list(step.restore([streams[i] for i in step.writes], made))
    if held:
        parts = zip(x, held[::2], held[1::2], record.strides, strict=True)
        x = [_laid_out(_repaired(*part), strides) for *part, strides in parts]
    for i, stream in zip(step.writes, x, strict=True):
        streams[i] = stream
    if isinstance(step, Add):
        return reads, given, [made]
    if middle is not None:
        plan.source.write(middle)
    with torch.enable_grad(), _again(record) if made is None else nullcontext():
        x = [_leaf(stream, record.needs[i]) for i, stream in zip(step.writes, x, strict=True)]
        outputs = list(step.change(x, made))
    for i in step.writes:
        plan.grads[i] = None
    return [*reads, *step.writes], [*given, *x], outputs


def _leaf(stream: Tensor, needed: bool) -> Tensor:
    """Return `stream` cut off; no leaf, since PyTorch's flop counter could not hook that."""
    stream = stream.detach()
    return stream.requires_grad_().view_as(stream) if needed and _real(stream) else stream


def _real(stream: Tensor) -> bool:
    return stream.is_floating_point() or stream.is_complex()


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [t._version for t in tensors if not t.is_inference()]


@cache
def _plain(kind: type) -> bool:
    """Return whether modules are PyTorch's own, which remember nothing outside of buffers."""
    return (kind.__module__.startswith("torch.nn.modules.")
            and not issubclass(kind, LazyModuleMixin))


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
    """Let the body run a step as it ran before, and leave no trace in its modules."""
    norms: list[Any] = [m for m in record.buffered if _counts(m) and m.track_running_stats]
    changed = [c for c in record.changed if not _counts(c.module)]
    now = [(c.module, c.name, c.module._buffers[c.name]) for c in changed]
    before = held = cast(Attributes, record.before)
    if before.differ():
        held = Attributes(record.remember)
        before.put_back()
    for norm in norms:
        norm.track_running_stats = False  # it normalises as before, and counts nothing
    for module, name, _, value in changed:
        module._buffers[name] = value.clone()
    try:
        with as_the_first():
            yield
    finally:
        held.put_back()
        for norm in norms:
            norm.track_running_stats = True
        for module, name, buffer in now:
            module._buffers[name] = buffer


@contextmanager
def _as_before(plan: _Plan, link: _Link) -> Iterator[None]:
    """Give the modules the parameters and the modes that they had, and then their own again."""
    random = plan.source.read()
    other_mode = [module for record in link.records
                  for module, mode in zip(record.modules, record.modes, strict=True)
                  if module.training != mode]
    swapped = [(module._parameters, name, module._parameters[name], p) for record in link.records
               for module, name, p in record.parameters if module._parameters.get(name) is not p]
    hooks = [(t._backward_hooks, dict(t._backward_hooks)) for t in link.own if t._backward_hooks]
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
        plan.source.write(random)


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


def _finite(streams: Sequence[Tensor]) -> bool:
    return all(bool(_sum(s).isfinite()) or bool(s.isfinite().all()) for s in streams if _real(s))


def _see_sound(step: Update, stream: Tensor, plan: _Plan) -> None:
    """See to it that a restored stream is finite where all ended so; on CUDA, later."""
    if not (_real(stream) and plan.sound):
        return
    total = _sum(stream)
    if stream.is_cuda:
        plan.sums.append((step, total))
    elif not (cmath.isfinite(total.item()) or bool(stream.isfinite().all())):
        raise _unsound(step)


def _see_finite(streams: Sequence[Tensor], sums: Sequence[tuple[Any, Tensor]]) -> None:
    """Raise CannotReverse, with the step, where the steps ended finite and began otherwise.

    `sums` are of what they ended in, and then of what each step restored.
    """
    if _finite(streams):
        return
    culprit = next((step for step, total in sums if not total.isfinite()), None)
    if culprit is not None:
        raise _unsound(culprit)


def _unsound(step: Update) -> CannotReverse:
    return CannotReverse(
        f"what {step} was given is no longer finite when it is reconstructed, though what "
        "the steps ended in is; its numbers span too wide a range for the dtype: bound its "
        "scale, use a wider dtype, or exact=True")


def no_strangers(step: Any, outputs: Sequence[Any], known: Sequence[Tensor]) -> None:
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
