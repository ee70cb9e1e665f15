from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from netwright.data import digits
from netwright.measure import cost
from netwright.rules import Backprop, ForwardGradient
from netwright.runtime.modes import evaluating


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def cnn() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3),
                         nn.Flatten(), nn.Linear(64, 3))


def seeded() -> Generator:
    return Generator().manual_seed(3)


def classes(*shape: int) -> Tensor:
    return torch.randint(3, shape)


def gradients(network: nn.Module) -> list[Tensor]:
    taken = [torch.zeros_like(p) if p.grad is None else p.grad
             for p in network.parameters() if p.requires_grad]
    network.zero_grad(set_to_none=True)
    return taken


def exact(network: nn.Module, x: Any, y: Tensor) -> list[Tensor]:
    network.zero_grad(set_to_none=True)
    Backprop(network)(x, y)
    return gradients(network)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def check_projection(network: nn.Module, x: Any, y: Tensor, *, directions: int = 2,
                     chunk: int = 16, **options: Any) -> ForwardGradient:
    """Hold the estimate to mean_k (g . v_k) v_k, g from autograd, v_k drawn again."""
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    rule = ForwardGradient(network, directions=directions, chunk=chunk, generator=seeded(),
                           **options)
    torch.manual_seed(5)
    loss = rule(x, y)
    estimate, drawn = gradients(network), torch.get_rng_state()
    after = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            buffer.copy_(before[name])
    torch.manual_seed(5)
    torch.testing.assert_close(loss, Backprop(network)(x, y))
    gradient, generator = gradients(network), seeded()
    # The step leaves the random state and the buffers as a plain forward pass does.
    assert torch.equal(drawn, torch.get_rng_state())
    for name, buffer in network.named_buffers():
        torch.testing.assert_close(after[name], buffer)

    wanted = [torch.zeros_like(g) for g in gradient]
    for start in range(0, directions, chunk):
        n = min(chunk, directions - start)
        v = [torch.randn(n, *g.shape, generator=generator, dtype=g.dtype) for g in gradient]
        slopes = sum((g * w).flatten(1).sum(1) for g, w in zip(gradient, v, strict=True))
        for total, w in zip(wanted, v, strict=True):
            total += torch.tensordot(slopes, w, 1) / directions
    scale = max(w.abs().max() for w in wanted)
    for got, want in zip(estimate, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5 * float(scale), rtol=1e-4)
    return rule


@pytest.mark.parametrize(("directions", "chunk"), [(1, 16), (5, 2)])
def test_each_estimate_is_the_gradient_projected_on_its_direction(directions, chunk):
    check_projection(mlp(), torch.randn(7, 6), classes(7), directions=directions, chunk=chunk)


@pytest.mark.parametrize("directions", [1, 3])
def test_batch_norm_and_dropout_run_once(directions):
    rule = check_projection(cnn(), torch.randn(7, 1, 8, 8), classes(7), directions=directions)
    assert rule._vectorised


def test_frozen_and_shared_parameters():
    network = mlp()
    network[0].requires_grad_(False)
    network.add_module("5", nn.Linear(3, 8))
    network.add_module("6", nn.Tanh())
    network.add_module("7", network[4])
    check_projection(network, torch.randn(7, 6), classes(7))
    assert network[0].weight.grad is None
    assert all(isinstance(p, nn.Parameter) for p in (network[4].weight, network[0].weight))


