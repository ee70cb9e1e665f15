"""A chain of modules that feed one another inside a model whose own forward calls them.

The first stage runs the model's own forward with the later members replaced by stubs, which
write down the arguments that they are given and pass the signal on; the last stage runs it again
with what came before replaced, so that whatever the model does before its members and after them
is the model's own code. In between a member is called with the arguments that were written down.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from netwright.anatomy.calls import Call, link, version
from netwright.anatomy.turns import Turn, turns_of
from netwright.errors import CannotStage
from netwright.runtime.modes import rehearsing
from netwright.runtime.random_state import RandomState, random_state, set_random_state
from netwright.signals import Path, apply, at, found, mapped, placed, tensor_of, tensors
from netwright.stages._transformers import fresh, is_cache
from netwright.stages.stage import Context, Stage


class _Stop(BaseException):
    """Leaves the model's forward where the stage ends; no `except Exception` holds it up."""


@dataclass(frozen=True)
class _Given:
    """Stands for the argument at `path` in what a member returns."""

    path: Path


@dataclass(frozen=True)
class _Cache:
    """Stands for a cache, of which each call is given one of its own so that none grows."""

    empty: Any


class _Signal:
    """Stands for the signal in what a member takes or returns."""

    def __deepcopy__(self, memo: Any) -> "_Signal":
        return self


SIGNAL = _Signal()


@dataclass(eq=False)
class Member:
    """One call of a module of the chain.

    `slot` leads to the signal in its arguments, `path` to the signal in what it returns,
    `response` is what it returns, with placeholders for the signal and the arguments.
    """

    module: nn.Module
    name: str
    slot: Path
    path: Path
    response: Any

    @property
    def called(self) -> nn.Module:
        """The module that the model's own forward calls, which may run members in turn."""
        return self.module.whole if isinstance(self.module, Turn) else self.module

    def outside(self, signal: Any) -> Any:
        """Return what stands for the signal that this takes where the model's own code runs."""
        return self.module.outside(signal) if isinstance(self.module, Turn) else signal

    def respond(self, signal: Any, arguments: Any) -> Any:
        """Return what the member would, with `signal` as its result."""
        if isinstance(self.response, _Signal):
            return signal
        return tree_map(lambda v: signal if isinstance(v, _Signal) else
                        at(arguments, v.path) if isinstance(v, _Given) else v, self.response)


class _Draws(TorchDispatchMode):
    """Writes down what draws from the global random state, so that it can be drawn again.

    A model may draw between its layers, to drop whole layers for instance.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in function.tags and not kwargs.get("generator"):
            given, named = tree_map(_own, (args, kwargs))
            self.made.append(lambda: function(*tree_map(_own, given), **named))
        return function(*args, **kwargs)

    def so_far(self) -> list[Callable[[], Any]]:
        """Return the draws since this was last asked."""
        draws, self.made = self.made, []
        return draws


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


class MemberContext(Context):
    """What the stubs wrote down: the later members' arguments and the entry's outputs.

    `draws` are the random draws that the model makes just before each later member's call.
    """

    def __init__(self, x: Any, *, live: bool = False) -> None:
        super().__init__(x, live=live)
        self.arguments: list[Any] | None = None
        self.draws: list[list[Callable[[], Any]]] = []
        self.entry: dict[nn.Module, list[Any]] = {}


class MemberStage(Stage):
    """The stage that runs one group of a chain's members."""

    def __init__(self, name: str, modules: list[nn.Module], chain: "MemberChain", i: int,
                 loose: list[Parameter]) -> None:
        super().__init__(name, modules, loose)
        self.chain, self.i = chain, i

    def __call__(self, h: Any, context: MemberContext) -> Tensor:
        """Return what the next stage takes."""
        if self.i == 0:
            return self.chain.first(h, context)
        if context.arguments is None:
            with rehearsing(self.chain.model):
                self.chain.first(context.x, context)
        if self.i == len(self.chain.groups) - 1:
            return self.chain.last(h, context)
        return self.chain.middle(self.i, h, context)


