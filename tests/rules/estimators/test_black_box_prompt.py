import sys
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

import netwright as nw
from netwright.errors import MissingExtra
from netwright.measure import cost
from netwright.rules import Backprop, BlackBoxPrompt
from netwright.rules.estimators._evolution import Evolution
from netwright.rules.estimators.black_box_prompt import with_places
from netwright.stages import call

cma = pytest.importorskip("cma")
TEXT = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 32}
SMALL: dict[str, Any] = {"tokens": 3, "dimension": 5, "population": 6}


def seeded(seed: int = 1) -> Generator:
    return Generator().manual_seed(seed)


def bowl(candidates: Tensor) -> Tensor:
    weights = torch.arange(1, candidates.shape[1] + 1) ** 2
    return ((candidates - 1).square() * weights).sum(1)


@pytest.mark.parametrize(("dimension", "population"), [(2, 4), (10, 8), (25, 20)])
def test_a_search_that_is_taken_up_each_time_is_one_that_never_stopped(dimension, population):
    ours = Evolution(dimension, step=0.5, population=population, generator=seeded())
    generator = seeded()
    theirs = cma.CMAEvolutionStrategy(dimension * [0.0], 0.5, {
        "popsize": population, "seed": numpy.nan, "CMA_mirrors": 0, "verbose": -9,
        "randn": lambda *shape: torch.randn(*shape, generator=generator,
                                            dtype=torch.float64).numpy()})
    state = numpy.random.get_state()[1].copy()
    for _ in range(40):
        candidates = ours.ask()
        ours.tell(bowl(candidates))
        expected = theirs.ask()
        assert numpy.array_equal(candidates.numpy(), numpy.stack(expected))
        theirs.tell(expected, bowl(torch.from_numpy(numpy.stack(expected))).tolist())
    assert numpy.array_equal(ours.mean.numpy(), theirs.mean)
    assert numpy.array_equal(state, numpy.random.get_state()[1])


def test_a_search_goes_on_from_its_state_dict_and_finds_the_least():
    first, second = (Evolution(6, step=0.5, population=10, generator=seeded()) for _ in range(2))
    for _ in range(30):
        first.tell(bowl(first.ask()))
    second.load_state_dict(first.state_dict())
    second.generator.set_state(first.generator.get_state())
    for search in (first, second.to(torch.bfloat16)):  # which leaves the state alone
        for _ in range(60):
            search.tell(bowl(search.ask()))
    assert torch.equal(first.mean, second.mean)
    assert (first.mean - 1).abs().max() < 0.01


def test_losses_that_are_no_numbers_are_the_worst():
    def told(bad: float) -> Tensor:
        search = Evolution(4, step=0.5, population=8, generator=seeded())
        losses = bowl(search.ask())
        losses[2] = bad
        search.tell(losses)
        return search.mean

    assert torch.equal(told(float("nan")), told(1e30))
    assert torch.equal(told(float("inf")), told(1e30))


def model(name: str) -> tuple[nn.Module, Any, Tensor]:
    tokens, y = torch.randint(3, 30, (4, 7)), torch.tensor([0, 1, 2, 1])
    if name == "gpt":
        return nw.models.gpt(30, context=32, width=16), tokens, tokens
    transformers = pytest.importorskip("transformers")
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[0, 5:] = 0
    x = {"input_ids": tokens, "attention_mask": mask}
    if name == "bert":
        return transformers.BertForSequenceClassification(
            transformers.BertConfig(**TEXT, num_labels=3)), x, y
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(
            **TEXT, num_key_value_heads=1, use_cache=False)), x, tokens
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=32, use_cache=False,
        bos_token_id=1, eos_token_id=2)), x, tokens


TRANSFORMERS = pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "gpt"])


@TRANSFORMERS
def test_the_model_stays_bit_for_bit_and_is_never_differentiated(name):
    network, x, y = model(name)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    rule = BlackBoxPrompt(network, x, generator=seeded(), **SMALL)
    assert len(rule.prompts) == 2
    assert all(prompt.weight.shape == (3, 16) for prompt in rule.prompts)
    for _ in range(2):
        assert rule(x, y).isfinite()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert [module.training for module in network.modules()] == modes
    assert all(p.grad is None for p in rule.parameters())
    assert not any(module._forward_pre_hooks for module in network.modules())
    assert all(prompt.weight.any() for prompt in rule.prompts)
    assert rule.predict(x).shape == Backprop(network).predict(x).shape
    assert not torch.equal(rule.predict(x), Backprop(network).predict(x))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt"])