def test_float64_and_a_loss_of_the_users_own():
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean()

    network, x, y = mlp().double(), torch.randn(7, 6).double(), torch.randn(7, 3).double()
    ForwardGradient(network, directions=3, loss=loss, generator=seeded())(x, y)
    estimate = flat(gradients(network))
    Backprop(network, loss=loss)(x, y)
    gradient, generator = gradients(network), seeded()
    v = torch.cat([torch.randn(3, *g.shape, generator=generator, dtype=torch.float64).flatten(1)
                   for g in gradient], 1)
    torch.testing.assert_close(estimate, v.T @ (v @ flat(gradient)) / 3, rtol=1e-12, atol=1e-12)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = torch.zeros(())  # not a buffer

    def forward(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h.tanh()


def test_a_network_that_vmap_cannot_take_is_run_direction_by_direction():
    network = nn.Sequential(nn.Linear(6, 8), Counts(), nn.Dropout(0.5), nn.Linear(8, 3))
    rule = check_projection(network, torch.randn(7, 6), classes(7), directions=4)
    assert not rule._vectorised


def hugging_face(name: str) -> tuple[nn.Module, Any, Tensor]:
    transformers = pytest.importorskip("transformers")
    tokens = torch.randint(3, 30, (3, 7))
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 5:] = 0
    text = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 16}
    causal = {**text, "num_key_value_heads": 1, "use_cache": False}
    if name == "vit":
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            image_size=8, patch_size=4, num_channels=1, num_labels=3, hidden_dropout_prob=0.1)
        model = transformers.ViTForImageClassification(config)
        return model, torch.randn(4, 1, 8, 8), classes(4)
    x = {"input_ids": tokens, "attention_mask": mask}
    if name == "bert":
        config = transformers.BertConfig(**text, num_labels=3)
        return transformers.BertForSequenceClassification(config), x, classes(3)
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**causal)), x, tokens
    if name == "mixtral":
        config = transformers.MixtralConfig(**causal, num_local_experts=4)
        return transformers.MixtralForCausalLM(config), x, tokens
    config = transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2,
                                     n_positions=16, use_cache=False, bos_token_id=1,
                                     eos_token_id=2)
    return transformers.GPT2LMHeadModel(config), x, tokens


@pytest.mark.parametrize("name", ["vit", "bert", "llama", "gpt2", "mixtral"])
def test_transformers(name):
    network, x, y = hugging_face(name)
    check_projection(network.train(), x, y)


def test_graph_networks():
    geometric = pytest.importorskip("torch_geometric.nn")
    network = geometric.GCN(5, 8, 2, 3, dropout=0.2)
    y = classes(9)
    y[4:] = -100
    check_projection(network, (torch.randn(9, 5), torch.randint(0, 9, (2, 20))), y)


@pytest.mark.parametrize("perturb", ["weights", "activities"])
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_the_mean_converges_to_the_gradient_as_one_over_root_n(perturb, distribution):
    network, x, y = mlp().double(), torch.randn(4, 6).double(), classes(4)
    gradient, errors = flat(exact(network, x, y)), []
    counts = torch.tensor([64, 256, 1024, 4096, 16384])
    for n in counts.tolist():
        rule = ForwardGradient(network, perturb=perturb, directions=n, chunk=4096,
                               distribution=distribution)
        squares = []
        for _ in range(6):
            rule(x, y)
            squares.append((flat(gradients(network)) - gradient).square().sum())
        errors.append(torch.stack(squares).mean().sqrt())
    logs = counts.double().log()
    found = torch.stack(errors).log()
    line = torch.stack([logs, torch.ones(5)], 1)
    fit = torch.linalg.lstsq(line, found.unsqueeze(1)).solution
    assert -0.55 < fit[0] < -0.45
    assert (line @ fit).squeeze(1).sub(found).abs().max() < 0.2  # a line over its whole length


def test_activities_are_less_noisy_than_weights():
    network, x, y = mlp(), torch.randn(16, 6), classes(16)
    gradient, noise = flat(exact(network, x, y)), {}
    for perturb in ("weights", "activities"):
        rule = ForwardGradient(network, perturb=perturb)
        squares = []
        for _ in range(100):
            rule(x, y)
            squares.append((flat(gradients(network)) - gradient).square().sum())
        noise[perturb] = torch.stack(squares).mean()
    assert noise["activities"] < noise["weights"] / 3


def test_the_last_stage_gets_its_exact_gradient_when_activities_are_perturbed():
    network, x, y = mlp(), torch.randn(7, 6), classes(7)
    ForwardGradient(network, perturb="activities")(x, y)
    estimate, gradient = gradients(network), exact(network, x, y)
    torch.testing.assert_close(estimate[-2:], gradient[-2:])
    assert not torch.allclose(estimate[0], gradient[0])


