import sys
from copy import deepcopy

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.errors import MissingExtra, NothingToReshape, UnknownName
from netwright.reshape import changes, prune_sublayers, run_with_onnx

pytest.importorskip("onnxruntime")


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4)).eval()


def test_a_graph_of_any_number_of_samples_gives_what_the_model_gives():
    model = perceptron()
    fast = run_with_onnx(model, torch.randn(5, 8))
    for count in (1, 5, 9):
        x = torch.randn(count, 8)
        assert torch.allclose(fast(x), model(x), atol=1e-5)
    small = run_with_onnx(model, torch.randn(5, 8), weights="int8")
    x = torch.randn(200, 8)
    apart = float((small(x) - model(x)).detach().norm() / model(x).detach().norm())
    assert 1e-5 < apart < 0.05


def test_a_hugging_face_encoder_by_name_and_in_a_chain(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4)).eval()
    ids, mask = torch.randint(64, (3, 10)), torch.ones(3, 10, dtype=torch.long)
    mask[1:, 6:] = 0
    x = {"input_ids": ids, "attention_mask": mask}
    smaller = prune_sublayers(model, x, 1)
    fast = run_with_onnx(smaller, x)
    assert [record.name for record in changes(fast)] == ["prune_sublayers", "run_with_onnx"]
    for some in (x, {"input_ids": ids[:1, :4], "attention_mask": mask[:1, :4]}):
        ours, theirs = fast(**some), smaller(**some)
        assert type(ours) is type(theirs)
        assert torch.allclose(ours.last_hidden_state, theirs.last_hidden_state, atol=1e-5)
        assert torch.allclose(ours.pooler_output, theirs.pooler_output, atol=1e-5)
    nw.save(fast, tmp_path)
    again = nw.load(tmp_path)
    assert torch.equal(again(**x).last_hidden_state, fast(**x).last_hidden_state)
    with pytest.raises(ValueError, match="got 1 tensors"):
        fast(input_ids=ids)


def test_a_convolutional_network_and_copies():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(8, 4)).eval()
    x = torch.randn(2, 3, 9, 9)
    fast = run_with_onnx(model, x)
    assert torch.allclose(fast(x), model(x), atol=1e-5)
    assert torch.equal(deepcopy(fast)(x), fast(x))
    other = run_with_onnx(nn.Sequential(*(deepcopy(m) for m in model)).train(), x)
    other.load_state_dict(fast.state_dict())  # the session follows the graph
    assert torch.equal(other(x), fast(x))


def test_what_is_refused(monkeypatch):
    model, x = perceptron(), torch.randn(5, 8)
    with pytest.raises(UnknownName, match="no weights is called"):
        run_with_onnx(model, x, weights="int4")
    with pytest.raises(NothingToReshape, match="already"):
        run_with_onnx(run_with_onnx(model, x), x)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            y = self.inner(x)
            return y * 2 if y.sum().item() > 0 else torch.from_numpy(y.numpy() * 3)

    with pytest.raises(NothingToReshape, match="Odd cannot be exported to ONNX"):
        run_with_onnx(Odd().requires_grad_(False), x)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtra, match=r"pip install 'netwright\[onnx\]'"):
        run_with_onnx(model, x)
