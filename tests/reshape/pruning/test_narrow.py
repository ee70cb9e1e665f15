"""Hidden units left out where the others make up for them best, and those refitted."""

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.errors import NothingToReshape
from netwright.reshape import changes, narrow
from netwright.reshape.pruning._elimination import Reader, eliminated, refitted
from netwright.signals import apply, tensors
from tests.reshape.pruning.families import NETWORKS


def outputs(model, x):
    with torch.no_grad():
        return tensors(apply(model.eval(), x))[0]


def reader(units, each, out=3, rows=200, seed=0):
    """Return a matrix, and inputs of it that depend on one another."""
    generator = torch.Generator().manual_seed(seed)
    n = units * each
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, n, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(out, n, generator=generator, dtype=torch.float64)
    return Reader(weight, x.T @ x / rows, torch.arange(n).view(units, each)), x


def least_error(reader, x, gone):
    """Return the squared error of the best fit without some units."""
    stays = [i for u in range(len(reader.places)) if u not in gone
             for i in reader.places[u].tolist()]
    target = x @ reader.weight.T
    fitted = torch.linalg.lstsq(x[:, stays], target).solution
    return float((x[:, stays] @ fitted - target).square().sum())


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("matrices", [1, 2])
def test_each_step_is_that_of_least_error_after_the_best_fit(each, matrices):
    seen = [reader(7, each, seed=seed) for seed in range(matrices)]
    gone = []
    for unit in eliminated([r for r, _ in seen], 4, 0.0):
        errors = {u: sum(least_error(r, x, [*gone, u]) for r, x in seen)
                  for u in range(7) if u not in gone}
        assert unit == min(errors, key=errors.__getitem__)
        gone.append(unit)


def test_the_fit_is_that_of_least_squares():
    r, x = reader(6, 2)
    fitted = refitted(r, [1, 4], 0.0)
    stays = [0, 1, 4, 5, 6, 7, 10, 11]
    expected = torch.linalg.lstsq(x[:, stays], x @ r.weight.T).solution.T
    assert torch.allclose(fitted[:, stays], expected, atol=1e-8)
    assert not fitted[:, [2, 3, 8, 9]].any()


def test_units_from_a_pool_are_as_good_as_one_at_a_time():
    r, x = reader(300, 1, rows=900)
    together = least_error(r, x, eliminated([r], 150, 0.0))
    magnitude = r.weight.norm(dim=0).argsort()[:150].tolist()
    drawn = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:150].tolist()
    assert together < 0.8 * min(least_error(r, x, magnitude), least_error(r, x, drawn))


