import inspect
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._pytree import tree_leaves, tree_map

from netwright import checks
from netwright.contracts.checks import Make, broken, check, check_once, expect, hold, offered
from netwright.errors import NothingToReshape, UnknownName
from netwright.models.gpt import gpt
from netwright.reshape.change import changes, named
from netwright.reshape.saved import load, save
from netwright.runtime.modes import evaluating
from netwright.signals import apply

__all__ = ["check_reshape"]

# Other names for what is `calibration`, or `example` where shapes alone are needed.
_OTHER_NAMES = ("batch", "batches", "data", "dataset", "inputs", "loader", "samples", "task_data",
                "x")


@checks.annotated
def check_reshape(reshape: Callable[..., nn.Module], *,
                  arguments: Mapping[str, Any] | None = None,
                  network: Callable[[], nn.Module] | None = None,
                  batch: Callable[[], Any] | None = None) -> None:
    """Hold a reshape to what every reshape keeps to: its argument, its record, its result.

    It is called as reshape(network, calibration=x, example=x, generator=generator, **arguments),
    with those of `calibration`, `example` and `generator` that it takes, on each of its declared
    variants where `arguments` are not given. `network` makes a new network (a small transformer of
    characters where it is None), and `batch` an input that the result takes. What was declared by
    `@nw.method("reshape", variants=…, network=…, batch=…)` stands where an argument is left out.

    Raises:
        BrokenContract: the reshape does not keep to it; says in one line what was expected, what
            was seen, and how to mend it.

    >>> def frozen(model):
    ...     return model.requires_grad_(False)
    >>> check_reshape(frozen)
    Traceback (most recent call last):
    netwright.errors.BrokenContract: frozen: its argument stays as it was: expected the model that \
was given to stay as it was, got another '0.characters.weight learns'; change a copy of it
    """
    hold("reshape", reshape, arguments=arguments, network=network, batch=batch)


def ordinary_network() -> nn.Module:
    """Return the small transformer on which a reshape is tried that names no other."""
    return gpt(16, context=8, width=16, depth=3, heads=2)


def ordinary_batch() -> Tensor:
    """Return some characters."""
    return torch.randint(16, (2, 8))


class Case:
    """A reshape with a small network and an input, everything random set back at each call."""

    def __init__(self, method: Callable[..., nn.Module], arguments: Mapping[str, Any],
                 network: Callable[[], nn.Module] | None, batch: Callable[[], Any] | None, *,
                 dtype: torch.dtype | None = None) -> None:
        self.method: Any = method
        self.arguments = dict(arguments)
        self.make = network or ordinary_network
        torch.manual_seed(0)
        self.network = self.make().to(dtype)
        torch.manual_seed(7)
        self.x = tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point()
                          else t, (batch or ordinary_batch)())

    def __call__(self, network: nn.Module | None = None, *, x: Any = None,
                 method: Callable[..., Any] | None = None) -> Any:
        x = self.x if x is None else x
        supplied = offered(self.method, calibration=x, example=x,
                           generator=Generator().manual_seed(0))
        parameter = inspect.signature(self.method).parameters.get("calibration")
        if parameter is not None and parameter.default is not parameter.empty:
            supplied.pop("calibration")  # where it may be left out, a variant gives it
        torch.manual_seed(1)
        return (method or self.method)(self.network if network is None else network,
                                       **{**supplied, **self.arguments})

    def outputs(self, model: nn.Module) -> list[Tensor]:
        torch.manual_seed(2)
        with torch.no_grad(), evaluating(model):
            return [t for t in tree_leaves(apply(model, self.x)) if isinstance(t, Tensor)]


def expect_same_outputs(case: Case, a: nn.Module, b: nn.Module, expected: str, mend: str) -> None:
    for one, other in zip(case.outputs(a), case.outputs(b), strict=True):
        expect(one.shape == other.shape and torch.equal(one, other), expected,
               f"a difference of {(one - other).abs().max():.1e}" if one.shape == other.shape
               else f"the shapes {tuple(one.shape)} and {tuple(other.shape)}", mend)


@contextmanager
def nothing_changed(model: nn.Module) -> Iterator[None]:
    """Raise BrokenContract where the body changes `model`."""
    before = dict(_looks(model))
    yield
    after = dict(_looks(model))
    other = next((what for what in {**before, **after}
                  if not _alike(before.get(what), after.get(what))), None)
    expect(other is None, "the model that was given to stay as it was", f"another {other!r}",
           "change a copy of it")


