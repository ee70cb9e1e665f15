"""The pages that list methods, and the parts of hand-written pages that do."""

import inspect
import re
import sys
from collections import Counter

from handbook.measured import ORDER, evidence_of, results, rows, verdict
from handbook.pages import (
    PACKAGE,
    called,
    cell,
    folders,
    gist,
    hand_written,
    link,
    page_of,
    pages,
)
from netwright import papers
from netwright.catalogue.facets import KINDS, NEEDS, PLACES, SAVES, Method, methods

METHODS = "methods/index.md"
MOST = 6
WIDE = "---\nhide: [toc]\n---\n\n"  # tables of many columns take the place of the list of headings
_QUOTED = re.compile(r'(\w+)="([^"]*)"')


def entries(inside: str = "") -> list[Method]:
    """Return the methods in a folder, without those that only go with another."""
    return [entry for page in pages() if page.uri.startswith(inside) for entry in page.main
            if entry.facets.kind != "companion"]


def methods_page() -> str:
    """Return the page of every method, which can be filtered."""
    every = entries()
    kinds = [kind for kind in KINDS if any(entry.facets.kind == kind for entry in every)]
    return WIDE + "\n".join([
        "# Methods", "",
        f"{len(every)} methods of {len(kinds)} kinds. A method's name leads to its page, with its "
        "formula, an example, what it costs and what was measured of its paper's claim.", "",
        '<div class="filter" data-columns="kind place saves needs verdict"></div>', "",
        *table(every, METHODS, ["kind", "place", "saves", "needs", "verdict"]), "",
        *(f"**{heading}.** " + "; ".join(f"*{word}*: {meaning}" for word, meaning in words.items())
          + ".\n" for heading, words in {
              "Kinds": {kind: KINDS[kind] for kind in kinds}, "Places": PLACES,
              "What is saved": SAVES, "What is needed": NEEDS}.items()),
        "`netwright find` asks the same on the command line. A verdict is what an experiment "
        "here said to the paper's claim, at a small scale: see the [evidence]"
        f"({link(METHODS, 'measured/evidence.md')}).", ""])


def table(listed: list[Method], uri: str, columns: list[str]) -> list[str]:
    """Return a table of methods; a column in which nothing stands is left out."""
    cells = [{"kind": entry.facets.kind, "place": entry.facets.place,
              "saves": ", ".join(entry.facets.saves), "needs": ", ".join(entry.facets.needs),
              "verdict": verdict(entry)} for entry in listed]
    shown = [column for column in columns if any(row[column] not in ("", "–") for row in cells)]
    return ["| method | what it does | " + "".join(f"{column} | " for column in shown),
            "|---|---|" + "---|" * len(shown),
            *(f"| {named(entry, uri)} | {gist(entry.value)} | "
              + "".join(f"{row[column] or '–'} | " for column in shown)
              for entry, row in zip(listed, cells, strict=True))]


def named(entry: Method, uri: str) -> str:
    """Return a method's name as a link to its page."""
    return f"[`{entry.name.rpartition('.')[2]}`]({link(uri, page_of(entry.name).uri)})"


def folder_page(folder: str) -> str:
    """Return the index of a room or a family: its text, and what is in it."""
    title, what = called(folder)
    text, _ = hand_written(PACKAGE / folder / "index.md")
    uri = f"{folder}/index.md"
    parts = [text or f"# {title}\n\n{what[:1].upper()}{what[1:]}", ""]
    columns = ["place", "saves", "needs", "verdict"]
    for family in folders()[folder]:
        name, holds = called(family)
        parts += [f"## [{name}]({link(uri, family)}/index.md)", "",
                  f"{holds[:1].upper()}{holds[1:]}", "",
                  *table(entries(family + "/"), uri, columns), ""]
    direct = [page for page in pages() if page.uri.rpartition("/")[0] == folder]
    own = [entry for page in direct for entry in page.main if entry.facets.kind != "companion"]
    if own:
        heading = "Others" if folders()[folder] else "What is here"
        parts += [f"## {heading}", "", *table(own, uri, columns), ""]
    other = [page for page in direct if not any(
        entry.facets.kind != "companion" for entry in page.main)]
    if other:
        parts += ["**Beside them:** " + ", ".join(
            f"[{page.title}]({link(uri, page.uri)})" for page in other) + ".", ""]
    return "\n".join(parts)


