import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import gaussian_nll_loss
from torch.optim import SGD
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from netwright import checks
from netwright.blocks.reversible import AdditiveCoupling, ReversibleSequential
from netwright.contracts.checks import (
    Make,
    broken,
    cast,
    check,
    expect,
    expect_same,
    hold,
    offered,
)
from netwright.errors import CannotReverse
from netwright.rules.rule import Rule
from netwright.signals import call

__all__ = ["check_rule"]

FEATURES, CLASSES = 20, 3


@checks.annotated
def check_rule(rule: Callable[..., Rule], *, arguments: Mapping[str, Any] | None = None,
               network: Callable[[], nn.Module] | None = None,
               batch: Callable[[], tuple[Any, Tensor]] | None = None) -> None:
    """Hold a rule to what every rule keeps to, whatever it does inside.

    It is built as rule(network, example=x, generator=generator, **arguments), with those of
    `example` and `generator` that it takes, on each of its declared variants where `arguments`
    are not given. `network` makes a new network of three classes (a small MLP of 20 features where
    it is None), and `batch` its (x, y) of six or more samples. What was declared by
    `@nw.method("rule", variants=…, network=…, batch=…)` stands where an argument is left out.

    Raises:
        BrokenContract: the rule does not keep to it; says in one line what was expected, what was
            seen, and how to mend it.

    >>> class Halved(Rule):
    ...     def forward(self, x, y):
    ...         return nn.functional.cross_entropy(self.network(x), y) / 2
    >>> check_rule(Halved)
    Traceback (most recent call last):
    netwright.errors.BrokenContract: Halved: the loss is a finite scalar without a graph: expected \
a loss without a graph, got one that requires grad; return loss.detach()
    """
    hold("rule", rule, arguments=arguments, network=network, batch=batch)


def ordinary_network() -> nn.Module:
    """Return the small classifier on which a rule is tried that names no other."""
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(),
                         nn.Linear(12, CLASSES))


def ordinary_batch() -> tuple[Tensor, Tensor]:
    """Return six samples of two for each class."""
    return torch.randn(6, FEATURES), torch.tensor([0, 1, 2, 0, 1, 2])


class Case:
    """A rule on a small network, with a batch, and everything random set back at each call."""

    def __init__(self, method: Callable[..., Rule], arguments: Mapping[str, Any],
                 network: Callable[[], nn.Module] | None,
                 batch: Callable[[], tuple[Any, Tensor]] | None, *, seed: int = 0,
                 dtype: torch.dtype | None = None) -> None:
        torch.manual_seed(seed)
        self.network = (network or ordinary_network)().to(dtype)
        self.names = list(self.network.state_dict())
        torch.manual_seed(7)  # the same batch for any seed
        x, self.y = (batch or ordinary_batch)()
        self.x: Any = cast(x, dtype)
        torch.manual_seed(seed)
        self.generator = Generator().manual_seed(seed)
        example = (tree_map(torch.randn_like, self.x) if isinstance(self.x, Tensor)
                   and self.x.is_floating_point() else self.x)
        self.rule = method(self.network, **offered(method, example=example,
                                                   generator=self.generator), **arguments)
        self.updates_weights = self.rule.updates_weights

    def __call__(self, x: Any = None, y: Tensor | None = None) -> Tensor:
        torch.manual_seed(1)
        self.generator.manual_seed(1)
        return self.rule(self.x if x is None else x, self.y if y is None else y)

    @property
    def samples(self) -> bool:
        """Whether each row of x is a sample by itself, as in anything but a graph."""
        return isinstance(self.x, Tensor)

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.rule.named_parameters()}

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.rule.named_parameters()
                if p.grad is not None}

    def state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.rule.state_dict().items()}

    def modes(self) -> list[bool]:
        return [module.training for module in self.rule.modules()]

    def mix_modes(self) -> list[bool]:
        """Put one of the network's parts into eval mode, which no call may change."""
        [*self.network.modules()][-1].eval()
        return self.modes()


def expect_finite(loss: Tensor, mend: str = "keep the loss within the numbers' range") -> None:
    expect(torch.isfinite(loss).all(), "a finite loss", loss, mend)


