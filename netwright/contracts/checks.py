"""Single checks of a kind's contract, and how a method is built to be held to them."""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from netwright.catalogue.facets import Facets, facets
from netwright.errors import BrokenContract, MissingExtra, UnknownName
from netwright.runtime.random_state import same_random_state

__all__ = ["Check", "checks"]

Make = Callable[..., Any]
Run = TypeVar("Run", bound=Callable[..., None])


@dataclass(frozen=True)
class Check:
    """One thing that every method of a kind keeps to; call it with a method to hold it to that.

    `name` says what is kept. `thorough` is True where every variant is tried, False where the
    first shows all that there is to see.

    Raises:
        BrokenContract: the method does not keep to it.

    >>> @check
    ... def it_has_a_name(make):
    ...     expect(make().__name__, "a name", "none", "give it one")
    >>> str(it_has_a_name)
    'it has a name'
    """

    name: str
    run: Callable[[Make], None]
    thorough: bool

    def __str__(self) -> str:
        return self.name

    def __call__(self, method: Any, *, variant: str | None = None,
                 arguments: Mapping[str, Any] | None = None,
                 network: Callable[[], Any] | None = None,
                 batch: Callable[[], Any] | None = None) -> None:
        """Raise BrokenContract unless `method` keeps to this, see `check_rule` for the rest."""
        ways = variants(method, arguments)
        if variant is not None and variant not in ways:
            raise UnknownName("variant", variant, ways)
        chosen = list(ways) if self.thorough else list(ways)[:1]
        said = facets(method) or Facets("")
        for label in chosen if variant is None else [variant]:
            make = functools.partial(
                importlib.import_module(self.run.__module__).Case, method, ways[label],
                network or said.network, batch or said.batch)
            self._hold(make, f"{method.__name__}{label and f' ({label})'}")

    def _hold(self, make: Make, who: str) -> None:
        try:
            with same_random_state():
                self.run(make)
        except BrokenContract as broken:
            raise BrokenContract(f"{who}: {self.name}: {broken}") from broken
        except MissingExtra:
            raise
        except Exception as error:
            said = " ".join(str(error).split())
            raise BrokenContract(f"{who}: {self.name}: expected no error, got "
                                 f"{type(error).__name__}: {said}; mend it, or say by arguments=, "
                                 "network= or batch= what it takes") from error


def check(run: Callable[[Make], None]) -> Check:
    """Make a function of how to build a case a check of every variant, named as it is."""
    return Check(run.__name__.strip("_").replace("_", " "), run, thorough=True)


def check_once(run: Callable[[Make], None]) -> Check:
    """Make a function a check of the first variant alone, where the others show nothing new."""
    return Check(run.__name__.strip("_").replace("_", " "), run, thorough=False)


def checks(kind: str) -> list[Check]:
    """Return what every method of `kind` is held to, each check by itself.

    They are there to be gone over one by one, as pytest's `parametrize` does.

    Raises:
        UnknownName: there is no contract for that kind.

    >>> str(checks("rule")[0])
    'the loss is a finite scalar without a graph'
    """
    where = {name.removeprefix("check_"): name for name in _kinds()}
    if kind not in where:
        raise UnknownName("kind with a contract", kind, where)
    module = importlib.import_module(f"netwright.contracts.{where[kind]}")
    return [value for value in vars(module).values() if isinstance(value, Check)]


def hold(kind: str, method: Any, **how: Any) -> None:
    """Hold `method` to every check of `kind`, one after another."""
    for single in checks(kind):
        single(method, **how)


def variants(method: Any, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the sets of arguments to build `method` with, by their labels."""
    if arguments is not None:
        return {"": arguments}
    said = facets(method)
    return dict(said.variants) if said and said.variants else {"": {}}


def offered(method: Callable[..., Any], **offers: Any) -> dict[str, Any]:
    """Return those of `offers` that the signature of `method` names."""
    named = inspect.signature(method).parameters
    return {name: value for name, value in offers.items() if name in named}


def cast(x: Any, dtype: torch.dtype | None) -> Any:
    """Return `x` with its floating-point tensors in another type, unless that is None."""
    return tree_map_only(Tensor, lambda part: part.to(dtype) if part.is_floating_point() else part,
                         x)


def expect(holds: object, expected: str, got: object, mend: str) -> None:
    """Raise BrokenContract unless something holds."""
    if not holds:
        broken(expected, got, mend)


def broken(expected: str, got: object, mend: str) -> NoReturn:
    """Say in one line what was expected, what was seen, and how to mend it."""
    raise BrokenContract(f"expected {expected}, got {' '.join(str(got).split())}; {mend}")


def expect_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], expected: str,
                mend: str) -> None:
    """Raise BrokenContract unless two sets of named tensors are equal bit for bit."""
    expect(a.keys() == b.keys(), expected, f"other names: {sorted(a.keys() ^ b.keys())}", mend)
    differ = [name for name in a if not equal(a[name], b[name])]
    expect(not differ, expected, f"other values in {', '.join(differ)}", mend)


def equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are the same, where not-a-number equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=a.is_floating_point())


@torch.no_grad()
def move(leaves: list[Tensor], ways: list[Tensor], far: float) -> None:
    """Move tensors along `ways` in place."""
    for leaf, way in zip(leaves, ways, strict=True):
        leaf.add_(way, alpha=far)


def difference(value: Callable[[], Tensor], leaves: list[Tensor], ways: list[Tensor]) -> float:
    """Return how fast a value rises along `ways`, by a small step to either side."""
    step = 1e-6
    move(leaves, ways, step)
    above = value().item()
    move(leaves, ways, -2 * step)
    below = value().item()
    move(leaves, ways, step)
    return (above - below) / (2 * step)


def _kinds() -> Iterator[str]:
    face = importlib.import_module("netwright.contracts")
    return (name for name in face.__all__ if name.startswith("check_"))
