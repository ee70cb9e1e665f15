from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.measure._batch import check_batch
from netwright.measure.cost import cost
from netwright.objectives.losses import cross_entropy
from netwright.rules.exact.backprop import Backprop
from netwright.rules.rule import Rule
from netwright.runtime.random_state import same_random_state

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

from netwright.catalogue.facets import method

__all__ = ["Memory", "memory"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Memory:
    """The memory of a step against depth, in bytes, by rule.

    `saved` is the most that waited for a backward pass at any one time; `working` the most that
    the step held besides its gradients and besides what was there before it, as in `Cost`.

    >>> found = Memory((8, 32), {"Backprop": (2048, 8192)}, {"Backprop": (4096, 10240)})
    >>> found.growth()
    {'Backprop': 4.0}
    >>> print(found)
                saved for backward         working memory
    depth            8        32  growth        8         32  growth
    Backprop   2.0 KiB   8.0 KiB    4.00  4.0 KiB   10.0 KiB    2.50
    """

    depths: tuple[int, ...]
    saved: Mapping[str, tuple[int, ...]]
    working: Mapping[str, tuple[int, ...]]

    def growth(self, of: str = "saved") -> dict[str, float]:
        """Return how many times the first depth's bytes the last depth's are, by rule."""
        checks.one_of(["saved", "working"], kind_of_memory=of)
        return {name: _ratio(line) for name, line in getattr(self, of).items()}

    def table(self) -> str:
        """Return a table to be printed: a row for each rule, a column for each depth."""
        head = [*map(str, self.depths), "growth"]
        rows = [["depth", *head, *head]]
        for name, saved in self.saved.items():
            rows.append([name])
            for line in (saved, self.working[name]):
                rows[-1] += [*map(_text, line), f"{_ratio(line):.2f}"]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in
                                                       zip(row[1:], widths[1:], strict=True))])
                 for row in rows]
        half = sum(widths[1:len(head) + 1]) + 2 * len(head)
        title = " " * widths[0] + "saved for backward".center(half)
        return "\n".join([f"{title}{'working memory'.center(half)}".rstrip(), *lines])

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Return a figure of bytes against depth, both axes logarithmic; write it as HTML.

        The page at `path` holds all it needs and opens without a network.
        """
        from plotly.colors import qualitative
        from plotly.graph_objects import Scatter
        from plotly.subplots import make_subplots
        figure = make_subplots(rows=1, cols=2,
                               subplot_titles=["saved for backward", "working memory"])
        for i, name in enumerate(self.saved):
            colour = qualitative.Plotly[i % len(qualitative.Plotly)]
            for column, lines in enumerate((self.saved, self.working), 1):
                figure.add_trace(Scatter(
                    x=self.depths, y=lines[name], name=name, legendgroup=name,
                    showlegend=column == 1, mode="lines+markers", marker={"color": colour},
                    text=[_text(value) for value in lines[name]],
                    hovertemplate="depth %{x}: %{text}"), row=1, col=column)
        figure.update_layout(template="plotly_white", height=400)
        figure.update_xaxes(title="depth", type="log", tickvals=list(self.depths))
        figure.update_yaxes(title="bytes", type="log", row=1, col=1)
        figure.update_yaxes(type="log", row=1, col=2)
        if path is not None:
            figure.write_html(str(path), include_plotlyjs=True)
        return figure

    def __str__(self) -> str:
        return self.table()


@method("measure")
def memory(make: Callable[[int], nn.Module], depths: Sequence[int], batch: tuple[Any, Any], *,
           rules: Mapping[str, Callable[..., nn.Module]] | None = None,
           loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy, seed: int = 0) -> Memory:
    """Measure the memory of a training step against depth, for any rules and networks.

    For every depth and rule the network is made anew under the same seed, and one step measured as
    `measure.cost` does. On a CPU the figures are the same on every run.

    Args:
        make: What makes the network of a depth.
        depths: The depths to measure, such as (4, 16, 64).
        batch: The pair (x, y) that the step is taken on.
        rules: What to measure, by name: a rule, which is given the network and the inputs as its
            example, or any function of the network that returns a rule or another network, such as
            a reshape. `{"Backprop": Backprop}` where it is None.
        loss: The loss of networks that are no rules.
        seed: What the random state is set to before a network is made.

    Shapes: x as the network takes it; y as the loss takes it.

    Raises:
        ValueError: `depths` or `rules` is empty, a depth comes twice, or `batch` is no pair.

    >>> from netwright.rules import Backprop, MonoForward
    >>> def make(depth):
    ...     hidden = [part for _ in range(depth) for part in (nn.Linear(32, 32), nn.ReLU())]
    ...     return nn.Sequential(*hidden, nn.Linear(32, 10))
    >>> batch = torch.randn(64, 32), torch.randint(10, (64,))
    >>> found = memory(make, [4, 16], batch, rules={"exact": Backprop, "local": MonoForward})
    >>> growth = found.growth()
    >>> growth["exact"] > 3, growth["local"] < 1.1
    (True, True)
    """
    check_batch(batch)
    depths, rules = tuple(depths), {"Backprop": Backprop} if rules is None else dict(rules)
    if not depths or len(set(depths)) < len(depths):
        raise ValueError(f"depths must hold at least one depth, and each once, got {depths}")
    if not rules:
        raise ValueError("rules must name at least one rule, got none; None measures Backprop")
    saved: dict[str, list[int]] = {name: [] for name in rules}
    working: dict[str, list[int]] = {name: [] for name in rules}
    for depth in depths:
        for name, rule in rules.items():
            with same_random_state():
                torch.manual_seed(seed)
                network = make(depth)
                found = cost(_built(rule, network, batch[0]), batch, loss=loss, repeats=1, warmup=0)
            saved[name].append(found.saved_bytes)
            working[name].append(found.working_bytes)
    return Memory(depths, {name: tuple(line) for name, line in saved.items()},
                  {name: tuple(line) for name, line in working.items()})


def _built(rule: Any, network: nn.Module, x: Any) -> Any:
    if isinstance(rule, type) and issubclass(rule, Rule):
        kind: Any = rule
        return kind(network, example=x)
    return rule(network)


def _ratio(line: Sequence[int]) -> float:
    return 1.0 if line[-1] == line[0] else line[-1] / line[0] if line[0] else float("inf")


def _text(count: float) -> str:
    unit = 0
    while count >= 1024 and unit + 1 < len(_UNITS):
        count, unit = count / 1024, unit + 1
    return f"{count:.0f} B" if not unit else f"{count:.1f} {_UNITS[unit]}"
