"""The two halves of a reshape, and the record of it that its result keeps."""

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar, cast, overload

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_leaves

from netwright.catalogue.facets import facets, method
from netwright.errors import NothingToReshape, UnknownName
from netwright.reshape._checked import Remembered, check_result, example_for
from netwright.reshape._naming import plain
from netwright.runtime.faces import where

__all__ = ["Reshaped", "changes", "decided", "reshape"]

Decision = dict[str, Any]
Half = Callable[..., nn.Module]
H = TypeVar("H", bound=Half)
P = ParamSpec("P")

# What a record leaves out.
_DATA = ("calibration", "example", "generator", "other_texts", "progress", "resume", "texts",
         "tokenizer")
_OWN: dict[str, "Reshape"] = {}  # reshapes of the user's, by module and name


@method("companion")
@dataclass(frozen=True)
class Reshaped:
    """One reshape that a model went through: its name, what it was asked and what it decided.

    `arguments` are those that were given, the model and its data apart, and `decision` is what
    its first half found; both are plain data, as JSON holds them.
    """

    name: str
    arguments: dict[str, Any]
    decision: Decision


class History(NamedTuple):
    """What a model was before it was reshaped, and all that was done to it since."""

    origin: dict[str, Any]
    records: tuple[Reshaped, ...]


class _Decided(NamedTuple):
    decision: Decision
    using: dict[str, Any]
    keeps_function: bool
    alike: bool


class Reshape(Protocol[P]):
    """A function from a network to a changed copy, whose halves can be had apart."""

    __name__: str

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> nn.Module: ...

    @overload
    def __call__(self, *args: Any, check: bool, **kwargs: Any) -> nn.Module: ...

    def decide(self, *args: P.args, **kwargs: P.kwargs) -> Decision:
        """Return what is to be changed, as plain data; nothing is changed."""

    def apply(self, model: nn.Module, decision: Decision) -> nn.Module:
        """Carry out what was decided on `model` itself, without data and without training."""

    def carry_out(self, model: nn.Module, decision: Decision, arguments: Mapping[str, Any],
                  using: Mapping[str, Any]) -> nn.Module:
        """Apply and record."""

    def applies(self, half: H) -> H:
        """Take `half` for what carries out the decisions."""


