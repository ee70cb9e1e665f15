"""What every learning rule keeps to, whatever it does inside."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

import netwright as nw

FEATURES, CLASSES = 20, 3

# How to build each rule, once for each of its variants that takes another path.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "AdaptiveFeedbackAlignment": [{}],
    "Backprop": [{}],
    "BlackBoxPrompt": [{"dimension": 4, "population": 4}],
    "BoostedUnits": [{}, {"units": 5, "steps": 1}],
    "ContinualBackprop": [{}, {"replacement_rate": 0.5, "maturity": 0}],
    "CascadedForward": [{}],
    "BlockCoordinateDescent": [{}, {"splitting": "two"}, {"keep": 6},
                               {"output_loss": "cross_entropy"}],
    "DiffusionBlocks": [{"blocks": 2, "num_classes": CLASSES}],
    "CounterCurrent": [{}],
    "DirectFeedbackAlignment": [{}, {"share": True}, {"feedback": "sign_symmetric"},
                                {"feedback": "kolen_pollack"}, {"ternary": 0.4, "noise": 0.1}],
    "DisinhibitoryHebb": [{}, {"inverse": "linear"}],
    "DualPropagation": [{}, {"means": "dyads"}, {"alpha": 1.0}],
    "DynamicalLowRank": [{}, {"tolerance": None, "rank": 3}],
    "EquilibriumPropagation": [{}, {"symmetric": False, "homeostasis": 1.0}],
    "FeedbackAlignment": [{}, {"feedback": "sign_symmetric"}, {"feedback": "kolen_pollack"}],
    "ForwardForward": [{}, {"goodness": "mean"}, {"predict_by": "softmax"}, {"collaborate": True},
                       {"collaborate": "earlier"}, {"goodness": "by_class"}, {"blocks": 1},
                       {"goodness": "by_class", "blocks": ["0"], "predict_by": "softmax"}],
    "ForwardGradient": [{}, {"perturb": "activities"}, {"directions": 3}, {"guess": "local_loss"},
                        {"perturb": "activities", "guess": "local_loss"}],
    "LLS": [{}, {"variant": "M"}, {"variant": "MxM"}, {"basis": "square"}],
    "LocalLosses": [{}, {"blocks": 2}],
    "MomentumAuxiliary": [{}, {"blocks": 2}],
    "LikelihoodRatio": [{"copies": 4}, {"copies": 2, "control": "antithetic"},
                        {"copies": 1, "control": None}],
    "HighwayBackprop": [{}],
    "InferenceLearning": [{}, {"rate": 10.0, "steps": 4}],
    "MonoForward": [{}, {"predict_by": "sum"}],
    "NoProp": [{"blocks": 3}, {"blocks": 3, "embedding": "one-hot"}],
    "NoPropContinuous": [{}, {"schedule": "cosine", "embedding": "one-hot", "solver": "euler"}],
    "NoPropFlow": [{}, {"embedding": "learned"}],
    "Pepita": [{}, {"presynaptic": "clean"}, {"presynaptic": "own"}, {"feedback": "mirror"}],
    "PipelinedBackprop": [{}, {"spike_compensation": False}, {"prediction": "difference"},
                          {"spike_compensation": False, "prediction": None, "stash": True}],
    "PhysicalForwardForward": [{}],
    "PredictiveCoding": [{}, {"incremental": True}],
    "QuantizedForwardGradient": [{}, {"share": 0.5}, {"momentum": 0.0, "kernelwise": False}],
    "RandomFeatureBoosting": [{}, {"output_loss": "squared"}, {"keep": 6}],
    "StationaryFeedback": [{}, {"feedback": 0.5}],
    "Reversible": [{}, {"checkpoint": False}],
    "SoftHebb": [{}, {"anti_hebbian": False, "temperature": [0.5, 2.0]}, {"initial_norm": None}],
    "ProductFeedback": [{}],
    "TargetProjection": [{}, {"distance": "absolute"}, {"distance": "direct"}],
    "ZerothOrder": [{}, {"difference": "forward", "directions": 3},
                    {"in_place": True, "rate": 0.1}],
    "TwoStageBackward": [{}],
}
# What a call leaves behind besides `.grad`: what the next update will need.
REMEMBERS = ("BoostedUnits", "ContinualBackprop", "PipelinedBackprop")
# What is for networks with recurrent layers alone, and gets one of those.
RECURRENT = ("StationaryFeedback",)
# What takes no such network as the one below, and where it is held to the same.
ELSEWHERE = {
    "DeltaRule": "local/test_delta_rule.py",  # takes one layer of neurons
    "ReverseDerivativeAscent": "discrete/test_reverse_derivative_ascent.py",  # takes circuits
    "SingleForward": "forward/test_single_forward.py",  # takes graphs
}
CASES = [pytest.param(name, options, id=" ".join([name, *(f"{k}={v}" for k, v in options.items())]))
         for name, variants in OPTIONS.items() for options in variants]


class Steps(nn.Module):
    """Reads 16 features as 4 steps of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 4, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.gru(h.unflatten(-1, (4, 4)))[0]
        return out.flatten(1)


