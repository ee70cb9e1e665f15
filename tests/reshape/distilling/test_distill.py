import math
from copy import deepcopy

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.errors import NothingToReshape
from netwright.models import gpt
from netwright.reshape import changes, distill, low_rank, prune_sublayers
from netwright.reshape.distilling.distill import _aligned
from netwright.signals import call


def perceptron(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).to(dtype)


def data(rows=200, seed=1):
    torch.manual_seed(seed)
    return torch.randn(rows, 8)


def moved(model, by, seed=2):
    torch.manual_seed(seed)
    other = deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(by * torch.randn_like(p))
    return other


def far(student, teacher, x):
    with torch.no_grad():
        return float((call(student, x) - call(teacher, x)).square().sum())


def test_a_student_comes_nearer_on_data_that_it_has_not_seen():
    teacher, fresh = perceptron(), data(seed=5)
    student = moved(teacher, 0.05)
    nearer = distill(student, teacher, data(), steps=100, learning_rate=3e-3)
    assert far(nearer, teacher, fresh) < 0.3 * far(student, teacher, fresh)
    before, after = changes(nearer)[0].decision["distance"]
    assert after < before


@pytest.mark.parametrize("rate", [1e-4, 30.0])
def test_it_never_returns_one_that_is_worse(rate):
    teacher = perceptron()
    student = moved(teacher, 1e-4)
    nearer = distill(student, teacher, data(), steps=20, learning_rate=rate)
    before, after = changes(nearer)[0].decision["distance"]
    held = data()[160:]
    assert after <= before
    assert far(nearer, teacher, held) <= far(student, teacher, held) * 1.001


def test_the_teacher_itself_stays_bit_for_bit():
    teacher = perceptron()
    same = distill(teacher, teacher, data(), steps=10)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), teacher.parameters(),
                                                 strict=True))
    assert changes(same)[0].decision["distance"] == [0.0, 0.0]


def test_what_does_not_learn_stays_and_modes_and_statistics_too():
    teacher = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5),
                            nn.Linear(16, 4)).train()
    student = moved(teacher, 0.1)
    student[0].requires_grad_(False)
    nearer = distill(student, teacher, data(), steps=20, learning_rate=1e-2)
    assert torch.equal(nearer[0].weight, student[0].weight)
    assert not torch.equal(nearer[3].weight, student[3].weight)
    assert torch.equal(nearer[1].running_mean, student[1].running_mean)
    assert nearer.training
    assert nearer[2].training
    assert not nearer[0].weight.requires_grad
    assert all(p.grad is None for p in nearer.parameters())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("loss", ["auto", "squared", "kl"])
def test_a_causal_language_model_of_fewer_sublayers(loss):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    teacher = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2)).eval()
    ids, mask = torch.randint(32, (40, 8)), torch.ones(40, 8, dtype=torch.long)
    mask[::2, 6:] = 0
    x = {"input_ids": ids, "attention_mask": mask}
    student = prune_sublayers(teacher, x, 4)
    nearer = distill(student, teacher, x, steps=20, learning_rate=1e-3, loss=loss)
    record = changes(nearer)[-1]
    assert record.decision["distance"][1] < record.decision["distance"][0]
    assert [name for name, _ in record.decision["layers"]] == [
        f"model.layers.{i}" for i in range(student.config.num_hidden_layers)]
    changed = {"input_ids": ids.where(mask > 0, 9), "attention_mask": mask}
    other = distill(student, teacher, changed, steps=20, learning_rate=1e-3, loss=loss)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(
        nearer.parameters(), other.parameters(), strict=True))


def test_an_encoder_with_thin_layers_is_saved_and_loaded(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    teacher = transformers.BertModel(transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4)).eval()
    x = torch.randint(64, (32, 10))
    student = low_rank(teacher, x, 6)
    nearer = distill(student, teacher, x, steps=20, learning_rate=1e-3)
    before, after = changes(nearer)[-1].decision["distance"]
    assert after < before
    nw.save(nearer, tmp_path)
    assert torch.equal(call(nw.load(tmp_path), x), call(nearer, x))


def test_a_convolutional_network_and_numbers_of_half_precision():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
                            nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4)).eval()
    x = torch.randn(48, 3, 8, 8)
    student = low_rank(teacher, x, 3)
    nearer = distill(student, teacher, x, steps=20, learning_rate=1e-3)
    before, after = changes(nearer)[-1].decision["distance"]
    assert after < before
    half = moved(perceptron(), 0.05).bfloat16()
    near = distill(half, perceptron(), data().bfloat16(), steps=60, learning_rate=1e-3)
    before, after = changes(near)[0].decision["distance"]
    assert after < 0.8 * before
    assert near[0].weight.dtype == torch.bfloat16


def test_budget_order_and_held_out_data():
    teacher = perceptron()
    student = moved(teacher, 0.05)
    short = distill(student, teacher, data(), steps=10**6, seconds=0.3)
    assert 0 < changes(short)[0].decision["steps"] < 10**6
    none = distill(student, teacher, data(), steps=0)
    assert far(none, student, data()) == 0
    one, two = (distill(student, teacher, data(), steps=8,
                        generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    held = data(seed=9)
    kept = distill(student, teacher, data(), steps=8, held_out=held)
    said = [call(teacher, part).detach() for part in held.split(16)]
    error = sum(far(kept, teacher, part) / float(y.square().sum()) * len(part)
                for part, y in zip(held.split(16), said, strict=True)) / len(held)
    assert math.isclose(changes(kept)[0].decision["distance"][1], error, rel_tol=1e-4)


def test_layers_are_paired_in_their_order():
    assert _aligned([[0.1, 0.9, 0.2], [0.8, 0.1, 0.1]]) == [(0, 1)]
    assert _aligned([[0.9, 0.1, 0.1, 0.1], [0.1, 0.1, 0.7, 0.8]]) == [(0, 0), (1, 3)]
    assert _aligned([[-1.0]]) == []
    assert _aligned([]) == []


def test_what_is_refused():
    teacher, student, x = perceptron(), moved(perceptron(), 0.05), data()
    with pytest.raises(NothingToReshape, match="no parameter of Sequential learns"):
        distill(deepcopy(student).requires_grad_(False), teacher, x)
    with pytest.raises(ValueError, match="at least two samples"):
        distill(student, teacher, x[:1])
    with pytest.raises(ValueError, match=r"student must give what the teacher gives"):
        distill(student, nn.Linear(8, 5), x)
    with pytest.raises(ValueError, match="finite outputs"):
        distill(student, teacher, x * torch.nan)
    with pytest.raises(ValueError, match="learning_rate must be above 0"):
        distill(student, teacher, x, learning_rate=0.0)
    with pytest.raises(ValueError, match="seconds must be above 0"):
        distill(student, teacher, x, seconds=-1.0)
    with pytest.raises(nw.errors.UnknownName, match="no loss is called"):
        distill(student, teacher, x, loss="squaerd")


def test_a_model_of_characters_whose_batches_come_from_a_loader():
    teacher = gpt(16, context=8, width=16, depth=3, heads=2)
    torch.manual_seed(1)
    x = torch.randint(16, (64, 8))
    student = prune_sublayers(teacher, x, 1)
    nearer = distill(student, teacher, iter(x.split(8)), steps=30, learning_rate=1e-3)
    before, after = changes(nearer)[-1].decision["distance"]
    assert after < before