@method("companion")
def reshape(body: Callable[P, nn.Module]) -> Reshape[P]:
    """Make a reshape of two halves: the decorated function decides, another one applies.

    decide(model, ...) -> plain data;  apply(model, plain data) -> model;
    reshape(model, ...) = apply(copy of model, decide(model, ...)), recorded in `changes`.

    The function looks at the model, changes nothing and returns `decided(...)`; the half that
    carries this out is named by `@name.applies` and changes the copy that it is given. Whatever
    was decided in another process can so be applied again, which is what `netwright.load` does.

    Every reshape takes `check`. Unless it is False, the result is run before it is returned, on
    the first rows of `example` or of `calibration`: in eval and in train mode, and where it
    generates, for two steps with a cache beside a full pass. What does not run, gives nan or
    outputs of other shapes, or moves outputs that were to stay raises `BrokenReshape`.

    >>> @reshape
    ... def halve(model: nn.Module) -> nn.Module:
    ...     return decided({"width": model[0].out_features // 2})
    >>> @halve.applies
    ... def halved(model, decision):
    ...     model[0] = nn.Linear(model[0].in_features, decision["width"])
    ...     return model
    >>> model = nn.Sequential(nn.Linear(4, 8))
    >>> halve.decide(model)
    {'width': 4}
    >>> [change.decision for change in changes(halve(model))], model[0].out_features
    ([{'width': 4}], 8)
    """
    signature = inspect.signature(body)
    inside = body.__module__.startswith("netwright.")
    name = body.__name__ if inside else f"{body.__module__}.{body.__qualname__}"
    decide = torch.inference_mode(False)(cast(Callable[P, Any], body))
    halves: list[Half] = []

    @wraps(body)
    @torch.inference_mode(False)
    def change(*args: Any, check: bool = True, **kwargs: Any) -> nn.Module:
        if not isinstance(check, bool):
            raise ValueError(f"check must be True or False, got {check!r}; False leaves out the "
                             "run of the result")
        given = signature.bind(*args, **kwargs)
        (first, models), *_ = given.arguments.items()
        models = list(models) if isinstance(models, (list, tuple)) else [models]
        _check(models)
        arguments = {key: plain(value) for key, value in given.arguments.items()
                     if key not in (first, *_DATA) and not _is_data(value)}
        if _streams(given.arguments.get("calibration")):
            given.arguments["calibration"] = Remembered(given.arguments["calibration"])
        found = _found(models, decide, given)
        result = carry_out(deepcopy(models[0]), found.decision, arguments, found.using)
        x = example_for(models[0], given.arguments) if check and found.alike else None
        if x is not None:
            said = facets(change)
            kept = found.keeps_function and said is not None and said.keeps_function is True
            check_result(name, models[0], result, x, kept=kept)
        return result

    @torch.inference_mode(False)
    def carry_out(model: nn.Module, decision: Decision, arguments: Mapping[str, Any],
                  using: Mapping[str, Any]) -> nn.Module:
        before = history(model)
        changed: Any = halves[0](model, decision, **using)
        changed._reshaped = History(
            before.origin, (*before.records, Reshaped(name, dict(arguments), decision)))
        if before.origin["config"] is not None:
            changed.save_pretrained = _SavePretrained(changed)
        return cast(nn.Module, changed)

    def applies(half: H) -> H:
        halves[:] = [half]
        return half

    made: Any = change
    made.__doc__ = _with_check(body.__doc__)
    parameters = list(signature.parameters.values())
    place = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    made.__signature__ = signature.replace(parameters=[
        *parameters[:place], inspect.Parameter("check", inspect.Parameter.KEYWORD_ONLY,
                                               default=True, annotation=bool),
        *parameters[place:]])
    made.decide = wraps(body)(lambda *args, **kwargs: decide(*args, **kwargs).decision)
    made.apply = lambda model, decision: carry_out(model, decision, {}, {})
    made.carry_out, made.applies = carry_out, applies
    if not inside:
        _OWN[name] = made
    return cast(Reshape[P], made)


@method("companion")
def decided(decision: Mapping[str, Any], *, keeps_function: bool = True, alike: bool = True,
            **using: Any) -> Any:
    """Return what a reshape's first half found: plain data, and what only this call has.

    `using` goes to the other half by name: generators, blocks that were trained, other models.
    That half must do without, since it gets none when a model is built again; what they would
    have drawn or trained is then loaded. `keeps_function` is False where this call, unlike what
    the reshape declares, changes what the network computes. `alike` is False where the result takes
    or gives other things than the model, such as other numbers of words, and cannot be run beside.

    Raises:
        TypeError: `decision` holds what JSON does not.
    """
    try:
        text = json.dumps(decision, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"decision must be plain data (numbers, strings, lists, dictionaries), "
                        f"got {decision!r:.200}: {error}") from error
    return _Decided(json.loads(text), using, keeps_function, alike)


@method("companion")
def changes(model: nn.Module) -> list[Reshaped]:
    """Return the reshapes that `model` went through, first to last.

    >>> from netwright.models import gpt
    >>> from netwright.reshape import prune_sublayers
    >>> x = torch.zeros(1, 16, dtype=torch.long)
    >>> smaller = prune_sublayers(gpt(96, context=16), x, remove=2)
    >>> [(change.name, change.arguments) for change in changes(smaller)]
    [('prune_sublayers', {'remove': 2})]
    """
    return list(history(model).records)


def history(model: nn.Module) -> History:
    """Return what `model` was, and what was done to it."""
    found = model.__dict__.get("_reshaped")
    return found if isinstance(found, History) else History(_origin(model), ())


