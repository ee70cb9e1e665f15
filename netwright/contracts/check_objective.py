from collections.abc import Callable, Mapping
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from netwright import checks
from netwright.catalogue.facets import Facets, facets
from netwright.contracts.checks import (
    Make,
    broken,
    cast,
    check,
    difference,
    expect,
    hold,
)

__all__ = ["check_objective"]

CLASSES, HORIZON = 3, 4


@checks.annotated
def check_objective(objective: Callable[..., Any], *,
                    arguments: Mapping[str, Any] | None = None,
                    network: None = None, batch: Callable[[], Any] | None = None) -> None:
    """Hold a loss or a metric to what every objective keeps to: one number, the mean of a batch.

    It is called as objective(*batch(), **arguments). Without `batch` it gets what it declares to
    need, by `@nw.method("objective", needs=…)`: scores and labels for "classes", a forecast, what
    came and, where it asks for a third, the history for "series"; of these a batch given twice
    over counts the same. A loss returns a tensor with a graph; a metric a number, or a tensor
    without one. `network` is for the likeness of the checks and not looked at.

    Raises:
        BrokenContract: the objective does not keep to it; says in one line what was expected, what
            was seen, and how to mend it.

    >>> from netwright.catalogue.facets import method
    >>> @method("objective", needs=["classes"])
    ... def summed(logits, y):
    ...     return torch.nn.functional.cross_entropy(logits, y, reduction="sum")
    >>> check_objective(summed)
    Traceback (most recent call last):
    netwright.errors.BrokenContract: summed: it is a mean over the samples: expected the same for \
a batch given twice over, ..., got ...; divide by the number of samples
    """
    hold("objective", objective, arguments=arguments, network=network, batch=batch)


class Case:
    """An objective, and what it is of."""

    def __init__(self, method: Callable[..., Any], arguments: Mapping[str, Any], network: None,
                 batch: Callable[[], Any] | None, *, dtype: torch.dtype | None = None) -> None:
        self.method, self.arguments = method, arguments
        self.needs = (facets(method) or Facets("objective")).needs
        torch.manual_seed(7)
        self.given: tuple[Any, ...] = cast(batch() if batch is not None else self._batch(), dtype)

    def _batch(self) -> tuple[Tensor, ...]:
        if "classes" in self.needs:
            return torch.randn(6, CLASSES), torch.tensor([0, 1, 2, 0, 1, 2])
        if "series" in self.needs:
            history = (torch.randn(6, 9),) if "history" in names(self.method) else ()
            return torch.randn(6, HORIZON), torch.randn(6, HORIZON), *history
        return torch.randn(6, 5), torch.randn(6, 5)

    def __call__(self, given: tuple[Any, ...] | None = None) -> Any:
        torch.manual_seed(1)
        return self.method(*(self.given if given is None else given), **self.arguments)

    def rows(self, change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
        """Return what is given with its rows changed, of all tensors that have as many."""
        count = len(self.given[0])
        return tree_map_only(Tensor, lambda part: change(part) if part.ndim and len(part) == count
                             else part, self.given)


def names(method: Callable[..., Any]) -> tuple[str, ...]:
    code: Any = getattr(method, "__wrapped__", method)
    return tuple(code.__code__.co_varnames[:code.__code__.co_argcount])


def number(value: Any) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def close(a: Any, b: Any) -> bool:
    return abs(number(a) - number(b)) <= 1e-5 * (1 + abs(number(b)))


@check
def it_is_one_finite_number(make: Make) -> None:
    case = make()
    value = case()
    expect(isinstance(value, Number) or (isinstance(value, Tensor) and value.shape == ()),
           "a number, or a tensor of shape ()",
           tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__,
           "return the mean over the samples")
    expect(torch.tensor(number(value)).isfinite(), "a finite number", value,
           "keep it within the numbers' range")
    expect(number(value) == number(case()), "the same number again", number(case()),
           "draw nothing, and keep nothing between two calls")


@check
def a_loss_has_the_slope_of_finite_differences(make: Make) -> None:
    case = make(dtype=torch.float64)
    first = case.given[0].requires_grad_()
    value = case()
    if not isinstance(value, Tensor) or not value.requires_grad:  # a metric
        return
    way = torch.randn_like(first)
    (slope,) = torch.autograd.grad(value, first)
    found, seen = (slope * way).sum().item(), difference(case, [first], [way])
    if abs(found - seen) > 1e-5 * (1 + abs(found)):
        broken(f"a slope of {seen:.6g} as finite differences in float64 have it", f"{found:.6g}",
               "mend the gradient")


@check
def it_keeps_the_type_of_its_numbers(make: Make) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        value = make(dtype=dtype)()
        if isinstance(value, Tensor):
            expect(value.dtype == dtype, f"{dtype} from {dtype}", value.dtype,
                   "make tensors in the type of the first argument")
        expect(torch.tensor(number(value)).isfinite(), f"a finite number in {dtype}", value,
               "keep it within the numbers' range")


@check
def the_order_of_samples_does_not_matter(make: Make) -> None:
    case = make()
    order = torch.randperm(len(case.given[0]))
    value, turned = case(), case(case.rows(lambda part: part[order]))
    expect(close(turned, value), f"the same for samples in another order, {number(value):.6g}",
           f"{number(turned):.6g}", "treat all samples alike")


@check
def it_is_a_mean_over_the_samples(make: Make) -> None:
    case = make()
    if not {"classes", "series"} & set(case.needs):  # what compares samples with one another
        return
    value, twice = case(), case(case.rows(lambda part: torch.cat([part, part])))
    expect(close(twice, value), f"the same for a batch given twice over, {number(value):.6g}",
           f"{number(twice):.6g}", "divide by the number of samples")
    one = case(case.rows(lambda part: part[:1]))
    expect(torch.tensor(number(one)).isfinite(), "a finite number for one sample", one,
           "take the mean in a way that one sample has as well")


@check
def labels_of_minus_100_do_not_count(make: Make) -> None:
    case = make()
    if "classes" not in case.needs:
        return
    scores, y, *rest = case.given
    short = case((scores[:4], y[:4], *rest))
    told = y.clone()
    told[4:] = -100
    value = case((scores, told, *rest))
    expect(close(value, short), f"the value of the other samples, {number(short):.6g}, where two "
           "labels are -100", f"{number(value):.6g}", "leave them out of the mean")
    wild = scores.clone()
    wild[4:] = 1e4
    value = case((wild, told, *rest))
    expect(close(value, short), "scores of such samples to make no difference",
           f"{number(value):.6g}", "leave them out of the mean")


@check
def leading_axes_count_as_samples(make: Make) -> None:
    case = make()
    if not {"classes", "series"} & set(case.needs):
        return
    value, split = case(), case(case.rows(lambda part: part.unflatten(0, (2, -1))))
    expect(close(split, value), f"the same for samples on two axes, {number(value):.6g}",
           f"{number(split):.6g}", "flatten all axes but the last")


@check
def its_arguments_are_left_as_they_were(make: Make) -> None:
    case = make()
    before = [part.clone() for part in tree_leaves(case.given) if isinstance(part, Tensor)]
    case()
    after = [part for part in tree_leaves(case.given) if isinstance(part, Tensor)]
    expect(all(map(torch.equal, before, after)), "arguments as they were", "others",
           "work on copies")


@check
def it_runs_without_gradients(make: Make) -> None:
    case = make()
    expected = number(case())
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            value = case()
        expect(number(value) == expected, f"the same under {without.__name__}, {expected:.6g}",
               number(value), "do the same in both")
