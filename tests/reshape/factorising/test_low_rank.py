import pytest
import torch
from torch import nn

import netwright as nw
from netwright.errors import NothingToReshape, UnknownName
from netwright.reshape import changes, low_rank


def correlated(rows=400, features=12, seed=0):
    """Inputs that lie near a plane of four dimensions, away from zero."""
    torch.manual_seed(seed)
    return torch.randn(rows, 4) @ torch.randn(4, features) + 0.01 * torch.randn(rows, features) + 3


def perceptron(bias=True):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 20, bias=bias), nn.ReLU(), nn.Linear(20, 12, bias=bias))


def error(thin, layer, x):
    return float((thin(x) - layer(x)).detach().square().sum())


@pytest.mark.parametrize("bias", [True, False])
def test_no_other_matrix_of_that_rank_is_closer_in_the_outputs(bias):
    x = correlated().double()
    layer = nn.Linear(12, 20, bias=bias).double()
    thin = low_rank(nn.Sequential(layer), x, 3)[0]
    y = layer(x).detach()
    if bias:  # the outputs around their mean, which the bias takes up
        y = y - y.mean(0)
    least = float(torch.linalg.svdvals(y)[3:].square().sum())
    assert least <= error(thin, layer, x) * (1 + 1e-9)
    assert error(thin, layer, x) < 1.05 * least + 1e-6 * float(y.square().sum())


def test_without_data_it_is_the_truncated_singular_value_decomposition():
    layer = nn.Linear(12, 20).double()
    thin = low_rank(nn.Sequential(layer), None, 3)[0]
    u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
    assert torch.allclose(thin.weight, u[:, :3] * s[:3] @ v[:3], atol=1e-12)
    assert torch.equal(thin.bias, layer.bias)


def test_data_come_closer_than_the_weights_alone():
    model, x, fresh = perceptron(), correlated(), correlated()
    with_data, without = low_rank(model, x, 4), low_rank(model, None, 4)
    assert error(with_data, model, fresh) < 0.1 * error(without, model, fresh)


def test_energy_gives_each_layer_the_smallest_rank_that_keeps_it():
    model, x = perceptron(), correlated()
    thin = low_rank(model, x, energy=0.9)
    ranks = changes(thin)[0].decision["ranks"]
    variance = (model[0](x) - model[0](x).mean(0)).square().sum()
    kept = error(thin[0], model[0], x)
    assert kept <= 0.1 * variance
    fewer = low_rank(model, x, ranks["0"] - 1, layers=["0"])
    assert error(fewer[0], model[0], x) > 0.1 * variance * 0.99


def test_later_layers_are_fitted_to_what_those_before_them_make():
    model, x = perceptron(), correlated()
    both = low_rank(model, x, 2)
    apart = nn.Sequential(both[0], nn.ReLU(), low_rank(model, x, 2, layers=["2"])[2])
    h = torch.relu(both[0](x))
    assert error(both[2], model[2], h) < error(apart[2], model[2], h)


def test_a_convolution_becomes_two():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, stride=2), nn.ReLU(),
                          nn.Conv2d(16, 16, 3, padding="same", dilation=2, bias=False),
                          nn.Conv2d(16, 16, 3, groups=4)).double()
    x = torch.randn(4, 3, 12, 12).double()
    thin = low_rank(model, x, 8)
    assert changes(thin)[0].decision["ranks"] == {"0": 8, "2": 8}
    assert thin[0][0].weight.shape == (8, 3, 3, 3)
    assert thin[0][1].weight.shape == (16, 8, 1, 1)
    assert thin[0].weight.shape == model[0].weight.shape
    assert thin(x).shape == model(x).shape
    plain = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, stride=2)).double()
    with torch.no_grad():
        a, b = torch.randn(16, 2).double(), torch.randn(2, 27).double()
        plain[0].weight.copy_((a @ b).view(16, 3, 3, 3))
    assert torch.allclose(low_rank(plain, x, 2)(x), plain(x), atol=1e-9)


def test_full_energy_of_a_layer_of_low_rank_is_the_layer():
    torch.manual_seed(3)
    layer = nn.Linear(12, 20).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(20, 3).double() @ torch.randn(3, 12).double())
    x = torch.randn(300, 12).double()
    thin = low_rank(nn.Sequential(layer), x, energy=1 - 1e-12)
    assert changes(thin)[0].decision["ranks"] == {"0": 3}
    assert torch.allclose(thin(x), layer(x), atol=1e-9)


def test_padding_and_transposed_layers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)).eval()
    ids, mask = torch.randint(64, (4, 10)), torch.ones(4, 10, dtype=torch.long)
    mask[:, 7:] = 0
    other = ids.where(mask > 0, 5)
    thin, same = (low_rank(gpt2, {"input_ids": some, "attention_mask": mask}, 6)
                  for some in (ids, other))
    assert set(changes(thin)[0].decision["ranks"]) == {
        f"transformer.h.{k}.{part}" for k in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(
        thin.parameters(), same.parameters(), strict=True))
    assert thin.lm_head.weight is thin.transformer.wte.weight  # tied, and so left alone


def test_one_that_is_no_chain_of_stages_is_done_in_one_pass():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(12, 20), nn.Linear(12, 20)

        def forward(self, x):
            return self.left(x) * self.right(x) + self.left(-x)

    torch.manual_seed(4)
    thin = low_rank(Forked(), correlated(), 3)
    assert changes(thin)[0].decision["ranks"] == {"left": 3, "right": 3}


def test_what_a_name_means_and_what_is_refused():
    model, x = perceptron(), correlated()
    stack = nn.Sequential(model, nn.Linear(12, 12))
    thin = low_rank(stack, x, 2, layers=["0"])
    assert set(changes(thin)[0].decision["ranks"]) == {"0.0", "0.2"}
    with pytest.raises(UnknownName, match="linear layer or convolution"):
        low_rank(model, x, 2, layers=["1"])
    with pytest.raises(NothingToReshape, match="rank 11 of 20 x 12 saves nothing"):
        low_rank(model, x, 11)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        low_rank(model, x, 0)
    with pytest.raises(ValueError, match="energy must be above 0 and below 1"):
        low_rank(model, x, energy=1.5)
    with pytest.raises(ValueError, match="finite activations"):
        low_rank(model, x * torch.nan, 2)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="finite weights, but '0'"):
        low_rank(model, None, 2)


def test_a_layer_of_zeros_and_constant_inputs_do_no_harm():
    model, x = perceptron(), torch.ones(40, 12)
    nn.init.zeros_(model[2].weight)
    thin = low_rank(model, x, 2)
    assert torch.allclose(thin(x), model(x), atol=1e-5)


def test_it_is_saved_with_hugging_face_and_loaded_without_data(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    bert = transformers.BertModel(transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4)).eval()
    x = torch.randint(64, (4, 10))
    thin = low_rank(bert, x, energy=0.9)
    nw.save(thin, tmp_path)
    again = nw.load(tmp_path)
    assert torch.equal(again(x).last_hidden_state, thin(x).last_hidden_state)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in bert.parameters())
