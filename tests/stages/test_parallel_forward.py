import pytest
import torch
from torch import nn

import netwright as nw
from netwright.errors import UnknownName
from netwright.models import gpt, mlp

DEPTH = 20
WAYS = [{}, {"residual": True}, {"method": "gauss_seidel", "blocks": 3},
        {"method": "gauss_seidel", "blocks": 3, "residual": True},
        {"method": "hybrid", "blocks": 3}, {"method": "hybrid", "blocks": 7, "residual": True},
        {"method": "hybrid", "blocks": 100}, {"stacked": False}]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, h):
        return h + self.linear(self.norm(h)).tanh() / 4


def chain(depth=DEPTH):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), *[Block(8) for _ in range(depth)],
                         nn.Linear(8, 3)).double()


def plain(depth=DEPTH):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), *[layer for _ in range(depth) for layer in (
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh())], nn.Linear(8, 3)).double()


X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("make", [chain, plain])
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_as_many_steps_as_stages_give_the_networks_output(make, options):
    network = make().eval()
    y, steps = nw.parallel_forward(network, X, **options)
    torch.testing.assert_close(y, network(X).detach(), rtol=1e-10, atol=1e-12)
    assert steps <= len(nw.stages(network))
    assert not y.requires_grad


def test_after_k_steps_the_first_k_stages_are_exact_and_the_last_is_not():
    network = chain(6)
    h = network[0](X)
    for k in range(1, 6):
        y, steps = nw.parallel_forward(network, X, max_iterations=k, residual=True)
        assert steps == 1 + 1 + k + 1  # the first layer, the first block, and the last layer
        h = network[:2 + k](X)
        short = nn.Sequential(*network[:2 + k], network[-1])
        ours, _ = nw.parallel_forward(short, X, max_iterations=k)
        torch.testing.assert_close(ours, network[-1](h).detach(), rtol=1e-10, atol=1e-12)
        if k < 5:
            assert (y - network(X)).abs().max() > 1e-9


@pytest.mark.parametrize("options", WAYS[:6], ids=str)
def test_every_way_settles_within_the_tolerance(options):
    network = chain(40).eval()
    y, _ = nw.parallel_forward(network, X, tolerance=1e-7, **options)
    torch.testing.assert_close(y, network(X).detach(), rtol=1e-4, atol=1e-5)


def test_far_fewer_steps_than_stages_are_enough():
    """The control: the form that suits the one network takes all steps on the other."""
    residual, forgetful = chain(40).eval(), nn.Sequential(nn.Linear(5, 8).double(), *[
        layer for _ in range(40) for layer in (nn.Linear(8, 8).double(), nn.Tanh())])
    steps = {(name, form): nw.parallel_forward(network, X, tolerance=1e-6, residual=form)[1]
             for name, network in (("residual", residual), ("forgetful", forgetful))
             for form in (True, False)}
    assert steps["residual", True] < 25
    assert steps["residual", False] > 40
    assert steps["forgetful", False] < 35
    assert steps["forgetful", False] < steps["forgetful", True]


def test_gauss_seidel_and_hybrid_do_what_they_say():
    network = chain(13)  # of the 13 blocks the first runs alone, and 12 are solved for
    forward = nw.parallel_forward
    assert forward(network, X, method="gauss_seidel", blocks=12)[1] == 15  # each in turn
    assert forward(network, X, method="hybrid", blocks=1)[1] == 15  # one block, in turn
    assert forward(network, X, method="hybrid", blocks=4, max_iterations=2)[1] == 3 + 2 * 3
    assert forward(network, X, method="gauss_seidel", blocks=4, max_iterations=2)[1] == 3 + 4 * 2


@pytest.mark.parametrize("kind", ["RNNCell", "GRUCell", "LSTMCell"])
@pytest.mark.parametrize("options", WAYS[:-1], ids=str)
def test_states_are_those_of_the_cell_run_in_turn(kind, options):
    torch.manual_seed(0)
    cell, x = getattr(nn, kind)(4, 5).double(), torch.randn(15, 3, 4).double()
    zeros = torch.zeros(3, 5).double()
    state = start = (zeros, zeros) if kind == "LSTMCell" else zeros
    expected = []
    for step in x:
        state = cell(step, state)
        expected.append(state)
    states, steps = nw.parallel_recurrence(cell, x, start, **options)
    assert steps <= 15
    if kind == "LSTMCell":
        states, expected = torch.cat(states, -1), [torch.cat(pair, -1) for pair in expected]
    torch.testing.assert_close(states, torch.stack(expected).detach(), rtol=1e-10, atol=1e-12)


def test_any_function_of_input_and_state_is_a_cell():
    x = torch.ones(10, 1, 1)
    states, steps = nw.parallel_recurrence(lambda x, h: x + h / 2, x, torch.zeros(1, 1))
    torch.testing.assert_close(states.flatten(), 2 - 0.5 ** torch.arange(10.0))
    assert steps == 10


def test_a_sequence_is_sampled_as_part_after_part():
    """Each of 12 letters is drawn given those before, by random numbers that are given."""
    torch.manual_seed(0)
    model, noise = gpt(9, 12, width=16).eval(), -(-torch.rand(2, 12, 9).log()).log()

    def drawn(letters):
        seen = torch.cat([torch.zeros(2, 1, dtype=torch.long), letters[:, :-1]], 1)
        return (model(seen) + noise).argmax(-1)

    in_turn = torch.zeros(2, 12, dtype=torch.long)
    for i in range(12):
        in_turn[:, i] = drawn(in_turn)[:, i]
    letters, iterations = nw.fixed_point(drawn, torch.zeros(2, 12, dtype=torch.long),
                                         max_iterations=12)
    assert torch.equal(letters, in_turn)
    assert iterations <= 12


def test_a_hugging_face_model_with_padding():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=16,
                                      num_hidden_layers=6, num_attention_heads=2, num_labels=3,
                                      pad_token_id=0)
    model = transformers.LlamaForSequenceClassification(config).eval()
    ids, mask = torch.randint(1, 20, (4, 7)), torch.ones(4, 7, dtype=torch.long)
    ids[:2, 5:], mask[:2, 5:] = 0, 0
    x = {"input_ids": ids, "attention_mask": mask}
    y, steps = nw.parallel_forward(model, x, residual=True)
    torch.testing.assert_close(y, model(**x).logits.detach(), rtol=1e-4, atol=1e-5)
    assert steps <= len(nw.stages(model))


def test_stages_that_differ_run_in_turn_and_modes_are_kept():
    network = nn.Sequential(nn.Linear(5, 8), nn.Dropout(), nn.Linear(8, 8), nn.ReLU(),
                            nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    y, steps = nw.parallel_forward(network, X)
    assert steps == 4
    assert network[1].training
    assert torch.equal(y, network.eval()(X))
    weights = [p.clone() for p in network.parameters()]
    nw.parallel_forward(chain(), X)
    assert all(map(torch.equal, weights, network.parameters()))


def test_errors():
    network, x = mlp(5, 3), X.float()
    with pytest.raises(UnknownName, match="did you mean jacobi"):
        nw.parallel_forward(network, x, method="jacoby")
    with pytest.raises(ValueError, match="blocks must be at least 1, got 0"):
        nw.parallel_forward(network, x, blocks=0)
    with pytest.raises(ValueError, match="tolerance must be at least 0, got -1"):
        nw.parallel_recurrence(nn.RNNCell(5, 5), x, x, tolerance=-1)
    with pytest.raises(ValueError, match="max_iterations must be at least 1, got 0"):
        nw.fixed_point(lambda x: x, x, max_iterations=0)