@pytest.mark.parametrize("kind", ["batch norm", "graph"])
def test_samples_that_mix_keep_the_estimate_unbiased(kind):
    if kind == "batch norm":
        network: nn.Module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.BatchNorm1d(8),
                                           nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(),
                                           nn.Linear(8, 3))
        x: Any = torch.randn(6, 6)
    else:
        geometric = pytest.importorskip("torch_geometric.nn")
        network = geometric.GCN(6, 8, 3, 3)
        x = (torch.randn(6, 6), torch.tensor([[0, 1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 0, 3]]))
    y = classes(6)
    gradient = flat(exact(network, x, y))

    def error(rule: ForwardGradient) -> float:
        network.zero_grad()
        rule(x, y)
        return float((flat(gradients(network)) - gradient).norm() / gradient.norm())

    rule = ForwardGradient(network, x, perturb="activities", directions=20000, chunk=5000)
    right = error(rule)
    assert rule._mixing.known
    rule._mixing.found = lambda *_, **__: False
    assert right < 0.15 < 0.2 < error(rule)  # a slope for each sample alone would be biased


def test_separate_samples_are_found_to_be_separate():
    network = cnn().eval()
    rule = ForwardGradient(network, perturb="activities", directions=2)
    state = torch.get_rng_state()
    rule(torch.randn(6, 1, 8, 8, generator=seeded()), torch.tensor([0, 1, 2, 0, 1, 2]))
    assert rule._mixing.known is False
    torch.manual_seed(0)
    torch.set_rng_state(state)
    assert not ForwardGradient(nn.Sequential(nn.Linear(2, 2)), perturb="activities")._mixing.known


def test_activities_leave_batch_norm_and_the_random_state_as_one_pass_does():
    network, x, y = cnn(), torch.randn(7, 1, 8, 8), classes(7)
    other = cnn()
    other.load_state_dict(network.state_dict())
    torch.manual_seed(1)
    loss = ForwardGradient(network, perturb="activities", directions=3, generator=seeded())(x, y)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(loss, Backprop(other)(x, y))
    assert torch.equal(state, torch.get_rng_state())
    for ours, theirs in zip(network.buffers(), other.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_activities_skip_frozen_stages():
    network, x, y = mlp(), torch.randn(7, 6), classes(7)
    network[0].requires_grad_(False)
    ForwardGradient(network, perturb="activities", directions=2)(x, y)
    assert network[0].weight.grad is None
    assert network[2].weight.grad.abs().sum() > 0
    network[2].requires_grad_(False)
    network.zero_grad()
    ForwardGradient(network, perturb="activities")(x, y)
    torch.testing.assert_close(gradients(network), exact(network, x, y))


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_activities_of_transformers_converge(name):
    network, x, y = hugging_face(name)
    with evaluating(network):
        ForwardGradient(network, x, perturb="activities", directions=512, chunk=128)(x, y)
        estimate = flat(gradients(network))
        assert torch.cosine_similarity(estimate, flat(exact(network, x, y)), dim=0) > 0.85


def test_weights_store_nothing_for_backward():
    network, x, y = cnn(), torch.randn(7, 1, 8, 8), classes(7)
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.nbytes)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        ForwardGradient(network, directions=3)(x, y)
        assert saved == []
        Backprop(network)(x, y)
        assert saved != []
    assert cost(ForwardGradient(network), (x, y), repeats=1).saved_bytes == 0


@pytest.mark.parametrize("perturb", ["weights", "activities"])
def test_gradients_accumulate_and_repeat_under_a_generator(perturb):
    network, x, y = mlp(), torch.randn(7, 6), classes(7)
    rule = ForwardGradient(network, perturb=perturb, generator=seeded())
    before = torch.get_rng_state()
    loss = rule(x, y)
    assert loss.shape == ()
    assert not loss.requires_grad
    assert torch.equal(before, torch.get_rng_state())
    first = flat(gradients(network))
    rule.generator.manual_seed(3)
    rule(x, y)
    rule.generator.manual_seed(3)
    rule(x, y)
    torch.testing.assert_close(flat(gradients(network)), 2 * first)


