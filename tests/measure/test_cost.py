import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import netwright as nw
from netwright.measure import cost

FLOAT = 4


def deep(stages: int, width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [part for _ in range(stages) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 4))


def batch(samples: int = 256, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(samples, width), torch.randint(4, (samples,))


class Local(nw.rules.Rule):
    """Each stage lowers the mean of its own squares and forgets them before the next runs."""

    def forward(self, x, y):
        h = x
        for stage in self.network:
            h = stage(h.detach())
            if h.requires_grad and isinstance(stage, nn.Linear):
                h.square().mean().backward()
        return cross_entropy(h.detach(), y)


class Functional(nw.rules.Rule):
    """Backprop by torch.func, which refuses to run under saved-tensor hooks."""

    def forward(self, x, y):
        weights = {name: p.detach() for name, p in self.network.named_parameters()}
        gradients, loss = torch.func.grad_and_value(lambda w: cross_entropy(
            torch.func.functional_call(self.network, w, (x,)), y))(weights)
        for name, p in self.network.named_parameters():
            p.grad = gradients[name]
        return loss.detach()


class Tangent(nw.rules.Rule):
    """A forward gradient along several directions at once."""

    def forward(self, x, y):
        weights = {name: p.detach() for name, p in self.network.named_parameters()}

        def loss(w):
            return cross_entropy(torch.func.functional_call(self.network, w, (x,)), y)

        drawn = {name: torch.randn(3, *p.shape, generator=self.generator)
                 for name, p in weights.items()}
        slopes = torch.func.vmap(lambda v: torch.func.jvp(loss, (weights,), (v,))[1])(drawn)
        for name, p in self.network.named_parameters():
            p.grad = torch.tensordot(slopes, drawn[name], 1)
        return slopes.mean()


def exact(found):
    """All but the time."""
    return (found.parameters, found.flops, found.saved_bytes, found.peak_bytes,
            found.working_bytes, dict(found.peak_by_kind))


def test_every_figure_of_a_small_step_is_the_one_counted_by_hand():
    x, y = torch.randn(8, 5), torch.zeros(8, dtype=torch.long)
    network = nn.Linear(5, 3)
    found = cost(network, (x, y))
    weights, logits, gradients = (5 * 3 + 3) * FLOAT, 8 * 3 * FLOAT, (5 * 3 + 3) * FLOAT
    assert found.parameters == 18
    assert found.flops == 2 * (2 * 8 * 5 * 3)  # forward and the weight's gradient
    # The input, the log-probabilities, the labels and the number of samples that count.
    assert found.saved_bytes == 8 * 5 * FLOAT + logits + 8 * 8 + FLOAT
    assert found.peak_by_kind["parameters"] == weights
    assert found.peak_by_kind["inputs"] == 8 * 5 * FLOAT + 8 * 8
    assert found.peak_by_kind["gradients"] <= gradients
    assert found.peak_bytes == sum(found.peak_by_kind.values())
    assert 2 * logits <= found.working_bytes <= 4 * logits
    assert found.step_time > 0


def test_a_forward_pass_alone_saves_nothing_and_is_measured_in_eval_mode():
    network = nn.Sequential(nn.Linear(16, 16), nn.Dropout(), nn.Linear(16, 4))
    x, _ = batch()
    found = cost(network, (x, None))
    assert found.saved_bytes == 0
    assert found.flops == 2 * 256 * (16 * 16 + 16 * 4)
    assert found.working_bytes == 256 * (16 + 4) * FLOAT
    assert network.training


@pytest.mark.parametrize("make", [nw.rules.Backprop, Local, Functional, Tangent])
def test_figures_repeat(make):
    first, second = (cost(make(deep(4)), batch(), repeats=1, warmup=0) for _ in range(2))
    assert exact(first) == exact(second)


def test_flops_are_those_of_the_counter_of_pytorch():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
                            nn.Flatten(), nn.Linear(8 * 9, 10))
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    with FlopCounterMode(display=False) as counter:
        cross_entropy(network(x), y).backward()
    assert cost(network, (x, y)).flops == counter.get_total_flops()


def test_attention_is_counted_beside_what_the_counter_of_pytorch_counts():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True)
    x = torch.randn(2, 5, 16)
    with FlopCounterMode(display=False) as counter:
        layer(x).square().mean().backward()
    found = cost(layer, (x, torch.zeros(0)), loss=lambda h, _: h.square().mean())
    scores, head = 2 * 2 * 5 * 5, 8  # the kernel's two products forward and five backward
    assert found.flops == counter.get_total_flops() + 7 * 2 * scores * head


def test_flops_of_forward_mode_are_those_of_the_products_that_run():
    network = deep(2)
    forward = cost(network, (batch()[0], None)).flops
    directions = 3
    tangents = 2 * directions * forward - directions * 2 * 256 * 16 * 16  # the input has none
    # Besides: the sum over directions, and a product with the input's zero tangent.
    assert 1 <= cost(Tangent(network), batch()).flops / (forward + tangents) < 1.1


def test_backprop_by_function_transform_saves_what_backprop_saves():
    ordinary = cost(nw.rules.Backprop(deep(8)), batch()).saved_bytes
    functional = cost(Functional(deep(8)), batch()).saved_bytes
    assert ordinary <= functional <= 2.1 * ordinary  # torch.func keeps ReLU's inputs as well


def test_a_local_rule_is_flat_in_depth_and_backprop_is_not():
    local = [cost(Local(deep(depth)), batch()) for depth in (8, 32)]
    whole = [cost(nw.rules.Backprop(deep(depth)), batch()) for depth in (8, 32)]
    assert local[1].saved_bytes == local[0].saved_bytes
    assert local[1].working_bytes == local[0].working_bytes
    assert whole[1].saved_bytes > 3 * whole[0].saved_bytes
    assert whole[1].working_bytes > 3 * whole[0].working_bytes