def remember(model: nn.Module, records: History) -> None:
    """Let `model` have gone through other changes."""
    model._reshaped = records  # type: ignore[assignment]


def named(name: str) -> Reshape:
    """Return the reshape that a record calls `name`.

    Raises:
        UnknownName: there is none.
    """
    if name in _OWN:
        return _OWN[name]
    known = where("netwright.reshape")
    found = _at(known[name], name) if name in known else None
    if not hasattr(found, "carry_out"):
        raise UnknownName("reshape (one of your own must be imported before)", name,
                          [*_OWN, *(n for n in known if hasattr(_at(known[n], n), "carry_out"))])
    return cast(Reshape, found)


def own() -> dict[str, Any]:
    """Return the user's own reshapes that can be saved and say what they are for, by name."""
    return {name: made for name, made in _OWN.items()
            if facets(made) is not None and "<locals>" not in name}


def _found(models: Sequence[nn.Module], decide: Callable[..., Any],
           given: inspect.BoundArguments) -> Any:
    """Return what was decided; where there was nothing, say what was done to the model before."""
    try:
        return decide(*given.args, **given.kwargs)
    except NothingToReshape as error:
        before = dict.fromkeys(record.name for model in models[:1]
                               for record in history(model).records)
        if not before:
            raise
        raise NothingToReshape(
            f"{error}; this model went through {', '.join(before)}, which puts other modules in "
            "the place of some: carry this one out before that") from error


def _check(models: list[Any]) -> None:
    """Raise unless there is something in which parts can be found and changed."""
    for model in models:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__} "
                            f"{model!r:.60}; build or load it first")
        if hasattr(model, "_orig_mod"):
            raise NothingToReshape("model was compiled by torch.compile, which hides its parts; "
                                   "give the module that was compiled, and compile the result")
        if any(p.is_meta for p in model.parameters()):
            raise ValueError("model must hold its weights, got some on the meta device; load them "
                             "first")


def _with_check(doc: str | None) -> str | None:
    """Return a reshape's docstring with the argument that every reshape has."""
    before, head, rest = (doc or "").partition("    Args:\n")
    arguments, gap, after = rest.partition("\n\n")
    told = "\n        check: whether the result is run before it is returned; see `reshape`."
    return f"{before}{head}{arguments}{told}{gap}{after}" if head else doc


def _streams(calibration: Any) -> bool:
    """Return whether data are gone through, as a loader or a generator is."""
    return isinstance(calibration, Iterable) and not isinstance(
        calibration, (Tensor, tuple, list, Mapping, str, bytes, nn.Module))


def _is_data(value: Any) -> bool:
    return any(isinstance(leaf, (Generator, nn.Module))
               or (isinstance(leaf, Tensor) and leaf.numel() != 1) for leaf in tree_leaves(value))


def _at(module: str, name: str) -> Any:
    return getattr(import_module(module), name)


def _origin(model: Any) -> dict[str, Any]:
    """Return what a model can be built again from: its class, and its config if it has one."""
    kind = type(model)
    config: Any = getattr(model, "config", None)
    said: dict[str, Any] = {"class": f"{kind.__module__}.{kind.__qualname__}", "config": None,
                            "attention": None}
    if hasattr(config, "to_json_string") and hasattr(model, "save_pretrained"):
        said["config"] = json.loads(config.to_json_string(use_diff=False))
        said["attention"] = getattr(config, "_attn_implementation", None)
    return said


class _SavePretrained:
    """Stands for the `save_pretrained` of a model whose class does not know what was changed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, save_directory: Any, *_: Any, state_dict: Any = None,
                 push_to_hub: bool = False, **__: Any) -> None:
        """Write what `netwright.load` reads, and `from_pretrained` where the class allows it."""
        if state_dict is not None or push_to_hub:
            raise ValueError("save_pretrained of a reshaped model takes neither state_dict nor "
                             "push_to_hub; write it by netwright.save(model, folder), and upload "
                             "the folder")
        from netwright.reshape.saved import save
        save(self.model, save_directory)
