from copy import deepcopy
from itertools import combinations, product

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.data import Batches
from netwright.errors import UnknownName
from netwright.formal.circuits import (
    PolynomialCircuit,
    evaluator,
    modular,
    saturating,
    sum_of_products,
)
from netwright.rules import ReverseDerivativeAscent

XOR = torch.tensor([0, 1, 1, 0])


def every(size, width):
    return torch.tensor(list(product(range(size), repeat=width)))


def accuracy(rule, x, y):
    return (rule.predict(x).argmax(1) == y).float().mean().item()


def test_one_sample_is_the_step_of_the_paper():
    """w + R f(w, x, y + f(w, x)), a sample after the other, in plain Python."""
    f = sum_of_products(3)
    f.weight.random_(2)
    w = f.weight.tolist()
    rule = ReverseDerivativeAscent(f)
    sets = [s for size in range(4) for s in combinations(range(3), size)]
    x = torch.randint(2, (30, 3))
    y = torch.randint(2, (30,))
    for n, (point, wanted) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        terms = [all(point[k] for k in s) for s in sets]
        output = sum(a * b for a, b in zip(w, terms, strict=True)) % 2
        w = [a ^ (b & (output ^ wanted)) for a, b in zip(w, terms, strict=True)]
        loss = rule(x[n:n + 1], y[n:n + 1])
        assert f.weight.tolist() == w
        assert loss == (output != wanted)


def test_a_batch_takes_the_change_that_most_samples_ask_for():
    f = evaluator(2)
    rule = ReverseDerivativeAscent(f)
    x = torch.tensor([[0, 0]] * 3 + [[0, 1]] * 3 + [[1, 0]] * 2)
    assert rule(x, torch.tensor([1, 1, 0, 1, 0, 0, 1, 0])) == 0.5
    assert f.weight.tolist() == [1, 0, 0, 0]  # two of three; one of three; one of two
    rule(x, torch.tensor([-100, 0, 1, 1, 1, 1, 1, 1]))
    assert f.weight.tolist() == [1, 1, 1, 0]


def test_a_chain_of_circuits_passes_the_change_of_its_input_on():
    first, second = evaluator(3, 2), evaluator(2)
    for part in (first, second):
        part.weight.random_(2)
    whole = nn.Sequential(first, second)
    x, y = torch.randint(2, (1, 3)), torch.tensor([0])
    y = 1 - whole(x)[0]
    dy = torch.ones(1, 1, dtype=torch.int64)
    dv, between = second.reverse_derivative(first(x), dy)
    dw, _ = first.reverse_derivative(x, between)
    expected = [(first.weight + dw[0]) % 2, (second.weight + dv[0]) % 2]
    ReverseDerivativeAscent(whole)(x, y)
    assert torch.equal(first.weight, expected[0].to(torch.uint8))
    assert torch.equal(second.weight, expected[1].to(torch.uint8))


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_a_table_learns_any_function_of_four_bits_in_one_pass(batch):
    x = every(2, 4)
    for seed in range(3):
        y = torch.randint(2, (16,), generator=torch.Generator().manual_seed(seed))
        rule = ReverseDerivativeAscent(evaluator(4))
        history = nw.fit(rule, Batches(x, y, batch, seed=seed), epochs=2, progress=False,
                         validation=Batches(x, y, 16))
        assert history[0].metric == 1
        assert history[1].loss == 0
        wrong = ReverseDerivativeAscent(evaluator(4))
        nw.fit(wrong, Batches(x, y[torch.randperm(16)], batch), epochs=2, progress=False)
        assert accuracy(wrong, x, y) < 1


@pytest.mark.parametrize("seed", range(2))
def test_a_chain_learns_what_its_first_circuit_must_tell_the_last(seed):
    """Exclusive or of a sum and a product, through 3 bits of 6; the control keeps the first."""
    x = every(2, 6)
    y = x[:, :3].sum(1) % 2 ^ x[:, 3:].prod(1)
    torch.manual_seed(seed)
    first, last = evaluator(6, 3), evaluator(3)
    for part in (first, last):
        part.weight.random_(2)
    untaught = first(x)
    chain, control = nn.Sequential(first, last), deepcopy(last)
    reached = []
    for circuit, a in ((chain, x), (control, untaught)):
        rule = ReverseDerivativeAscent(circuit)
        for _ in range(16):
            for batch in torch.randperm(64).split(4):
                rule(a[batch], y[batch])
        reached.append(accuracy(rule, a, y))
    assert reached[0] > 0.9
    assert reached[1] < 0.8


@pytest.mark.parametrize("semiring", [modular(3), modular(7), saturating(4)],
                         ids=lambda semiring: semiring.name)
def test_tables_over_other_semirings_learn_too(semiring):
    x = every(semiring.size, 2)
    y = (x[:, 0] * x[:, 1]) % semiring.size
    rule = ReverseDerivativeAscent(evaluator(2, semiring=semiring))
    rule(x, y)
    assert accuracy(rule, x, y) == 1
    assert rule(x, y) == 0


