import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from netwright.catalogue.facets import Facets, facets
from netwright.contracts.checks import (
    Make,
    broken,
    cast,
    check,
    difference,
    expect,
    expect_same,
    hold,
    move,
)
from netwright.runtime.padding import holding
from netwright.signals import apply

__all__ = ["check_block"]

# What the places supply, by the names of constructors' arguments.
SUPPLIED: dict[str, Any] = {
    "dim": 8, "inputs": 8, "in_features": 8, "dim_in": 8, "features": 8, "channels": 8,
    "hidden": 16, "outputs": 6, "out_features": 6, "dim_out": 6, "out": 6, "units": 6,
    "classes": 3, "heads": 2, "n_experts": 4, "n_features": 6, "tokens": 16, "height": 4,
    "width": 4, "size": (8, 8), "dims": 2, "vocabulary": 10, "depth": 2, "lookback": 8,
    "horizon": 3,
}
# How many of its last axes a block of each place reads together; those before it stand apart.
READS = {"activation": 1, "feedforward": 1, "linear": 1, "normalisation": 1, "experts": 1,
         "head": 1, "embedding": 1, "attention": 2, "token mixing": 2, "residual block": 2}
SAME_SHAPE = ("activation", "feedforward", "normalisation", "experts", "attention",
              "token mixing", "residual block")


def check_block(block: Callable[..., nn.Module], *, arguments: Mapping[str, Any] | None = None,
                network: Callable[[], nn.Module] | None = None,
                batch: Callable[[], Any] | None = None) -> None:
    """Hold a block to what every block keeps to: shapes, types, gradients, state and copies.

    It must say where it goes, by `@nw.method("block", place=…, takes=…)`, and is built with what
    the place supplies for `takes` and with `arguments`, or its declared variants where they are
    not given; or by `network`, which makes a new one. `batch` draws what goes in: a tensor, or a
    tuple of arguments; without it the input is what its place gives it, of width 8.

    Raises:
        BrokenContract: the block does not keep to it; says in one line what was expected, what was
            seen, and how to mend it.

    >>> from netwright.catalogue.facets import method
    >>> @method("block", place="feedforward", takes=["dim"])
    ... class Doubled(nn.Linear):
    ...     def __init__(self, dim):
    ...         super().__init__(dim, 2 * dim)
    >>> check_block(Doubled)
    Traceback (most recent call last):
    netwright.errors.BrokenContract: Doubled: it fits its declared place: expected an output of \
the input's shape (2, 5, 8) at the place 'feedforward', got (2, 5, 16); return that, or declare \
another place
    """
    hold("block", block, arguments=arguments, network=network, batch=batch)


class Case:
    """A block in eval mode, with an input for it."""

    def __init__(self, method: Callable[..., nn.Module], arguments: Mapping[str, Any],
                 network: Callable[[], nn.Module] | None, batch: Callable[[], Any] | None, *,
                 seed: int = 0, dtype: torch.dtype | None = None) -> None:
        said = facets(method) or Facets("block")
        self.method, self.place, self.takes, self.needs = method, said.place, said.takes, said.needs
        self.ordinary = batch is None and not {"images", "a graph"} & set(said.needs)
        torch.manual_seed(seed)
        if network is not None:
            self.block = network()
        else:
            supplied = {name: SUPPLIED[name] for name in said.takes if name in SUPPLIED}
            self.block = method(**{**supplied, **arguments})
        self.block.to(dtype).eval()
        torch.manual_seed(7)
        self.x: Any = cast(batch() if batch is not None else self._input(), dtype)

    def _input(self) -> Tensor:
        if self.place == "router":
            return torch.randn(5, 8)
        if READS.get(self.place) == 1:
            return torch.randn(2, 5, 8)
        if READS.get(self.place) == 2:
            return torch.randn(2, 16, 8)
        return torch.randn(2, 8, 8, 8) if "images" in self.needs else torch.randn(4, 8)

    def __call__(self, x: Any = None) -> Any:
        torch.manual_seed(1)
        return apply(self.block, self.x if x is None else x)

    def outputs(self, x: Any = None) -> list[Tensor]:
        return [part for part in tree_leaves(self(x)) if isinstance(part, Tensor)]

    def inputs(self) -> list[Tensor]:
        return [part for part in tree_leaves(self.x) if isinstance(part, Tensor)]

    def state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.block.state_dict().items()
                if isinstance(value, Tensor)}