def _looks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield all that a model is, down to what its modules hold."""
    for name, module in model.named_modules():
        yield f"{name} itself", (id(module), type(module))
        for key, value in vars(module).items():
            if key == "_modules":
                yield f"{name} children", [(child, id(part)) for child, part in value.items()]
            elif key.endswith("hooks") and isinstance(value, Mapping):
                yield f"{name} {key}", list(value)
            elif key not in ("_parameters", "_buffers"):
                yield f"{name} {key}", value if isinstance(
                    value, (bool, int, float, str)) else id(value)
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            full = f"{name}.{key}" if name else key
            yield full, None if tensor is None else tensor.detach().clone()
            if tensor is not None:
                yield f"{full} itself", id(tensor)
                yield f"{full} learns", tensor.requires_grad
                yield f"{full} gradient", tensor.grad
    yield "config", str(getattr(model, "config", None))


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    return type(a) is type(b) and bool(a == b)


@check
def its_argument_stays_as_it_was(make: Make) -> None:
    case = make()
    with nothing_changed(case.network):
        case()
    with nothing_changed(case.network):
        case(method=case.method.decide)


@check
def its_argument_stays_as_it_was_after_a_failed_call(make: Make) -> None:
    case = make()
    last = list(case.network.modules())[-1]

    def fail(*_: Any) -> None:
        raise RuntimeError("the run was broken off")

    last.register_forward_hook(fail)
    with nothing_changed(case.network):
        try:
            case()
        except Exception:  # whatever the failed run became
            return


@check
def random_state_stays_as_it_was(make: Make) -> None:
    case = make()
    if "generator" not in inspect.signature(case.method).parameters:
        return
    torch.manual_seed(1)
    expected = torch.get_rng_state()
    case()
    expect(torch.equal(torch.get_rng_state(), expected),
           "all draws to be the generator's that is given", "a changed global random state",
           "draw from generator, or within same_random_state()")


@check_once
def its_data_are_called_calibration_or_example(make: Make) -> None:
    case = make()
    found = inspect.signature(case.method).parameters
    other = [name for name in found if name in _OTHER_NAMES]
    expect(not other, "data called calibration, or example where shapes alone are needed",
           ", ".join(other), "give it that name")
    if "calibration" in found and found["calibration"].default is inspect.Parameter.empty:
        torch.manual_seed(3)
        case(x=iter([case.x, case.x]))  # any iterable of batches will do


@check
def padding_decides_nothing(make: Make) -> None:
    case = make()
    if "calibration" not in inspect.signature(case.method).parameters or not (
            isinstance(case.x, Tensor) and case.x.dtype == torch.long and case.x.ndim == 2):
        return
    mask = torch.ones_like(case.x)
    mask[:, -3:] = 0
    decisions = []
    for number in (0, 5):
        case = make()
        x = {"input_ids": case.x.where(mask > 0, number), "attention_mask": mask}
        if "calibration" in case.arguments:
            case.arguments["calibration"] = x
        try:
            decisions.append(case(Padded(case.network), x=x, method=case.method.decide))
        except UnknownName:  # arguments that name the parts of another network
            return
    expect(decisions[0] == decisions[1], "the same decision whatever stands where attention_mask "
           "is 0", "another", "leave it out, as netwright.runtime.padding.real_rows does")


class Padded(nn.Module):
    """A network that is called with a mask, which its layers have no need of."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Return what the network returns."""
        return self.network(input_ids)


@check
def what_was_done_is_recorded(make: Make) -> None:
    case = make()
    result = case()
    expect(isinstance(result, nn.Module), "a model", type(result).__name__, "return the model")
    records, before = changes(result), changes(case.network)
    expect(len(records) == len(before) + 1 and records[:-1] == before,
           "one record more in changes(result)", f"{len(records)} where {len(before)} were before",
           "make it by @nw.reshape.reshape")
    expect(named(records[-1].name) is case.method, "a record by which the reshape is found again",
           records[-1].name, "define it at the top of a module")
    for data in (records[-1].arguments, records[-1].decision):
        expect(json.loads(json.dumps(data)) == data, "plain data in the record", data,
               "put numbers, strings, lists and dictionaries into decided(...)")