def test_exclusive_or_is_learnt_from_its_sum():
    x = every(2, 2)
    for seed in range(5):
        rule = ReverseDerivativeAscent(sum_of_products(2, degree=1))
        nw.fit(rule, Batches(x, XOR, 1, seed=seed), epochs=40, progress=False)
        assert accuracy(rule, x, XOR) == 1


def test_classes_are_coded_by_a_bit_each_or_by_their_digits():
    x, y = every(2, 2), torch.tensor([0, 1, 2, 1])
    for outputs, codes, classes in ((3, "one-hot", None), (2, "binary", 3), (2, "binary", None)):
        rule = ReverseDerivativeAscent(evaluator(2, outputs), codes=codes, num_classes=classes)
        assert rule(x, y) == (0.75 if codes == "binary" else 1)
        assert rule.predict(x).shape == (4, classes or 2 ** outputs if outputs == 2 else 3)
        assert accuracy(rule, x, y) == 1
    ternary = ReverseDerivativeAscent(evaluator(2, 2, semiring=modular(3)), codes="binary")
    assert ternary.codes.tolist()[5] == [1, 2]


def test_patience_checkpoints_and_state(tmp_path):
    x, y = every(2, 3), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    rule = ReverseDerivativeAscent(evaluator(3))
    nw.fit(rule, Batches(x, y, 2), epochs=5, progress=False, validation=Batches(x, y, 8),
           patience=1, checkpoint=tmp_path)
    fresh = ReverseDerivativeAscent(evaluator(3))
    assert accuracy(fresh, x, y) == 0.5
    fresh.load_state_dict(rule.state_dict())
    assert torch.equal(fresh.predict(x), rule.predict(x))
    copied = deepcopy(fresh)
    copied(x, 1 - y)
    assert accuracy(fresh, x, y) == 1
    assert accuracy(copied, x, y) == 0


def test_what_is_given_is_left_alone():
    x, y = every(2, 3), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    rule = ReverseDerivativeAscent(evaluator(3), example=x)
    before = x.clone(), y.clone()
    with torch.inference_mode():
        rule(x + 0, y + 0)
    rule.train()
    weights = rule.network.weight.clone()
    scores = rule.predict(x)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert torch.equal(rule.network.weight, weights)
    assert rule.training
    assert rule.network.weight.grad is None
    assert torch.equal(scores, rule.predict(x.bool()))


def test_its_cost_can_be_measured():
    found = nw.measure.cost(ReverseDerivativeAscent(evaluator(4)), (every(2, 4), torch.ones(
        16, dtype=torch.int64)), repeats=1, warmup=0)
    assert found.saved_bytes == 0
    assert found.parameters == 16


def test_errors():
    with pytest.raises(ValueError, match=r"must be a PolynomialCircuit .* got Linear; build one"):
        ReverseDerivativeAscent(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"of them, got ReLU; build one"):
        ReverseDerivativeAscent(nn.Sequential(evaluator(3), nn.ReLU()))
    with pytest.raises(ValueError, match=r"got an empty nn\.Sequential"):
        ReverseDerivativeAscent(nn.Sequential())
    with pytest.raises(ValueError, match="3 inputs over Z_2 cannot follow one of 2 outputs over"):
        ReverseDerivativeAscent(nn.Sequential(evaluator(2, 2), evaluator(3)))
    with pytest.raises(ValueError, match="over Z_3 cannot follow one of 2 outputs over Z_2"):
        ReverseDerivativeAscent(nn.Sequential(evaluator(2, 2),
                                              evaluator(2, semiring=modular(3))))
    with pytest.raises(UnknownName, match="did you mean one-hot"):
        ReverseDerivativeAscent(evaluator(2), codes="onehot")
    with pytest.raises(ValueError, match="num_classes=4 must be 3 for a one-hot code of 3 outputs"):
        ReverseDerivativeAscent(evaluator(2, 3), num_classes=4)
    with pytest.raises(ValueError, match="num_classes=5 must be 2 to 4 for a binary code"):
        ReverseDerivativeAscent(evaluator(2, 2), codes="binary", num_classes=5)
    rule = ReverseDerivativeAscent(evaluator(2))
    x = every(2, 2)
    for bad, match in ((torch.tensor([0, 1, 2, 0]), "y must be between 0 and 1"),
                       (torch.tensor([0, 1, 1]), "one class for each of the 4 samples"),
                       (torch.zeros(4), "dtype int64, got torch.float32")):
        with pytest.raises(ValueError, match=match):
            rule(x, bad)
    with pytest.raises(ValueError, match=r"whole numbers 0 to 1, got torch\.float32"):
        rule(x.float(), XOR)
    assert not rule.network.weight.any()
    with pytest.raises(ValueError, match="changes the weights itself; leave out optimizer"):
        nw.fit(rule, [(x, XOR)], epochs=1, optimizer=torch.optim.Adam)
    with pytest.raises(ValueError, match="whole numbers 0 to 1"):
        ReverseDerivativeAscent(evaluator(2), torch.randn(3, 2))
    empty = PolynomialCircuit(lambda w, x: [x[0]], parameters=0, inputs=2)
    assert ReverseDerivativeAscent(empty)(x, XOR) == 0.5
