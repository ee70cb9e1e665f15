"""An inspection as a page that needs no network."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from netwright import checks
from netwright.advise.applicable import Applicable
from netwright.advise.inspect import FIGURES, Inspection, Share
from netwright.report._figures import PALETTE
from netwright.report._writing import write_page
from netwright.runtime.written import plain

MEANINGS = {
    "parameters": ("Parameters", "Numbers that are learned; one of several names counts once."),
    "bytes": ("Bytes", "Of parameters and buffers, as they are in memory."),
    "flops": ("FLOPs", "Operations of matrix products, convolutions and attention in one forward "
                       "pass; a multiplication and an addition are two."),
    "seconds": ("Time", "Of the operations of one forward pass, median of several; the total is "
                        "that of a pass that nobody watches."),
    "saved_bytes": ("Saved for backward", "What a pass in training would keep for its backward."),
    "peak_bytes": ("Peak memory", "What is alive at the moment of a forward pass at which most "
                                  "is: weights, and what operations have made.")}


@checks.annotated
def inspection(found: Inspection, path: str | Path, changes: Applicable | None = None) -> Path:
    """Write an inspection as one self-contained page with a treemap and bars; return its path.

    Args:
        found: what `nw.inspect` returned.
        path: where the page goes.
        changes: what could be done, as `nw.applicable` returned it.
    """
    kinds = [kind.name for kind in found.kinds]
    payload = {
        "palette": PALETTE, "kinds": kinds, "tree": _tree(found.parts),
        "figures": [{"key": key, "title": title} for key, (title, _) in MEANINGS.items()],
        "byKind": _shares(found.kinds), "byStage": _shares(found.stages)}
    return write_page(
        path, "_inspection.html", payload, title=escape(f"What is in {plain(found.network)}"),
        summary=escape(f"One forward pass on {found.given}"), said=_lines(found.said),
        unusual=f'<ul class="findings">{_lines(found.unusual)}</ul>' if found.unusual else
        '<p class="soft">Nothing.</p>',
        switches="".join(f'<button data-figure="{key}">{title.lower()}</button>'
                         for key, (title, _) in MEANINGS.items()),
        key="".join(f'<span><span class="swatch" data-kind="{kind}"></span>{kind}</span>'
                    for kind in kinds),
        table=_table(found), changes=_changes(changes or ()),
        glossary="<dl>" + "".join(f"<dt>{title}</dt><dd>{meaning}</dd>"
                                  for title, meaning in MEANINGS.values()) + "</dl>")


def _tree(parts: Sequence[Share]) -> dict[str, Any]:
    """Return the modules as a tree by their dotted names; what runs in several kinds is split."""
    names = {part.name for part in parts}
    around = {".".join(name.split(".")[:i]) for name in names
              for i in range(1, name.count(".") + 1)}
    nodes: dict[str, tuple[str, str, str, Share | None]] = {
        name: (name.rpartition(".")[2], name.rpartition(".")[0], "", None)
        for name in sorted(around)}
    for part in parts:
        name, kind = part.name, part.kind
        if name in around or not name or sum(other.name == name for other in parts) > 1:
            nodes[f"{name} ({kind})"] = (kind, name if name in around else "", kind, part)
        else:
            nodes[name] = (name.rpartition(".")[2], name.rpartition(".")[0], kind, part)
    held = [node[3] for node in nodes.values()]
    return {"ids": [*map(_label, nodes)], "labels": [_label(node[0]) for node in nodes.values()],
            "parents": [_label(node[1]) for node in nodes.values()],
            "kinds": [node[2] for node in nodes.values()],
            "values": {key: [getattr(part, key) if part else 0 for part in held]
                       for key in FIGURES},
            "text": [{key: write(getattr(part, key)) for key, write in FIGURES.items()}
                     if part else None for part in held]}


def _shares(shares: Iterable[Share]) -> list[dict[str, Any]]:
    shares = [*shares]
    whole = {key: sum(getattr(share, key) for share in shares) for key in FIGURES}
    return [{"name": _label(share.name), "shares": {
        key: 100 * getattr(share, key) / whole[key] if whole[key] else 0 for key in FIGURES}}
        for share in shares]


def _table(found: Inspection) -> str:
    head = "".join(f'<th scope="col">{title}</th>' for title in
                   ("Part", *(title for title, _ in MEANINGS.values())))
    rows = "".join(
        f"<tr><td>{escape(plain(share.name))}</td>" + "".join(
            f"<td>{write(getattr(share, key))}</td>" for key, write in FIGURES.items()) + "</tr>"
        for share in (*found.kinds, found.total))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _changes(changes: Sequence[Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(plain(change.method.name))}<div class=note>"
        f"{escape(plain(change.method.gist))}</div></td>"
        f'<td style="white-space:normal">{escape(plain(change.why))}</td>'
        f'<td style="white-space:normal">'
        f"{escape(plain(', '.join(change.method.facets.saves)))}</td></tr>"
        for change in changes)
    return (f"<details><summary>{len(changes)} changes apply to this network</summary>"
            '<div class="scroll"><table><thead><tr><th>Change</th><th>Where</th><th>Saves</th>'
            f"</tr></thead><tbody>{rows}</tbody></table></div></details>" if rows else
            '<p class="soft">netwright applicable lists it.</p>')


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"<li>{escape(line)}</li>" for line in lines)


def _label(text: str) -> str:
    """Return a text as Plotly shows it, without markup or formulas."""
    return escape(plain(text)).replace("$", "&#36;")
