import math

import pytest
import torch
from torch import nn

from netwright.advise.material import length, material, rows
from netwright.advise.quality import FIDELITIES, interval, judge_for, score
from netwright.data import Split
from netwright.errors import UnknownName
from netwright.models import gpt, mlp


def bodies(part):
    return [tuple(row.flatten().tolist()) for x, _ in part for row in x]


@pytest.mark.parametrize("given", ["tensor", "loader", "list", "repeated"])
def test_three_parts_share_no_sample(given):
    x = torch.randn(64, 6)
    data = {"tensor": x, "list": list(x.split(10)), "repeated": torch.cat([x, x]),
            "loader": torch.utils.data.DataLoader(
                torch.utils.data.TensorDataset(x, torch.zeros(64)), batch_size=10)}[given]
    found = material(mlp(6, 3), data, labels=False, batch=16)
    parts = [bodies(part) for part in found.parts]
    together = [row for part in parts for row in part]
    assert len(together) == len(set(together)) == 64
    assert all(rows(part) >= 8 for part in found.parts)
    assert found.digest() == material(mlp(6, 3), data, labels=False, batch=16).digest()


def test_targets_are_kept_where_a_metric_judges():
    x, y = torch.randn(64, 6), torch.arange(64)
    found = material(mlp(6, 3), Split(x, y, x, y), labels=True, batch=16)
    assert found.labelled
    assert all(torch.equal(x[y], given) for part in found.parts for given, y in part)


def test_mappings_keep_their_rows_together():
    class Takes(nn.Module):
        def forward(self, ids, mask):
            return (ids * mask).sum(-1, keepdim=True).float().expand(-1, 2)
    ids = torch.arange(80).view(40, 2)
    found = material(Takes(), {"ids": ids, "mask": ids + 100, "labels": ids}, labels=False,
                     batch=8)
    assert all(torch.equal(x["ids"] + 100, x["mask"]) and {*x} == {"ids", "mask"}
               for part in found.parts for x, _ in part)


@pytest.mark.parametrize(("data", "said"), [
    (torch.randn(64, 7), "the model cannot take the data"),
    (torch.randn(5, 6), "at least 12 different samples.*got 5"),
    (torch.zeros(64, 6), "at least 12 different samples.*got 1"),
    ([], "at least 12 different samples"), (3, "data must be what the model takes"),
    ("words", "data must be what the model takes"), (["words"], "data must hold tensors")])
def test_data_that_will_not_do(data, said):
    with pytest.raises(ValueError, match=said):
        material(mlp(6, 3), data, labels=False, batch=16)


def test_a_metric_needs_targets():
    with pytest.raises(ValueError, match="pairs of inputs and targets"):
        material(mlp(6, 3), torch.randn(64, 6), labels=True, batch=16)


def parts_of(model, x, **options):
    found = material(model, x, labels=False, batch=16)
    return judge_for(model, found.screening, **options), found.screening


@pytest.mark.parametrize("name", sorted(FIDELITIES))
def test_the_original_is_as_good_as_itself_and_noise_is_worse(name):
    torch.manual_seed(0)
    model = gpt(20, context=8)
    judge, part = parts_of(model, torch.randint(20, (96, 8)), fidelity=name)
    same = judge.outputs(model, part)
    assert score(judge, same, same, []) == pytest.approx(1.0, abs=1e-6)
    other = gpt(20, context=8)
    changed = judge.outputs(other, part)
    value = interval(judge, same, changed, [])
    assert value.low <= value.value <= value.high < 0.95


def test_a_likeness_is_the_exponential_of_minus_the_divergence():
    judge = FIDELITIES["distribution"]
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    expected = math.exp(-(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)))
    assert score(judge, [p], [q], []) == pytest.approx(expected, rel=1e-5)


def test_positions_of_padding_do_not_count():
    judge = FIDELITIES["agreement"]
    before, after = torch.eye(3)[None], torch.eye(3)[[0, 1, 0]][None]
    assert score(judge, [before], [after], []) == pytest.approx(2 / 3)
    mask = torch.tensor([[True, True, False]])
    assert score(judge, [before], [after], [mask]) == 1.0


def test_pairs_are_of_different_samples():
    judge = FIDELITIES["pairwise"]
    torch.manual_seed(0)
    before = torch.randn(30, 5)
    assert score(judge, [before], [-3 * before], []) == pytest.approx(1.0)
    assert abs(score(judge, [before], [torch.randn(30, 5)], [])) < 0.3
    drawn = interval(judge, [before], [before + torch.randn(30, 5)], [])
    assert drawn.high - drawn.low > 0.01


@pytest.mark.parametrize(("options", "kind", "said"), [
    ({"fidelity": "agrement"}, UnknownName, "did you mean agreement"),
    ({"metric": "acuracy"}, UnknownName, "did you mean accuracy"),
    ({"metric": lambda a, b: 1.0}, ValueError, "higher_is_better must be given"),
    ({"metric": 3}, ValueError, "metric must be a name or a function"),
    ({"metric": "accuracy", "fidelity": "cosine"}, ValueError, "give one of them"),
    ({"metric": lambda a, b: math.nan, "higher_is_better": True}, ValueError, "nan and nan"),
    ({"metric": lambda a, b: float(torch.rand(1)), "higher_is_better": True}, ValueError,
     "same finite number")])
def test_a_judge_that_is_none(options, kind, said):
    x, y = torch.randn(64, 6), torch.randint(3, (64,))
    found = material(mlp(6, 3), Split(x, y, x, y), labels=True, batch=16)
    with pytest.raises(kind, match=said):
        judge_for(mlp(6, 3), found.screening, **options)


def test_a_model_that_draws_is_refused():
    class Draws(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x + self.calls
    with pytest.raises(ValueError, match="others at the second call"):
        parts_of(Draws(), torch.randn(64, 6))


def test_a_metric_is_a_share_of_the_originals():
    x, y = torch.randn(64, 6), torch.randn(64, 3)
    model = mlp(6, 3)
    found = material(model, Split(x, y, x, y), labels=True, batch=16)
    for name in ("mean squared error", "accuracy"):
        targets = [t for _, t in found.final]
        labels = targets if name != "accuracy" else [t.argmax(-1) for t in targets]
        judge = judge_for(model, [(x, t) for (x, _), t in zip(found.final, labels, strict=True)],
                          metric=name)
        good = labels if name != "accuracy" else list(targets)
        outputs = judge.outputs(model, found.final)
        assert score(judge, outputs, outputs, labels) == 1.0
        assert judge.metric(good, labels) == (0.0 if name != "accuracy" else 1.0)
        assert length(found.final[0][0]) == len(labels[0])
