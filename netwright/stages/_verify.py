"""Runs a chain beside its model and compares them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from netwright.anatomy.calls import Call, watching
from netwright.errors import CannotStage
from netwright.runtime.modes import evaluating, rehearsing, training
from netwright.runtime.random_state import (
    RandomState,
    random_state,
    same_draws,
    set_random_state,
)
from netwright.signals import tensors
from netwright.stages.stage import Stages, call


def describe(x: Any) -> str:
    """Return what `x` is in a few words: shapes and names."""
    if isinstance(x, Tensor):
        return f"a tensor of shape {tuple(x.shape)} and {x.dtype}"
    if isinstance(x, Mapping):
        return f"a mapping of {', '.join(f'{k}: {_short(v)}' for k, v in x.items())}"
    if isinstance(x, (tuple, list)):
        return f"{len(x)} arguments: {', '.join(_short(v) for v in x)}"
    return _short(x)


def _short(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def check_example(model: nn.Module, example: Any, what: str = "the example") -> None:
    """Raise CannotStage where `model` does not take `example`, naming the module that failed."""
    calls: list[Call] = []
    try:
        with evaluating(model), rehearsing(model), watching(model, calls):
            call(model, example)
    except CannotStage:
        raise
    except Exception as error:
        failed = next((c for c in reversed(calls) if not c.end and c.name), None)
        where = f" at {failed.name} ({failed.module})" if failed and not failed.children else ""
        raise CannotStage(f"{type(model).__name__} cannot run on {what}, {describe(example)}: it "
                          f"failed{where} with {error}; give an example= that the network takes"
                          ) from error


def difference(net: Stages, example: Any) -> str | None:
    """Return how `net` differs from its model on `example`, None where it does not.

    Outputs, buffers and the random state are compared bit for bit, in eval and in train mode; in
    train mode only where the model itself runs there (batch normalisation needs two examples).
    """
    model = net.model
    with evaluating(model):
        wrong = _differs(net, example, _after(model, model, example))
    if wrong:
        return f"{wrong} in eval mode"
    with training(model):
        try:
            expected = _after(model, model, example)
        except (RuntimeError, ValueError):
            return None  # the model's own train mode refuses the example
        wrong = _differs(net, example, expected)
    return f"{wrong} in train mode" if wrong else None


_After = tuple[Tensor, list[Tensor], RandomState]


def _after(run: nn.Module | Stages, model: nn.Module, example: Any) -> _After:
    with rehearsing(model):
        output = run(example) if isinstance(run, Stages) else call(run, example)
        buffers = [b.clone() for b in model.buffers()]
        return output, buffers, random_state()


def _differs(net: Stages, example: Any, expected: _After) -> str | None:
    start = random_state()
    try:
        got = _after(net, net.model, example)
    except Exception as error:  # whatever the model's code raised is the reason that is given
        return f"the stages raise {type(error).__name__} ({error})"
    finally:
        set_random_state(start)
    (output, buffers, drawn), (output2, buffers2, drawn2) = expected, got
    if not isinstance(output2, Tensor):
        return f"the last stage returns {type(output2).__name__}"
    if not _same(output, output2):
        return "the outputs differ"
    if not all(map(_same, buffers, buffers2)):
        return "the buffers, such as running statistics, differ"
    if not same_draws(drawn, drawn2):
        return "different random numbers are drawn (such as by dropping whole layers)"
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def parameters_reached(values: Any) -> set[int]:
    """Return the ids of the parameters from which the tensors in `values` were computed."""
    seen: set[Any] = set()
    found: set[int] = set()
    waiting = [t.grad_fn for t in tensors(values) if t.grad_fn is not None]
    found |= {id(t) for t in tensors(values) if t.grad_fn is None}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [next_node for next_node, _ in node.next_functions if next_node is not None]
    return found
