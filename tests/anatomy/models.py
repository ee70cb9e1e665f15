"""Networks of several architectures, each with an input, in which parts are looked for."""

import pytest
import torch
from torch import nn

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 64}
GROUPED = {**TEXT, "num_key_value_heads": 2}


def tokens():
    return torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(1))


def images(size=16):
    return {"pixel_values": torch.randn(2, 3, size, size,
                                        generator=torch.Generator().manual_seed(1))}


def built(name):
    """Return a Hugging Face model of that kind in eval mode, and what it takes."""
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    both = {"input_ids": tokens(), "decoder_input_ids": tokens()}
    make, x = {
        "gpt2": (lambda: t.GPT2LMHeadModel(t.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)),
            tokens()),
        "llama": (lambda: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED)), tokens()),
        "bert": (lambda: t.BertForSequenceClassification(t.BertConfig(**TEXT)), tokens()),
        "vit": (lambda: t.ViTForImageClassification(t.ViTConfig(
            **SIZES, image_size=16, patch_size=4)), images()),
        "mixtral": (lambda: t.MixtralForCausalLM(t.MixtralConfig(
            **GROUPED, num_local_experts=4)), tokens()),
        "t5": (lambda: t.T5ForConditionalGeneration(t.T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0)), both),
        "opt": (lambda: t.OPTForCausalLM(t.OPTConfig(
            vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
            num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=32)), tokens()),
        "albert": (lambda: t.AlbertModel(t.AlbertConfig(**TEXT, embedding_size=16)), tokens()),
        "phi3": (lambda: t.Phi3ForCausalLM(t.Phi3Config(
            **GROUPED, pad_token_id=0, max_position_embeddings=64,
            original_max_position_embeddings=64)), tokens()),
        "neox": (lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**TEXT)), tokens()),
        "resnet": (lambda: t.ResNetForImageClassification(t.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic")),
            images(32)),
        "convnext": (lambda: t.ConvNextForImageClassification(t.ConvNextConfig(
            hidden_sizes=[8, 16], depths=[2, 1], num_stages=2)), images(32)),
    }[name]
    return make().eval(), x


class Heads(nn.Module):
    """Attention written out by hand, with two heads for keys and values beside four of queries."""

    def __init__(self, *, out=True):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.out = nn.Linear(16, 16) if out else None

    def forward(self, x):
        q = self.query(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2).repeat_interleave(2, 1)
                for layer in (self.key, self.value))
        mixed = ((q @ k.mT) / 2).softmax(-1) @ v
        mixed = mixed.transpose(1, 2).flatten(2)
        return mixed if self.out is None else self.out(mixed)
