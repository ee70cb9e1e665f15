from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils.parametrize import is_parametrized

from netwright.anatomy.layers import beyond_weights, is_linear, linear_sizes
from netwright.catalogue.facets import method
from netwright.errors import NothingToReshape
from netwright.models.gpt import gpt
from netwright.reshape.change import decided, reshape
from netwright.reshape.vocabulary._tokenizers import ids_of, kept_of, trimmed, used
from netwright.runtime.modes import evaluating, rehearsing
from netwright.signals import apply, tensor_of

__all__ = ["trim_vocabulary"]

OTHER = 32  # of other texts are looked at by the model
TOKENS = 128  # of each


class Letters:
    """A tokenizer of the letters from a on.

    >>> Letters().decode(Letters().encode("face"))
    'face'
    """

    def encode(self, text: str) -> list[int]:
        """Return the numbers of the letters."""
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the letters."""
        return "".join(chr(i + ord("a")) for i in ids)


@method(
    "reshape",
    place="embedding",
    saves=["parameters", "file size", "inference memory"],
    needs=["tokens"],
    keeps_function=False,
    variants={"letters": {"tokenizer": Letters(), "texts": ["badgefchikjl"]}},
    network=lambda: gpt(20, context=8, width=16, depth=2, heads=2),
    batch=lambda: torch.randint(10, (2, 8)),
)
@reshape
@torch.no_grad()
def trim_vocabulary(model: nn.Module, tokenizer: Any, texts: Sequence[str], *,
                    other_texts: Sequence[str] | None = None) -> nn.Module:
    """Return a copy that knows the tokens of some texts alone, with the tokenizer for it.

    E'[i] = E[k_i],  W'[i] = W[k_i],  b'[i] = b[k_i],  k = the tokens that are kept, ascending.

    Kept are the tokens that `texts` are cut into, special tokens, single characters and bytes, and
    the pieces that a kept token is merged from. So `texts` are cut as before, and the model gives
    for them what it gave (of the logits those of kept tokens); any other text is cut into more and
    shorter tokens, which costs quality: how much, on `other_texts`, is on record.

    The result's `tokenizer` is the new one; `netwright.save` writes it beside the model, and
    `netwright.load` reads it. Ties stay, and so does a Hugging Face config's and generation
    config's account of the vocabulary and of special tokens, in the new numbers.

    On record, in `changes(result)[-1].decision["other_text"]`: how many texts were looked at, the
    share of them that is cut as before, how many times as many tokens they have, and for Hugging
    Face models what the model makes of them: of a causal language model the nats for a text over
    those before, of any other the cosine of the mean outputs.

    Args:
        model: a network with an embedding of as many rows as the tokenizer has tokens, or more.
        tokenizer: a fast tokenizer of transformers, one of the library tokenizers (BPE, WordPiece,
            WordLevel, Unigram), or anything with `encode`, which then knows no other tokens at all.
        texts: all that the model must still be good at; some thousand sentences.
        other_texts: texts to see what was lost; where None, a fifth of `texts`, looked at as if
            they had not been given.

    Raises:
        NothingToReshape: there is no embedding of that size, or all tokens are kept.
        ValueError: `texts` is empty or no list of strings.

    Paper: Abdaoui, Pradel, Sigel, 2020, Load What You Need: Smaller Versions of Multilingual BERT.

    >>> model = gpt(20, context=8, width=16, depth=2, heads=2)
    >>> small = trim_vocabulary(model, Letters(), ["cabbage", "bed"])
    >>> small.tokenizer.encode("bed"), small(torch.tensor([[1, 4, 3]])).shape
    ([1, 4, 3], torch.Size([1, 3, 6]))
    """
    if isinstance(texts, str) or not texts or not all(isinstance(t, str) for t in texts):
        raise ValueError("texts must be a list of at least one string, got "
                         f"{type(texts).__name__} of {len(texts)}; some thousand sentences are a "
                         "good number")
    if not callable(getattr(tokenizer, "encode", None)) or isinstance(tokenizer, str):
        raise TypeError("tokenizer must turn texts into numbers by its encode, as those of "
                        f"transformers do, got {type(tokenizer).__name__}; "
                        "AutoTokenizer.from_pretrained(folder) loads one")
    rows, embeddings, heads = _tables(model, tokenizer)
    kept = [i for i in kept_of(tokenizer, used(tokenizer, texts)) if i < rows]
    if len(kept) == rows:
        raise NothingToReshape(f"all {rows} tokens of the model are kept for these texts; give "
                               "those alone that the model must still be good at")
    decision = {"kept": kept, "rows": rows, "embeddings": embeddings, "heads": heads,
                "biases": _biases(model, rows, heads)}
    decision["other_text"] = _on_other_text(model, tokenizer, texts, other_texts, decision)
    return decided(decision, alike=False, tokenizer=trimmed(tokenizer, kept))


@trim_vocabulary.applies
@torch.no_grad()
def _trimmed(model: nn.Module, decision: Mapping[str, Any], tokenizer: Any = None) -> nn.Module:
    result: Any = model
    kept = decision["kept"]
    number = {old: new for new, old in enumerate(kept)}
    names = [f"{name}.weight" for name in (*decision["embeddings"], *decision["heads"])]
    for name in (*names, *decision["biases"]):
        _take(model, name, kept)
    for name in decision["embeddings"]:
        table: Any = model.get_submodule(name)
        table.num_embeddings = len(kept)
        if table.padding_idx is not None:
            table.padding_idx = number.get(table.padding_idx)
    for name in decision["heads"]:
        head: Any = model.get_submodule(name)
        head.out_features = len(kept)
    for module in model.modules():
        if getattr(module, "vocab_size", None) == decision["rows"]:
            module.vocab_size = len(kept)  # type: ignore[assignment]
    for holder in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        _renumber(holder, number, decision["rows"])
    if tokenizer is not None:
        result.tokenizer = tokenizer
    return result


def _take(model: nn.Module, name: str, kept: Sequence[int]) -> None:
    """Leave some rows of a parameter, wherever the same parameter is."""
    before = model.get_parameter(name)
    if len(before) == len(kept):  # tied to one that was done before
        return
    rows = torch.as_tensor(kept, device=before.device)
    after = Parameter(before.detach()[rows], before.requires_grad)
    for module in model.modules():
        for own, parameter in module._parameters.items():
            if parameter is before:
                module._parameters[own] = after


def _renumber(said: Any, number: Mapping[int, int], rows: int) -> None:
    """Tell a config, and those inside it, of the new vocabulary."""
    if said is None:
        return
    for name, value in list(vars(said).items()):
        if name == "vocab_size" and value == rows:
            said.vocab_size = len(number)
        elif name.endswith(("_token_id", "_tokens", "_token_ids")) and value is not None:
            setattr(said, name, _new(value, number))
        elif hasattr(value, "to_diff_dict") and value is not said:
            _renumber(value, number, rows)


def _new(value: Any, number: Mapping[int, int]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(new for each in value if (new := _new(each, number)) is not None)
    return number.get(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _tables(model: Any, tokenizer: Any) -> tuple[int, list[str], list[str]]:
    """Return how many rows the embedding has, and the names of tables and of heads."""
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else getattr(
        tokenizer, "get_vocab_size", lambda: 1)()
    asked = getattr(model, "get_input_embeddings", None)
    try:
        own = asked() if callable(asked) else None
    except (NotImplementedError, AttributeError):  # as models of images do
        own = None
    tables = {name: m for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    fit = [m for m in tables.values() if m.num_embeddings >= size]
    table = own if isinstance(own, nn.Embedding) else max(
        fit, key=lambda m: m.num_embeddings, default=None)
    if table is None or table.num_embeddings < size:
        raise NothingToReshape(f"{type(model).__name__} has no embedding of {size} rows, as the "
                               "tokenizer has tokens; give the tokenizer that the model was "
                               "trained with")
    rows = table.num_embeddings
    embeddings = [name for name, m in tables.items() if m is table or m.weight is table.weight]
    output = getattr(model, "get_output_embeddings", lambda: None)()
    heads = [name for name, m in model.named_modules() if is_linear(m)
             and linear_sizes(m)[1] == rows and (
                 m is output or m.weight is table.weight or output is None)]
    for name in (*embeddings, *heads):
        part = model.get_submodule(name)
        why = "a parametrized weight" if is_parametrized(part) else beyond_weights(part)
        if why:
            raise NothingToReshape(f"{name!r} has {why}, so that its rows cannot be taken; remove "
                                   "the hooks or parametrizations first")
    return rows, embeddings, heads


def _biases(model: nn.Module, rows: int, heads: Sequence[str]) -> list[str]:
    """Return the biases of heads, those included that stand beside them."""
    return [name for name, p in model.named_parameters() if p.ndim == 1 and len(p) == rows
            and (name.rpartition(".")[0] in heads or name.rpartition(".")[2] == "bias")]


def _on_other_text(model: nn.Module, tokenizer: Any, texts: Sequence[str],
                   other: Sequence[str] | None, decision: Mapping[str, Any]) -> dict[str, Any]:
    """Return what becomes of texts that had no say in which tokens are kept."""
    kept = decision["kept"]
    if other is None:
        seen = [text for i, text in enumerate(texts) if i % 5 != 4]
        other = list(texts[4::5])
        kept = [i for i in kept_of(tokenizer, used(tokenizer, seen)) if i < decision["rows"]]
    cut = trimmed(tokenizer, kept)
    pairs = []
    for text in other:
        try:
            pairs.append((ids_of(tokenizer, text), [kept[i] for i in ids_of(cut, text)]))
        except ValueError:  # a tokenizer that has no other way to write it
            continue
    said: dict[str, Any] = {"texts": len(other), "written": len(pairs)}
    if pairs:
        said["cut as before"] = sum(a == b for a, b in pairs) / len(pairs)
        said["tokens"] = sum(len(b) for _, b in pairs) / max(1, sum(len(a) for a, _ in pairs))
        said |= _quality(model, pairs)
    return said


def _quality(model: Any, pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, float]:
    """Return what the model makes of texts by the tokens before, and by those that are left.

    Since rows are only taken, the model that was given says it for both.
    """
    if not hasattr(model, "config"):
        return {}
    causal = callable(getattr(model, "can_generate", None)) and model.can_generate()
    found = []
    with evaluating(model), rehearsing(model):
        for before, after in islice(((a, b) for a, b in pairs if min(len(a), len(b)) > 1), OTHER):
            try:
                outputs = [_output(model, ids) for ids in (before, after)]
            except Exception:  # a model that takes more than tokens
                return {}
            found.append([_nats(y, ids) for y, ids in zip(outputs, (before, after), strict=True)]
                         if causal else [_cosine(*(y.flatten(0, -2).mean(0) for y in outputs)), 1])
    if not found:
        return {}
    name = "nats" if causal else "cosine"
    return {name: sum(a for a, _ in found) and (
        sum(b for _, b in found) / sum(a for a, _ in found) if causal
        else sum(a for a, _ in found) / len(found))}


def _output(model: Any, ids: list[int]) -> Tensor:
    device = next(model.parameters()).device
    return tensor_of(apply(model, torch.tensor([ids[:TOKENS]], device=device))).double()


def _nats(logits: Tensor, ids: list[int]) -> float:
    target = torch.tensor(ids[1:TOKENS], device=logits.device)
    return float(nn.functional.cross_entropy(logits[0, :-1], target, reduction="sum"))


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a, b, dim=0))
