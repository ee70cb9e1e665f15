from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.utils._pytree import tree_leaves

from netwright import checks
from netwright.catalogue.facets import Facets, facets
from netwright.contracts.checks import (
    Make,
    broken,
    cast,
    check,
    check_once,
    difference,
    equal,
    expect,
    expect_same,
    hold,
    move,
)
from netwright.generative.flows.flow import Flow
from netwright.signals import apply
from netwright.training.loop import fit

__all__ = ["check_generative"]

# What is supplied by the names of constructors' arguments.
SUPPLIED: dict[str, Any] = {"channels": 4, "dim": 4, "size": 4, "condition_channels": 5,
                            "label_dim": 2, "cond_dim": 5, "dims": 2}


@checks.annotated
def check_generative(model: Callable[..., nn.Module], *,
                     arguments: Mapping[str, Any] | None = None,
                     network: Callable[[], nn.Module] | None = None,
                     batch: Callable[[], Any] | None = None) -> None:
    """Hold a density, a sampler or a transform of one to what every generative model keeps to.

    It is built as model(**arguments), with what it declares to take supplied where it is one of
    the usual sizes, on its declared variants where `arguments` are not given, or by `network`.
    `batch` draws x, or the tuple of x and its condition; without it x is (5, 4), and (3, 4, 4, 4)
    where images are needed. It is held to what it has: `log_prob`; `sample`; a `forward` that
    returns z and log |det dz/dx| with its `inverse`; parameters, which `nw.fit` trains.

    Raises:
        BrokenContract: the model does not keep to it; says in one line what was expected, what was
            seen, and how to mend it.

    >>> from netwright.generative.flows import Transform
    >>> class Doubled(Transform):
    ...     def map(self, x, condition=None):
    ...         return 2 * x, x.new_zeros(len(x))
    ...     def inverse(self, z, condition=None):
    ...         return z / 2
    >>> check_generative(Doubled)
    Traceback (most recent call last):
    netwright.errors.BrokenContract: Doubled: log det is that of the jacobian: expected log |det \
dz/dx| = 2.77259, got 0; add every change of volume
    """
    hold("generative", model, arguments=arguments, network=network, batch=batch)


class Case:
    """A model in eval mode, and what goes in."""

    def __init__(self, method: Callable[..., nn.Module], arguments: Mapping[str, Any],
                 network: Callable[[], nn.Module] | None, batch: Callable[[], Any] | None, *,
                 seed: int = 0, dtype: torch.dtype | None = None) -> None:
        said = facets(method) or Facets("generative")
        torch.manual_seed(seed)
        supplied = {name: SUPPLIED[name] for name in said.takes if name in SUPPLIED}
        self.model: Any = network() if network else method(**{**supplied, **arguments})
        self.model.to(dtype)
        torch.manual_seed(7)
        shape = (3, 4, 4, 4) if "images" in said.needs else (5, 4)
        self.given: Any = cast(batch() if batch else torch.randn(shape), dtype)
        self.x = self.given[0] if isinstance(self.given, tuple) else self.given
        self.condition = self.given[1:] if isinstance(self.given, tuple) else ()
        if self.transforms:  # what is set up by the first batch
            self.model(self.x, *self.condition)
        self.model.eval()

    @property
    def transforms(self) -> bool:
        return hasattr(self.model, "log_det") and hasattr(self.model, "inverse")

    @property
    def dense(self) -> bool:
        return hasattr(self.model, "log_prob")

    def outputs(self) -> list[Tensor]:
        """Return what the model says of x."""
        torch.manual_seed(1)
        if self.dense:
            return [self.model.log_prob(self.x, *self.condition)]
        if self.transforms:
            return list(self.model(self.x, *self.condition))
        if not hasattr(self.model, "loss"):
            return []
        return [part for part in tree_leaves(apply(self.model.loss, self.given))
                if isinstance(part, Tensor)]

    def state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()
                if isinstance(value, Tensor)}


@check
def it_maps_back_what_it_maps_forward(make: Make) -> None:
    case = make(dtype=torch.float64)
    if not case.transforms:
        return
    z, log_det = case.model(case.x, *case.condition)
    expect(log_det.shape == case.x.shape[:1], f"a log_det of shape ({len(case.x)},)",
           tuple(log_det.shape), "return one number for each sample")
    again = case.model.inverse(z, *case.condition)
    expect(again.shape == case.x.shape and torch.allclose(again, case.x, atol=1e-5),
           "inverse(forward(x)[0]) to be x", f"a difference of {(again - case.x).abs().max():.1e}"
           if again.shape == case.x.shape else tuple(again.shape), "mend the inverse")


