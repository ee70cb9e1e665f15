from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, mse_loss
from torch.utils.flop_counter import FlopCounterMode

from netwright.data import digits
from netwright.objectives.losses import cross_entropy
from netwright.rules import Backprop, PredictiveCoding

LABELS = torch.tensor([0, 2, 1, 1, 0, 2])


def mlp(*, seed: int = 0, depth: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    widths = [5, *[7] * (depth - 1), 3]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def inputs(samples: int = 6) -> Tensor:
    return torch.randn(samples, 5, generator=torch.Generator().manual_seed(1)).double()


def chain(network: nn.Sequential) -> list[nn.Sequential]:
    return [network[i:i + 2] for i in range(0, len(network), 2)]


def gradients(network: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in network.parameters()]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def whole_energy(network: nn.Sequential, x: Tensor, y: Tensor, states: list[Tensor],
                 nudge: float) -> Tensor:
    """The sum over samples, as one graph through everything."""
    *hidden, last = chain(network)
    energy, below = torch.zeros(()).double(), x
    for part, h in zip(hidden, states, strict=True):
        energy, below = energy + (h - part(below)).square().sum() / 2, h
    return energy + nudge * len(x) * cross_entropy(last(below), y)


def forward_states(network: nn.Sequential, x: Tensor) -> list[Tensor]:
    states, h = [], x
    for part in chain(network)[:-1]:
        h = part(h).detach()
        states.append(h.clone().requires_grad_())
    return states


def reference(network: nn.Sequential, x: Tensor, y: Tensor, *, steps: int, rate: float,
              nudge: float) -> list[Tensor]:
    states = forward_states(network, x)
    for _ in range(steps):
        pulls = torch.autograd.grad(whole_energy(network, x, y, states, nudge), states)
        states = [(h - rate * pull).detach().requires_grad_()
                  for h, pull in zip(states, pulls, strict=True)]
    energy = whole_energy(network, x, y, states, nudge) / (nudge * len(x))
    return list(torch.autograd.grad(energy, list(network.parameters())))


def reference_incremental(network: nn.Sequential, x: Tensor, y: Tensor, *, steps: int,
                          rate: float, nudge: float, weight_rate: float) -> nn.Sequential:
    network = deepcopy(network)
    weights, states = list(network.parameters()), forward_states(network, x)
    optimizer = torch.optim.SGD(weights, lr=weight_rate / (nudge * len(x)))
    for _ in range(steps):
        optimizer.zero_grad()
        for h in states:
            h.grad = None
        whole_energy(network, x, y, states, nudge).backward()
        optimizer.step()
        states = [(h - rate * h.grad).detach().requires_grad_() for h in states]
    return network


@pytest.mark.parametrize(("depth", "steps"), [(2, 1), (3, 2), (4, 3), (4, 9)])
@pytest.mark.parametrize("nudge", [1.0, 0.2])
def test_gradient_is_that_of_the_whole_energy_at_the_settled_states(
        depth: int, steps: int, nudge: float) -> None:
    network, x = mlp(depth=depth), inputs()
    expected = reference(network, x, LABELS, steps=steps, rate=0.3, nudge=nudge)

    PredictiveCoding(network, steps=steps, state_rate=0.3, nudge=nudge)(x, LABELS)

    torch.testing.assert_close(gradients(network), expected)


@pytest.mark.parametrize(("depth", "steps"), [(1, 3), (3, 3), (4, 9)])
def test_sgd_on_the_incremental_gradient_ends_where_a_step_each_inference_step_ends(
        depth: int, steps: int) -> None:
    network, x = mlp(depth=depth), inputs()
    expected = reference_incremental(network, x, LABELS, steps=steps, rate=0.3, nudge=0.5,
                                     weight_rate=0.2)
    before = deepcopy(network.state_dict())
    rule = PredictiveCoding(network, steps=steps, state_rate=0.3, nudge=0.5, incremental=True,
                            weight_rate=0.2)

    rule(x, LABELS)

    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    torch.optim.SGD(rule.parameters(), lr=0.2).step()
    torch.testing.assert_close(list(network.parameters()), list(expected.parameters()))


def test_incremental_with_a_weight_shared_by_two_stages_steps_both() -> None:
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(),
                            nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    network[4].weight = network[2].weight
    x = inputs()
    expected = reference_incremental(network, x, LABELS, steps=6, rate=0.3, nudge=1.0,
                                     weight_rate=0.2)
    rule = PredictiveCoding(network, steps=6, state_rate=0.3, incremental=True, weight_rate=0.2)

    rule(x, LABELS)

    torch.optim.SGD(rule.parameters(), lr=0.2).step()
    torch.testing.assert_close(list(network.parameters()), list(expected.parameters()))


def test_a_weak_nudge_brings_the_settled_gradient_to_the_exact_one_at_first_order() -> None:
    network, x = mlp(), inputs()
    Backprop(network)(x, LABELS)
    exact = flat(gradients(network))
    off = []
    for nudge in (1e-1, 1e-2, 1e-3):
        network.zero_grad()
        PredictiveCoding(network, steps=400, state_rate=0.3, nudge=nudge)(x, LABELS)
        found = flat(gradients(network))
        off.append(float((found - exact).norm() / exact.norm()))
    assert off[2] < 2e-3
    assert off[0] / off[1] == pytest.approx(10, rel=0.2)
    assert off[1] / off[2] == pytest.approx(10, rel=0.05)
    assert cosine_similarity(found, exact, dim=0) > 1 - 1e-5


@pytest.mark.parametrize("nudge", [1.0, 1e-2])
def test_the_energy_falls_to_an_equilibrium(nudge: float) -> None:
    network, x = mlp(), inputs()
    energies = PredictiveCoding(network, steps=400, state_rate=0.3,
                                nudge=nudge).energies(x, LABELS)
    rises = [after - before for before, after in pairwise(energies)]
    assert max(rises) < 1e-14  # rounding
    assert energies[0] - energies[-1] > 1e-3 * nudge**2
    states = forward_states(network, x)
    for _ in range(400):
        pulls = torch.autograd.grad(whole_energy(network, x, LABELS, states, nudge), states)
        states = [(h - 0.3 * pull).detach().requires_grad_()
                  for h, pull in zip(states, pulls, strict=True)]
    settled = whole_energy(network, x, LABELS, states, nudge)
    assert energies[-1] == pytest.approx(settled.item() / len(x), rel=1e-12)
    assert flat(list(torch.autograd.grad(settled, states))).norm() < 1e-9 * nudge


@pytest.mark.parametrize("steps", [3, 4])
def test_at_rate_one_the_front_of_the_errors_carries_the_exact_gradient(steps: int) -> None:
    network, x = mlp(depth=steps + 1), inputs()
    Backprop(network)(x, LABELS)
    exact = network[0].weight.grad.clone()
    network.zero_grad()

    PredictiveCoding(network, steps=steps, state_rate=1.0)(x, LABELS)

    torch.testing.assert_close(network[0].weight.grad, exact)
    assert not torch.allclose(network[-1].weight.grad, exact.new_zeros(()))


def test_one_stage_learns_by_the_exact_gradient() -> None:
    network, x = mlp(depth=1), inputs()
    PredictiveCoding(network)(x, LABELS)
    found = gradients(network)
    network.zero_grad()
    Backprop(network)(x, LABELS)
    torch.testing.assert_close(found, gradients(network))


def test_a_batch_gives_the_mean_of_its_samples() -> None:
    network, x = mlp(), inputs()
    rule = PredictiveCoding(network, steps=5, state_rate=0.3)
    rule(x, LABELS)
    whole = gradients(network)
    network.zero_grad()
    for i in range(len(x)):
        rule(x[i:i + 1], LABELS[i:i + 1])
    torch.testing.assert_close(whole, [g / len(x) for g in gradients(network)])


def test_targets_left_out_change_nothing_but_the_mean() -> None:
    network, x = mlp(), inputs()
    rule = PredictiveCoding(network)
    rule(x[:4], LABELS[:4])
    expected = gradients(network)
    network.zero_grad()
    rule(x, torch.cat([LABELS[:4], torch.tensor([-100, -100])]))
    torch.testing.assert_close(gradients(network), expected)


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3),
        nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(24, 3))