def expect_finite_gradients(case: Case, dtype: torch.dtype | None = None) -> None:
    for name, gradient in case.gradients().items():
        expect(gradient.isfinite().all(), f"a finite gradient of {name}", "one that is not",
               "keep the update within the numbers' range")
        if dtype is not None and gradient.is_floating_point():
            expect(gradient.dtype == dtype, f"a gradient of {name} in the weight's {dtype}",
                   gradient.dtype, "convert it with .to(parameter.dtype)")


def expect_some_gradient(case: Case) -> None:
    expect(case.updates_weights or case.gradients(), "a gradient in .grad of some parameter",
           "none", "add to .grad in forward, or set updates_weights = True")


@check
def the_loss_is_a_finite_scalar_without_a_graph(make: Make) -> None:
    loss = make()()
    expect(isinstance(loss, Tensor) and loss.shape == (), "a loss of shape ()",
           tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__,
           "return the mean over the batch")
    expect_finite(loss)
    expect(not loss.requires_grad, "a loss without a graph", "one that requires grad",
           "return loss.detach()")


@check
def the_rule_moves_its_network_or_what_it_adds(make: Make) -> None:
    case = make()
    before, weights = case.state(), case.weights()
    case()
    if not case.updates_weights:
        mend = "leave steps to the optimizer, or set updates_weights or remembers on the class"
        expect_same(case.weights(), weights, "weights that wait for the optimizer", mend)
        if not case.rule.remembers:
            expect_same(case.state(), before, "a call that leaves the state as it was", mend)
        SGD(case.rule.parameters(), lr=0.1).step()
    names = list(weights) or list(before)
    after = case.state()
    moved = [name for name in names if not torch.equal(before[name], after[name])]
    expect(any(not name.endswith("bias") for name in moved), "a step that moves some weight",
           f"{moved or 'nothing'} moved", "add to .grad of what is to learn")


@check
def two_calls_add_up_as_two_backward_passes_do(make: Make) -> None:
    case = make()
    if case.updates_weights:  # at each call
        return
    case()
    once = case.gradients()
    expect_some_gradient(case)
    case()
    twice = case.gradients()
    for name, gradient in once.items():
        expect(torch.allclose(twice[name], 2 * gradient, rtol=1.3e-6, atol=1e-5),
               f".grad of {name} to be twice as much after two calls", "something else",
               "add to .grad where there is one, and do not look at what it holds")


@check
def the_same_random_state_gives_the_same_update(make: Make) -> None:
    first, second = make(), make()
    mend = "draw from generator, or from PyTorch's global state, alone"
    expect(torch.equal(first(), second()), "the same loss", "another", mend)
    expect_same(first.gradients(), second.gradients(), "the same gradients", mend)
    expect_same(first.state(), second.state(), "the same state", mend)


@check
def state_goes_into_a_fresh_rule_that_predicts_the_same(make: Make) -> None:
    case, fresh = make(), make(seed=5)
    case()
    expect(not torch.equal(case.rule.predict(case.x), fresh.rule.predict(case.x)),
           "other predictions from other weights", "the same", "let predict use the network")
    fresh.rule.load_state_dict(case.rule.state_dict())
    mend = "register whatever forward and predict use as a parameter, a buffer or extra state"
    expect(torch.equal(case.rule.predict(case.x), fresh.rule.predict(case.x)),
           "the same predictions from the same state_dict", "others", mend)
    case.rule.zero_grad()
    expect(torch.equal(case(), fresh()), "the same loss from the same state_dict", "another", mend)
    expect_same(fresh.gradients(), case.gradients(), "the same gradients", mend)


@check
def predictions_are_scores_that_leave_no_trace(make: Make) -> None:
    case = make()
    case()
    gradients, state, modes = case.gradients(), case.state(), case.mix_modes()
    scores = case.rule.predict(case.x)
    expect(scores.shape == (len(case.y), CLASSES), f"scores ({len(case.y)}, {CLASSES})",
           tuple(scores.shape), "return a score for each class")
    expect(not scores.requires_grad, "scores without a graph", "some that require grad",
           "decorate predict with torch.no_grad()")
    expect(torch.equal(scores, case.rule.predict(case.x)), "the same when asked again", "others",
           "predict in eval mode, see netwright.runtime.modes.evaluating")
    mend = "change nothing in predict"
    expect_same(case.gradients(), gradients, "the gradients as they were", mend)
    expect_same(case.state(), state, "the state as it was", mend)
    expect(case.modes() == modes, "train and eval modes as they were", "others", mend)