def planted():
    """Return a network each of whose hidden units is there twice, at another size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        for p in (model[0].weight, model[0].bias):
            p[16:] = 2 * p[:16]
    return model, torch.randn(400, 6)


def test_one_of_each_pair_that_say_the_same_goes_without_a_trace():
    model, x = planted()
    smaller = narrow(model, x, 0.5)
    assert smaller[0].out_features == 16
    error = (outputs(smaller, x) - outputs(model, x)).norm() / outputs(model, x).norm()
    assert error < 2e-3
    (change,) = changes(smaller)
    gone = change.decision["removed"]["0: hidden"]["ids"]
    assert sorted(i % 16 for i in gone) == list(range(16))


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "lstm"])
def test_it_beats_the_same_number_of_units_by_size_and_by_chance(name, tmp_path):
    make, x = NETWORKS[name][0], NETWORKS[name][1]()
    model = make()
    smaller = narrow(model, x, 0.5, multiple=4)
    error = float((outputs(smaller, x) - outputs(model, x)).norm())
    removed = changes(smaller)[0].decision["removed"]
    drawn = {group: torch.randperm(said["of"], generator=torch.Generator().manual_seed(5))
             [:len(said["ids"])].tolist() for group, said in removed.items()}
    at_random = nw.reshape.remove_units(model, x, drawn)
    assert error < 0.9 * float((outputs(at_random, x) - outputs(model, x)).norm())
    nw.save(smaller, tmp_path)
    again = nw.load(tmp_path, None if hasattr(model, "config") else make())
    assert torch.equal(outputs(again, x), outputs(smaller, x))
    assert all(said["of"] == 2 * len(said["ids"]) for said in removed.values())


def test_widths_are_multiples_and_what_is_stated_in_the_config_alone_is_changed():
    make, x = NETWORKS["bert"][0], NETWORKS["bert"][1]()
    smaller = narrow(make(), x, 0.4)
    assert smaller.config.intermediate_size == 32  # of 48, 28.8 asked for
    assert smaller.bert.pooler.dense.out_features == 32
    assert narrow(make(), x, 0.4, uniform=False).bert.pooler.dense.out_features == 16


def test_a_network_that_is_no_chain_is_narrowed_too():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.other = nn.Linear(6, 32), nn.Linear(32, 6), nn.Linear(6, 3)

        def forward(self, x):
            for _ in range(2):
                x = self.down(torch.relu(self.up(x)))
            return self.other(x) + x[:, :3]

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(200, 6)
    smaller = narrow(model, x, 0.5)
    assert smaller.up.out_features == 16
    error = (outputs(smaller, x) - outputs(model, x)).norm()
    assert error < 0.5 * outputs(model, x).norm()


def test_later_layers_are_fitted_on_what_the_changed_ones_give():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(),
                          nn.Linear(24, 4))
    x = torch.randn(300, 6)
    smaller = narrow(model, x, 0.5)
    assert [layer.out_features for layer in smaller[::2]] == [16, 16, 4]
    before = narrow(model[:3], x, 0.5)
    after = narrow(nn.Sequential(before[2], nn.Tanh(), model[4]), before[:2](x), 0.5)
    assert torch.allclose(smaller[2].weight, after[0].weight, atol=1e-5)
    assert torch.allclose(smaller[4].weight, after[2].weight, atol=1e-4)


@pytest.mark.parametrize(("change", "message"), [
    ({"ratio": 0.0}, "ratio must be"), ({"ratio": 1.0}, "ratio must be"),
    ({"multiple": 0}, "multiple must be"),
])
def test_numbers_that_make_no_sense_are_refused(change, message):
    model, x = planted()
    with pytest.raises(ValueError, match=message):
        narrow(model, x, **change)


def test_what_has_no_hidden_units_says_what_was_looked_for():
    with pytest.raises(NothingToReshape, match="no hidden units that can be removed"):
        narrow(nn.Sequential(nn.Linear(4, 2)), torch.randn(5, 4))
    with pytest.raises(NothingToReshape, match="'rnn', which reads it, is no linear layer"):
        narrow(NETWORKS["lstm"][0](), NETWORKS["lstm"][1]())
    with pytest.raises(NothingToReshape, match="takes no unit away from"):
        narrow(planted()[0], planted()[1], 0.05)


def test_numbers_that_are_not_finite_are_named():
    model, x = planted()
    x[3] = float("nan")
    with pytest.raises(ValueError, match="what 2 takes"):
        narrow(model, x)


def test_constant_and_dead_units_and_few_rows_are_no_obstacle():
    model, x = planted()
    with torch.no_grad():
        model[0].weight[:8] = 0
        model[0].bias[:4] = 1.0  # constant
        model[0].bias[4:8] = -1.0  # dead
    for rows in (x, x[:5]):
        smaller = narrow(model, rows, 0.5)
        assert (outputs(smaller, rows) - outputs(model, rows)).abs().max() < 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_keep_their_dtype_and_what_learns(dtype):
    model, x = planted()
    model = model.to(dtype)
    model[2].weight.requires_grad_(False)
    smaller = narrow(model, x.to(dtype), 0.5)
    assert {p.dtype for p in smaller.parameters()} == {dtype}
    assert not smaller[2].weight.requires_grad
    assert smaller[0].weight.requires_grad
