"""Shows the house's docstrings as they are meant: formulas and examples line by line."""

import re
from typing import Any

import griffe

FORMULA = re.compile(r"`?(?!Shapes:)\S+(:\s+\S+)? :?= ")
LABEL = re.compile(r"(Shapes|Paper|Papers): ")


class Docstrings(griffe.Extension):
    """Turns the paragraphs of a docstring that Markdown would run together into blocks."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of `obj` before it is parsed."""
        if obj.docstring is not None:
            paragraphs = re.split(r"\n{2,}", obj.docstring.value)
            obj.docstring.value = "\n\n".join(map(rewritten, paragraphs))


def rewritten(paragraph: str) -> str:
    """Return a paragraph as the Markdown that shows it.

    >>> print(rewritten("y = W x;  e = dL/dy."))
    ```text
    y = W x
    e = dL/dy.
    ```
    """
    if paragraph.startswith(">>> "):
        return f"```pycon\n{paragraph}\n```"
    if FORMULA.match(paragraph):
        lines = re.sub(r";(  +|$)", "\n", paragraph, flags=re.MULTILINE).replace("`", "")
        return "```text\n" + re.sub(r"\n{2,}", "\n", lines).strip() + "\n```"
    if label := LABEL.match(paragraph):
        said = paragraph[label.end():].replace("*", "\\*")
        return f"**{label[1]}:** {said}"
    return paragraph
