"""Forward gradients along the directions that stages' own losses guess."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

import netwright as nw
from netwright.data import Batches, digits
from netwright.measure import alignment, cost
from netwright.models import cnn, mlp
from netwright.rules import Backprop, ForwardGradient

EACH = pytest.mark.parametrize("perturb", ["weights", "activities"])
Y = torch.tensor([0, 1, 2, 0, 1, 2, 2])


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(),
                         nn.Linear(7, 3)).double()


def x_of(network: nn.Module, n: int = 7) -> Tensor:
    return torch.randn(n, 6, dtype=next(network.parameters()).dtype)


def gradients(module: nn.Module) -> list[Tensor]:
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone()
             for p in module.parameters() if p.requires_grad]
    module.zero_grad(set_to_none=True)
    return found


class Rest(nn.Module):
    """A head that is all that follows in the network, so that its guess is the gradient."""

    def __init__(self, rest: nn.Module) -> None:
        super().__init__()
        self.rest = deepcopy(rest).requires_grad_(False)

    def forward(self, h: Tensor, y: Tensor, x: Any) -> Tensor:
        return self.rest(h)


@EACH
@pytest.mark.parametrize("kind", ["linear", "convolutional", "batch norm"])
def test_a_guess_that_is_the_gradient_gives_the_gradient(perturb, kind):
    if kind == "linear":
        network, starts, x = small(), [2, 4], torch.randn(7, 6).double()
    else:
        network = cnn(1, (8, 8), 3, widths=(4, 5), norm=kind == "batch norm").double()
        starts = [4, 8] if kind == "batch norm" else [3, 6]
        x = torch.randn(7, 1, 8, 8).double()
    rule = ForwardGradient(network, x, perturb=perturb, guess="local_loss")
    rule.heads = nn.ModuleList(Rest(network[start:]) for start in starts)
    plain = deepcopy(network)
    loss = rule(x, Y)
    torch.testing.assert_close(loss, Backprop(plain)(x, Y))
    torch.testing.assert_close(gradients(network), gradients(plain))
    for ours, theirs in zip(network.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def parts(network: nn.Module, rule: ForwardGradient, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return each hidden stage's output and the gradient of its own loss, by autograd."""
    found, h = [], x
    for layers, head in zip((network[:2], network[2:4]), rule.heads, strict=True):
        h = layers(h.detach())
        leaf = h.detach().requires_grad_()
        found.append((h, torch.autograd.grad(cross_entropy(head(leaf), Y), leaf)[0]))
    return found


def test_weights_get_the_gradients_projection_on_their_stages_guess():
    network = small()
    x = x_of(network)
    rule = ForwardGradient(network, guess="local_loss", width=9)
    rule(x, Y)
    estimate = gradients(network)
    Backprop(network)(x, Y)
    exact = gradients(network)
    for i, (h, signal) in enumerate(parts(network, rule, x)):
        own = slice(2 * i, 2 * i + 2)
        u = torch.cat([g.flatten() for g in torch.autograd.grad(
            h, list(network[2 * i].parameters()), signal)])
        g = torch.cat([g.flatten() for g in exact[own]])
        torch.testing.assert_close(torch.cat([e.flatten() for e in estimate[own]]),
                                   (g @ u) / (u @ u) * u)
    torch.testing.assert_close(estimate[4:], exact[4:])  # the last stage knows its gradient


def test_activities_get_each_samples_projection_on_its_guess():
    network = small()
    x = x_of(network)
    rule = ForwardGradient(network, perturb="activities", guess="local_loss", chunk=1)
    rule(x, Y)
    estimate = gradients(network)
    for i, (h, u) in enumerate(parts(network, rule, x)):
        leaf = h.detach().requires_grad_()
        (g,) = torch.autograd.grad(cross_entropy(network[2 * i + 2:](leaf), Y), leaf)
        signal = (g * u).sum(1, keepdim=True) / u.square().sum(1, keepdim=True) * u
        wanted = torch.autograd.grad(h, list(network[2 * i].parameters()), signal)
        torch.testing.assert_close(estimate[2 * i:2 * i + 2], list(wanted))


@EACH
def test_heads_descend_their_own_loss_and_the_rest_is_a_forward_pass(perturb):
    network = cnn(1, (8, 8), 3, widths=(4, 5), norm=True).append(nn.Dropout(0.2))
    rule, plain = ForwardGradient(network, perturb=perturb, guess="local_loss"), deepcopy(network)
    x = torch.randn(7, 1, 8, 8)
    torch.manual_seed(3)
    loss = rule(x, Y)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    torch.testing.assert_close(loss, Backprop(plain)(x, Y))
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(dict(network.named_buffers()), dict(plain.named_buffers()))
    if perturb == "activities":
        assert rule._mixing.known  # batch norm does
    h = x
    for layers, head in zip((plain[:4], plain[4:9]), rule.heads, strict=True):
        h = layers(h)
        wanted = torch.autograd.grad(cross_entropy(head(h.detach()), Y), list(head.parameters()))
        torch.testing.assert_close(gradients(head), list(wanted))


@EACH
def test_the_weights_are_never_longer_than_the_gradient(perturb):
    network = mlp(6, 3, hidden=(16, 16))
    x = torch.randn(32, 6)
    y = torch.randint(3, (32,))
    rule = ForwardGradient(network, perturb=perturb, guess="local_loss")
    rule(x, y)
    ours = gradients(network)
    Backprop(network)(x, y)
    dots = [float((a * b).sum()) for a, b in zip(ours, gradients(network), strict=True)]
    assert sum(dots) > 0
    if perturb == "weights":
        assert sum(dots) == pytest.approx(sum(float(a.square().sum()) for a in ours), rel=1e-3)