@check
def inputs_labels_and_modes_are_left_as_they_were(make: Make) -> None:
    case = make()
    x, y = tree_map(torch.clone, case.x), case.y.clone()
    modes = case.mix_modes()
    case()
    case.rule.predict(case.x)
    mend = "work on a copy"
    expect(all(map(torch.equal, tree_leaves(case.x), tree_leaves(x))), "x as it was", "another",
           mend)
    expect(torch.equal(case.y, y), "y as it was", "another", mend)
    for leaf in tree_leaves(case.x):
        expect(not leaf.requires_grad and leaf.grad is None, "x without a gradient", "one",
               "call requires_grad_ on x.detach(), not on x")
    expect(case.modes() == modes, "train and eval modes as they were", "others",
           "set modes by netwright.runtime.modes, which puts them back")


@check
def a_frozen_layer_stays_as_it_is(make: Make) -> None:
    layers = [name for name, module in make().network.named_modules()
              if any(True for _ in module.parameters(recurse=False))]
    for name in layers if len(layers) > 1 else []:
        case = make()
        own = dict(case.network.get_submodule(name).named_parameters(recurse=False))
        for p in own.values():
            p.requires_grad_(False)
        before = {key: p.clone() for key, p in own.items()}
        case()
        mend = "leave out what has requires_grad=False"
        expect(all(p.grad is None for p in own.values()), f"no gradient in the frozen {name}",
               "one", mend)
        expect_same(dict(own), before, f"the frozen {name} as it was", mend)


@check
def a_frozen_network_gets_no_gradient(make: Make) -> None:
    case = make()
    case.network.requires_grad_(False)
    try:
        expect_finite(case())
    except ValueError as error:
        expect("network has no trainable parameters" in str(error),
               "a loss, or 'network has no trainable parameters'", error,
               "raise a ValueError that says so where nothing can learn")
    expect(all(p.grad is None for p in case.network.parameters()),
           "no gradient in a frozen network", "one", "leave out what has requires_grad=False")


@check
def a_rule_follows_when_it_is_converted(make: Make) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        case = make()
        case()
        case.rule.zero_grad()
        case.rule.to(dtype)
        expect_finite(case(cast(case.x, dtype)))
        expect_some_gradient(case)
        expect_finite_gradients(case, dtype)
        expect_finite(case.rule.predict(cast(case.x, dtype)))


@check
def batches_of_any_size_and_layout_do(make: Make) -> None:
    case, plain = make(), make()
    columns = tree_map(lambda part: part.T.contiguous().T, case.x)
    alike = torch.isclose(case(columns, torch.stack([case.y, case.y], 1)[:, 0]), plain(),
                          rtol=1.3e-6, atol=1e-5)
    expect(alike, "the same loss from x that is not contiguous", "another",
           "use reshape in place of view")
    if not case.samples:
        return
    repeated = case.x[:1].expand(len(case.y), *case.x.shape[1:])
    case(repeated, torch.ones_like(case.y))  # one class only
    expect(torch.equal(repeated, case.x[:1].repeat(len(case.y), *[1] * (case.x.ndim - 1))),
           "x as it was", "another", "work on a copy")
    for size in (1, 4, 2):
        case.rule.zero_grad()
        expect_finite(case(case.x[:size], case.y[:size]), f"a batch of {size} must do")
        expect_finite_gradients(case)
        shape = tuple(case.rule.predict(case.x[:size]).shape)
        expect(shape == (size, CLASSES), f"scores ({size}, {CLASSES})", shape,
               "take the batch size from x")


@check
def everything_follows_the_network_to_float64(make: Make) -> None:
    case = make(dtype=torch.float64)
    mend = "make what the rule adds in the network's dtype, as torch.randn(…).to(first_parameter)"
    for name, value in case.rule.state_dict().items():
        expect(not value.is_floating_point() or value.dtype == torch.float64,
               f"{name} in the network's float64", value.dtype, mend)
    case()
    expect_finite_gradients(case, torch.float64)
    scores = case.rule.predict(case.x)
    if any(p.is_floating_point() for p in case.network.parameters()):
        expect(scores.dtype == torch.float64, "scores in float64", scores.dtype, mend)
    moved = make()
    moved.rule.double()
    moved(cast(moved.x, torch.float64))
    expect_finite_gradients(moved, torch.float64)


