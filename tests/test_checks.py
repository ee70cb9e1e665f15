import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Literal

import numpy
import pytest
import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.errors import UnknownName

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("value", [1, 7, numpy.int64(3), torch.tensor(2)])
def test_a_count_takes_every_kind_of_whole_number(value):
    assert checks.count(1, width=value) is None


@pytest.mark.parametrize(("value", "message"), [
    (0, "width must be at least 1, got 0"),
    (2.0, "width must be a whole number of at least 1, got 2.0"),
    (NAN, "width must be a whole number of at least 1, got nan"),
    (True, "width must be a whole number of at least 1, got True"),
    ("3", "width must be a whole number of at least 1, got '3'"),
    (None, "width must be a whole number of at least 1, got None"),
])
def test_a_count_names_what_is_none(value, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        checks.count(1, depth=1, width=value)


def test_a_bound_is_met_or_passed():
    assert checks.at_least(0, share=0) is None
    assert checks.at_least(0.5, share=Fraction(1, 2)) is None
    assert checks.above(0, rate=1e-300) is None
    with pytest.raises(ValueError, match=r"^rate must be above 0, got 0$"):
        checks.above(0, rate=0)
    with pytest.raises(ValueError, match=r"^share must be at least 0.5, got 0.49$"):
        checks.at_least(0.5, share=0.49)


@pytest.mark.parametrize("value", [NAN, INF, "1", None, True, [1], 2 ** 2000])
def test_no_bound_takes_what_is_no_finite_number(value):
    for check in (lambda: checks.at_least(0, rate=value), lambda: checks.above(0, rate=value),
                  lambda: checks.between(0, 3, rate=value)):
        with pytest.raises(ValueError, match=r"^rate must be "):
            check()


def test_between_takes_its_ends_where_it_is_told_to():
    assert checks.between(0, 1, a=0, b=1, c=0.5) is None
    assert checks.between(0, 1, ends=(True, False), a=0) is None
    assert checks.between(0, 1, ends=(False, True), a=1) is None
    for ends, value, must in (((False, True), 0, "above 0 and at most 1"),
                              ((True, False), 1, "at least 0 and below 1"),
                              ((False, False), 0, "above 0 and below 1"),
                              ((False, False), 1, "above 0 and below 1"),
                              ((True, True), -0.1, "between 0 and 1"),
                              ((True, True), 1.1, "between 0 and 1")):
        with pytest.raises(ValueError, match=f"^a must be {must}, got {value}$"):
            checks.between(0, 1, ends=ends, a=value)
    with pytest.raises(ValueError, match=r"^a must be a whole number between 0 and 9, got 1.5$"):
        checks.between(0, 9, whole=True, a=1.5)


def test_none_passes_where_it_is_optional_and_advice_ends_the_message():
    for check in (checks.count, checks.at_least, checks.above):
        assert check(1, optional=True, rank=None) is None
        with pytest.raises(ValueError, match=r"got -2; try 4$"):
            check(1, optional=True, advice="try 4", rank=-2)
    assert checks.between(0, 1, optional=True, rank=None) is None


def test_a_name_is_one_of_those_that_are_known():
    assert checks.one_of(["sum", "mean"], reduction="sum") is None
    assert checks.one_of(["sum"], optional=True, reduction=None) is None
    with pytest.raises(UnknownName, match=r"no way of predicting is called 'men'; did you mean"):
        checks.one_of(["mean"], way_of_predicting="men")
    with pytest.raises(UnknownName, match=r"no reduction is called 'None'; known are mean, sum$"):
        checks.one_of(["sum", "mean"], reduction=None)


def test_a_pair_is_a_tuple_or_a_list_of_two():
    assert checks.pair(betas=(0.9, 0.99), sizes=[1, 2]) is None
    for value, got in (((1,), "tuple of 1"), ([1, 2, 3], "list of 3"), (5, "5"),
                       ("ab", "str of 2")):
        with pytest.raises(ValueError, match=f"^betas must be a pair, got {got}; use two$"):
            checks.pair(betas=value, advice="use two")


def test_finite_looks_at_numbers_and_at_tensors():
    assert checks.finite(a=1.0, b=torch.ones(3)) is None
    with pytest.raises(ValueError, match=r"^b must be finite, got 2 of 3 numbers that are not$"):
        checks.finite(b=torch.tensor([1.0, NAN, -INF]))
    with pytest.raises(ValueError, match=r"^a must be a finite number, got inf$"):
        checks.finite(a=INF)


@checks.annotated
def made(width: int, rate: float = math.inf, *, name: str = "", flag: bool = False,
         sizes: Sequence[int] = (), pair: tuple[int, float] = (1, 1.0),
         rows: "list[Tensor] | None" = None,
         by: Mapping[str, int] | None = None, module: nn.Module | None = None,
         kind: Literal["sum", "mean"] = "sum", generator: Generator | None = None,
         function: Callable[[int], int] = abs) -> int:
    return width


@pytest.mark.parametrize(("given", "message"), [
    ({"width": 2.5}, "width must be a whole number, got 2.5"),
    ({"width": True}, "width must be a whole number, got True"),
    ({"width": 2**70}, r"width must be a whole number below 2\*\*63, got 1180"),
    ({"rate": math.nan}, "rate must be a finite number, got nan"),
    ({"rate": "1"}, "rate must be a finite number, got '1'"),
    ({"name": 3}, "name must be a string, got 3"),
    ({"flag": 1}, "flag must be True or False, got 1"),
    ({"sizes": "12"}, "sizes must be a list of a whole number, got '12'"),
    ({"sizes": 3}, "sizes must be a list of a whole number, got 3"),
    ({"sizes": [1, 2.5]}, r"sizes\[1\] must be a whole number, got 2.5"),
    ({"pair": (1,)}, r"pair must be \(a whole number, a finite number\), got \(1,\)"),
    ({"rows": [3]}, r"rows\[0\] must be a tensor, got 3"),
    ({"by": {"a": 0.5}}, r"by\['a'\] must be a whole number, got 0.5"),
    ({"by": [1]}, r"by must be a mapping to a whole number or None, got \[1\]"),
    ({"module": "net"}, "module must be an nn.Module or None, got 'net'"),
    ({"module": nn.Linear}, "module must be an nn.Module or None, got Linear"),
    ({"kind": 3}, "kind must be one of 'sum', 'mean', got 3"),
    ({"generator": 7}, "generator must be a Generator or None, got 7"),
    ({"function": None}, "function must be a function, got None"),
])
def test_what_does_not_fit_an_annotation(given, message):
    with pytest.raises(ValueError, match=message):
        made(**{"width": 3, **given})


def test_what_fits_an_annotation():
    assert made(numpy.int64(3), 2, flag=numpy.bool_(True), sizes=torch.Size([1]),
                rows=[torch.ones(1)], by={"a": 1}, kind="other",
                generator=Generator(), function=len) == 3
    assert made(torch.tensor(3)) == 3
    assert made(3, math.inf) == 3  # the default, whatever it is
    assert torch.compile(made, backend="eager", fullgraph=True)(3) == 3
    assert inspect.signature(made).parameters["rate"].default == math.inf