@check
def its_decision_alone_builds_the_result_again(make: Make) -> None:
    case = make()
    decision = case(method=case.method.decide)
    expect(json.loads(json.dumps(decision)) == decision, "a decision in plain data", decision,
           "put numbers, strings, lists and dictionaries into decided(...)")
    result, fresh = case(), make().make()
    again = case.method.apply(fresh, changes(result)[-1].decision)
    again.load_state_dict(result.state_dict())
    for (name, buffer), (_, other) in zip(result.named_buffers(), again.named_buffers(),
                                          strict=True):
        expect(buffer.shape == other.shape, f"the buffer {name} of {tuple(buffer.shape)}",
               tuple(other.shape), "build all of the structure when the decision is applied")
        other.copy_(buffer)
    expect_same_outputs(case, again, result, "the result's outputs from its decision and state",
                        "put what apply needs into the decision")


@check
def the_result_trains(make: Make) -> None:
    result = make()
    case, result = result, result().train()
    if not any(p.requires_grad for p in result.parameters()):
        return  # one that is made for inference alone
    torch.manual_seed(2)
    outputs = [t for t in tree_leaves(apply(result, case.x)) if isinstance(t, Tensor)]
    sum(t.square().mean() for t in outputs).backward()  # type: ignore[union-attr]
    found = [p.grad for p in result.parameters() if p.grad is not None]
    expect(any(bool(grad.any()) for grad in found), "a gradient in some parameter", "none",
           "keep the graph, and what learned before")
    expect(all(bool(grad.isfinite().all()) for grad in found), "finite gradients", "others",
           "look for a division by zero")


@check_once
def the_result_compiles(make: Make) -> None:
    case = make()
    result = case().eval()
    compiled = torch.compile(deepcopy(result), backend="eager")
    expected, got = case.outputs(result), case.outputs(compiled)
    torch._dynamo.reset()
    for one, other in zip(got, expected, strict=True):
        expect(torch.allclose(one, other, rtol=1e-4, atol=1e-5), "the same outputs when compiled",
               f"a difference of {(one - other).abs().max():.1e}",
               "keep to what torch.compile can follow")


@check
def the_result_is_copied_and_pickled(make: Make) -> None:
    case = make()
    result = case()
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    for how, other in (("deepcopy", deepcopy(result)),
                       ("torch.save", torch.load(file, weights_only=False))):
        expect_same_outputs(case, other, result, f"the same outputs after {how}",
                            "hold no lambdas and no handles of other modules")
        expect(changes(other) == changes(result), f"the same record after {how}", changes(other),
               "keep the record at the model")


@check
def the_result_is_reshaped_again(make: Make) -> None:
    case = make()
    result = case()
    with nothing_changed(result):
        try:
            again = case(result)
        except ValueError:  # the reshape says that there is nothing left, or that this is another
            return
    case.outputs(again)
    expect(len(changes(again)) == len(changes(result)) + 1, "both reshapes on record",
           [record.name for record in changes(again)], "make it by @nw.reshape.reshape")


@check
def the_result_is_saved_and_loaded(make: Make) -> None:
    case = make()
    result = case()
    with tempfile.TemporaryDirectory() as folder:
        save(result, folder)
        torch.manual_seed(5)
        again = load(folder, case.make())
    expect_same_outputs(case, again, result, "the same outputs after save and load",
                        "put what apply needs into the decision")
    expect(changes(again) == changes(result), "the same record after save and load",
           changes(again), "put plain data into decided(...)")


@check
def dtype_modes_buffers_hooks_and_what_is_frozen_stay(make: Make) -> None:
    case = make(dtype=torch.float64)
    model = case.network
    model.train()
    next(model.children()).eval()
    model.register_buffer("held", torch.tensor([2.0], dtype=torch.float64))
    model.register_buffer("aside", torch.tensor([3]), persistent=False)
    model.register_forward_hook(_twice)
    first = next(iter(model.parameters())).requires_grad_(False)
    result = case()
    for name, buffer in (("held", model.held), ("aside", model.aside)):
        kept = dict(result.named_buffers()).get(name)
        expect(kept is not None and torch.equal(kept, buffer), f"the buffer {name!r} to be kept",
               kept, "change the model's parts, not the model around them")
    expect("aside" in result._non_persistent_buffers_set, "a buffer that is in no state to stay "
           "so", "one that is", "keep it")
    expect(list(result._forward_hooks.values()) == [_twice], "the model's hooks to be kept",
           list(result._forward_hooks.values()), "change a deepcopy, which has them")
    kinds = {t.dtype for t in result.parameters()} - {torch.float64}
    expect(not kinds or case.arguments.get("dtype") is not None,  # which asks for another one
           "all weights in the model's dtype, torch.float64", kinds,
           "make new weights .to(those that are there)")
    before, after = dict(model.named_modules()), dict(result.named_modules())
    for name in before.keys() & after.keys():
        if type(before[name]) is type(after[name]):
            expect(before[name].training == after[name].training,
                   f"the mode of {name!r} to be kept", after[name].training,
                   "give what is new the mode of what it replaces")
    name = next(name for name, p in model.named_parameters() if p is first)
    kept = dict(result.named_parameters()).get(name)
    expect(kept is None or not kept.requires_grad, f"the frozen {name!r} to stay frozen",
           "one that learns", "copy requires_grad with the weights")