@check
def a_step_under_autocast_leaves_gradients_in_the_weights_type(make: Make) -> None:
    case = make()
    with torch.autocast("cpu", torch.bfloat16):
        expect_finite(case())
        shape = tuple(case.rule.predict(case.x).shape)
    expect(shape == (len(case.y), CLASSES), f"scores ({len(case.y)}, {CLASSES})", shape,
           "let predict run under autocast")
    expect_some_gradient(case)
    expect_finite_gradients(case, torch.float32)
    for name, p in case.rule.named_parameters():
        expect(p.dtype == torch.float32 or not p.is_floating_point(), f"{name} in float32",
               p.dtype, "leave the weights' type as it is")


def refuse(case: Case, x: Any, y: Tensor, errors: tuple[type[Exception], ...],
           *words: str) -> None:
    """Expect an error that holds `words`, after which all is as it was before the call."""
    gradients, state = case.gradients(), case.state()
    wanted = f"a {errors[0].__name__} that says {' and '.join(words)}"
    try:
        case(x, y)
    except errors as error:
        said = str(error)
        expect(all(word in said for word in words), wanted, said, "say what it was")
    except Exception as error:
        broken(wanted, repr(error), "see netwright.rules.rule.check_labels")
    else:
        broken(wanted, "no error", "see netwright.rules.rule.check_labels")
    mend = "look at x and y before anything is changed"
    expect_same(case.gradients(), gradients, "gradients as before the refused call", mend)
    expect_same(case.state(), state, "the state as before the refused call", mend)


@check
def labels_that_are_none_are_refused_before_anything_changes(make: Make) -> None:
    case = make()
    case()
    for wrong in (3, -1):
        y = case.y.clone()
        y[-1] = wrong
        refuse(case, case.x, y, (ValueError,), "y must be between 0 and 2", f"got {wrong}")
    refuse(case, case.x, case.y.float(), (ValueError,),
           "y must hold class numbers of dtype int64", "got torch.float32")


@check
def an_input_of_the_wrong_shape_is_refused_before_anything_changes(make: Make) -> None:
    case = make()
    case()
    first, *_ = tree_leaves(case.x)
    wide = torch.cat([first, first[:, :1]], 1)
    x = tree_map(lambda part: wide if part is first else part, case.x)
    refuse(case, x, case.y, (ValueError, RuntimeError), str(wide.shape[1]))


@check
def fewer_labels_than_inputs_are_refused_before_anything_changes(make: Make) -> None:
    case = make()
    case()
    refuse(case, case.x, case.y[:-1], (ValueError, RuntimeError), str(len(case.y) - 1))


@check
def the_update_stops_at_the_input(make: Make) -> None:
    case, plain = make(), make()
    made_of = []

    def within_a_graph(part: Tensor) -> Tensor:
        if not part.is_floating_point():
            return part
        made_of.append(torch.ones_like(part[0], requires_grad=True))
        return part * made_of[-1]
    mend = "detach x before it is used"
    expect(torch.equal(case(tree_map(within_a_graph, case.x)), plain()), "the same loss",
           "another", mend)
    expect(all(part.grad is None for part in made_of), "no gradient in what x was made of", "one",
           mend)
    expect_same(case.gradients(), plain.gradients(), "the same gradients", mend)
    leaves = tree_map(lambda part: part.clone().requires_grad_() if part.is_floating_point()
                      else part, case.x)
    case(leaves)
    for leaf, part in zip(tree_leaves(leaves), tree_leaves(case.x), strict=True):
        expect(leaf.grad is None, "no gradient in x", "one", mend)
        expect(torch.equal(leaf, part), "x as it was", "another", "work on a copy")
        expect(leaf.requires_grad == leaf.is_floating_point(), "x to require grad as before",
               "a change", mend)