@EACH
def test_frozen_and_shared_parameters(perturb):
    network = small()
    network[0].requires_grad_(False)
    network.append(nn.Linear(3, 8).double()).append(nn.Tanh()).append(network[2])
    network.append(nn.Tanh()).append(nn.Linear(7, 3).double())
    rule = ForwardGradient(network, perturb=perturb, guess="local_loss")
    rule(x_of(network), Y)
    assert network[0].weight.grad is None
    assert rule.heads[0].scores.weight.grad is None  # nothing asks it
    assert all(p.grad is not None for layer in (network[2], network[4], network[9])
               for p in layer.parameters())


def bert() -> tuple[nn.Module, Any, Tensor]:
    transformers = pytest.importorskip("transformers")
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 5:] = 0
    network = transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=3))
    return network, {"input_ids": torch.randint(3, 30, (3, 7)), "attention_mask": mask}, Y[:3]


def gcn() -> tuple[nn.Module, Any, Tensor]:
    network = pytest.importorskip("torch_geometric.nn").GCN(5, 8, 3, 3, dropout=0.2)
    y = torch.randint(3, (9,))
    y[4:] = -100
    return network, (torch.randn(9, 5), torch.randint(0, 9, (2, 20))), y


@EACH
@pytest.mark.parametrize("make", [bert, gcn])
def test_transformers_and_graphs(perturb, make):
    network, x, y = make()
    rule = ForwardGradient(network.eval(), x, num_classes=3, perturb=perturb, guess="local_loss")
    rule(x, y)
    ours = gradients(network)
    Backprop(network)(x, y)
    exact = gradients(network)
    assert all(g.isfinite().all() for g in ours)
    torch.testing.assert_close(ours[-2:], exact[-2:])
    assert sum(float((a * b).sum()) for a, b in zip(ours, exact, strict=True)) > 0


@EACH
def test_autocast_keeps_gradients_in_the_weights_type(perturb):
    network = cnn(1, (8, 8), 3, widths=(4, 5), norm=True)
    rule = ForwardGradient(network, perturb=perturb, guess="local_loss")
    with torch.autocast("cpu", torch.bfloat16):
        rule(torch.randn(7, 1, 8, 8), Y)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all()
               for p in rule.parameters())


def trained(perturb: str, guess: str, *, frozen: bool = False,
            shuffled: bool = False) -> tuple[float, float]:
    """Return the accuracy on the digits, and the cosine at the end with the gradient."""
    data = digits()
    torch.manual_seed(0)
    network = mlp(64, 10, hidden=(32, 32))
    network[1].requires_grad_(not frozen)
    network[3].requires_grad_(not frozen)
    y = data.y_train[torch.randperm(len(data.y_train))] if shuffled else data.y_train
    rule = ForwardGradient(network, perturb=perturb, guess=guess, width=32)
    nw.fit(rule, Batches(data.x_train, y, 64), epochs=5, progress=False,
           optimizer=lambda p: torch.optim.Adam(p, 3e-3))
    cosines = alignment(rule, (data.x_train[:256], y[:256]))
    right = (rule.predict(data.x_test).argmax(1) == data.y_test).float().mean()
    return float(right), sum(list(cosines.values())[:-1]) / 2


@EACH
def test_local_guesses_teach_the_hidden_stages_more_than_isotropic_ones(perturb):
    accuracy, cosine = trained(perturb, "local_loss")
    isotropic, noise = trained(perturb, "isotropic")
    assert accuracy > 0.65
    assert accuracy > isotropic + 0.03
    assert cosine > 1.4 * noise
    assert accuracy > trained(perturb, "local_loss", frozen=True)[0] + 0.15
    assert trained(perturb, "local_loss", shuffled=True)[0] < 0.3


def test_weights_store_no_more_than_one_stage_at_a_time():
    x, y = torch.randn(64, 256), torch.randint(10, (64,))
    saved = {depth: cost(ForwardGradient(mlp(256, 10, hidden=(64,) * depth), guess="local_loss",
                                         width=8), (x, y), repeats=1).saved_bytes
             for depth in (2, 16)}
    assert saved[16] <= 1.1 * saved[2]


@pytest.mark.parametrize(("options", "match"), [
    ({"guess": "random"}, "guess must be 'isotropic' or 'local_loss', got 'random'"),
    ({"guess": "local_loss", "width": 0}, "width must be at least 1, got 0"),
    ({"guess": "local_loss", "num_classes": 4}, "num_classes=4 must be the number of outputs"),
])
def test_options_that_do_not_exist(options, match):
    with pytest.raises(ValueError, match=match):
        ForwardGradient(small(), **options)


class Branched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x))


def test_a_network_whose_widths_are_unknown_needs_an_example():
    with pytest.raises((ValueError, nw.errors.CannotStage), match="example"):
        ForwardGradient(Branched(), guess="local_loss")
    rule = ForwardGradient(Branched(), torch.randn(2, 6), guess="local_loss")
    assert rule(torch.randn(7, 6), Y).isfinite()


@EACH
def test_one_generator_makes_the_same_heads(perturb):
    made = [ForwardGradient(small(), perturb=perturb, guess="local_loss",
                            generator=Generator().manual_seed(2)) for _ in range(2)]
    torch.testing.assert_close(made[0].heads.state_dict(), made[1].heads.state_dict())
