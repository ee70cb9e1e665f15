"""Small networks of the kinds whose units are removed, with what each takes."""

import pytest
import torch
from torch import nn

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4}


class Residual(nn.Module):
    """A block of two convolutions beside a shortcut."""

    def __init__(self, channels, out, stride=1):
        super().__init__()
        self.one = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.two = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm_one, self.norm_two = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.short = (nn.Identity() if channels == out and stride == 1 else
                      nn.Conv2d(channels, out, 1, stride))

    def forward(self, x):
        h = self.norm_two(self.two(torch.relu(self.norm_one(self.one(x)))))
        return torch.relu(h + self.short(x))


class Tagger(nn.Module):
    """Two recurrent layers between an embedding and a head."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(64, 16), nn.Linear(24, 10)
        self.rnn = nn.LSTM(16, 24, 2, batch_first=True)

    def forward(self, x):
        return self.head(self.rnn(self.embedding(x))[0])


class Own(nn.Module):
    """Attention and a gated feed-forward layer written by hand."""

    def __init__(self, dim=16, heads=4, hidden=40):
        super().__init__()
        self.heads = heads
        self.embed, self.out = nn.Linear(8, dim), nn.Linear(dim, 5)
        self.qkv, self.mix = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.gate, self.down = (nn.Linear(dim, hidden), nn.Linear(dim, hidden),
                                         nn.Linear(hidden, dim))
        self.one, self.two = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x):
        h = self.embed(x)
        batch, length, _ = h.shape
        q, k, v = self.qkv(self.one(h)).view(batch, length, 3, self.heads, -1).unbind(2)
        seen = nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        h = h + self.mix(seen.transpose(1, 2).reshape(batch, length, -1))
        normed = self.two(h)
        return self.out(h + self.down(torch.relu(self.gate(normed)) * self.up(normed)))


def tokens():
    torch.manual_seed(1)
    return torch.randint(64, (2, 10))


def padded():
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": tokens(), "attention_mask": mask}


def images(side=16):
    torch.manual_seed(1)
    return torch.randn(2, 3, side, side)


def spread(network):
    """Return a network whose weights are of a size at which each unit matters."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return network.eval()


def llama(**changes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return spread(transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **SMALL | {"num_key_value_heads": 2} | changes)))


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return spread(transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)))


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return spread(transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL)))


def vit():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vision = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    return spread(transformers.ViTForImageClassification(transformers.ViTConfig(
        **vision, image_size=16, patch_size=4)))


def resnet():
    torch.manual_seed(0)
    return spread(nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), Residual(16, 16),
        Residual(16, 24, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)))


def lstm():
    torch.manual_seed(0)
    return spread(Tagger())


def own():
    torch.manual_seed(0)
    return spread(Own())


def rows():
    torch.manual_seed(1)
    return torch.randn(3, 6, 8)


PRETRAINED = {"gpt2": (gpt2, padded), "llama": (llama, padded), "bert": (bert, padded),
              "vit": (vit, lambda: {"pixel_values": images()})}
NETWORKS = {**PRETRAINED, "resnet": (resnet, images), "lstm": (lstm, tokens), "own": (own, rows)}
