"""An advice as a page that needs no network."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from netwright import checks
from netwright.catalogue.papers import paper
from netwright.report._figures import PALETTE, pareto
from netwright.report._writing import write_page
from netwright.runtime.units import bytes_text, count_text, seconds_text
from netwright.runtime.written import plain

FORMAT = 1
TITLES: dict[str, tuple[str, Callable[[float], str]]] = {
    "size": ("Size on disk", bytes_text), "inference_time": ("Time of an answer", seconds_text),
    "inference_memory": ("Peak memory of an answer", bytes_text),
    "training_memory": ("Peak memory of a training step", bytes_text),
    "training_time": ("Time of a training step", seconds_text),
    "flops": ("FLOPs of an answer", count_text), "parameters": ("Parameters", count_text)}


@checks.annotated
def advice(found: Mapping[str, Any], path: str | Path) -> Path:
    """Write an advice as one self-contained page; return its path.

    It shows the front with the original and the limits, what each step of a recipe gave and cost,
    what became of each layer, the papers and the evidence of each method, and what was set aside.

    Args:
        found: an advice as plain data, as `nw.advise` writes it to `advice.json`.
        path: where the page goes.

    Raises:
        ValueError: `found` is no advice, or one of another format.
    """
    if found.get("format") != FORMAT or "points" not in found:
        raise ValueError(f"found must be an advice of format {FORMAT}, got "
                         f"{checks.seen(found.get('format'))}; give what advice.json holds")
    points = found["points"]
    shown = [key for key in TITLES if any(key in point["shares"] for point in points)]
    first = [key for key in found["resources"] if key in shown]
    resources = [*first, *(key for key in shown if key not in first)]
    chosen = found.get("recommended")
    chosen = chosen if chosen is not None else points[-1]["number"] if points else 0
    became = sorted({_became(layer) for point in points for layer in point["layers"]}
                    - {"untouched", "removed"})
    payload = {
        "palette": PALETTE, "became": [*map(_label, became)], "chosen": chosen,
        "keep": found.get("keep"),
        "quality": _label(f"Quality: {found['quality']['name']}"),
        "resources": [_resource(key, found) for key in resources],
        "points": [_point(point, resources) for point in points],
        "tried": [{"name": _label(one["recipe"]), "quality": one["quality"],
                   "shares": one["shares"]} for one in found["tried"]]}
    model = found["model"]
    return write_page(
        path, "_advice.html", payload, title=escape(plain(f"What to change in {model['name']}")),
        summary=_summary(found), verdict=escape(plain(found["verdict"])), findings=_findings(found),
        switches="".join(f'<button data-resource="{key}">{TITLES[key][0].lower()}</button>'
                         for key in resources),
        table=_table(points, resources, chosen), points="".join(map(_details, points)),
        methods=_methods(found["methods"]), failed=_listed(
            (one["recipe"], one["reason"]) for one in found["failed"]),
        aside=_listed((one["name"], one["why"]) for one in found["aside"]),
        settings=_settings(found))


# The data of the plots.

def _resource(key: str, found: Mapping[str, Any]) -> dict[str, Any]:
    measured = [(point["shares"].get(key, math.nan), point["quality"]["value"])
                for point in found["points"]]
    limit = next((want["share"] for want in found["wants"] if want["resource"] == key), None)
    return {"key": key, "title": TITLES[key][0], "limit": limit, "front": pareto(measured)}


def _point(point: Mapping[str, Any], resources: Sequence[str]) -> dict[str, Any]:
    quality, time = point["quality"], point.get("time") or {}
    middle = time.get("median", math.nan)
    return {
        "number": point["number"], "name": _label(point["recipe"]), "original": not point["number"],
        "quality": quality["value"], "low": quality["low"], "high": quality["high"],
        "late": 100 * (time.get("high", math.nan) - middle),
        "early": 100 * (middle - time.get("low", math.nan)), "shares": point["shares"],
        "meets": point["meets"], "recommended": point["recommended"],
        "text": {key: _figure(key, point) for key in resources}, "layers": _layers(point)}


def _layers(point: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the layers as a tree by their dotted names, each with what it became."""
    nodes: dict[str, tuple[str, float, str, str]] = {}
    for layer in point["layers"]:
        name = layer["name"] or "(the network)"
        parts = name.split(".")
        for i in range(1, len(parts)):
            nodes.setdefault(".".join(parts[:i]), (parts[i - 1], 0, "", ""))
        said = (f"{layer['kind']}: {bytes_text(layer['bytes'])} → "
                f"{bytes_text(layer['bytes_after'])}, {layer['became']}")
        nodes[name] = (parts[-1], layer["bytes"], said, _became(layer))
    return {"ids": [*map(_label, nodes)], "labels": [_label(node[0]) for node in nodes.values()],
            "parents": [_label(name.rpartition(".")[0]) for name in nodes],
            "values": [node[1] for node in nodes.values()],
            "text": [_label(node[2]) for node in nodes.values()],
            "became": [_label(node[3]) for node in nodes.values()]}


