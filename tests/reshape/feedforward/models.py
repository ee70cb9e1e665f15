"""The networks in which feed-forward layers are looked for."""

import pytest
import torch
from torch import nn

from netwright.blocks.feedforward import GLU, FeedForward
from netwright.models import gpt, patch_transformer
from netwright.stages import call

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4}


def tokens():
    return torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(1))


def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def vectors():
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


def encoder(*, norm_first=False):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first,
                                       activation="gelu")
    layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for part in layers.layers:  # which begin as copies of one
        part.linear1.reset_parameters()
        part.linear2.reset_parameters()
    return layers


def hugging_face(name):
    t = pytest.importorskip("transformers")
    heads = {"num_key_value_heads": 2}
    return {
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(
            **{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=16, patch_size=4)),
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**SMALL)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, **heads)),
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(
            **SMALL, **heads, num_local_experts=4)),
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0)),
        "gpt-oss": lambda: t.GptOssForCausalLM(t.GptOssConfig(
            **SMALL, **heads, num_local_experts=4, head_dim=8)),
    }[name]()


def built(name):
    """Return a network in eval mode and what it takes."""
    torch.manual_seed(0)
    own = {
        "gpt": lambda: (gpt(64, context=8, width=32), tokens()),
        "gpt of GLU": lambda: (gpt(64, context=8, width=32, feedforward=GLU), tokens()),
        "patches": lambda: (patch_transformer(3, (16, 16), 10, width=32, depth=2, feedforward=lambda
                            dim, hidden: FeedForward(dim, hidden, dropout=0.1)), images()),
        "encoder": lambda: (encoder(), vectors()),
        "encoder, norm first": lambda: (encoder(norm_first=True), vectors()),
        "transformer": lambda: (nn.Transformer(16, 2, 1, 1, 32, batch_first=True),
                                (vectors(), vectors())),
    }
    if name in own:
        model, x = own[name]()
    else:
        model = hugging_face(name)
        x = {"vit": {"pixel_values": images()},
             "t5": {"input_ids": tokens(), "decoder_input_ids": tokens()}}.get(name, tokens())
    return model.eval(), x


def run(model, x):
    """Return the model's output, keeping PyTorch's encoder layers off the path that is fused."""
    for part in model.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0
    return call(model, x)


DENSE = ["gpt", "gpt of GLU", "patches", "encoder", "encoder, norm first", "transformer", "vit",
         "bert", "gpt2", "llama", "t5"]
EVERY = [*DENSE, "mixtral"]