@check
def the_update_is_the_same_where_gradients_are_off(make: Make) -> None:
    for without in (torch.no_grad, torch.inference_mode):
        case, plain = make(), make()
        with without():
            x, y = tree_map(torch.clone, case.x), case.y.clone()
            loss = case(x, y)
        mend = "leave __call__ to Rule, which turns gradients on, and define forward"
        expect(torch.equal(loss, plain()), "the same loss", "another", mend)
        expect_same(case.gradients(), plain.gradients(), "the same gradients", mend)
        again = case(x, y)  # tensors of inference mode, outside of it
        expect(case.updates_weights or torch.equal(again, loss), "the same loss again", "another",
               mend)
        with without():
            scores = case.rule.predict(case.x)
        expect(torch.equal(scores, case.rule.predict(case.x)), "the same scores", "others", mend)


@check
def parts_of_an_input_are_cut_off_too(make: Make) -> None:
    case, plain = make(), make()
    leaf, *rest = tree_leaves(case.x)
    leaf = leaf.clone().requires_grad_(leaf.is_floating_point())
    try:
        loss = case((leaf, *rest))
    except ValueError as error:
        expect("x must be a" in str(error), "a call, or 'x must be a tensor'", error,
               "say so where the rule writes into x")
        return
    mend = "leave __call__ to Rule, which cuts every part of x off, and define forward"
    expect(torch.equal(loss, plain()), "the same loss", "another", mend)
    expect(leaf.grad is None, "no gradient in a part of x", "one", mend)
    expect_same(case.gradients(), plain.gradients(), "the same gradients", mend)


@check
def a_deep_copy_stands_alone(make: Make) -> None:
    case = make()
    copied = deepcopy(case)
    case()
    expected = case.gradients(), case.state()
    copied()
    mend = "reach modules and tensors through attributes that deepcopy follows, not closures"
    expect_same(copied.gradients(), expected[0], "the copy's gradients to be the same", mend)
    expect_same(copied.state(), expected[1], "the copy's state to be the same", mend)
    if copied.weights() and not copied.updates_weights:
        SGD(copied.rule.parameters(), lr=0.1).step()
    expect_same(case.state(), expected[1], "the original as it was when the copy steps", mend)


@check
def the_networks_own_names_are_kept(make: Make) -> None:
    case = make()
    shape = call(make().network, case.x).shape
    case()
    names = list(case.network.state_dict())
    expect(names == case.names, "the network's own names in its state_dict",
           sorted({*names} ^ {*case.names}), "keep what is added on the rule")
    expect(call(case.network, case.x).shape == shape, "a network that runs as before",
           tuple(call(case.network, case.x).shape), "leave the network's own pass as it is")


class TwoHeads(nn.Module):
    """A mean and a log-variance for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean, self.spread = (nn.Linear(FEATURES, 8), nn.Linear(8, 1),
                                             nn.Linear(8, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.mean(h), self.spread(h)


def likelihood(output: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    return gaussian_nll_loss(output[0].flatten(), y.to(output[0].dtype), output[1].flatten().exp())


@check
def a_loss_of_ones_own_teaches_all_that_the_network_returns(make: Make) -> None:
    method, arguments, *_ = make.args  # type: ignore[attr-defined]
    if not offered(method, loss=None):
        return
    try:
        case = Case(method, {**arguments, "loss": likelihood}, TwoHeads, ordinary_batch)
        before = case.weights()
        loss = case()
    except (ValueError, TypeError, AttributeError) as error:
        expect("network" in str(error) or "stage" in str(error),
               "a call, or an error that says what the network must return", repr(error),
               "see netwright.rules.rule.output_for and chain_of")
        return
    expect_finite(loss)
    taught = {name for name, g in case.gradients().items() if g.any()}
    moved = {name for name, w in case.weights().items() if not torch.equal(w, before[name])}
    expect(any("spread" in name for name in taught | moved),
           "an update of the second head", "none", "give the loss all of output_for(…)")


class Reused(nn.Module):
    """A network that runs one of its layers twice."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.within, self.out = (nn.Linear(FEATURES, 12), nn.Linear(12, 12),
                                            nn.Linear(12, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.within(torch.tanh(self.into(x))))
        scores: Tensor = self.out(torch.tanh(self.within(h)))
        return scores