@pytest.mark.parametrize("incremental", [False, True])
def test_energy_never_rises_under_norms_and_dropout(incremental: bool) -> None:
    rule = PredictiveCoding(convolutional(), steps=25, incremental=incremental)
    energies = rule.energies(torch.randn(6, 1, 8, 8), LABELS)
    assert len(energies) == 26
    assert energies == sorted(energies, reverse=True)
    assert energies[-1] < 0.95 * energies[0]


def test_a_state_rate_that_is_too_large_shows_in_the_energies() -> None:
    network = mlp()
    with torch.no_grad():
        network[2].weight *= 8
    energies = PredictiveCoding(network, steps=12, state_rate=1.0).energies(inputs(), LABELS)
    assert energies != sorted(energies, reverse=True)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_energies_are_found_where_gradients_are_off(without: Callable[[], Any]) -> None:
    rule = PredictiveCoding(mlp())
    expected = rule.energies(inputs(), LABELS)
    x = inputs()
    with without():
        found = rule.energies(x, LABELS)
    assert found == expected
    assert len(set(found)) > 1


def test_energies_start_at_the_loss_and_follow_the_reference() -> None:
    network, x = mlp(), inputs()
    energies = PredictiveCoding(network, steps=3, state_rate=0.3).energies(x, LABELS)
    states = forward_states(network, x)
    assert energies[0] == pytest.approx(cross_entropy(network(x), LABELS).item())
    for found in energies[1:]:
        pulls = torch.autograd.grad(whole_energy(network, x, LABELS, states, 1.0), states)
        states = [(h - 0.3 * pull).detach().requires_grad_()
                  for h, pull in zip(states, pulls, strict=True)]
        energy = whole_energy(network, x, LABELS, states, 1.0) / len(x)
        assert found == pytest.approx(energy.item())


