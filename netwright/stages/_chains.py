"""Chooses, among the calls of an example run, those that make the best chain."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from netwright.anatomy.calls import Call, link
from netwright.anatomy.turns import Turn
from netwright.signals import tensors
from netwright.stages._members import MemberChain, MemberContext, MemberStage, entry_of, members_of
from netwright.stages.stage import Stages


@dataclass
class Candidate:
    """Linked calls, with the sum over their stages of (layers with weights)^2."""

    path: list[Call]
    cost: int


def candidates(calls: list[Call]) -> list[Candidate]:
    """Return the best chain inside each module that called others, the finest and evenest first.

    A chain is measured by the sum of the squares of its stages' numbers of weighted layers, where
    what runs before it counts for its first stage and what runs after it for its last.
    """
    excluded: set[nn.Module] = set()
    while True:
        found = [c for call in calls if len(call.children) > 1
                 if (c := _best(call, calls, excluded)) is not None]
        repeated = {m for c in found for m in _repeated_elsewhere(c.path, calls)}
        if not repeated:
            return sorted(found, key=lambda c: (c.cost, -len(c.path)))
        excluded |= repeated


def lists(calls: list[Call]) -> list[Candidate]:
    """Return the chains that are made of one module list's members, the evenest first.

    Lists inside another chain's members are left out.
    """
    found = []
    for owner in calls[0].module.modules():
        if not isinstance(owner, (nn.ModuleList, nn.Sequential)):
            continue
        made = [turn for c in calls if any(c.module is child for child in owner.children())
                for turn in _turns(c)]
        if not made or not all(link(a, b, calls) for a, b in _pairs(made)):
            continue
        found.append(Candidate(made, _cost(made, calls)))
    found = [c for c in found if sound(c.path) and not any(
        len(d.path) > 1 and all(any(call.inside(o) for o in d.path) for call in c.path)
        for d in found)]
    return sorted(found, key=lambda c: (c.cost, -len(c.path)))


def _turns(call: Call) -> list[Call]:
    """Return the turns that a call consists of, itself where it is no such call."""
    turns = [c for c in call.children if isinstance(c.module, Turn)]
    return turns or [call]


def _completed(path: list[Call]) -> tuple[list[Call], int]:
    """Return `path` with all turns of the modules that it begins and ends in, and how many first.

    A module that runs in turns is run by stages with all of its turns, or as a whole.
    """
    before, after = _turns_around(path[0]), _turns_around(path[-1])
    first = before[:before.index(path[0])]
    return [*first, *path, *after[after.index(path[-1]) + 1:]], len(first)


def _turns_around(call: Call) -> list[Call]:
    return _turns(call.parent) if isinstance(call.module, Turn) and call.parent else [call]


def through(cuts: list[str], calls: list[Call]) -> tuple[list[Call], list[int]] | str:
    """Return the linked calls that lead through the calls named `cuts`, and where each begins.

    Where there are none, a sentence that says between which two the link is missing.
    """
    named = []
    for cut in cuts:
        made = [c for c in calls if c.name == cut]
        if not made:
            return f"{cut} was not called in the example run"
        named.append(made[0])
    path, starts = [named[0]], [0]
    for a, b in _pairs(named):
        way = _way(a, b, calls)
        if way is None:
            return f"nothing that {a.name} leads to is what {b.name} takes, unchanged"
        path += way[1:]
        starts.append(len(path) - 1)
    repeated = _repeated_elsewhere(path, calls)
    if repeated:
        names = ", ".join(c.name for c in path if c.module in repeated)
        return f"{names} is called in other places too"
    path, added = _completed(path)
    return path, [0, *(start + added for start in starts[1:])]


def sound(path: list[Call]) -> bool:
    """Whether no call of `path` takes what an earlier one took or returned beside the signal."""
    signals: set[int] = set()
    for k, call in enumerate(path):
        taken = {id(t) for t in tensors(call.arguments)}
        returned = {id(t) for t in tensors(path[k - 1].output)} if k else set()
        if taken & (signals - returned):
            return False
        signals |= returned & taken
    return True


def groups_of(path: list[Call]) -> list[int]:
    """Return where in `path` a stage begins: at each call with weights but the first."""
    starts = [0]
    for k, call in enumerate(path):
        if k and call.weights and any(c.weights for c in path[starts[-1]:k]):
            starts.append(k)
    return starts


def unique(names: list[str]) -> list[str]:
    """Return `names` with a number behind those that come again, as where layers are shared."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return result