class TiedHead(nn.Module):
    """Scores of tokens, read off by the matrix that they were embedded with."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.head = nn.Linear(8, CLASSES, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        for layer in self.layers:
            h = torch.tanh(layer(h))
        scores: Tensor = self.head(h)
        return scores


def token_batch() -> tuple[Tensor, Tensor]:
    return torch.arange(12).view(4, 3) % CLASSES, (torch.arange(12).view(4, 3) + 1) % CLASSES


@check
def weights_that_are_used_twice_train_and_are_kept(make: Make) -> None:
    method, arguments, *_ = make.args  # type: ignore[attr-defined]
    for network, batch in ((Reused, ordinary_batch), (TiedHead, token_batch)):
        try:
            case = Case(method, arguments, network, batch)
            case()
        except (ValueError, TypeError) as refused:
            expect("KeyError" not in repr(refused), "a call, or why it is refused", refused,
                   "name state by its place in the chain, or by its weight")
            continue
        expect_some_gradient(case)
        expect_finite_gradients(case)
        fresh = Case(method, arguments, network, batch, seed=5)
        fresh.rule.load_state_dict(case.rule.state_dict())
        case.rule.zero_grad()
        mend = "keep what belongs to a weight once, and what belongs to a stage for each of them"
        expect(torch.equal(case(), fresh()), "the same loss from the same state_dict", "another",
               mend)
        expect_same(fresh.gradients(), case.gradients(), "the same gradients", mend)


class Reader(nn.Module):
    """A transformer that reads tokens, those that count, and says one of three things."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.layers = nn.ModuleList([ReaderLayer() for _ in range(3)])
        self.head = nn.Linear(8, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.embedding(input_ids)
        for layer in self.layers:
            h = layer(h, attention_mask)
        counted = attention_mask.unsqueeze(-1).to(h.dtype)
        scores: Tensor = self.head((h * counted).sum(1) / counted.sum(1))
        return scores


class ReaderLayer(nn.Module):
    """Tokens attend to those that count."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.read, self.write = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.read(self.norm(h)).chunk(3, -1)
        scores = (q @ k.transpose(1, 2)).masked_fill(mask.unsqueeze(1) == 0, -torch.inf)
        return h + self.write(torch.tanh(scores.softmax(-1) @ v))


def padded_batch() -> tuple[dict[str, Tensor], Tensor]:
    mask = torch.ones(6, 5, dtype=torch.int64)
    mask[1, 3:] = mask[2, 2:] = mask[4, 4:] = 0
    return {"input_ids": torch.randint(9, (6, 5)), "attention_mask": mask}, ordinary_batch()[1]


@check
def what_stands_under_the_mask_changes_nothing(make: Make) -> None:
    method, arguments, *_ = make.args  # type: ignore[attr-defined]
    try:
        case, other = (Case(method, arguments, Reader, padded_batch) for _ in range(2))
        loss = case()
    except (ValueError, TypeError):
        return  # it takes other networks
    ids, mask = case.x["input_ids"], case.x["attention_mask"]
    again = other({"input_ids": torch.where(mask == 0, (ids + 4) % 9, ids),
                   "attention_mask": mask})
    mend = "leave padding out, see netwright.rules.readout.without_padding"
    expect(torch.allclose(loss, again, rtol=1e-5), f"a loss of {loss:.6f}", f"{again:.6f}", mend)
    for name, gradient in case.gradients().items():
        found = other.gradients()[name]
        expect(torch.allclose(found, gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max())
                              + 1e-9), f"the same gradient of {name}", "another", mend)
    for name, weight in case.weights().items():
        expect(torch.allclose(other.weights()[name], weight, rtol=1e-5, atol=1e-7),
               f"the same {name}", "another", mend)


class _Checkpointed(nn.Module):
    """Two layers whose activations are computed again in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 12))
        self.reentrant = reentrant

    def forward(self, h: Tensor) -> Tensor:
        if self.reentrant is None:
            made: Tensor = self.layers(h)
        else:
            with warnings.catch_warnings():  # PyTorch's, where the network is looked at
                warnings.simplefilter("ignore")
                made = checkpoint(self.layers, h, use_reentrant=self.reentrant)
        return made


def _deep(reentrant: bool | None) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), _Checkpointed(reentrant), nn.Tanh(),
                         nn.Linear(12, CLASSES))