@check
def log_det_is_that_of_the_jacobian(make: Make) -> None:
    case = make(dtype=torch.float64)
    if not case.transforms:
        return
    one, rest = case.x[:1], [first(part) for part in case.condition]

    def z(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        mapped: Tensor = case.model(x, *rest)[0]
        return mapped
    slope = jacobian(z, one).reshape(one.numel(), one.numel())
    wanted = torch.linalg.slogdet(slope).logabsdet.item()
    torch.manual_seed(1)
    told = case.model(one, *rest)[1].item()
    expect(abs(told - wanted) < 1e-5 * (1 + abs(wanted)), f"log |det dz/dx| = {wanted:.6g}",
           f"{told:.6g}", "add every change of volume")


def first(part: Any) -> Any:
    return tuple(map(first, part)) if isinstance(part, (tuple, list)) else part[:1]


@check
def log_prob_is_a_finite_number_for_each_sample(make: Make) -> None:
    case = make()
    if not case.dense:
        return
    [log_prob] = case.outputs()
    expect(log_prob.shape == case.x.shape[:1], f"log_prob of shape ({len(case.x)},)",
           tuple(log_prob.shape), "add up over all axes but the first")
    expect(log_prob.isfinite().all(), "finite log_prob", "some that is not",
           "keep it within the numbers' range")


@check
def samples_come_from_the_generator_alone(make: Make) -> None:
    case = make()
    if not (case.dense and hasattr(case.model, "sample")):
        return
    n = len(case.x)

    def drawn(seed: int) -> Tensor:
        samples: Tensor = case.model.sample(n, *case.condition,
                                            generator=torch.Generator().manual_seed(seed))
        return samples
    samples = drawn(0)
    expect(samples.shape == case.x.shape, f"{n} samples {tuple(case.x.shape)}",
           tuple(samples.shape), "return them in the shape that log_prob takes")
    expect(not samples.requires_grad, "samples without a graph", "some that require grad",
           "decorate sample with torch.no_grad()")
    expect(samples.isfinite().all(), "finite samples", "some that are not",
           "keep them within the numbers' range")
    expect(torch.equal(samples, drawn(0)), "the same samples from the same generator", "others",
           "draw from generator alone")
    expect(not torch.equal(samples, drawn(1)), "other samples from another generator", "the same",
           "draw from generator")


@check
def fit_trains_it_on_inputs_without_labels(make: Make) -> None:
    case = make()
    if case.transforms and not case.dense:
        case.model = Flow([case.model], case.x.shape[1:])
    leaves = [p for p in case.model.parameters() if p.requires_grad]
    if not leaves:
        return
    move(leaves, [torch.randn_like(leaf) for leaf in leaves], 0.1)  # what is fitted by the start
    history = fit(case.model, [case.given], epochs=12, progress=False, seed=0,
                  optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-2))
    losses = [epoch.loss for epoch in history.epochs]
    expect(min(losses[1:]) < losses[0], f"a loss below the {losses[0]:.6g} of the start",
           f"{min(losses[1:]):.6g} at best", "give log_prob, or loss, a gradient")


@check
def its_gradients_are_those_of_finite_differences(make: Make) -> None:
    case = make(dtype=torch.float64)
    leaves = [p for p in case.model.parameters() if p.requires_grad]
    ways = [torch.randn_like(leaf) for leaf in leaves]
    move(leaves, ways, 0.01)

    learned = [i for i, part in enumerate(case.outputs()) if part.requires_grad]

    def weighted() -> Tensor:
        outputs = case.outputs()
        torch.manual_seed(2)
        return torch.stack([(outputs[i] * torch.randn_like(outputs[i])).sum()
                            for i in learned]).sum()
    if not learned:
        return
    found = torch.autograd.grad(weighted(), leaves, allow_unused=True, materialize_grads=True)
    along = [(gradient * way).sum().item() for gradient, way in zip(found, ways, strict=True)]
    seen = difference(weighted, leaves, ways)
    allowed = getattr(case.model, "gradient_tolerance", 1e-4) * (1 + sum(map(abs, along)))
    if abs(sum(along) - seen) > allowed:
        broken(f"a slope of {seen:.6g} as finite differences in float64 have it",
               f"{sum(along):.6g}", "mend the backward pass, or give the class gradient_tolerance")


@check
def state_goes_into_a_fresh_model_that_says_the_same(make: Make) -> None:
    case, fresh = make(), make(seed=5)
    fresh.model.load_state_dict(case.model.state_dict())
    mend = "register whatever it uses as a parameter, a buffer or extra state"
    expect(all(map(equal, case.outputs(), fresh.outputs())), "the same from the same state_dict",
           "another", mend)


@check
def a_deep_copy_stands_alone(make: Make) -> None:
    case = make()
    before, state = case.outputs(), case.state()
    copied = deepcopy(case)
    mend = "reach modules and tensors through attributes that deepcopy follows, not closures"
    expect(all(map(equal, copied.outputs(), before)), "the copy to say the same", "another", mend)
    with torch.no_grad():
        for p in copied.model.parameters():
            p.add_(0.03 * torch.randn_like(p))
    expect_same(case.state(), state, "the original as it was when the copy changes", mend)
    expect(all(map(equal, case.outputs(), before)), "the original to say the same", "another", mend)


@check
def what_goes_in_is_left_as_it_was(make: Make) -> None:
    case = make()
    before = [part.clone() for part in tree_leaves(case.given) if isinstance(part, Tensor)]
    state = case.state()
    case.outputs()
    after = [part for part in tree_leaves(case.given) if isinstance(part, Tensor)]
    expect(all(map(torch.equal, before, after)), "x and its condition as they were", "others",
           "work on copies")
    expect_same(case.state(), state, "the state as it was in eval mode",
                "update buffers only where self.training")


@check_once
def it_runs_in_float64_and_without_gradients(make: Make) -> None:
    for part in make(dtype=torch.float64).outputs():
        expect(part.dtype == torch.float64 or not part.is_floating_point(), "numbers in float64",
               part.dtype, "make tensors in the type of x")
    case = make()
    expected = case.outputs()
    with torch.no_grad():
        outputs = case.outputs()
    expect(not any(part.requires_grad for part in outputs), "no graph where gradients are off",
           "one", "leave gradients as they are set")
    for part, other in zip(outputs, expected, strict=True):
        expect(torch.allclose(part, other, atol=1e-5), "the same without gradients", "another",
               "do the same in both")
