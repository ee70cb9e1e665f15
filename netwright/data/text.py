import torch
from torch import Tensor

from netwright import checks
from netwright.data._folder import locate
from netwright.data.images import Split
from netwright.errors import MissingData

__all__ = ["CHARACTERS", "characters", "pydoc_text", "tinyshakespeare"]

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # a new line, then printable ASCII


@checks.annotated
def pydoc_text() -> str:
    """Return the English text on Python's syntax that ships with CPython, about 450,000 characters.

    Its wording differs a little between versions of Python.

    >>> "statement" in pydoc_text()
    True
    """
    from pydoc_data.topics import topics
    return "\n".join(topics[name] for name in sorted(topics))


@checks.annotated
def tinyshakespeare() -> str:
    """Return about a million characters of Shakespeare from `NETWRIGHT_DATA/tinyshakespeare`.

    Raises:
        MissingData: the file is missing or is not text.
    """
    path = locate("tinyshakespeare", "input.txt", source=_SHAKESPEARE)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MissingData(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); "
                          f"{_SHAKESPEARE}") from error


@checks.annotated
def characters(text: str, *, context: int = 64, test: float = 0.1) -> Split:
    """Cut `text` into windows of `context` characters, each with the character that follows.

    The last part of the text is held out. A character outside `CHARACTERS` is left out.

    Shapes: x (windows, context) and y (windows, context) of int64, places in `CHARACTERS`.

    Raises:
        ValueError: the text is too short for one window in each part.

    >>> part = characters("to be or not to be", context=4, test=0.5)
    >>> "".join(CHARACTERS[i] for i in part.x_train[0])
    'to b'
    >>> "".join(CHARACTERS[i] for i in part.y_train[0])
    'o be'
    """
    codes = _codes(text)
    held_out = int(len(codes) * test)
    parts = codes[:len(codes) - held_out], codes[len(codes) - held_out:]
    for part in parts:
        if len(part) <= context:
            raise ValueError(f"text must give more than context={context} characters to each part, "
                             f"got {len(part)} with test={test}; use a longer text")
    train, rest = (_windows(part, context) for part in parts)
    return Split(*train, *rest)


_SHAKESPEARE = "get the file input.txt of tinyshakespeare (Karpathy's char-rnn)"


def _codes(text: str) -> Tensor:
    place = {character: i for i, character in enumerate(CHARACTERS)}
    return torch.tensor([place[character] for character in text if character in place])


def _windows(codes: Tensor, context: int) -> tuple[Tensor, Tensor]:
    windows = (len(codes) - 1) // context
    x = codes[:windows * context].view(windows, context)
    y = codes[1:windows * context + 1].view(windows, context)
    return x, y