def _became(layer: Mapping[str, Any]) -> str:
    return str(layer["became"]).partition(" of ")[0]


def _label(text: str) -> str:
    """Return a text as Plotly shows it, without markup or formulas."""
    return escape(plain(text)).replace("$", "&#36;")


# What is written.

def _summary(found: Mapping[str, Any]) -> str:
    said = [found["model"]["class"], f"{len(found['points']) - 1} changed models measured",
            f"{len(found['tried'])} recipes tried",
            f"{seconds_text(found['seconds'])} of a budget of {seconds_text(found['budget'])}"]
    return escape(plain(" · ".join(said)))


def _findings(found: Mapping[str, Any]) -> str:
    wants = ", ".join(want["written"] for want in found["wants"]) or "no limit"
    quality = found["quality"]
    lines = [f"Asked for: {wants}; quality at least {found['keep']:g} of the original's.",
             f"Quality is the {quality['means']}"
             + ("." if quality["labels"] else ", which needs no labels.")]
    point = next((p for p in found["points"] if p["recommended"]), None)
    if point is not None and point["number"]:
        costs = ", ".join(f"{TITLES[key][0].lower()} {_percent(share)}"
                          for key, share in point["shares"].items() if key in TITLES)
        lines.append(f"Recommended: {point['number']}, {point['recipe']}. Of the original's: "
                     f"{costs}; quality {_quality(point)}.")
    return "".join(f"<li>{escape(plain(line))}</li>" for line in lines)


def _table(points: Sequence[Mapping[str, Any]], resources: Sequence[str], chosen: int) -> str:
    head = "".join(f'<th scope="col">{title}</th>' for title in
                   ("Recipe", "Quality", *(TITLES[key][0] for key in resources)))
    rows = "".join(_row(point, resources, point["number"] == chosen) for point in points)
    return (f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
            '<p class="soft">Quality with its 95 % interval; shares of the original.</p>')


def _row(point: Mapping[str, Any], resources: Sequence[str], chosen: bool) -> str:
    notes = [word for word, true in (
        ("recommended", point["recommended"]), ("meets all limits", point["meets"]),
        ("beaten by another", point["dominated"]), ("slower than the original", point["slower"]),
        ("the plain change of dtype", point["plain_dtype"])) if true]
    notes += [f"{miss['resource']} {miss['is']:.3g} misses {miss['limit']:.3g}"
              for miss in point["misses"]] if point["number"] else []
    cells = (f"<td>{point['number']} · {escape(plain(point['recipe']))}"
             f'<div class="note">{escape(plain("; ".join(notes)))}</div></td>'
             f"<td>{escape(_quality(point))}</td>")
    for key in resources:
        share = point["shares"].get(key)
        bar = "" if share is None else (f'<span class="bar"><i style="width:'
                                        f'{min(100, 100 * share):.1f}%"></i></span>')
        cells += (f"<td>{escape(_figure(key, point))}"
                  f"<small>{_percent(share) if share is not None else ''}</small>{bar}</td>")
    return (f'<tr data-point="{point["number"]}" tabindex="0" aria-selected="'
            f'{str(chosen).lower()}">{cells}</tr>')