def expect_close(a: list[Tensor], b: list[Tensor], expected: str, mend: str) -> None:
    for one, other in zip(a, b, strict=True):
        expect(one.shape == other.shape, f"{expected}, of shape {tuple(other.shape)}",
               tuple(one.shape), mend)
        tolerance = 1e-5 if one.dtype == torch.float32 else 1e-8
        worst = (one.double() - other.double()).abs().max().item() if one.numel() else 0.0
        expect(torch.allclose(one, other, rtol=1e-4, atol=tolerance), expected,
               f"a difference of {worst:.1e}", mend)


def expect_finite(parts: list[Tensor], what: str) -> None:
    for part in parts:
        expect(part.isfinite().all(), f"{what} that are finite", "some that are not",
               "keep it within the numbers' range")


@check
def it_fits_its_declared_place(make: Make) -> None:
    case = make()
    expect(case.place, "a declared place", "none",
           'decorate it with @nw.method("block", place=…, takes=…)')
    named = inspect.signature(case.method).parameters
    strangers = [name for name in case.takes if name not in named]
    expect(not strangers, "takes= to name arguments of the constructor", ", ".join(strangers),
           f"name some of {', '.join(named)}")
    outputs = case.outputs()
    expect(outputs, "a tensor, or several, as output", "none", "return one")
    expect_finite([part for part in outputs if part.is_floating_point()], "outputs")
    first, shape = case.inputs()[0], tuple(outputs[0].shape)
    if case.place in SAME_SHAPE:
        expect(shape == first.shape, f"an output of the input's shape {tuple(first.shape)} at the "
               f"place {case.place!r}", shape, "return that, or declare another place")
    elif case.place in ("linear", "head", "embedding"):
        expect(shape[:-1] == first.shape[:-1], f"an output ({', '.join(map(str, first.shape[:-1]))}"
               ", …), the input's leading axes kept", shape, "map the last axis alone")
    elif case.place == "whole network" and "classes" in case.takes and first.ndim > 2:
        expect(shape == (len(first), SUPPLIED["classes"]), "scores (batch, classes)", shape,
               "return a score for each class")


@check
def leading_axes_stand_apart(make: Make) -> None:
    case = make()
    reads = READS.get(case.place)
    if not case.ordinary or reads is None:  # a grid, a graph or a table says itself what it reads
        return
    [x] = case.inputs()
    whole, mend = case.outputs(), "treat all but the last axes alike, as with x.flatten(0, -2)"
    flat = x.flatten(0, -1 - reads)
    expect_close(case.outputs(flat), [part.flatten(0, x.ndim - 1 - reads) for part in whole],
                 f"the same for x {tuple(flat.shape)} as for {tuple(x.shape)}", mend)
    more = x.unsqueeze(0)
    expect_close(case.outputs(more), [part.unsqueeze(0) for part in whole],
                 f"the same for x {tuple(more.shape)} as for {tuple(x.shape)}", mend)
    expect_close(case.outputs(flat[0]), [part.flatten(0, x.ndim - 1 - reads)[0] for part in whole],
                 f"the same for one sample {tuple(flat[0].shape)}", mend)