@pytest.mark.parametrize("incremental", [False, True])
def test_statistics_and_random_state_are_those_of_one_forward_pass(incremental: bool) -> None:
    network, x = convolutional(), torch.randn(6, 1, 8, 8)
    twin = deepcopy(network)
    torch.manual_seed(3)
    loss = cross_entropy(twin(x), LABELS)
    after = torch.rand(3)

    torch.manual_seed(3)
    found = PredictiveCoding(network, incremental=incremental)(x, LABELS)

    assert torch.equal(torch.rand(3), after)
    assert torch.equal(found, loss)
    for key, value in twin.state_dict().items():
        assert torch.equal(network.state_dict()[key], value), key


def test_dropout_keeps_its_mask_through_all_steps() -> None:
    network, x = convolutional(), torch.randn(6, 1, 8, 8)
    rule = PredictiveCoding(network, steps=300, nudge=1e-4, state_rate=0.2).double()
    torch.manual_seed(3)
    rule(x.double(), LABELS)
    found = flat(gradients(network))
    network.zero_grad()
    torch.manual_seed(3)
    Backprop(network)(x.double(), LABELS)
    # Only with the forward pass's own masks is the weakly nudged gradient the exact one.
    assert cosine_similarity(found, flat(gradients(network)), dim=0) > 0.9999


@pytest.mark.parametrize("incremental", [False, True])
def test_energies_change_nothing(incremental: bool) -> None:
    network, x = convolutional(), torch.randn(6, 1, 8, 8)
    before, state = deepcopy(network.state_dict()), torch.get_rng_state()
    PredictiveCoding(network, incremental=incremental).energies(x, LABELS)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("incremental", [False, True])
def test_gradients_accumulate_and_inputs_survive(incremental: bool) -> None:
    network, x, y = mlp(), inputs(), LABELS.clone()
    rule = PredictiveCoding(network, incremental=incremental)
    rule(x, y)
    once = gradients(network)
    loss = rule(x, y)
    torch.testing.assert_close(gradients(network), [2 * g for g in once])
    assert loss.shape == ()
    assert not loss.requires_grad
    assert torch.equal(x, inputs())
    assert torch.equal(y, LABELS)


@pytest.mark.parametrize("incremental", [False, True])
def test_frozen_weights_get_nothing_and_the_others_what_they_got_before(
        incremental: bool) -> None:
    network, x = mlp(), inputs()
    rule = PredictiveCoding(network, incremental=False)
    rule(x, LABELS)
    expected = network[2].weight.grad.clone()
    network.zero_grad()
    network[0].requires_grad_(False)
    PredictiveCoding(network, incremental=incremental)(x, LABELS)
    assert network[0].weight.grad is None
    assert network[4].weight.grad is not None
    if not incremental:
        torch.testing.assert_close(network[2].weight.grad, expected)


@pytest.mark.parametrize("incremental", [False, True])
def test_a_wholly_frozen_network_is_left_alone(incremental: bool) -> None:
    network = mlp().requires_grad_(False)
    loss = PredictiveCoding(network, incremental=incremental)(inputs(), LABELS)
    assert loss == cross_entropy(network(inputs()), LABELS)
    assert all(p.grad is None for p in network.parameters())