def test_a_token_before_the_prompt_does_not_see_it_and_those_behind_do(name):
    network, x, y = model(name)
    rule = BlackBoxPrompt(network, x, after=2, **SMALL)
    plain = rule.predict(x)
    rule(x, y)
    moved = (rule.predict(x) - plain).abs().sum(2).gt(1e-6).any(0)
    assert moved.tolist() == [False, False, True, True, True, True, True]


def test_places_are_put_in_and_padding_stays_masked():
    network, x, _ = model("bert")
    grown = with_places(x, 1, 3)
    assert grown["input_ids"][:, 1:4].sum() == 0
    assert torch.equal(grown["input_ids"][:, 4:], x["input_ids"][:, 1:])
    assert grown["attention_mask"][0].tolist() == [1] * 8 + [0] * 2
    rule = BlackBoxPrompt(network, x, **SMALL)
    other = {**x, "input_ids": x["input_ids"].clone()}
    other["input_ids"][0, 5:] = 4  # behind the mask
    torch.testing.assert_close(rule.predict(x), rule.predict(other))


@TRANSFORMERS
def test_prompts_are_added_to_what_the_layers_take(name):
    """A prompt at a place of the first layer is the embedding of that place moved by it."""
    network, x, _ = model(name)
    rule = BlackBoxPrompt(network, x, layers="first", **SMALL)
    (prompt,) = rule.prompts
    with torch.no_grad():
        prompt.weight.copy_(torch.randn(3, 16))
    taken = []
    handle = network.get_submodule(prompt.stage).register_forward_pre_hook(
        lambda _, args: taken.append(args[0]))
    call(network.eval(), with_places(x, 1, 3))
    handle.remove()
    with rule._hooked({prompt.stage: prompt.added}):
        handle = network.get_submodule(prompt.stage).register_forward_pre_hook(
            lambda _, args: taken.append(args[0]))
        call(network, with_places(x, 1, 3))
    handle.remove()
    plain, prompted = taken
    torch.testing.assert_close((prompted - plain)[:, 1:4], prompt.weight.expand(4, 3, 16))
    assert torch.equal(prompted[:, [0, *range(4, 10)]], plain[:, [0, *range(4, 10)]])


def test_a_call_is_a_generation_of_each_layer_in_turn():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(9, 6), torch.arange(9) % 3
    rule = BlackBoxPrompt(network, x, dimension=4, population=6, generator=seeded())
    twin = BlackBoxPrompt(network, x, dimension=4, population=6, generator=seeded())
    loss, means = rule(x, y), []
    with torch.no_grad():
        for i, prompt in enumerate(twin.prompts):
            losses = []
            for z in prompt.search.ask():
                prompts = [p.weight for p in twin.prompts]
                prompts[i] = prompt.projection.T @ z.float()
                h = torch.tanh(network[0](x + prompts[0]))
                losses.append(cross_entropy(network[2](h + prompts[1]), y))
            prompt.search.tell(torch.stack(losses))
            prompt.weight.copy_(prompt.projection.T @ prompt.search.mean.float())
            means.append(torch.stack(losses).mean())
    torch.testing.assert_close(loss, torch.stack(means).mean())
    for ours, theirs in zip(rule.prompts, twin.prompts, strict=True):
        torch.testing.assert_close(ours.weight, theirs.weight)


def test_prompts_as_long_as_the_signal_at_the_start():
    network, x, _ = model("gpt2")
    rule = BlackBoxPrompt(network, x, tokens=8, dimension=100)
    taken: dict[str, Tensor] = rule._signals([p.stage for p in rule.prompts], x)
    for prompt in rule.prompts:
        drawn = torch.stack([prompt.of(torch.randn(100)) for _ in range(200)])
        torch.testing.assert_close(drawn.std(), taken[prompt.stage].std(), rtol=0.1, atol=0)