class Contract:
    """A rule on a small network, with a batch, and everything random set back at each call."""

    def __init__(self, name: str, options: dict[str, Any], seed: int = 0,
                 dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(seed)
        act = nn.ReLU if name == "BlockCoordinateDescent" else nn.Tanh  # it takes no other
        self.network = nn.Sequential(
            nn.Linear(FEATURES, 16), Steps() if name in RECURRENT else act(),
            nn.Linear(16, 12), act(), nn.Linear(12, CLASSES)).to(dtype)
        if name == "DiffusionBlocks":  # it trains denoisers, which return what they take
            self.network = nn.Sequential(
                nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(),
                nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, FEATURES)).to(dtype)
        self.names, self.outputs = list(self.network.state_dict()), self.network[-1].out_features
        self.generator = Generator().manual_seed(seed)
        self.rule = getattr(nw.rules, name)(self.network, torch.randn(6, FEATURES, dtype=dtype),
                                            generator=self.generator, **options)
        batch = Generator().manual_seed(7)
        self.x = torch.randn(6, FEATURES, generator=batch).to(dtype)
        self.y = torch.tensor([0, 1, 2, 0, 1, 2])

    def __call__(self, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        torch.manual_seed(1)
        self.generator.manual_seed(1)
        return self.rule(self.x if x is None else x, self.y if y is None else y)

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.rule.named_parameters()
                if p.grad is not None}

    def state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.rule.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def every_rule(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize(("name", "options"), CASES)(test)


def test_every_rule_is_held_to_the_contract() -> None:
    assert set(OPTIONS) | set(ELSEWHERE) == set(nw.rules.__all__) - {"Rule"}
    assert not set(OPTIONS) & set(ELSEWHERE)


@every_rule
def test_the_loss_is_a_finite_scalar_without_a_graph(name: str, options: dict[str, Any]) -> None:
    loss = Contract(name, options)()
    assert loss.shape == ()
    assert torch.isfinite(loss)
    assert not loss.requires_grad


@every_rule
def test_the_rule_moves_its_network_or_what_it_adds(name: str, options: dict[str, Any]) -> None:
    case = Contract(name, options)
    before = case.state()
    optimizer = torch.optim.SGD(case.rule.parameters(), lr=0.1)
    case()
    if case.rule.updates_weights:
        optimizer.zero_grad()
    elif name in REMEMBERS:
        weights = {key: p.detach().clone() for key, p in case.rule.named_parameters()}
        assert_same(weights, {key: before[key] for key in weights})
    else:
        assert_same(case.state(), before)
    optimizer.step()
    after = case.state()
    moved = [key for key, _ in case.rule.named_parameters()
             if not torch.equal(before[key], after[key])]
    assert any(key.endswith("weight") for key in moved)


@every_rule
def test_two_calls_add_up_as_two_backward_passes_do(name: str, options: dict[str, Any]) -> None:
    case = Contract(name, options)
    if case.rule.updates_weights:
        pytest.skip("it changes the weights at each call")
    case()
    once = case.gradients()
    assert once
    case()
    twice = case.gradients()
    assert once.keys() == twice.keys()
    for key, gradient in once.items():
        torch.testing.assert_close(twice[key], 2 * gradient, msg=lambda text, key=key: key + text)


@every_rule
def test_the_same_random_state_gives_the_same_update(name: str, options: dict[str, Any]) -> None:
    first, second = Contract(name, options), Contract(name, options)
    assert torch.equal(first(), second())
    assert_same(first.gradients(), second.gradients())
    assert_same(first.state(), second.state())


@every_rule
def test_state_goes_into_a_fresh_rule_that_predicts_the_same(name: str,
                                                             options: dict[str, Any]) -> None:
    case, fresh = Contract(name, options), Contract(name, options, seed=5)
    case()
    assert not torch.equal(case.rule.predict(case.x), fresh.rule.predict(case.x))
    fresh.rule.load_state_dict(case.rule.state_dict())
    assert torch.equal(case.rule.predict(case.x), fresh.rule.predict(case.x))
    case.rule.zero_grad()
    assert torch.equal(case(), fresh())
    assert_same(fresh.gradients(), case.gradients())


@every_rule
def test_predictions_are_scores_that_leave_no_trace(name: str, options: dict[str, Any]) -> None:
    case = Contract(name, options)
    case()
    gradients, state = case.gradients(), case.state()
    case.network[1].eval()
    modes = [module.training for module in case.rule.modules()]
    scores = case.rule.predict(case.x)
    assert scores.shape == (6, CLASSES)
    assert not scores.requires_grad
    assert torch.equal(scores, case.rule.predict(case.x))
    assert_same(case.gradients(), gradients)
    assert_same(case.state(), state)
    assert [module.training for module in case.rule.modules()] == modes


@every_rule
def test_inputs_labels_and_modes_are_left_as_they_were(name: str, options: dict[str, Any]) -> None:
    case = Contract(name, options)
    x, y = case.x.clone(), case.y.clone()
    case.network[1].eval()
    modes = [module.training for module in case.rule.modules()]
    case()
    case.rule.predict(case.x)
    assert torch.equal(case.x, x)
    assert torch.equal(case.y, y)
    assert not case.x.requires_grad
    assert case.x.grad is None
    assert [module.training for module in case.rule.modules()] == modes


@every_rule
@pytest.mark.parametrize("layer", [0, 2, 4])
def test_a_frozen_layer_stays_as_it_is(name: str, options: dict[str, Any], layer: int) -> None:
    case = Contract(name, options)
    case.network[layer].requires_grad_(False)
    before = case.network[layer].weight.clone()
    case()
    assert case.network[layer].weight.grad is None
    assert torch.equal(case.network[layer].weight, before)


@every_rule
def test_a_frozen_network_gets_no_gradient(name: str, options: dict[str, Any]) -> None:
    case = Contract(name, options)
    case.network.requires_grad_(False)
    # the others may have parameters of their own
    if name in ("Backprop", "BoostedUnits", "ContinualBackprop", "ForwardGradient",
                "HighwayBackprop", "LikelihoodRatio", "PipelinedBackprop",
                "QuantizedForwardGradient", "Reversible", "StationaryFeedback",
                "TwoStageBackward", "ZerothOrder"):
        with pytest.raises(ValueError, match="network has no trainable parameters"):
            case()
    else:
        assert torch.isfinite(case())
    assert all(p.grad is None for p in case.network.parameters())


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_rule_follows_when_it_is_converted(name: str, options: dict[str, Any],
                                             dtype: torch.dtype) -> None:
    case = Contract(name, options)
    case()
    case.rule.zero_grad()
    case.rule.to(dtype)
    assert torch.isfinite(case(case.x.to(dtype)))
    assert case.rule.updates_weights or case.gradients()
    assert all(gradient.dtype == dtype and gradient.isfinite().all()
               for gradient in case.gradients().values())
    assert case.rule.predict(case.x.to(dtype)).isfinite().all()


@every_rule
def test_batches_of_any_size_and_layout_do(name: str, options: dict[str, Any]) -> None:
    case, plain = Contract(name, options), Contract(name, options)
    columns = case.x.T.contiguous().T
    assert not columns.is_contiguous()
    torch.testing.assert_close(case(columns, torch.stack([case.y, case.y], 1)[:, 0]), plain())
    repeated = case.x[:1].expand(6, FEATURES)
    case(repeated, torch.ones_like(case.y))  # one class only
    assert torch.equal(repeated, case.x[:1].repeat(6, 1))
    for size in (1, 4, 2):
        case.rule.zero_grad()
        assert torch.isfinite(case(case.x[:size], case.y[:size]))
        assert all(gradient.isfinite().all() for gradient in case.gradients().values())
        assert case.rule.predict(case.x[:size]).shape == (size, CLASSES)


@every_rule
def test_everything_follows_the_network_to_float64(name: str, options: dict[str, Any]) -> None:
    case = Contract(name, options, dtype=torch.float64)
    floating = [value for value in case.rule.state_dict().values() if value.is_floating_point()]
    assert all(value.dtype == torch.float64 for value in floating)
    case()
    assert all(gradient.dtype == torch.float64 for gradient in case.gradients().values())
    assert case.rule.predict(case.x).dtype == torch.float64
    moved = Contract(name, options)
    moved.rule.double()
    moved(moved.x.double())
    assert all(gradient.dtype == torch.float64 for gradient in moved.gradients().values())


@every_rule
def test_a_step_under_autocast_leaves_gradients_in_the_weights_type(
        name: str, options: dict[str, Any]) -> None:
    case = Contract(name, options)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(case())
        assert case.rule.predict(case.x).shape == (6, CLASSES)
    gradients = case.gradients()
    assert case.rule.updates_weights or gradients
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert all(p.dtype == torch.float32 for p in case.rule.parameters())


def refuse(case: Contract, x: Tensor, y: Tensor, error: type[Exception] | tuple[Any, ...],
           match: str) -> None:
    """Expect an error that says `match`, after which all is as it was before the call."""
    case()
    gradients, state = case.gradients(), case.state()
    with pytest.raises(error, match=match):
        case(x, y)
    assert_same(case.gradients(), gradients)
    assert_same(case.state(), state)


@every_rule
@pytest.mark.parametrize(("labels", "match"), [
    ([0, 1, 2, 0, 1, 3], "y must be between 0 and 2 .* got 3"),
    ([0, 1, 2, 0, 1, -1], "y must be between 0 and 2 .* got -1"),
    ([0.0, 1.0, 2.0, 0.0, 1.0, 2.0], "y must hold class numbers of dtype int64, got torch.float32"),
], ids=["too large", "negative", "not whole"])
def test_labels_that_are_none_are_refused_before_anything_changes(
        name: str, options: dict[str, Any], labels: list[float], match: str) -> None:
    case = Contract(name, options)
    refuse(case, case.x, torch.tensor(labels), ValueError, match)


@every_rule
def test_an_input_of_the_wrong_shape_is_refused_before_anything_changes(
        name: str, options: dict[str, Any]) -> None:
    case = Contract(name, options)
    refuse(case, torch.randn(6, FEATURES + 1), case.y, (ValueError, RuntimeError), "21")


@every_rule
def test_fewer_labels_than_inputs_are_refused_before_anything_changes(
        name: str, options: dict[str, Any]) -> None:
    case = Contract(name, options)
    refuse(case, case.x, case.y[:5], (ValueError, RuntimeError), "5")


@every_rule
def test_the_update_stops_at_the_input(name: str, options: dict[str, Any]) -> None:
    case, plain = Contract(name, options), Contract(name, options)
    made_of = torch.ones(FEATURES, requires_grad=True)
    assert torch.equal(case(case.x * made_of), plain())
    assert made_of.grad is None
    assert_same(case.gradients(), plain.gradients())
    leaf = case.x.clone().requires_grad_()
    case(leaf)
    assert leaf.grad is None
    assert torch.equal(leaf, case.x)
    assert leaf.requires_grad


@every_rule
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_the_update_is_the_same_where_gradients_are_off(
        name: str, options: dict[str, Any], without: Callable[[], Any]) -> None:
    case, plain = Contract(name, options), Contract(name, options)
    with without():
        x, y = case.x + 0, case.y + 0
        loss = case(x, y)
    assert torch.equal(loss, plain())
    assert_same(case.gradients(), plain.gradients())
    again = case(x, y)  # tensors of inference mode, outside of it
    assert case.rule.updates_weights or torch.equal(again, loss)
    with without():
        scores = case.rule.predict(case.x)
    assert torch.equal(scores, case.rule.predict(case.x))


@every_rule
def test_parts_of_an_input_are_cut_off_too(name: str, options: dict[str, Any]) -> None:
    if name in ("DiffusionBlocks", "ForwardForward", "PhysicalForwardForward"):
        pytest.skip("it writes labels or noise into x, which must be a tensor")
    case, plain = Contract(name, options), Contract(name, options)
    leaf = case.x.clone().requires_grad_()
    loss = case((leaf,))  # type: ignore[arg-type]
    assert torch.equal(loss, plain())
    assert leaf.grad is None
    assert_same(case.gradients(), plain.gradients())


@every_rule
def test_a_deep_copy_stands_alone(name: str, options: dict[str, Any]) -> None:
    case = Contract(name, options)
    copied = deepcopy(case)
    case()
    expected = case.gradients(), case.state()
    copied()
    assert_same(copied.gradients(), expected[0])
    assert_same(copied.state(), expected[1])
    optimizer = torch.optim.SGD(copied.rule.parameters(), lr=0.1)
    optimizer.step()
    assert_same(case.state(), expected[1])


@every_rule
def test_the_networks_own_names_are_kept(name: str, options: dict[str, Any]) -> None:
    case = Contract(name, options)
    case()
    assert list(case.network.state_dict()) == case.names
    assert case.network(case.x).shape == (6, case.outputs)