def test_weights_come_back_when_a_step_fails() -> None:
    network, calls = mlp(), []

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no more")
        return cross_entropy(logits, y)

    before = deepcopy(network.state_dict())
    with pytest.raises(RuntimeError, match="no more"):
        PredictiveCoding(network, incremental=True, loss=loss)(inputs(), LABELS)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_step_runs_only_stages_that_an_error_has_reached() -> None:
    network, x, widths = mlp(), inputs(), [5 * 7, 7 * 7, 7 * 3]
    with FlopCounterMode(display=False) as counter:
        PredictiveCoding(network, steps=4)(x, LABELS)
    states = widths[2] + 3 * sum(widths[1:])  # its vjp in the first step, and in later ones
    again = widths[2] + 3 * sum(widths[1:])
    assert counter.get_total_flops() == 2 * len(x) * (2 * sum(widths) + states + again)


@pytest.mark.parametrize("incremental", [False, True])
def test_the_flop_counter_can_watch(incremental: bool) -> None:
    rule = PredictiveCoding(convolutional(), incremental=incremental)
    with FlopCounterMode(display=False) as counter:
        rule(torch.randn(6, 1, 8, 8), LABELS)
    assert counter.get_total_flops() > 0


def test_squared_error_on_real_targets_weighs_samples_alike() -> None:
    network, x, y = mlp(), inputs(), torch.randn(6, 3).double()
    rule = PredictiveCoding(network, loss=mse_loss)
    rule(x, y)
    whole = gradients(network)
    network.zero_grad()
    for i in range(6):
        rule(x[i:i + 1], y[i:i + 1])
    torch.testing.assert_close(whole, [g / 6 for g in gradients(network)])


@pytest.mark.parametrize("incremental", [False, True])
def test_autocast_gives_nearly_the_same_gradient(incremental: bool) -> None:
    network, x = mlp().float(), inputs().float()
    rule = PredictiveCoding(network, incremental=incremental, steps=8, state_rate=0.2,
                            weight_rate=0.5)
    rule(x, LABELS)
    expected = flat(gradients(network))
    network.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rule(x, LABELS)
    found = gradients(network)
    assert all(g.dtype == torch.float32 for g in found)
    assert (flat(found) - expected).norm() < 0.02 * expected.norm()


def test_incremental_under_autocast_sees_its_own_steps() -> None:
    rule = PredictiveCoding(mlp().float(), incremental=True, steps=8, weight_rate=0.5,
                            state_rate=1e-9)  # so that only the weights lower the energy
    first, *_, last = rule.energies(inputs().float(), LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = rule.energies(inputs().float(), LABELS)
    assert first - last > 0.03
    assert found[0] - found[-1] == pytest.approx(first - last, rel=0.2)


def test_weights_in_half_precision() -> None:
    network = mlp().bfloat16()
    loss = PredictiveCoding(network)(inputs().bfloat16(), LABELS)
    assert loss.isfinite()
    assert all(p.grad.dtype == torch.bfloat16 for p in network.parameters())
    assert network[0].weight.grad.any()


def test_state_round_trips_and_predict_is_the_forward_pass() -> None:
    rule = PredictiveCoding(convolutional())
    twin = PredictiveCoding(convolutional())
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    twin.load_state_dict(rule.state_dict())
    x = torch.randn(6, 1, 8, 8)
    assert torch.equal(rule.predict(x), rule.network.eval()(x))
    assert torch.equal(twin.predict(x), rule.predict(x))


def settles_and_learns(network: nn.Module, x: object, y: Tensor, example: object = None) -> None:
    for incremental in (False, True):
        network.zero_grad()
        rule = PredictiveCoding(network, example, incremental=incremental, weight_rate=1e-5)
        energies = rule.energies(x, y)
        assert energies == sorted(energies, reverse=True)
        rule(x, y)
        for i, stage in enumerate(rule.stages):
            assert any(p.grad is not None and p.grad.any() for p in stage.parameters()), i


def test_vision_transformer() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                    intermediate_size=32, image_size=8, patch_size=4,
                                    num_channels=1, num_labels=3)
    x = torch.randn(6, 1, 8, 8)
    settles_and_learns(transformers.ViTForImageClassification(config), x, LABELS, x)