@check
def parts_in_eval_mode_stay_so_wherever_they_are_put(make: Make) -> None:
    case = make()
    case.network.train()
    for k, (name, part) in enumerate(case.network.named_modules()):
        part.was_called = name
        part.training = k % 3 != 1
    before = {name: part.training for name, part in case.network.named_modules()}
    places = list(case().named_modules(remove_duplicate=False))
    for name, part in places:
        if sum(other is part for _, other in places) > 1:
            continue  # one that stands for several has but one mode
        was = vars(part).get("was_called")
        expect(was is None or part.training == before[was],
               f"the mode of {was!r} to be kept where it is called {name!r}", part.training,
               "put a part elsewhere by netwright.anatomy.replace, which gives it modes, and give "
               "it its own again")


def _twice(module: nn.Module, args: Any, output: Any) -> Any:
    return tree_map(lambda t: 2 * t if isinstance(t, Tensor) else t, output)


@check
def tied_weights_stay_tied(make: Make) -> None:
    case = make()
    parts = [module for module in case.network.modules() if isinstance(module, nn.Linear)]
    pair = next(((a, b) for i, a in enumerate(parts) for b in parts[i + 1:]
                 if a.weight.shape == b.weight.shape), None)
    if pair is None:
        return
    pair[1].weight = pair[0].weight
    names = [name for name, p in case.network.named_parameters(remove_duplicate=False)
             if p is pair[0].weight]
    try:
        result = case()
    except ValueError:  # the reshape says so
        return
    kept = [p for name, p in result.named_parameters(remove_duplicate=False)
            if name in names and _alike(p, pair[0].weight)]
    expect(len({id(p) for p in kept}) <= 1, f"{' and '.join(names)} to stay one parameter", "two",
           "change a deepcopy")


@check
def parametrizations_stay_or_are_named(make: Make) -> None:
    case = make()
    found = [(name, module) for name, module in case.network.named_modules()
             if isinstance(module, nn.Linear)]
    if not found:
        return
    name: str
    part: Any
    name, part = found[0]
    register_parametrization(part, "weight", Halved())
    try:
        result = case()
    except (ValueError, NotImplementedError) as error:
        expect("parametriz" in str(error), "an error that names the parametrization", error,
               "say that the weight is parametrized, and to remove that first")
        return
    lost = {name for name, module in result.named_modules() if type(module) is nn.Linear
            and any(_alike(module.weight, weight)
                    for weight in (part.weight, part.parametrizations.weight.original))}
    expect(not lost, f"the parametrization of {name!r} to be kept", f"a plain weight in {lost}",
           "write into a parametrized weight through it, or refuse it")
    case.outputs(result)


@check
def hooks_of_parts_stay_or_are_named(make: Make) -> None:
    case = make()
    parts = [module for module in case.network.modules() if isinstance(module, nn.Linear)]
    for part in parts:
        part.register_forward_hook(_twice)
    try:
        result = case()
    except ValueError as error:
        expect("hook" in str(error), "an error that names the hooks", error,
               "say that the part has hooks, and to remove them first")
        return
    lost = {name for name, module in result.named_modules()
            if isinstance(module, nn.Linear) and not module._forward_hooks
            and any(_alike(module.weight, part.weight) for part in parts)}
    expect(not lost, "the hooks of parts that go on to be kept", f"none at {lost}",
           "move the modules rather than their weights, or refuse those with hooks")


class Halved(nn.Module):
    """A parametrization that can be written through."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return half of it."""
        return weight / 2

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return what gives `weight`."""
        return 2 * weight


@check_once
def where_there_is_nothing_it_says_so(make: Make) -> None:
    case = make()
    nothing = nn.Sequential(nn.Identity())
    try:
        case(nothing, x=torch.randn(2, 4))
    except NothingToReshape:
        return
    broken("NothingToReshape at a network with nothing that it could change", "a result",
           "raise it, and say what was looked for")
