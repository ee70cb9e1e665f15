"""The two language models that experiments share, each trained once and kept."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from evidence.small_models import language_model, text
from netwright.data import CHARACTERS, Split
from netwright.evidence.code import fingerprints

CONTEXT, BATCH, STEPS = 128, 16, 1200


def char_llama(seed: int = 0) -> nn.Module:
    """Return a Llama of 1.5 million parameters (6 layers, 6 query and 2 key heads), trained."""
    return _kept("char_llama", _llama, seed)


def char_gpt(seed: int = 0) -> nn.Module:
    """Return a GPT of 6 blocks and 0.7 million parameters, trained."""
    return _kept("char_gpt", lambda: language_model(96, 6, context=CONTEXT), seed)


def desk_text(held_out: int = 256) -> Split:
    """Return what the models are trained on and, held out, `held_out` windows of another part."""
    return text(CONTEXT, held_out)


def calibration_text(windows: int = 64, seed: int = 0) -> Tensor:
    """Return windows (windows, 128) drawn from the text that the models are trained on."""
    x = desk_text().x_train
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:windows]]


@torch.no_grad()
def held_out_loss(model: nn.Module, held_out: int = 256) -> float:
    """Return the cross-entropy (nats a character) of `model` on text that is held out."""
    model.eval()
    data = desk_text(held_out)
    losses = [float(_loss(model, x, y)) * len(x)
              for x, y in zip(data.x_test.split(64), data.y_test.split(64), strict=True)]
    return sum(losses) / len(data.x_test)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(CHARACTERS), hidden_size=144, intermediate_size=432, num_hidden_layers=6,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=2048,
        bos_token_id=None, eos_token_id=None))


def _kept(name: str, make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return `make()` with the weights that were kept, or trained now where there are none.

    What they are called has a fingerprint of this file and of all code that it uses.
    """
    folder = Path(os.environ.get("NETWRIGHT_CACHE") or Path.home() / ".cache" / "netwright")
    path = folder / f"{name}-{seed}-{fingerprints([__name__])[__name__]}.safetensors"
    torch.manual_seed(seed)
    model = make()
    if not path.exists():
        _train(model)
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, part)
        part.replace(path)
    model.load_state_dict(load_file(path))
    return model.eval()


def _train(model: Any) -> None:
    x, y = desk_text().x_train, desk_text().y_train
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        _loss(model, x[rows], y[rows]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    return cross_entropy(getattr(out, "logits", out).flatten(0, 1), y.flatten())