def member_stages(model: nn.Module, calls: list[Call], path: list[Call], starts: list[int],
                  names: list[str], options: dict[str, object]) -> Stages:
    """Return the stages in which the calls of `path` run, a stage beginning at each of `starts`."""
    groups = [range(a, b) for a, b in _pairs([*starts, len(path)])]
    entry, changed = entry_of(path, calls)
    chain = MemberChain(model, members_of(path, calls), groups, entry, options, changed)
    stages: list[MemberStage] = []
    for i, (name, group) in enumerate(zip(names, groups, strict=True)):
        modules = [path[k].module for k in group]
        if i == 0:
            modules = [module for module, _ in entry] + modules
        if i == len(groups) - 1:
            modules += _after(path, calls)
        stages.append(MemberStage(name, list(dict.fromkeys(modules)), chain, i, []))
    return Stages(model, stages, MemberContext)


def _best(container: Call, calls: list[Call],
          excluded: set[nn.Module]) -> Candidate | None:
    paths = [(p, sum(c.weights ** 2 for c in p)) for p in _pieces(container, calls, excluded)]
    total = calls[0].weights
    best: list[tuple[int, list[Call]]] = []
    for path, squares in paths:
        before, _ = _around(path[0], path[0], calls, total)
        options = [(squares + before * (before + 2 * path[0].weights), path)]
        options += [(cost + squares, way + path) for cost, way in best
                    if link(way[-1], path[0], calls)]
        best.append(min(options, key=lambda o: (o[0], -len(o[1]))))
    ends = []
    for _, way in best:
        if len(groups_of(way)) > 1 and sound(way):
            ends.append(Candidate(way, _cost(way, calls)))
    return min(ends, key=lambda c: (c.cost, -len(c.path)), default=None)


def _cost(path: list[Call], calls: list[Call]) -> int:
    sizes = [sum(c.weights for c in path[a:b]) for a, b in _pairs([*groups_of(path), len(path)])]
    before, after = _around(path[0], path[-1], calls, calls[0].weights)
    sizes[0] += before
    sizes[-1] += after
    return sum(size * size for size in sizes)


def _pieces(container: Call, calls: list[Call], excluded: set[nn.Module]) -> list[list[Call]]:
    """Return the children of `container`, those that only pass a signal on as what is in them."""
    pieces = []
    for child in container.children:
        inner = _inside(child, calls, excluded)
        if inner is not None:
            pieces.append(inner)
        elif child.module not in excluded:
            pieces.append([child])
    return pieces


def _inside(pipe: Call, calls: list[Call], excluded: set[nn.Module]) -> list[Call] | None:
    """Return the chain that leads from what `pipe` takes to what it returns, if it is finer."""
    if len(pipe.children) < 2 or pipe.module in excluded:
        return None
    taken = {id(t) for t in tensors(pipe.arguments)}
    returned = {id(t) for t in tensors(pipe.output)}
    best: list[tuple[int, list[Call]]] = []
    earlier = 0
    for path in _pieces(pipe, calls, excluded):
        squares = sum(c.weights ** 2 for c in path)
        options = [(cost + squares, way + path) for cost, way in best
                   if link(way[-1], path[0], calls)]
        if not earlier and any(id(t) in taken for t in tensors(path[0].arguments)):
            options.append((squares, path))
        earlier += sum(c.weights for c in path)
        if options:
            best.append(min(options, key=lambda o: (o[0], -len(o[1]))))
    full = [(cost, way) for cost, way in best
            if any(id(t) in returned for t in tensors(way[-1].output))
            and sum(c.weights for c in way) == pipe.weights and len(groups_of(way)) > 1
            and sound(way)]
    return min(full, key=lambda o: (o[0], -len(o[1])), default=(0, None))[1]


def _way(a: Call, b: Call, calls: list[Call]) -> list[Call] | None:
    """Return the shortest linked calls from `a` to `b`."""
    ways, reached = [[a]], {a}
    while ways:
        further = []
        for way in ways:
            for call in calls:
                if (call in reached or call.start > b.start or call.start < way[-1].end
                        or not link(way[-1], call, calls)):
                    continue
                if call is b:
                    return [*way, b]
                reached.add(call)
                further.append([*way, call])
        ways = further
    return None


def _around(first: Call, last: Call, calls: list[Call], total: int) -> tuple[int, int]:
    """Return how many layers with weights ran before `first` began and after `last` ended."""
    leaves = [c for c in calls if c.weights and not any(d.weights for d in c.children)]
    before = {c.module: c.weights for c in leaves if c.end < first.start}
    after = {c.module: c.weights for c in leaves if c.start > last.end}
    return min(sum(before.values()), total), min(sum(after.values()), total)


def _after(path: list[Call], calls: list[Call]) -> list[nn.Module]:
    end = path[-1].end
    return [c.module for c in calls if c.start > end
            and (c.parent is None or c.parent.start < end)]


def _repeated_elsewhere(path: list[Call], calls: list[Call]) -> set[nn.Module]:
    """Return the modules of `path` that the example run also called outside it."""
    inside, everywhere = Counter(c.module for c in path), Counter(c.module for c in calls)
    return {module for module, count in inside.items() if everywhere[module] != count}


def _pairs(items: list) -> Iterator[tuple]:
    return pairwise(items)