def test_images_and_graphs_have_prompts_of_the_shape_of_their_signal():
    network = nw.models.cnn(1, (8, 8), 3, widths=(4, 5), norm=True)
    x, y = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
    rule = BlackBoxPrompt(network, x, dimension=5, population=6)
    assert [tuple(p.weight.shape) for p in rule.prompts] == [(1, 8, 8), (4, 4, 4), (20,)]
    rule(x, y)
    assert int(network[1].num_batches_tracked) == 0
    graphs = pytest.importorskip("torch_geometric.nn")
    inputs = (torch.randn(9, 5), torch.randint(0, 9, (2, 20)))
    labels = torch.tensor([0, 1, 2, 0, -100, -100, -100, -100, -100])
    rule = BlackBoxPrompt(graphs.GCN(5, 8, 2, 3), inputs, dimension=5, population=6)
    assert rule(inputs, labels).isfinite()
    assert rule.predict(inputs).shape == (9, 3)


def tuned(layers: str) -> tuple[float, float]:
    """Return the loss before and after the search on labels that another bias would give."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(),
                            nn.Linear(16, 3))
    x = torch.randn(200, 6)
    with torch.no_grad():
        h = torch.tanh(network[0](x))
        h = torch.tanh(network[2](h + 0.5 * torch.randn(16)))
        y = network[4](h + 0.5 * torch.randn(16)).argmax(1)
    rule = BlackBoxPrompt(network, x, layers=layers, dimension=8, population=10, step=1.0,
                          generator=seeded())
    before = float(cross_entropy(rule.predict(x), y))
    for _ in range(12 if layers == "all" else 36):
        rule(x, y)
    return before, float(cross_entropy(rule.predict(x), y))


def test_prompts_at_all_layers_find_what_one_at_the_input_cannot():
    before, after = tuned("all")
    assert after < before - 0.2
    assert after < tuned("first")[1] - 0.05  # with as many runs of the network


def test_fit_trains_it_and_nothing_is_stored():
    network, x, y = model("bert")
    network.requires_grad_(False)
    rule = BlackBoxPrompt(network, x, **SMALL)
    history = nw.fit(rule, [(x, y)], epochs=2, progress=False)
    assert len(history) == 2
    assert cost(rule, (x, y), repeats=1).saved_bytes == 0


def bad(change: Callable[[], Any], match: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=match):
        change()


def test_errors_say_what_to_give():
    network, x, _ = model("gpt")
    bad(lambda: BlackBoxPrompt(network), "example is needed")
    bad(lambda: BlackBoxPrompt(network, x, tokens=0), "tokens must be at least 1, got 0")
    bad(lambda: BlackBoxPrompt(network, x, dimension=1), "dimension must be at least 2, got 1")
    bad(lambda: BlackBoxPrompt(network, x, population=3), "population must be at least 4, got 3")
    bad(lambda: BlackBoxPrompt(network, x, after=-1), "after must be at least 0, got -1")
    bad(lambda: BlackBoxPrompt(network, x, step=0.0), "step must be above 0, got 0.0")
    bad(lambda: BlackBoxPrompt(network, x, layers="last"),
        "no choice of layers is called 'last'; known are all, first")
    bad(lambda: BlackBoxPrompt(nn.Sequential(nn.Embedding(30, 4), nn.Flatten(0, 1)), x),
        "network must have a stage that takes floats")
    rule = BlackBoxPrompt(network, x, **SMALL)
    bad(lambda: rule.predict(torch.randn(4, 7)), "x must be token numbers")
    bad(lambda: BlackBoxPrompt(network, x, after=9, **SMALL), "at least after=9 tokens a row")
    bad(lambda: with_places({"input_ids": x, "position_ids": x}, 1, 3), "position_ids")
    plain = BlackBoxPrompt(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 3)),
                           torch.randn(2, 1, 8, 8), dimension=4, population=4)
    bad(lambda: plain.predict(torch.randn(2, 1, 9, 9)), "x must give stage 0 a signal of shape")


def test_without_cma_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    bad(lambda: BlackBoxPrompt(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)),
        r"netwright\[blackbox\]", MissingExtra)
