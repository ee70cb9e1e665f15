import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from netwright import checks
from netwright.blocks.experts.mixture import MixtureOfExperts
from netwright.catalogue.facets import Facets, facets
from netwright.contracts.checks import (
    Make,
    broken,
    cast,
    check,
    check_once,
    difference,
    expect,
    expect_same,
    hold,
    move,
)
from netwright.errors import CannotReverse
from netwright.reversing.engine import Stored, run
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


@checks.annotated
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
        whole = case.place == "embedding" and not first.is_floating_point()  # each number a vector
        kept = first.shape if whole else first.shape[:-1]
        expect(shape[:-1] == kept, f"an output ({', '.join(map(str, kept))}"
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
def forward_mode_gives_the_slope_of_the_backward_pass(make: Make) -> None:
    case = make(dtype=torch.float64)
    if not getattr(case.block, "differentiable", True) or getattr(
            case.block, "surrogate_gradient", False):
        return
    named = {name: p for name, p in case.block.named_parameters() if p.is_floating_point()}
    leaves = [*named.values(), *(part for part in case.inputs() if part.is_floating_point())]
    ways = [torch.randn_like(leaf) for leaf in leaves]
    move(leaves, ways, 0.03)  # off the kinks at which some are made
    for leaf in leaves:
        leaf.requires_grad_()
    plain = case.outputs()
    above = [torch.randn(part.shape, dtype=torch.float64) for part in plain]
    pairs = [(part, over) for part, over in zip(plain, above, strict=True) if part.requires_grad]
    if not pairs:
        return
    value = torch.stack([(part * over).sum() for part, over in pairs]).sum()
    found = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    parts = [float((g * way).sum()) for g, way in zip(found, ways, strict=True)]
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        duals = {id(leaf): forward_ad.make_dual(leaf.detach(), way)
                 for leaf, way in zip(leaves, ways, strict=True)}
        x = tree_map_only(Tensor, lambda part: duals.get(id(part), part), case.x)
        torch.manual_seed(1)
        outputs = functional_call(case.block, {name: duals[id(p)] for name, p in named.items()},
                                  x if isinstance(x, tuple) else (x,))
        seen = sum(float((tangent * over).sum().detach()) for part, over in zip(
            (part for part in tree_leaves(outputs) if isinstance(part, Tensor)), above, strict=True)
            if (tangent := forward_ad.unpack_dual(part).tangent) is not None)
    expect(abs(seen - sum(parts)) <= 1e-6 * (1 + sum(map(abs, parts))),
           f"a slope of {sum(parts):.6g} in forward mode, as by the gradients", f"{seen:.6g}",
           "give its autograd.Function a jvp, or take plain operations where "
           "netwright.runtime.modes.transformed() says so")


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


def _stored(course: "Course", x: Any) -> Tensor:
    return course.made(x)


def _checkpointed(course: "Course", x: Any, *, reentrant: bool) -> Tensor:
    args = x if isinstance(x, tuple) else (x,)
    made: Tensor = checkpoint(lambda *given: course.made(given), *args, use_reentrant=reentrant)
    return made


def _reversed(course: "Course", x: Any) -> Tensor:
    args = x if isinstance(x, tuple) else (x,)
    step = Stored("the block", lambda first: course.made((first, *args[1:])), [course.network],
                  [part for part in tree_leaves(args[1:]) if isinstance(part, Tensor)])
    return run([step], [args[0]], first=course.steps == 0)[0]


class Course:
    """Some steps of training a block, two passes before each backward pass."""

    def __init__(self, make: Make, way: Callable[["Course", Any], Tensor] = _stored,
                 **optimizer: bool) -> None:
        case = make(dtype=torch.float64)
        self.x, self.place = case.x, case.place
        self.network = case.block.train()
        if self.place == "router":  # which learns, and is told its loads, in a mixture
            self.network = MixtureOfExperts(8, lambda: nn.Linear(8, 8), case.block).double()
        torch.manual_seed(3)
        for p in self.network.parameters():
            with torch.no_grad():
                p.add_(0.03 * torch.randn_like(p))
        self.way, self.steps, self.how = way, 0, optimizer
        self.optimizer = self._new_optimizer()

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([*self.network.parameters(), nn.Parameter(torch.zeros(1))], 0.05,
                               **self.how)

    def made(self, x: Any) -> Tensor:
        """Return what the block makes of `x`, in one row."""
        outputs = [part for part in tree_leaves(apply(self.network, x)) if isinstance(part, Tensor)]
        return torch.cat([part.flatten() for part in outputs if part.is_floating_point()])

    def half(self, number: int) -> None:
        """Take a pass and keep its output for the backward pass."""
        x = tree_map_only(Tensor, lambda part: (part * (1 + 0.2 * number)).requires_grad_()
                          if part.is_floating_point() else part, self.x)
        torch.manual_seed(number)
        self.outputs.append(self.way(self, x))

    def step(self, between: Callable[[], None] = lambda: None) -> list[Tensor]:
        """Take two passes, go back through both, and step; return the gradients."""
        self.outputs: list[Tensor] = []
        self.optimizer.zero_grad()
        for number in (2 * self.steps, 2 * self.steps + 1):
            self.half(number)
        sum((y.square().mean() for y in self.outputs), torch.tensor(0.0)).backward()
        between()
        found = [torch.zeros_like(p) if p.grad is None else p.grad.clone()
                 for p in self.network.parameters()]
        self.optimizer.step()
        self.steps += 1
        return found

    def continued(self, network: nn.Module) -> None:
        """Go on with another network, which has this one's gradients."""
        for p, new in zip(self.network.parameters(), network.parameters(), strict=True):
            new.grad = p.grad
        self.network = network.train()
        self.optimizer = self._new_optimizer()


WAYS: dict[str, Callable[[Course, Any], Tensor]] = {
    "a checkpoint": partial(_checkpointed, reentrant=False),
    "a reentrant checkpoint": partial(_checkpointed, reentrant=True),
    "a reversible stack": _reversed,
}


def _learns(make: Make) -> bool:
    case = make()
    first = case.inputs()[0] if case.inputs() else torch.zeros(0, dtype=torch.long)
    return (getattr(case.block, "differentiable", True) and first.is_floating_point()
            and isinstance(case.x, Tensor | tuple)
            and all(isinstance(part, Tensor) for part in (
                case.x if isinstance(case.x, tuple) else (case.x,)))
            and any(p.requires_grad for p in case.block.parameters())
            and any(part.requires_grad for part in case.outputs()))


def expect_course(found: list[Tensor], expected: list[Tensor], how: str) -> None:
    for one, other in zip(found, expected, strict=True):
        worst = float((one - other).abs().max()) if one.numel() else 0.0
        expect(worst <= 1e-7 * (1 + float(other.abs().max() if other.numel() else 0)),
               f"the gradients of plain training {how}", f"a difference of {worst:.1e}",
               "let nothing move between a pass and the same pass run again "
               "(netwright.runtime.passes), hear of steps from the optimizer, and keep what "
               "waits for a step in the state_dict")


@check_once
def a_pass_that_runs_again_gives_the_same_gradients(make: Make) -> None:
    if not _learns(make):
        return
    plain = Course(make)
    expected = [plain.step() for _ in range(3)]
    for name, way in WAYS.items():
        course = Course(make, way)
        try:
            for k in range(3):
                expect_course(course.step(), expected[k], f"under {name}, in step {k + 1}")
        except CannotReverse:  # which says what is right instead
            continue


@check_once
def any_optimizer_and_a_resume_in_the_middle_give_the_same_steps(make: Make) -> None:
    if not _learns(make):
        return
    plain = Course(make)
    expected = [plain.step() for _ in range(3)][-1]
    for how in ("fused", "foreach"):
        course = Course(make, _stored, **{how: True})
        expect_course([course.step() for _ in range(3)][-1], expected, f"with {how}=True")
    for name in ("deepcopy", "load_state_dict"):
        course = Course(make)
        course.step()

        def change(course: Course = course, name: str = name) -> None:
            copied = deepcopy(course.network) if name == "deepcopy" else Course(make).network
            copied.load_state_dict(course.network.state_dict())
            course.continued(copied)
        course.step(between=change)
        expect_course(course.step(), expected, f"after {name} before a step")