def test_padded_text_does_not_see_its_padding() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2,
                                     num_attention_heads=2, intermediate_size=32, num_labels=3)
    network = transformers.BertForSequenceClassification(config)
    mask = torch.ones(6, 7, dtype=torch.long)
    mask[:, 5:] = 0
    x = {"input_ids": torch.randint(1, 20, (6, 7)), "attention_mask": mask}
    settles_and_learns(network, x, LABELS, x)

    network.eval().zero_grad()
    rule = PredictiveCoding(network, x)
    rule(x, LABELS)
    weight = network.bert.encoder.layer[0].output.dense.weight
    padded = weight.grad.clone()
    network.zero_grad()
    rule({key: value[:, :5] for key, value in x.items()}, LABELS)
    torch.testing.assert_close(weight.grad, padded)


def test_graph_network_with_labels_on_some_nodes() -> None:
    graphs = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    network = graphs.GCN(in_channels=5, hidden_channels=8, num_layers=3, out_channels=3,
                         dropout=0.2)
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 0, 3]])
    y = torch.tensor([0, -100, 1, -100, 2, -100])
    x = (torch.randn(6, 5), edges)
    settles_and_learns(network, x, y, x)


def small() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(),
                         nn.Linear(12, 10))


def train(rule: PredictiveCoding, x: Tensor, y: Tensor, epochs: int = 5) -> PredictiveCoding:
    optimizer = torch.optim.Adam([p for p in rule.parameters() if p.requires_grad], lr=1.5e-2)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            rule(x[index], y[index])
            optimizer.step()
    return rule


@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize("seed", [0])
def test_digits_are_learned_and_controls_are_not(incremental: bool, seed: int) -> None:
    data = digits()

    def accuracy(prepare: Callable[[nn.Sequential], object] = lambda network: None,
                 y: Tensor = data.y_train) -> float:
        torch.manual_seed(seed)
        network = small()
        prepare(network)
        rule = train(PredictiveCoding(network, incremental=incremental), data.x_train, y)
        return float((rule.predict(data.x_test).argmax(1) == data.y_test).float().mean())

    learned = accuracy()
    frozen = accuracy(lambda network: network[1:5].requires_grad_(False))
    shuffled = accuracy(y=data.y_train[torch.randperm(len(data.y_train))])
    assert learned > 0.9
    assert learned > frozen + 0.2
    assert shuffled < 0.3


@pytest.mark.parametrize(("depth", "steps"), [(1, 0), (2, 8), (3, 15), (4, 23), (6, 38)])
def test_default_steps_grow_with_depth_and_reach_the_first_stage(depth: int, steps: int) -> None:
    network = mlp(depth=depth)
    rule = PredictiveCoding(network)
    rule(inputs(), LABELS)
    assert rule.steps == steps
    assert PredictiveCoding(network, incremental=True).steps == max(depth, steps)
    assert network[0].weight.grad.any()


@pytest.mark.parametrize("seed", range(2))
def test_states_that_swing_at_a_kink_hold_up_no_others(seed: int) -> None:
    torch.manual_seed(seed)
    hidden = [part for _ in range(14) for part in (nn.Linear(32, 32), nn.ReLU())]
    network = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), *hidden, nn.Linear(32, 4))
    exact, x = deepcopy(network), torch.randn(64, 20)
    y = x[:, :4].argmax(1)
    PredictiveCoding(network)(x, y)
    Backprop(exact)(x, y)
    ratios = torch.stack([p.grad.norm() / q.grad.norm() for p, q in zip(
        network.parameters(), exact.parameters(), strict=True) if p.ndim > 1])
    # Measured over four seeds: at most 9.4; 1,400 and more where any rise halves the rate.
    assert (ratios / ratios.median()).min() > 1 / 20
    assert (ratios / ratios.median()).max() < 20


@pytest.mark.parametrize(("options", "match"), [
    ({"steps": 1}, r"steps must be at least 2, got 1; .* 3 stages"),
    ({"steps": 2, "incremental": True}, r"steps must be at least 3, got 2; .* 3 stages"),
    ({"state_rate": 0.0}, r"state_rate must be above 0, got 0.0"),
    ({"nudge": -1.0}, r"nudge must be above 0, got -1.0"),
    ({"weight_rate": float("nan")}, r"weight_rate must be above 0, got nan"),
])
def test_settings_that_cannot_work(options: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PredictiveCoding(mlp(), **options)


def test_labels_out_of_range() -> None:
    network = mlp()
    with pytest.raises(ValueError, match="y must be between 0 and 2"):
        PredictiveCoding(network)(inputs(), LABELS + 1)
    with pytest.raises(ValueError, match="y must hold class numbers of dtype int64"):
        PredictiveCoding(network)(inputs(), LABELS.float())
    assert all(p.grad is None for p in network.parameters())