def _details(point: Mapping[str, Any]) -> str:
    """Say of one changed model what each step gave and cost, and what became of its layers."""
    title = escape(plain(point["recipe"]))
    said = "" if not point["loads"] else (
        f'<p class="soft">In the folder {escape(plain(point["folder"]))}; it is loaded by '
        f"{escape(plain(point['loads']))}.</p>")
    steps = "".join(map(_step, point["steps"]))
    shown = (f'<div class="scroll"><table><thead><tr><th>Step</th><th>Quality after it</th>'
             f"<th>Size</th><th>Time</th><th>Memory</th><th>Evidence</th></tr></thead>"
             f"<tbody>{steps}</tbody></table></div>") if steps else ""
    picture = ""
    if point["layers"]:
        kinds = list(dict.fromkeys(map(_became, point["layers"])))
        picture = ("<br><h3>What became of each layer</h3>"
                   '<p class="soft">Areas are the original\'s bytes.</p>'
                   f'<div class="plot tall" data-plot="layers"></div>{_key(kinds)}'
                   + _untouched(point["untouched"]))
    return (f'<section class="card" data-shown="{point["number"]}" hidden><h2>'
            f"{point['number']} · {title}</h2>{said}{shown}{picture}</section>")


def _key(kinds: Sequence[str]) -> str:
    return '<p class="key">' + "".join(
        f'<span><span class="swatch" data-became="{escape(_label(kind))}"></span>'
        f"{escape(plain(kind))}</span>" for kind in kinds) + "</p>"


def _step(step: Mapping[str, Any]) -> str:
    after = step.get("after") or {}
    shares = after.get("shares", {})
    papers = "; ".join(filter(None, map(_paper, step["papers"])))
    keeps = " It keeps the function." if step.get("keeps_function") else ""
    cells = [f"{after['quality']:.4f}" if after.get("quality") is not None else "–",
             *(_percent(shares[key]) if key in shares else "–"
               for key in ("size", "inference_time", "inference_memory")),
             escape(plain(", ".join(step["evidence"]) or "none yet"))]
    return (f"<tr><td>{escape(plain(step['text']))}<div class=note>"
            f"{escape(plain(step['gist'] + keeps))}<br>{papers}</div></td>"
            + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")


def _paper(id: str) -> str:
    try:
        found = paper(id)
    except ValueError:  # of a catalogue that is newer than this one
        return escape(plain(id))
    return escape(plain(found.title))


def _untouched(layers: Sequence[Mapping[str, Any]]) -> str:
    if not layers:
        return ""
    rows = "".join(f"<li>{escape(plain(layer['name'] or 'the network itself'))}: "
                   f"{bytes_text(layer['bytes'])}, {_percent(layer['share'])}</li>"
                   for layer in sorted(layers, key=lambda layer: -layer["bytes"]))
    whole = sum(layer["share"] for layer in layers)
    return (f"<details><summary>{len(layers)} layers left as they were, {_percent(whole)} of the "
            f'bytes</summary><ul class="list">{rows}</ul></details>')


def _methods(methods: Sequence[Mapping[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td>{escape(plain(m['name']))}<div class=note>{escape(plain(m['gist']))}<br>"
        f"{'; '.join(filter(None, map(_paper, m['papers'])))}</div></td>"
        f'<td style="white-space:normal">{escape(plain(m["where"]))}</td>'
        f"<td>{m['settings']}</td><td>{escape(plain(', '.join(m['evidence']) or 'none yet'))}</td>"
        "</tr>" for m in methods)
    return (f'<div class="scroll"><table><thead><tr><th>Method</th><th>Where</th><th>Settings</th>'
            f"<th>Evidence</th></tr></thead><tbody>{rows}</tbody></table></div>"
            if rows else '<p class="soft">No method applies.</p>')


def _listed(pairs: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"<li><b>{escape(plain(name))}</b>: {escape(plain(why))}</li>"
                   for name, why in pairs)
    return f'<ul class="list">{rows}</ul>' if rows else '<p class="soft">Nothing.</p>'


def _settings(found: Mapping[str, Any]) -> str:
    data = {"samples": ", ".join(f"{name} {count}" for name, count in found["data"].items()),
            "machine": ", ".join(f"{name} {value}" for name, value in found["machine"].items()),
            "netwright": found["netwright"]}
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(plain(said))}</dd>"
                            for name, said in data.items()) + "</dl>"


def _figure(key: str, point: Mapping[str, Any]) -> str:
    value = point["figures"].get(key)
    return "–" if value is None else TITLES[key][1](value)


def _quality(point: Mapping[str, Any]) -> str:
    quality = point["quality"]
    if not point["number"]:
        return f"{quality['value']:.4f}"
    return f"{quality['value']:.4f} ({quality['low']:.4f} to {quality['high']:.4f})"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
