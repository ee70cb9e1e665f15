"""Tokenizers of fewer tokens, which cut texts as those that they were made from."""

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from netwright import checks
from netwright.errors import NothingToReshape


class Renumbered:
    """A tokenizer with other numbers for the tokens that are kept; it has no others.

    `tokenizer` has `encode`, and perhaps `decode`.

    Raises:
        ValueError: a text has a token that was not kept.

    >>> class Letters:
    ...     def encode(self, text):
    ...         return [ord(letter) for letter in text]
    >>> Renumbered(Letters(), [97, 99]).encode("caca")
    [1, 0, 1, 0]
    """

    def __init__(self, tokenizer: Any, kept: Sequence[int]) -> None:
        self.tokenizer, self.kept = tokenizer, list(kept)
        self.number = {old: new for new, old in enumerate(self.kept)}

    def encode(self, text: str) -> list[int]:
        """Return the numbers of the tokens of a text."""
        ids = list(self.tokenizer.encode(text))
        gone = next((i for i in ids if i not in self.number), None)
        if gone is not None:
            raise ValueError(f"text must be of the {len(self.kept)} tokens that were kept, got "
                             f"token {gone} in {checks.seen(text)}; trim by texts that have it")
        return [self.number[i] for i in ids]

    def decode(self, ids: Iterable[int]) -> Any:
        """Return the text of tokens."""
        return self.tokenizer.decode([self.kept[int(i)] for i in ids])

    def __len__(self) -> int:
        return len(self.kept)


def used(tokenizer: Any, texts: Iterable[str]) -> set[int]:
    """Return the tokens that texts are made of."""
    return {int(i) for text in texts for i in ids_of(tokenizer, text)}


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text, those included that a tokenizer puts around it."""
    found = tokenizer.encode(text)
    return [int(i) for i in getattr(found, "ids", found)]


def kept_of(tokenizer: Any, tokens: Collection[int]) -> list[int]:
    """Return those of a tokenizer's tokens that must stay where `tokens` do, in their order.

    Those are the special ones, single characters and bytes, by which every other text can still be
    written, and the pieces that a kept token is merged from.
    """
    backend = _backend(tokenizer)
    if backend is None:
        return sorted(tokens)
    said = json.loads(backend.to_str())
    vocabulary = _vocabulary(said["model"])
    names = {number: token for token, number in vocabulary.items()}
    added = {entry["id"]: entry["content"] for entry in said["added_tokens"]}
    kept = {names[i] for i in tokens if i in names} | {
        token for token in vocabulary if _is_fallback(token, said["model"])}
    kept |= {token for token in added.values() if token in vocabulary}
    unknown = said["model"].get("unk_token")
    kept |= {unknown} & vocabulary.keys()
    if said["model"]["type"] == "Unigram" and said["model"].get("unk_id") is not None:
        kept.add(names[said["model"]["unk_id"]])
    if said["model"]["type"] == "BPE":
        kept = _with_pieces(kept, vocabulary, said["model"]["merges"])
    return sorted({vocabulary[token] for token in kept} | set(added))


def trimmed(tokenizer: Any, kept: Sequence[int]) -> Any:
    """Return a tokenizer that has the tokens `kept` alone, numbered from 0 in that order."""
    backend = _backend(tokenizer)
    if backend is None:
        return Renumbered(tokenizer, kept)
    said = json.loads(backend.to_str())
    number = {old: new for new, old in enumerate(kept)}
    names = {name: number[old] for name, old in _vocabulary(said["model"]).items() if old in number}
    model = said["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][old] for old in kept if old < len(model["vocab"])]
        unknown = model.get("unk_id")
        model["unk_id"] = None if unknown is None else number[unknown]
    else:
        model["vocab"] = names
    if model["type"] == "BPE":
        model["merges"] = [merge for merge in model["merges"]
                           if all(part in names for part in (*_pair(merge), _joined(merge)))]
    for entry in said["added_tokens"]:
        entry["id"] = number[entry["id"]]
    _renumber(said["post_processor"], number)
    if said.get("padding"):
        said["padding"]["pad_id"] = number[said["padding"]["pad_id"]]
    made = type(backend).from_str(json.dumps(said))
    if backend is tokenizer:
        return made
    result = deepcopy(tokenizer)
    result._tokenizer = made
    for name, value in (("_vocab", names), ("_merges", model.get("merges"))):
        if isinstance(getattr(result, name, None), (dict, list)):
            setattr(result, name, value)
    return result


def _backend(tokenizer: Any) -> Any:
    """Return the tokenizer of the library tokenizers behind one, None where there is none."""
    found = getattr(tokenizer, "backend_tokenizer", None)
    return found if found is not None else tokenizer if hasattr(tokenizer, "to_str") else None


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    if model["type"] == "Unigram":
        return {token: i for i, (token, _) in enumerate(model["vocab"])}
    if model["type"] not in ("BPE", "WordPiece", "WordLevel"):
        raise NothingToReshape(f"tokenizer is a {model['type']}, whose tokens cannot be told to go "
                               "by themselves; it must be a BPE, WordPiece, WordLevel or Unigram")
    return dict(model["vocab"])


def _is_fallback(token: str, model: Mapping[str, Any]) -> bool:
    """Return whether a token is a character or a byte, with a mark of its place in a word."""
    if model["type"] == "WordLevel":
        return False
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    bare = token.removeprefix(prefix).removesuffix(suffix) if token not in (prefix, suffix) else ""
    return byte or len(bare) == 1 or (len(bare) == 2 and bare[0] == "▁")


def _with_pieces(kept: set[str], vocabulary: Mapping[str, int], merges: Sequence[Any]) -> set[str]:
    """Return tokens with all that they can be merged from."""
    made: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for merge in merges:
        made[_joined(merge)].append(_pair(merge))
    waiting, found = list(kept), set(kept)
    while waiting:
        for piece in {piece for pair in made[waiting.pop()] for piece in pair} - found:
            found.add(piece)
            waiting.append(piece)
    return found & vocabulary.keys()


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _joined(merge: Any) -> str:
    return "".join(_pair(merge))


def _renumber(said: Any, number: Mapping[int, int]) -> None:
    """Write other numbers into what puts special tokens around a text, in place."""
    if isinstance(said, list):
        for entry in said:
            _renumber(entry, number)
    elif isinstance(said, dict):
        for key, value in said.items():
            if key in ("sep", "cls") and isinstance(value, list):
                said[key] = [value[0], number[value[1]]]
            elif key == "ids":
                said[key] = [number[i] for i in value]
            else:
                _renumber(value, number)