@check
def it_runs_in_bfloat16_and_in_float64(make: Make) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        case = make()
        case.block.to(dtype)
        outputs = [part for part in case.outputs(cast(case.x, dtype)) if part.is_floating_point()]
        expect_finite(outputs, f"outputs in {dtype}")
        for part in outputs:
            wide = case.place == "router" and part.dtype == torch.promote_types(
                dtype, torch.float32)  # since a choice turns on small differences
            expect(part.dtype == dtype or wide, f"an output in {dtype} from weights and x in it",
                   part.dtype, "make tensors with x.new_…, dtype=x.dtype or .to(x.dtype)")
        for name, p in case.block.named_parameters():
            expect(p.dtype == dtype or not p.is_floating_point(), f"{name} in {dtype} after .to",
                   p.dtype, "register it as a parameter of the module")


@check
def a_batch_of_none_is_a_batch(make: Make) -> None:
    case = make()
    first = case.inputs()[0]
    if first.ndim < 2:
        return

    def none(part: Tensor) -> Tensor:
        if len(part) == len(first):
            return part[:0]
        return part[:, :0] if part.ndim == 2 else torch.zeros_like(part)  # edges, or counts of rows
    empty = tree_map_only(Tensor, none, case.x)
    shapes = [tuple(part.shape) for part in case.outputs()]
    for part, shape in zip(case.outputs(empty), shapes, strict=True):
        if shape and shape[0] == len(first):
            expect(part.shape == (0, *shape[1:]), f"an output (0, {', '.join(map(str, shape[1:]))})"
                   " for a batch of none", tuple(part.shape), "take the batch size from x")


@check
def gradients_are_those_of_finite_differences(make: Make) -> None:
    case = make(dtype=torch.float64)
    for part in (*case.block.parameters(), *case.inputs()):
        if part.is_floating_point():
            part.requires_grad_()
    leaves = [part for part in (*case.inputs(), *case.block.parameters()) if part.requires_grad]
    ways = [torch.randn_like(leaf) for leaf in leaves]
    move(leaves, ways, 0.03)  # off the kinks at which some are made

    def weighted() -> Tensor:
        torch.manual_seed(2)
        parts = [(part * torch.randn_like(part)).sum() for part in case.outputs()
                 if part.is_floating_point()]
        return torch.stack(parts).sum()
    value = weighted()
    if not value.requires_grad or getattr(case.block, "surrogate_gradient", False):
        return
    found = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    along = [(gradient * way).sum().item() for gradient, way in zip(found, ways, strict=True)]
    slope, allowed = sum(along), 1e-5 * (1 + sum(map(abs, along)))
    seen = difference(weighted, leaves, ways)
    if abs(slope - seen) > allowed:
        names = [f"x[{i}]" for i, part in enumerate(case.inputs()) if part.requires_grad]
        names += [name for name, p in case.block.named_parameters() if p.requires_grad]
        wrong = [name for name, leaf, way, slope in zip(names, leaves, ways, along, strict=True)
                 if abs(slope - difference(weighted, [leaf], [way])) > allowed]
        broken(f"a slope of {seen:.6g} as finite differences in float64 have it",
               f"{slope:.6g}, by the gradients of {', '.join(wrong) or 'all together'}",
               "mend the backward pass, or set surrogate_gradient = True on the class")


@check
def training_gives_finite_gradients_in_the_weights_type(make: Make) -> None:
    case = make()
    case.block.train()
    for part in case.inputs():
        if part.is_floating_point():
            part.requires_grad_()
    learned = [part for part in case.outputs() if part.requires_grad]
    trained = [p for p in case.block.parameters() if p.requires_grad]
    if not getattr(case.block, "differentiable", True):
        expect(not learned, "no graph where differentiable is False", "one", "leave that out")
        return
    expect(learned or not trained, "an output with a graph in training", "none",
           "do not detach, or set differentiable = False on the class")
    if learned:
        sum((part.square().sum() for part in learned), torch.tensor(0.0)).backward()
    reached = [p for p in trained if p.grad is not None]
    expect(reached or not trained, "a gradient in some parameter", "none",
           "use the parameters in forward")
    expect_finite([p.grad for p in reached if p.grad is not None], "gradients")


