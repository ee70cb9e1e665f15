"""Models on disk as Hugging Face folders: the model, an input of it, and a text to train it on."""

import hashlib
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.data import Split
from netwright.objectives.losses import cross_entropy
from netwright.reshape.saved import CHANGES, load
from netwright.tasks.task import Task

__all__ = ["example_of", "pretrained", "text_task"]

SENTENCES = ("A network is a chain of layers, and each of them reads what the one before it wrote. "
             "What a layer does can often be said with fewer numbers than it was given.")
LENGTH = 64  # tokens of an example


@checks.annotated
def pretrained(folder: str | Path) -> nn.Module:
    """Return the model in a Hugging Face folder, or in one that `netwright.save` wrote.

    The model is of the class that the folder's `config.json` names, in eval mode, with the dtype
    that its weights have. Nothing is downloaded, and no code from the folder is run.

    Args:
        folder: what `save_pretrained` or `netwright.save` wrote.

    Raises:
        ValueError: the folder holds no model of transformers, or files of it are damaged.
        ImportError: transformers is not installed.

    >>> from tempfile import mkdtemp
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> folder = mkdtemp()
    >>> GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=64)).save_pretrained(
    ...     folder)
    >>> type(pretrained(folder)).__name__
    'GPT2LMHeadModel'
    """
    folder = Path(folder)
    if (folder / CHANGES).is_file():
        return load(folder)
    config = _config(folder)
    import transformers
    named = (config.architectures or [""])[0]
    kind: Any = getattr(transformers, named, None) if named else transformers.AutoModel
    if kind is None:
        raise ValueError(f"{folder}/config.json names the class {named}, which transformers "
                         f"{transformers.__version__} has not; update it, or give "
                         "package.module:name of what builds the model")
    try:
        with _quiet():
            model: nn.Module = kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the many loaders of transformers raise
        raise ValueError(f"{folder} could not be loaded as {named or 'a model'}: "
                         f"{type(error).__name__}: {error}") from error
    return model.eval()


@checks.annotated
def example_of(model: nn.Module, folder: str | Path, text: str | Path | None = None) -> Any:
    """Return an input of a model of transformers: tokens of a text, or an image of noise.

    Tokens are those of the folder's tokenizer, and drawn where it has none.

    Args:
        model: the model, as `pretrained` returns it.
        folder: where its tokenizer is.
        text: a file whose beginning is read; a few words by default.

    Shapes: tokens (1, at most 64); images (1, channels, height, width).

    Raises:
        ValueError: the model takes neither tokens nor images, or `text` is not such a file.
    """
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if main == "input_ids":
        ids = _tokens(folder, config, _read(text) if text else SENTENCES)[None, :_length(config)]
        if getattr(config, "is_encoder_decoder", False):
            return {"input_ids": ids, "decoder_input_ids": ids[:, :8]}
        return ids
    if text is not None:
        raise ValueError(f"text goes with a model that takes tokens; {type(model).__name__} takes "
                         f"{main}")
    if main == "pixel_values":
        sizes = getattr(config, "image_size", None) or 224
        height, width = sizes if isinstance(sizes, (list, tuple)) else (sizes, sizes)
        like = next(model.parameters())
        draw = torch.Generator().manual_seed(0)
        image = torch.randn(1, getattr(config, "num_channels", 3), height, width, generator=draw)
        return image.to(like.dtype)
    raise ValueError(f"what {type(model).__name__} takes ({main}) is not known here; write a task "
                     "file that gives an example")


@checks.annotated
def text_task(folder: str | Path, text: str | Path, *, context: int = 128, epochs: int = 1,
              batch_size: int = 8, learning_rate: float = 5e-5) -> Task:
    """Return the task of going on with a text, for a causal language model in a folder.

    Its network is the model in the folder, fresh each time; windows of the text's tokens are
    samples, whose targets are the next tokens. The last tenth of the text is the test. The metric
    is the bits that a token takes.

    Args:
        folder: a model, as `pretrained` takes it, with its tokenizer.
        text: a file of text.
        context: tokens in a window; fewer where the model takes no more.
        epochs: of each run.
        batch_size: in training.
        learning_rate: where tuning starts.

    Raises:
        ValueError: the folder holds no causal language model, or the text is too short.
    """
    checks.count(1, context=context, epochs=epochs, batch_size=batch_size)
    folder, path = Path(folder), Path(text)
    model = pretrained(folder)
    name = type(model).__name__
    if "CausalLM" not in name and "LMHead" not in name:
        raise ValueError(f"the task of a text goes with a causal language model, got {name} in "
                         f"{folder}; write a task file for it")
    config: Any = model.config
    context = min(context, _length(config, context))
    ids = _tokens(folder, config, _read(path))
    windows = (len(ids) - 1) // context
    if windows < 10:
        raise ValueError(f"text must have at least {10 * context + 1} tokens, got {len(ids)} in "
                         f"{path}; give a longer one, or context={max(1, len(ids) // 20)}")
    x = ids[:windows * context].view(windows, context)
    y = ids[1:windows * context + 1].view(windows, context)
    held = max(1, windows // 10)
    split = Split(x[:-held], y[:-held], x[-held:], y[-held:])
    digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:8]
    return Task(f"{folder.resolve().name} on {path.stem} {digest}", partial(_training, folder),
                split, metric=bits_per_token, higher_is_better=False, epochs=epochs,
                batch_size=batch_size, learning_rate=learning_rate, num_classes=config.vocab_size)


def bits_per_token(scores: Tensor, y: Tensor) -> float:
    """Return the cross-entropy of the next token in bits; targets of -100 do not count."""
    return float(cross_entropy(scores, y)) / math.log(2)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from showing a bar of its own while it loads weights."""
    from transformers.utils import logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _training(folder: Path) -> nn.Module:
    return pretrained(folder).train()


def _config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ValueError(f"{folder} must hold a config.json, as save_pretrained and netwright.save "
                         f"write it, got {held}")
    from transformers import AutoConfig
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # JSON that is damaged, a kind of model that is not known
        raise ValueError(f"{folder}/config.json could not be read as a model's: "
                         f"{type(error).__name__}: {error}") from error


def _tokens(folder: str | Path, config: Any, text: str) -> Tensor:
    """Return the ids of a text, drawn ones where the folder has no tokenizer."""
    tokenizer = _tokenizer(Path(folder))
    if tokenizer is None:
        draw = torch.Generator().manual_seed(0)
        return torch.randint(config.vocab_size, (max(LENGTH, len(text) // 4),), generator=draw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of texts that are longer than the model's context
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(found, dtype=torch.long)


@cache
def _tokenizer(folder: Path) -> Any:
    if not any(folder.glob("token*")) and not any(folder.glob("vocab*")):
        return None
    from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"the tokenizer in {folder} could not be read: "
                         f"{type(error).__name__}: {error}") from error


def _length(config: Any, wanted: int = LENGTH) -> int:
    known = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    return min([wanted, *(length for length in known if isinstance(length, int) and length > 0)])


def _read(path: str | Path) -> str:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"text must be a file, got {path}")
    try:
        found = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text must be a file of UTF-8 text, got {path}: {error}") from error
    if not found.strip():
        raise ValueError(f"text must hold words, got {path}, which is empty")
    return found