def test_what_shares_storage_is_counted_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16))

        def forward(self, x):
            return (x * self.weight + x * self.weight.square()).view(-1, 4)

    found = cost(Twice(), (batch()[0], torch.zeros(0)), loss=lambda h, _: h.sum())
    # The input, though two products save it, and not the weight, which its square saves.
    assert found.saved_bytes == 256 * 16 * FLOAT


def test_a_batch_that_is_a_view_counts_as_the_batch():
    x, y = batch(1024)
    network = deep(2)
    view, copied = (cost(network, pair) for pair in ((x[:256], y[:256]),
                                                     (x[:256].clone(), y[:256].clone())))
    assert exact(view) == exact(copied)


def test_checkpointed_stages_save_less():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = deep(16)

        def forward(self, x):
            for i in range(0, 33, 8):
                x = checkpoint(self.parts[i:i + 8], x, use_reentrant=False)
            return x

    whole, parts = cost(deep(16), batch()), cost(Checkpointed(), batch())
    assert parts.saved_bytes < 0.5 * whole.saved_bytes
    assert parts.working_bytes < 0.6 * whole.working_bytes
    assert parts.flops > whole.flops


def test_sparse_gradients_are_counted():
    network = nn.Sequential(nn.Embedding(1000, 8, sparse=True), nn.Flatten(), nn.Linear(16, 4))
    found = cost(network, (torch.randint(1000, (32, 2)), torch.zeros(32, dtype=torch.long)))
    assert 0 < found.working_bytes < 1000 * 8 * FLOAT


def test_mappings_tuples_float64_and_autocast_are_measured():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, x, mask):
            return self.layer(x * mask)

    x, y = batch()
    mask = torch.ones(16)
    named = cost(Masked(), ({"x": x, "mask": mask}, y))
    ordered = cost(Masked(), ((x, mask), y))
    double = cost(Masked().double(), ((x.double(), mask.double()), y))
    with torch.autocast("cpu", torch.bfloat16):
        half = cost(Masked(), ((x, mask), y))
    assert exact(named) == exact(ordered)
    assert double.flops == half.flops == named.flops
    assert double.working_bytes > 1.8 * named.working_bytes
    assert half.saved_bytes < named.saved_bytes


def test_stages_are_measured_as_their_model():
    network = deep(2)
    assert exact(cost(nw.stages(network), batch())) == exact(cost(network, batch()))


class Careless(nw.rules.Rule):
    """Changes everything that a rule can change."""

    updates_weights = True

    def __init__(self, network, **options):
        super().__init__(network, **options)
        self.register_buffer("seen", torch.zeros(3))
        self.steps, self.state = 0, torch.zeros(2)

    def forward(self, x, y):
        loss = cross_entropy(self.network(x), y)
        loss.backward()
        with torch.no_grad():
            for p in self.network.parameters():
                p += torch.randn(p.shape, generator=self.generator)
        self.seen = self.seen + 1
        self.state += 1
        self.steps += 1
        self.fresh = True
        torch.rand(1)
        return loss.detach()


def test_everything_is_left_as_it_was():
    network = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 4))
    rule = Careless(network, generator=torch.Generator().manual_seed(3))
    network[1].eval()
    network[0].weight.grad = torch.ones(16, 16)
    gradient, seen = network[0].weight.grad, rule.seen
    state = {name: value.clone() for name, value in rule.state_dict().items()}
    drawn = rule.generator.get_state()
    x, y = batch()
    x_before = x.clone()

    random = torch.get_rng_state()
    cost(rule, (x, y))

    assert all(torch.equal(value, state[name]) for name, value in rule.state_dict().items())
    assert network[0].weight.grad is gradient
    assert torch.equal(gradient, torch.ones(16, 16))
    assert network[3].weight.grad is None
    assert rule.seen is seen
    assert rule.steps == 0
    assert torch.equal(rule.state, torch.zeros(2))
    assert not hasattr(rule, "fresh")
    assert (rule.training, network[1].training) == (True, False)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(rule.generator.get_state(), drawn)
    assert torch.equal(x, x_before)
    assert torch.autograd.graph.disable_saved_tensors_hooks.__module__ == "torch.autograd.graph"


def test_everything_is_left_as_it_was_when_the_step_fails():
    class Failing(Careless):
        def forward(self, x, y):
            super().forward(x, y)
            raise ArithmeticError("no")

    rule = Failing(deep(2))
    before = [p.clone() for p in rule.parameters()]
    with pytest.raises(ArithmeticError):
        cost(rule, batch())
    assert all(torch.equal(p, old) for p, old in zip(rule.parameters(), before, strict=True))
    assert rule.steps == 0


@pytest.mark.parametrize(("wrong", "message"), [
    (torch.zeros(3, 16), r"batch must be the pair \(x, y\), got a tensor of shape \(3, 16\)"),
    ((torch.zeros(3, 16),), "got a tuple of 1"),
    ({"x": 1, "y": 2}, "got dict")])
def test_a_batch_that_is_no_pair_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        cost(deep(1), wrong)


def test_a_rule_needs_targets():
    with pytest.raises(ValueError, match="got y=None"):
        cost(Local(deep(1)), (batch()[0], None))


@pytest.mark.parametrize(("options", "match"), [
    ({"repeats": 0}, "repeats must be at least 1, got 0"),
    ({"warmup": -1}, "warmup must be at least 0, got -1"),
])
def test_repeats_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        cost(deep(1), batch(), **options)