@check
def eval_mode_is_deterministic_and_leaves_no_trace(make: Make) -> None:
    case = make()
    state = case.state()
    first = case.outputs()
    torch.manual_seed(123)
    again = [part for part in tree_leaves(apply(case.block, case.x)) if isinstance(part, Tensor)]
    expect(all(map(torch.equal, first, again)), "the same outputs again in eval mode", "others",
           "draw only where self.training")
    expect_same(case.state(), state, "the state as it was in eval mode",
                "update buffers only where self.training")
    expect(not any(module.training for module in case.block.modules()), "eval mode kept",
           "a part in train mode", "leave modes alone in forward")


@check
def state_goes_into_a_fresh_block_that_returns_the_same(make: Make) -> None:
    case, fresh = make(), make(seed=5)
    fresh.block.load_state_dict(case.block.state_dict())
    expect(all(map(torch.equal, case.outputs(), fresh.outputs())),
           "the same outputs from the same state_dict", "others",
           "register whatever forward uses as a parameter, a buffer or extra state")


@check
def a_deep_copy_stands_alone(make: Make) -> None:
    case = make()
    before, state = case.outputs(), case.state()
    copied = deepcopy(case)
    mend = "reach modules and tensors through attributes that deepcopy follows, not closures"
    expect(all(map(torch.equal, copied.outputs(), before)), "the copy's outputs to be the same",
           "others", mend)
    with torch.no_grad():
        for p in copied.block.parameters():
            p.add_(0.03 * torch.randn_like(p))
    told = make()
    told.block.load_state_dict(copied.block.state_dict())
    expect_close(copied.outputs(), told.outputs(), "the copy to run on its own state", mend)
    expect_same(case.state(), state, "the original as it was when the copy changes", mend)
    expect(all(map(torch.equal, case.outputs(), before)), "the original's outputs as before",
           "others", mend)


@check
def the_input_is_left_as_it_was(make: Make) -> None:
    for training in (False, True):
        case = make()
        case.block.train(training)
        before = [part.clone() for part in case.inputs()]
        case()
        expect(all(map(torch.equal, case.inputs(), before)), "x as it was", "another",
               "work on a copy, not in place")


@check
def it_runs_the_same_without_gradients(make: Make) -> None:
    case = make()
    expected = case.outputs()
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            outputs = case.outputs()
            expect(not any(part.requires_grad for part in outputs), "outputs without a graph",
                   "some that require grad", "leave gradients as they are set")
        expect_close(outputs, [part.detach() for part in expected],
                     f"the same outputs under {without.__name__}", "do the same in both")


@check
def what_stands_at_padding_changes_nothing(make: Make) -> None:
    case = make()
    if not case.ordinary or READS.get(case.place) != 1:
        return
    [x] = case.inputs()
    real = torch.tensor([[True, True, True, False, False], [True] * 5])
    for training in (False, True):
        found = []
        for filled in (x, torch.where(real[..., None], x, 3 * torch.randn_like(x))):
            fresh = make()
            fresh.block.train(training)
            with holding(real):
                seen = [part[real] for part in fresh.outputs(filled)
                        if part.shape[:2] == real.shape]
            taught = [p for p in fresh.block.parameters() if p.requires_grad]
            value = sum((part.square().sum() for part in seen if part.requires_grad),
                        torch.tensor(0.0))
            if taught and value.requires_grad:
                seen += torch.autograd.grad(value, taught, allow_unused=True,
                                            materialize_grads=True)
            found.append([part.detach() for part in seen])
        one, other = found
        expect_close(one, other, "the same for real tokens, and the same gradients, whatever "
                     "stands at padding", "leave it out of sums over tokens: read real_of(x) from "
                     "netwright.runtime.padding")


@check
def layouts_do_not_matter(make: Make) -> None:
    case = make()
    expected = case.outputs()
    strided = tree_map_only(
        Tensor, lambda part: part.transpose(0, -1).contiguous().transpose(0, -1), case.x)
    expect_close(case.outputs(strided), expected, "the same from x that is not contiguous",
                 "use reshape in place of view")
