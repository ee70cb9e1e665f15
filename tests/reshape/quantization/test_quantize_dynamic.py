import torch
from torch import nn

import netwright as nw
from netwright.blocks import DynamicLinear
from tests.reshape.quantization.test_quantize_weights import gpt2, llama


def test_linear_layers_multiply_codes_and_the_rest_stays():
    for model in (llama(tie_word_embeddings=True), gpt2()):
        fast, x = nw.reshape.quantize_dynamic(model), torch.randint(64, (2, 9))
        made = [name for name, part in fast.named_modules() if isinstance(part, DynamicLinear)]
        assert made
        assert "lm_head" not in made
        expected, got = model(x).logits, fast(x).logits
        assert (got - expected).abs().max() < 0.1 * expected.abs().max()
        assert "lm_head" in nw.changes(fast)[-1].decision["left"]


@torch.no_grad()
def test_scales_for_each_row_err_less_than_one_for_all():
    layer = nn.Sequential(nn.Linear(64, 32, bias=False))
    x = torch.randn(50, 64) * torch.logspace(-2, 2, 50)[:, None]
    scale = x.abs().max() / 127
    near = ((x / scale).round() * scale) @ layer[0].weight.T

    def error(y):
        return float(((y - layer(x)).norm(dim=1) / layer(x).norm(dim=1)).mean())

    assert error(nw.reshape.quantize_dynamic(layer)(x)) < 0.1 * error(near)
