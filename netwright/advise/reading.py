"""Models and data from disk, as a command line names them."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.errors import MissingExtra
from netwright.tasks import pretrained
from netwright.tasks.pretrained import SENTENCES

__all__ = ["images", "model_in", "texts"]

LENGTH = 64  # tokens of a sample
MOST = 2048  # samples
PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


@checks.annotated
def model_in(folder: str | Path) -> nn.Module:
    """Return the model in a folder of `save_pretrained` or `netwright.save`.

    Raises:
        ValueError: it is a pickled checkpoint, or the folder holds no weights or no model.
    """
    folder = Path(folder)
    if folder.is_file() or folder.suffix in PICKLED:
        raise ValueError(pickled(folder) if folder.suffix in PICKLED else
                         f"a model must be a folder of save_pretrained or netwright.save, got the "
                         f"file {folder}; name the folder that it is in")
    if not folder.is_dir():
        raise ValueError(f"a model must be a folder, and {folder} does not exist; give one that "
                         "save_pretrained or netwright.save wrote")
    weights = [*folder.glob("*.safetensors")]
    if not weights:
        other = [path for path in sorted(folder.iterdir()) if path.suffix in PICKLED]
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ValueError(pickled(other[0]) if other else
                         f"{folder} must hold weights as safetensors, got {held}; save the model "
                         "by save_pretrained or netwright.save")
    return pretrained(folder)


def pickled(path: Path) -> str:
    """Return the refusal of a pickled checkpoint, with the line that converts it."""
    target = path.with_suffix(".safetensors")
    return (f"{path} is a pickled checkpoint, which may run any code when it is read; convert it "
            "where you trust it: python -c \"import torch, safetensors.torch as s; "
            f"s.save_file(torch.load('{path}', weights_only=True), '{target}')\"")


@checks.annotated
def texts(model: nn.Module, folder: str | Path, text: str | Path | None = None, *,
          length: int = LENGTH) -> list[dict[str, Tensor]]:
    """Return a text as samples of a model that takes tokens, by the tokenizer in its folder.

    An encoder is given sentences, padded and with a mask; a causal language model windows of
    `length` tokens that follow one another.

    Args:
        model: of transformers.
        folder: where its tokenizer is.
        text: a file of text; a few sentences of netwright's own where it is None.
        length: the most tokens of a sample.

    Shapes: input_ids and attention_mask (samples, length).

    Raises:
        ValueError: the model takes no tokens, the folder has no tokenizer, or the text is too
            short.
    """
    if getattr(model, "main_input_name", None) != "input_ids":
        raise ValueError(f"text goes with a model that takes tokens, got {type(model).__name__}; "
                         "give images, or a task file")
    tokenizer = _tokenizer(Path(folder))
    content = _read(Path(text)) if text is not None else SENTENCES
    config: Any = model.config
    known = getattr(config, "max_position_embeddings", None) or length
    length = min(length, int(known))
    if "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__:
        return _windows(tokenizer, content, length)
    found = _sentences(content)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    made = tokenizer(found[:MOST], padding=True, truncation=True, max_length=length,
                     return_tensors="pt")
    sample = {name: made[name] for name in ("input_ids", "attention_mask") if name in made}
    return [sample]


def _windows(tokenizer: Any, content: str, length: int) -> list[dict[str, Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of texts that are longer than the model's context
        ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    count = min(len(ids) // length, MOST)
    if count < 1:
        raise ValueError(f"text must have at least {length} tokens, got {len(ids)}; give more")
    return [{"input_ids": torch.tensor(ids[:count * length]).view(count, length)}]


def _sentences(content: str) -> list[str]:
    """Return the sentences of a text, those of a few letters left out, each once."""
    lines = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+(?=\S)|\n\s*\n", content)]
    return list(dict.fromkeys(line for line in lines if len(line) > 20))


@checks.annotated
def images(model: nn.Module, source: str | Path, folder: str | Path | None = None, *,
           size: int | None = None) -> list[Tensor]:
    """Return the pictures in a folder as samples of a model that takes images.

    They are scaled to the model's size, and normalised as the model's folder says, where it does.

    Args:
        model: what takes them.
        source: a folder with pictures, in it or in folders of it.
        folder: that of the model.
        size: height and width; the config's, or 224.

    Shapes: (samples, 3, size, size).

    Raises:
        ValueError: there are no pictures.
        MissingExtra: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("pictures are read by Pillow; pip install pillow") from error
    paths = sorted(path for path in Path(source).rglob("*")
                   if path.suffix.lower() in PICTURES)[:MOST]
    if not paths:
        raise ValueError(f"{source} must hold pictures ({', '.join(PICTURES)}), got none")
    known = getattr(getattr(model, "config", None), "image_size", None)
    side = size or (known if isinstance(known, int) else 224)
    mean, spread = _normal(folder)
    found = []
    for path in paths:
        with Image.open(path) as picture:
            plain = picture.convert("RGB").resize((side, side))
        pixels = torch.frombuffer(bytearray(plain.tobytes()), dtype=torch.uint8)
        found.append(pixels.view(side, side, 3).permute(2, 0, 1).float() / 255)
    return [(torch.stack(found) - mean) / spread]


def _normal(folder: str | Path | None) -> tuple[Tensor, Tensor]:
    import json
    path = None if folder is None else Path(folder) / "preprocessor_config.json"
    said: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path is not None \
        and path.is_file() else {}
    mean, spread = said.get("image_mean", [0.0] * 3), said.get("image_std", [1.0] * 3)
    return torch.tensor(mean).view(3, 1, 1), torch.tensor(spread).view(3, 1, 1)


def _tokenizer(folder: Path) -> Any:
    if not any(folder.glob("token*")) and not any(folder.glob("vocab*")):
        raise ValueError(f"{folder} has no tokenizer, which text is read by; put it there by "
                         "tokenizer.save_pretrained, or give a task file")
    from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the many loaders of transformers raise
        raise ValueError(f"the tokenizer in {folder} could not be read: "
                         f"{type(error).__name__}: {error}") from error


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"text must be a file, got {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text must be a file of UTF-8 text, got {path}: {error}") from error