def measured_map(uri: str) -> str:
    """Return the table of a room's facts and figures: the front matter of its texts, and costs."""
    inside = [page for page in pages() if page.uri.startswith(uri.removesuffix("index.md"))
              and any(entry.facets.kind != "companion" for entry in page.main)]
    tasks = list(dict.fromkeys(task for task, _ in rows()))
    facts = list(dict.fromkeys(fact for page in inside for fact in page.facts))
    parts = [f"What was measured is for `{', '.join(tasks)}`: accuracy after equal tuning; time "
             "and peak memory of a step as multiples of backpropagation's on the same network. A "
             "dash stands where a rule is for something else, as its page says.", "",
             f"| method | family | {' | '.join(facts)} | accuracy % | step time | peak memory |",
             "|---|---|" + "---|" * len(facts) + "---:|---:|---:|"]
    for page in inside:
        entry = page.main[0]
        family = called(page.uri.rpartition("/")[0])[0].lower()
        there = [(rows()[task, name], rows()[task, "Backprop"]) for task in tasks
                 if (task, name := entry.name.rpartition(".")[2]) in rows()]
        figures = ([f"{100 * row.mean:.1f}" for row, _ in there],
                   [f"{row.step_time / base.step_time:.1f}" for row, base in there],
                   [f"{row.peak_bytes / base.peak_bytes:.1f}" for row, base in there])
        parts.append(f"| {named(entry, uri)} | {family} | "
                     + "".join(f"{cell(str(page.facts.get(fact, '–')))} | " for fact in facts)
                     + "".join(f"{', '.join(column) or '–'} | " for column in figures))
    return "\n".join(parts)


def asked(request: str, uri: str) -> str:
    """Return a list of the methods that a hand-written page asks for.

    `saves="…"`, `needs="…"`, `place="…"` and `kind="…"` are facets; `order="length"` puts the
    shortest files first, where else each kind and family has its turn, the best verdicts first.
    """
    wanted = dict(_QUOTED.findall(request))
    found = [entry for entry in entries() if _fits(entry, wanted)]
    found = sorted(found, key=_lines) if wanted.get("order") == "length" else _of_each_kind(found)
    query = "&".join(f"{key}={value.replace(' ', '+')}" for key, value in wanted.items()
                     if key != "order")
    listed = [f"- {named(entry, uri)}: {gist(entry.value)}"
              + (f" ({_lines(entry)} lines)" if "order" in wanted else "")
              for entry in found[:MOST]]
    more = f"[More in the table of methods]({link(uri, METHODS)}?{query})"
    return "\n".join(listed if len(found) == len(listed) else [*listed, "", more])


def _of_each_kind(found: list[Method]) -> list[Method]:
    """Return methods with the best verdicts first, and each kind and family in its turn."""
    kinds = list(KINDS)  # what changes a network that is there comes before what builds one
    found = sorted(found, key=lambda entry: (
        min(map(ORDER.index, verdict(entry).split(", "))), kinds.index(entry.facets.kind)))
    turns: Counter[str] = Counter()
    late = {}
    for entry in found:
        page = page_of(entry.name).uri
        folder, kind = page.rpartition("/")[0], entry.facets.kind
        late[entry.name] = 10 * turns[page] + 2 * turns[folder] + turns[kind]
        turns.update([page, folder, kind])
    return sorted(found, key=lambda entry: late[entry.name])


def _fits(entry: Method, wanted: dict[str, str]) -> bool:
    said = entry.facets
    return (wanted.get("kind", said.kind) == said.kind
            and wanted.get("place", said.place) == said.place
            and wanted.get("saves", "") in ("", *said.saves)
            and wanted.get("needs", "") in ("", *said.needs))


def _lines(entry: Method) -> int:
    return len(inspect.getsource(sys.modules[entry.value.__module__]).splitlines())


def layout_page() -> str:
    """Return the page of the package's folders and what each holds."""
    parts = ["# Layout", "", "What a folder holds is what its name says, and imports only point "
             "down.", "", "| folder | what it holds |", "|---|---|"]
    for path in sorted(PACKAGE.rglob("__init__.py")):
        folder = path.parent.relative_to(PACKAGE).as_posix()
        if folder != ".":
            title, what = called(folder)
            shown = f"{title}: {what}" if what and not what.startswith(title) else what or title
            parts.append(f"| `{folder}/` | {cell(shown)} |")
    return "\n".join(parts) + "\n"


def papers_page() -> str:
    """Return the page of the whole catalogue, by family."""
    uri = "reference/papers.md"
    every = papers.papers()
    by_paper: dict[str, list[Method]] = {}
    for entry in methods().values():
        for name in entry.facets.papers:
            by_paper.setdefault(name, []).append(entry)
    measured = {result["paper"] for result in results().values()}
    parts = ["# Papers", "", f"{len(every)} papers, of which {len(by_paper)} are implemented. "
             "`netwright papers WORDS` searches them.", "",
             "## Implemented here", "", "| id | paper | claim | here | verdict |",
             "|---|---|---|---|---|"]
    for paper in every:
        if paper.id in by_paper:
            verdicts = {results()[name]["verdict"] for name in evidence_of([paper.id])}
            parts.append(f"| `{paper.id}` | {cell(paper.title)} | {cell(paper.claim)} | "
                         + ", ".join(named(entry, uri) for entry in by_paper[paper.id]) + " | "
                         + (", ".join(sorted(verdicts, key=ORDER.index))
                            if paper.id in measured else "–") + " |")
    for family, whole in sorted(papers.FAMILIES.items(), key=lambda item: item[1]):
        parts += ["", f"## {whole[0].upper()}{whole[1:]} ({family})", "",
                  "| id | paper | what it does |", "|---|---|---|"]
        parts += [f"| `{paper.id}` | {cell(paper.title)} | {cell(paper.gist)} |"
                  for paper in every if paper.family == family]
    return "\n".join(parts) + "\n"
