import pytest
import torch
from torch import nn

import netwright as nw
from netwright.errors import NothingToReshape, UnknownName
from netwright.models import gpt
from netwright.reshape import changes, replace_by_linear
from netwright.reshape.pruning import without_sublayers
from netwright.signals import call


class Block(nn.Module):
    """A residual block whose branch is linear where `bend` is zero."""

    def __init__(self, width, bend):
        super().__init__()
        self.inner, self.bend = nn.Linear(width, width), bend

    def forward(self, h):
        y = self.inner(h)
        return h + y + self.bend * y.square()


def stack(*bends, width=6):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), *(Block(width, b) for b in bends),
                         nn.Linear(width, 3)).double()


def data(rows=200):
    torch.manual_seed(1)
    return torch.randn(rows, 5).double()


def test_a_part_that_is_linear_is_found_exactly_and_chosen():
    model, x = stack(1.0, 0.0, 1.0), data()
    linear = replace_by_linear(model, x, 1)
    assert list(changes(linear)[0].decision["maps"]) == ["2"]
    assert torch.allclose(linear(x), model(x), atol=1e-5)
    a = torch.eye(6).double() + model[2].inner.weight
    assert torch.allclose(linear[2].map.weight, a, atol=1e-4)
    assert torch.allclose(linear[2].map.bias, model[2].inner.bias, atol=1e-4)


def test_it_is_the_least_squares_map():
    model, x = stack(0.3, 0.3), data(2000)
    linear = replace_by_linear(model, x, ["1"])
    h = model[0](x).detach()
    y = model[1](h).detach()
    ones = torch.cat([h, torch.ones(len(h), 1).double()], 1)
    best = torch.linalg.lstsq(ones, y).solution
    least = float((ones @ best - y).square().sum())
    assert least <= float((linear[1](h).detach() - y).square().sum()) < 1.01 * least


def test_several_are_fitted_one_after_another():
    model, x = stack(0.1, 0.1, 0.1), data()
    both = replace_by_linear(model, x, ["1", "2"])
    h = both[0:2](x).detach()
    alone = replace_by_linear(model, x, ["2"])
    ours, theirs = (float((m[2](h) - model[2](h)).detach().square().sum()) for m in (both, alone))
    assert ours < theirs
    assert len(changes(replace_by_linear(model, x, 3))[0].decision["maps"]) == 3


def hugging_face(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
             "num_attention_heads": 4}
    made = {"llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(
                **sizes, num_key_value_heads=2)),
            "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
                **sizes, num_key_value_heads=2, head_dim=8)),
            "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
                vocab_size=64, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)),
            "bert": lambda: transformers.BertModel(transformers.BertConfig(**sizes))}
    return made[name]().eval()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert"])
def test_a_layer_of_hugging_face_goes_and_the_result_generates_and_loads(name, tmp_path):
    model, ids = hugging_face(name), torch.randint(64, (4, 12))
    mask = torch.ones_like(ids)
    mask[:, 9:] = 0
    linear = replace_by_linear(model, {"input_ids": ids, "attention_mask": mask}, 1)
    padded = replace_by_linear(model, {"input_ids": ids.where(mask > 0, 3),
                                       "attention_mask": mask}, 1)
    one, other = (call(m, ids[:, :9]) for m in (linear, padded))
    assert torch.allclose(one, other, atol=1e-4)
    nw.save(linear, tmp_path)
    assert torch.equal(call(nw.load(tmp_path), ids), call(linear, ids))
    if linear.can_generate():
        cached, whole = (linear.generate(ids[:2, :4], max_new_tokens=4, do_sample=False,
                                         use_cache=use, pad_token_id=0) for use in (True, False))
        assert torch.equal(cached, whole)


def test_it_keeps_more_than_leaving_the_sublayer_out():
    model = gpt(16, context=8, width=16, depth=3, heads=2)
    torch.manual_seed(2)
    x, fresh = torch.randint(16, (64, 8)), torch.randint(16, (64, 8))
    linear = replace_by_linear(model, x, ["2"])
    dropped = without_sublayers(model, x, ["2.attention_out", "2.mlp_out"])
    far = [float((m(fresh) - model(fresh)).detach().square().sum()) for m in (linear, dropped)]
    assert far[0] < 0.8 * far[1]


def test_channels_of_convolutions():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

        def forward(self, h):
            return h + self.branch(h)

    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Residual(), Residual(), nn.Flatten(),
                          nn.Linear(4 * 36, 5)).eval()
    x = torch.randn(20, 3, 8, 8)
    linear = replace_by_linear(model, x, 2)
    assert torch.allclose(linear(x), model(x), atol=1e-4)


def test_what_is_refused():
    model, x = stack(0.1, 0.1), data()
    with pytest.raises(UnknownName, match="module of the model"):
        replace_by_linear(model, x, ["9"])
    with pytest.raises(ValueError, match="layers must be between 1 and 2"):
        replace_by_linear(model, x, 3)
    with pytest.raises(ValueError, match=r"layers must not name '1.inner' beside '1'"):
        replace_by_linear(model, x, ["1", "1.inner"])
    with pytest.raises(ValueError, match="at least one module"):
        replace_by_linear(model, x, [])
    with pytest.raises(NothingToReshape, match="no residual block"):
        replace_by_linear(nn.Sequential(nn.Linear(5, 5), nn.ReLU()), x.float())
    with pytest.raises(ValueError, match="finite activations"):
        replace_by_linear(model, x * torch.nan, ["1"])