@pytest.mark.parametrize("perturb", ["weights", "activities"])
@pytest.mark.parametrize("directions", [1, 4])
def test_autocast(perturb, directions):
    network, x, y = cnn(), torch.randn(7, 1, 8, 8), classes(7)
    rule = ForwardGradient(network, perturb=perturb, directions=directions)
    with torch.autocast("cpu", torch.bfloat16):
        loss = rule(x, y)
    assert loss.isfinite()
    assert rule._vectorised
    for p in network.parameters():
        assert p.grad.dtype == torch.float32
        assert p.grad.isfinite().all()


def accuracy(perturb: str, *, frozen: bool = False, shuffled: bool = False) -> float:
    data = digits()
    network = nn.Sequential(OrderedDict(
        flat=nn.Flatten(), one=nn.Linear(64, 16), bend=nn.Tanh(), two=nn.Linear(16, 16),
        again=nn.Tanh(), out=nn.Linear(16, 10)))
    network.one.requires_grad_(not frozen)
    network.two.requires_grad_(not frozen)
    rule = ForwardGradient(network, perturb=perturb, directions=8 if perturb == "weights" else 1)
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.01)
    y = data.y_train[torch.randperm(len(data.y_train))] if shuffled else data.y_train
    for _ in range(15 if perturb == "weights" else 8):
        for batch in torch.randperm(len(y)).split(64):
            optimizer.zero_grad()
            rule(data.x_train[batch], y[batch])
            optimizer.step()
    return float((rule.predict(data.x_test).argmax(1) == data.y_test).float().mean())


@pytest.mark.parametrize("perturb", ["weights", "activities"])
def test_digits_are_learned_in_the_hidden_stages_too(perturb):
    trained = accuracy(perturb)
    assert trained > 0.7
    assert trained > accuracy(perturb, frozen=True) + 0.1
    assert accuracy(perturb, shuffled=True) < 0.3


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Opaque(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return NoForwardMode.apply(h)


@pytest.mark.parametrize("directions", [1, 2])
def test_an_operation_without_forward_mode_is_named_as_the_cause(directions):
    network = nn.Sequential(nn.Linear(6, 4), Opaque(), nn.Linear(4, 3))
    with pytest.raises(TypeError, match="forward-mode derivatives"):
        ForwardGradient(network, directions=directions)(torch.randn(2, 6), classes(2))
    assert network[0].weight.grad is None


@pytest.mark.parametrize(("options", "words"), [
    ({"perturb": "outputs"}, "perturb must be"),
    ({"distribution": "uniform"}, "distribution must be"),
    ({"directions": 0}, "directions must be at least 1, got 0"),
    ({"chunk": 0}, "chunk must be at least 1"),
])
def test_options_that_do_not_exist(options, words):
    with pytest.raises(ValueError, match=words):
        ForwardGradient(mlp(), **options)


@pytest.mark.parametrize("perturb", ["weights", "activities"])
def test_bad_batches_change_nothing(perturb):
    network = mlp()
    rule = ForwardGradient(network, perturb=perturb, directions=2)
    with pytest.raises(ValueError, match="between 0 and 2"):
        rule(torch.randn(2, 6), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="int64"):
        rule(torch.randn(2, 6), torch.tensor([0.0, 1.0]))
    assert all(p.grad is None for p in network.parameters())
    with pytest.raises(ValueError, match="no trainable parameters"):
        ForwardGradient(mlp().requires_grad_(False), perturb=perturb)(torch.randn(2, 6),
                                                                     classes(2))


def test_the_state_goes_round():
    network = mlp()
    rule = ForwardGradient(network)
    other = ForwardGradient(mlp())
    other.load_state_dict(rule.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(rule.predict(x), other.predict(x))


def test_what_one_mode_has_shown_of_mixing_says_nothing_of_another():
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8),
                            nn.Tanh(), nn.Linear(8, 3)).eval()
    rule = ForwardGradient(network, perturb="activities")
    x, y = torch.randn(6, 6), torch.tensor([0, 1, 2, 0, 1, 2])
    rule(x, y)
    assert rule._mixing.known is False
    network.train()
    rule(x, y)
    assert rule._mixing.known