class _Coupled(nn.Module):
    """Two reversible blocks that keep what they compute, or compute it again."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        def half() -> nn.Module:
            return nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.blocks = ReversibleSequential(*(AdditiveCoupling(half(), half()) for _ in range(2)))
        self.again = again

    def forward(self, h: Tensor) -> Tensor:
        if self.again:
            made: Tensor = self.blocks(h)
            return made
        for block in self.blocks:
            h = block(h)
        return h


def _coupled(again: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), _Coupled(again), nn.Tanh(),
                         nn.Linear(16, CLASSES))


def _on(make: Any, network: Callable[[], nn.Module] | None) -> Make:
    """Return `make` for another network."""
    method, arguments, _, batch = make.args
    return partial(make.func, method, arguments, network, batch)


class Course:
    """Some steps of training by a rule."""

    def __init__(self, make: Make, network: Callable[[], nn.Module] | None = None,
                 **optimizer: Any) -> None:
        self.fresh = partial(make if network is None else _on(make, network),
                             dtype=torch.float64)
        case = self.fresh()
        self.rule, self.x, self.y = case.rule, case.x, case.y
        self.how, self.steps = optimizer, 0
        self._go_on()

    def _go_on(self) -> None:
        learning = [p for p in self.rule.parameters() if p.requires_grad]
        self.optimizer = SGD([*learning, nn.Parameter(torch.zeros(1))], 0.05, **self.how)

    def step(self, between: Callable[[], None] = lambda: None) -> list[Tensor]:
        """Take a step; return the gradients, and what the parameters are after it."""
        self.optimizer.zero_grad()
        torch.manual_seed(self.steps)
        if self.rule.generator is not None:
            self.rule.generator.manual_seed(self.steps)
        self.rule(self.x, self.y)
        between()
        found = [torch.zeros_like(p) if p.grad is None else p.grad.clone()
                 for p in self.rule.parameters()]
        self.optimizer.step()
        self.steps += 1
        return [*found, *(p.detach().clone() for p in self.rule.parameters())]

    def run(self) -> list[list[Tensor]]:
        return [self.step() for _ in range(3)]

    def continued(self, rule: Rule) -> None:
        """Go on with another rule, which has this one's gradients."""
        for p, new in zip(self.rule.parameters(), rule.parameters(), strict=True):
            new.grad = p.grad
        self.rule = rule
        self._go_on()


def expect_course(found: list[list[Tensor]], expected: list[list[Tensor]], how: str) -> None:
    for k, (ones, others) in enumerate(zip(found, expected, strict=True)):
        for one, other in zip(ones, others, strict=True):
            worst = float((one - other).abs().max()) if one.numel() else 0.0
            expect(worst <= 1e-9 * (1 + float(other.abs().max() if other.numel() else 0)),
                   f"the steps of plain training {how}", f"a difference of {worst:.1e} in the "
                   f"step at {k}", "keep what the next call needs in the state_dict, and set "
                   "keeps_activations where nothing may be computed again")


@check
def any_optimizer_and_a_resume_in_the_middle_give_the_same_steps(make: Make) -> None:
    expected = Course(make).run()
    for how in ("fused", "foreach"):
        expect_course(Course(make, None, **{how: True}).run(), expected, f"with {how}=True")
    for name in ("deepcopy", "load_state_dict"):
        course = Course(make)
        course.step()

        def change(course: Course = course, name: str = name) -> None:
            copied = deepcopy(course.rule) if name == "deepcopy" else course.fresh().rule
            copied.load_state_dict(course.rule.state_dict())
            course.continued(copied)
        expect_course([course.step(between=change), course.step()], expected[1:],
                      f"after {name} before a step")


@check
def stages_that_run_again_in_the_backward_pass_teach_the_same(make: Any) -> None:
    if make.args[2] is not None:  # a network of a kind of its own
        return
    ways: list[tuple[Any, Any, dict[str, bool]]] = [
        (_deep, None, {"a checkpoint": False, "a reentrant checkpoint": True}),
        (_coupled, False, {"reversible blocks": True})]
    for network, kept, again in ways:
        plain = partial(network, kept)
        try:
            expected = Course(make, plain).run()
        except ValueError:  # which says what networks it takes
            continue
        for name, way in again.items():
            with suppress(CannotReverse):  # which says what is right instead
                expect_course(Course(make, partial(network, way)).run(), expected, f"under {name}")