class MemberChain:
    """Members in groups, a group a stage, and how the model's own forward runs around them."""

    def __init__(self, model: nn.Module, members: list[Member], groups: list[range],
                 entry: list[tuple[nn.Module, int]], options: dict[str, Any],
                 clone_entry: bool) -> None:
        self.model, self.members, self.groups = model, members, groups
        self.entry, self.options, self.clone_entry = entry, options, clone_entry
        self.turns = {member.module.whole: len(turns_of(member.module.whole))
                      for member in members if isinstance(member.module, Turn)}
        self.draws: dict[bool, bool] = {}  # whether the model draws between members, by its mode

    def first(self, x: Any, context: MemberContext) -> Tensor:
        """Run what comes before the members and the first group; write down what follows."""
        if len(self.groups) == 1:
            return tensor_of(apply(self.model, x, **self.options))
        start = self.groups[0].stop
        fill = context.live or context.arguments is None
        training = self.model.training
        listens = self.draws.get(training, True)  # which takes time, so once if there are none
        written: list[Any] = []
        draws = _Draws()
        drawn: list[list[Callable[[], Any]]] = []
        caches: dict[int, _Cache] = {}
        signal: Any = None
        shown: Any = None
        state: RandomState | None = None
        _refuse_caches(x)

        def kept(value: Any) -> Any:
            if value is signal or value is shown:
                return SIGNAL
            return caches.get(id(value)) or context.keep(value)

        def stub(k: int, arguments: Any, run: Callable[..., Any]) -> Any:
            nonlocal signal, shown, state
            member = self.members[k]
            if k == 0:
                for cache in found(arguments, is_cache):
                    caches[id(cache)] = _Cache(fresh(cache))
            if k < start:
                return run(*arguments[0], **arguments[1])
            if k == start:
                signal = at(arguments, member.slot)
                shown = member.outside(signal)
                if not fill:
                    raise _Stop
                if listens:
                    state = random_state()
                    listening.enter_context(draws)
            elif at(arguments, member.slot) is not (signal if self._within(k, start) else shown):
                raise CannotStage(f"{member.name} did not take what {self.members[k - 1].name} "
                                  "returned, as it did for the example")
            written.append(tree_map(kept, arguments))
            drawn.append(draws.so_far())
            if k + 1 == len(self.members):
                listening.close()
                raise _Stop
            return member.respond(signal if self._within(k + 1, start) else shown, arguments)

        entry: dict[nn.Module, list[Any]] = {}
        with (self._stubs(stub, range(start)), self._recorded(entry if fill else None, context),
              ExitStack() as listening):
            self._run(x)
        if fill:
            context.arguments, context.entry, context.draws = written, entry, drawn
            if listens:
                self.draws[training] = any(drawn)
            if any(drawn) and state is not None:
                set_random_state(state)
        return signal

    def middle(self, i: int, h: Tensor, context: MemberContext) -> Tensor:
        """Run group `i` on `h` with the arguments that were written down."""
        for k in self.groups[i]:
            self._draw(k, context)
            args, kwargs = self._arguments(k, h, context)
            h = at(self.members[k].module(*args, **kwargs), self.members[k].path)
        return h

    def last(self, h: Tensor, context: MemberContext) -> Tensor:
        """Run the last group on `h` and what follows it, drawing what the model would draw."""
        group, state = self.groups[-1], random_state()
        shown = self.members[group.start].outside(h)

        def stub(k: int, arguments: Any, run: Callable[..., Any]) -> Any:
            member = self.members[k]
            if k < group.start:
                return member.respond(h if self._within(k + 1, group.start) else shown, arguments)
            if k == group.start:
                set_random_state(state)
                self._draw(k, context)
            args, kwargs = self._arguments(k, at(arguments, member.slot), context)
            return run(*args, **kwargs)

        with self._stubs(stub, group), self._replayed(context):
            return tensor_of(apply(self.model, context.x, **self.options))

    def _within(self, k: int, start: int) -> bool:
        """Whether the module in whose turns member `start` is runs member `k` after another."""
        member, other = self.members[k].module, self.members[start].module
        return (isinstance(member, Turn) and isinstance(other, Turn) and member.k > 0
                and member.whole is other.whole)

    def _draw(self, k: int, context: MemberContext) -> None:
        for draw in context.draws[k - self.groups[0].stop]:
            draw()

    def _arguments(self, k: int, h: Any, context: MemberContext) -> Any:
        assert context.arguments is not None
        written = context.arguments[k - self.groups[0].stop]
        return tree_map(lambda v: h if isinstance(v, _Signal) else
                        fresh(v.empty) if isinstance(v, _Cache) else v, written)

    def _run(self, x: Any) -> None:
        try:
            apply(self.model, x, **self.options)
        except _Stop:
            return
        raise CannotStage(f"{type(self.model).__name__} did not call {self.members[-1].name}, "
                          "which it did for the example; where whole layers are dropped at random, "
                          "set layerdrop to 0")

    @contextmanager
    def _stubs(self, stub: Callable[..., Any], real: range) -> Iterator[None]:
        """Let `stub` answer each member's call; the hooks of those not in `real` stay silent."""
        position = 0

        def forward_of(module: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal position
                for _ in range(self.turns.get(module, 1)):
                    k, position = position, position + 1
                    if k >= len(self.members) or self.members[k].called is not module:
                        raise CannotStage(f"the layers of {type(self.model).__name__} were not "
                                          "called as they were for the example; where whole "
                                          "layers are dropped at random, set layerdrop to 0")
                    member = self.members[k].module
                    args = (stub(k, (args, kwargs), run if member is module else member.forward),
                            *args[1:])
                return args[0]
            return forward

        modules = {member.called for member in self.members}
        silent = modules - {self.members[k].called for k in real}
        with _forwards({m: forward_of(m, m.forward) for m in modules}), _silence(silent):
            yield

    @contextmanager
    def _recorded(self, entry: dict[nn.Module, list[Any]] | None,
                  context: Context) -> Iterator[None]:
        """Write down in `entry` what the modules before the members return."""
        handles = []

        def record(module: nn.Module, args: Any, output: Any) -> None:
            assert entry is not None
            entry.setdefault(module, []).append(tree_map(lambda v: context.keep(
                v.clone() if self.clone_entry and isinstance(v, Tensor) else v), output))

        try:
            if entry is not None:
                handles = [module.register_forward_hook(record) for module, _ in self.entry]
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _replayed(self, context: MemberContext) -> Iterator[None]:
        """Let the modules before the members return what they returned in the first stage."""
        def forward_of(module: nn.Module, count: int, run: Callable[..., Any]) -> Any:
            outputs = iter(context.entry[module][:count])

            def forward(*args: Any, **kwargs: Any) -> Any:
                for output in outputs:
                    if self.clone_entry:
                        return mapped(output, Tensor.clone)
                    return output
                return run(*args, **kwargs)
            return forward

        patched = {m: forward_of(m, count, m.forward) for m, count in self.entry}
        with _forwards(patched), _silence(patched):
            yield


def _refuse_caches(x: Any) -> None:
    entries = x.items() if isinstance(x, Mapping) else enumerate(
        x if isinstance(x, (tuple, list)) else [x])
    for name, value in entries:
        if found(value, is_cache):
            raise CannotStage(f"x holds the cache {name}, which a stage that is run twice would "
                              "extend twice; leave it out")


@contextmanager
def _forwards(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let each module's calls run its replacement instead of its forward."""
    before = {module: module.__dict__.get("forward") for module in replacements}
    try:
        for module, forward in replacements.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@contextmanager
def _silence(modules: Any) -> Iterator[None]:
    """Keep the hooks of `modules` from seeing calls that are not real."""
    hidden = [(module, name, getattr(module, name)) for module in modules for name in _HOOKS
              if getattr(module, name)]
    try:
        for module, name, hooks in hidden:
            setattr(module, name, type(hooks)())
        yield
    finally:
        for module, name, hooks in hidden:
            hooks.update(getattr(module, name))  # those that the run itself has added
            setattr(module, name, hooks)


def members_of(path: list[Call], calls: list[Call]) -> list[Member]:
    """Return the members for a path of linked calls.

    The first member's slot and the last one's path are not used.
    """
    links = [link(a, b, calls) for a, b in pairwise(path)]
    assert None not in links
    slots = [(), *(slot for _, slot in links)]  # type: ignore[misc]
    paths = [*(path for path, _ in links), None]  # type: ignore[misc]
    return [Member(c.module, c.name, slot, way or (), _response(c, way))
            for c, slot, way in zip(path, slots, paths, strict=True)]


def _response(made: Call, path: Path | None) -> Any:
    given = {id(t): p for p, t in placed(made.arguments)}
    signal = None if path is None else at(made.output, path)

    def placeholder(value: Any) -> Any:
        if value is signal:
            return SIGNAL
        if isinstance(value, Tensor):
            return _Given(given[id(value)]) if id(value) in given else None
        return value

    return tree_map(placeholder, made.output)


def entry_of(path: list[Call], calls: list[Call]) -> tuple[list[tuple[nn.Module, int]], bool]:
    """Return the outermost modules that finished before the path began, with their calls counted.

    Also whether one of their outputs was changed in place after it was returned.
    """
    start = path[0].start
    done = [c for c in calls if c.end < start
            and (c.parent is None or c.parent.end > start)]
    counts: dict[nn.Module, int] = {}
    for c in done:
        counts[c.module] = counts.get(c.module, 0) + 1
    # What was put into an output after it was returned has no version.
    changed = any(version(t) != c.output_versions.get(id(t))
                  for c in done for t in tensors(c.output))
    return list(counts.items()), changed
