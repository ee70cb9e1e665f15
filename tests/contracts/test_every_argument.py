"""No argument is ignored: another value of it changes what comes out, or how it is computed."""

import importlib
import inspect
import typing
from functools import partial

import pytest
import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import netwright as nw
from netwright.catalogue.facets import methods
from netwright.contracts.checks import variants
from tests.contracts.calls import parameters

KINDS = [name.removeprefix("check_") for name in nw.contracts.__all__ if name.startswith("check_")]


class Operations(TorchDispatchMode):
    """The operations that the body does, on which shapes: how something is computed."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((str(func), tuple(tuple(each.shape) for each in tree_leaves(args)
                                           if isinstance(each, Tensor))))
        return func(*args, **(kwargs or {}))


def others(annotation, default, searched):
    """Yield values of an annotation's kind that are not the default."""
    kinds = typing.get_args(annotation) if typing.get_origin(annotation) in (
        typing.Union, type(int | str)) else (annotation,)
    if isinstance(searched, list):
        yield from searched
    elif isinstance(searched, tuple):
        yield from searched[:2]
    for kind in kinds:
        if typing.get_origin(kind) is typing.Literal:
            yield from typing.get_args(kind)
        elif kind is bool:
            yield from (True, False)
        elif kind is int:
            yield from (default + 1, default + 2, 2 * default, default - 1) if isinstance(
                default, int) else (1, 2, 3, 4, 8)
        elif kind is float:
            yield from (0.5 * default, 2.0 * default, default + 0.3) if isinstance(
                default, (int, float)) else (0.1, 0.5, 0.9, 2.0)
        elif kind is Generator:
            yield Generator().manual_seed(12345)


def result(kind, make):
    """Return what comes of a method, and by which operations: a list of plain values."""
    try:
        with Operations() as operations, torch.random.fork_rng():
            torch.manual_seed(3)
            found = RESULTS[kind](make())
    except nw.errors.MissingExtra:
        raise
    except Exception as error:
        return [type(error).__name__]
    return [*plain(found), operations.seen]


def plain(value):
    """Yield the numbers of a result."""
    for each in tree_leaves(value):
        if isinstance(each, Tensor):
            yield tuple(each.shape), each.dtype, torch.nan_to_num(each.detach().double()).tolist()
        else:
            yield repr(each) if isinstance(each, (str, int, float, bool, tuple)) else \
                type(each).__name__


def of_block(case):
    case.block.train()
    outputs = [part for part in case.outputs() if part.requires_grad]
    if outputs:
        torch.autograd.backward([part.double().square().sum() for part in outputs])
    gradients = [p.grad for p in case.block.parameters()]
    case.block.eval()
    return case.outputs(), gradients, case.state()


def of_rule(case):
    losses = [case(), case()]
    return losses, case.gradients(), case.weights(), case.state(), case.rule.predict(case.x)


def of_generative(case):
    found = [case.outputs(), case.state()]
    if hasattr(case.model, "sample") and not case.condition:
        found.append(case.model.sample(3))
    return found


def of_optimizer(case):
    return [case.step() for _ in range(4)], case.weights()


def of_reshape(case):
    model = case()
    return model.state_dict(), case.outputs(model), [
        (name, p.requires_grad) for name, p in model.named_parameters()]


RESULTS = {"block": of_block, "rule": of_rule, "generative": of_generative,
           "optimizer": of_optimizer, "reshape": of_reshape, "objective": lambda case: case(),
           "measure": lambda case: case.measure()}


def ignored(method):
    """Return the arguments of a method of which no other value changes anything."""
    said = method.facets
    case = importlib.import_module(f"netwright.contracts.check_{said.kind}").Case
    network = said.network
    if said.kind in ("block", "generative") and network is not None:
        return []
    left = {}
    for name, parameter in parameters(method.value).items():
        values = list(others(parameter.annotation, parameter.default, said.search.get(name)))
        if values and name not in said.takes:
            left[name] = values
    for arguments in variants(method.value).values():
        make = partial(case, method.value, network=network, batch=said.batch)
        base = result(said.kind, lambda make=make, a=arguments: make(arguments=a))
        for name in list(left):
            for value in left[name]:
                changed = {**arguments, name: value}
                if result(said.kind, lambda make=make, c=changed: make(arguments=c)) != base:
                    del left[name]
                    break
    return list(left)


CASES = [pytest.param(method, id=name) for name, method in methods().items()
         if method.facets.kind in KINDS]
assert set(RESULTS) == set(KINDS)


@pytest.mark.check
@pytest.mark.parametrize("method", CASES)
def test_every_argument_changes_something(method):
    try:
        assert ignored(method) == []
    except nw.errors.MissingExtra as missing:
        pytest.skip(str(missing))


def test_an_argument_that_is_ignored_is_found():
    @nw.method("objective")
    def deaf(a: Tensor, b: Tensor, *, scale: float = 2.0, heard: float = 1.0) -> Tensor:
        return (a - b).square().mean() * heard
    method = next(iter(methods().values())).__class__("objectives.deaf", deaf, deaf.facets)
    assert inspect.signature(deaf).parameters["scale"].annotation is float
    assert ignored(method) == ["scale"]
