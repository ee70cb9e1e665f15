import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["Epoch", "History"]


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave.

    `epoch` counts from 1. `seconds` are those spent training since the first epoch began, without
    validation and checkpoints. `loss` is the training loss's mean over the epoch's samples.
    `metric` is NaN where there is no validation, `learning_rate` where there is no optimizer.
    """

    epoch: int
    seconds: float
    loss: float
    metric: float
    learning_rate: float


@dataclass
class History:
    """What a training gave, epoch by epoch.

    `stopped` says why the training ended: "epochs" or "patience".

    >>> history = History([Epoch(1, 0.5, 0.9, 0.7, 0.001), Epoch(2, 1.0, 0.4, 0.8, 0.001)])
    >>> history.best.epoch, len(history), history[-1].loss
    (2, 2, 0.4)
    >>> History.from_json(history.to_json()) == history
    True
    """

    epochs: list[Epoch] = field(default_factory=list)
    metric: str = "accuracy"
    higher_is_better: bool = True
    steps: int = 0
    stopped: str = ""

    def __len__(self) -> int:
        return len(self.epochs)

    def __getitem__(self, i: int) -> Epoch:
        return self.epochs[i]

    @property
    def best(self) -> Epoch:
        """The first epoch with the best metric, or the lowest loss where there is no metric."""
        self._check()
        scored = [epoch for epoch in self.epochs if not math.isnan(epoch.metric)]
        if not scored:
            return min(self.epochs, key=lambda epoch: epoch.loss)
        sign = 1 if self.higher_is_better else -1
        return max(scored, key=lambda epoch: sign * epoch.metric)

    @property
    def curve(self) -> Sequence[tuple[int, float, float, float]]:
        """The (epoch, seconds, training loss, metric) of each epoch."""
        return [(e.epoch, e.seconds, e.loss, e.metric) for e in self.epochs]

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Return a figure of loss, metric and learning rate by epoch; write it to `path` as HTML.

        The page holds all it needs and opens without a network.
        """
        self._check()
        from plotly.graph_objects import Scatter
        from plotly.subplots import make_subplots
        lines = {"training loss": [e.loss for e in self.epochs],
                 f"validation {self.metric}": [e.metric for e in self.epochs],
                 "learning rate": [e.learning_rate for e in self.epochs]}
        lines = {name: line for name, line in lines.items() if not all(map(math.isnan, line))}
        figure = make_subplots(rows=1, cols=len(lines), subplot_titles=list(lines))
        for column, (name, line) in enumerate(lines.items(), 1):
            figure.add_trace(Scatter(x=[e.epoch for e in self.epochs], y=line, name=name,
                                     mode="lines+markers"), row=1, col=column)
        figure.update_layout(template="plotly_white", showlegend=False, height=360)
        figure.update_xaxes(title="epoch")
        if path is not None:
            figure.write_html(str(path), include_plotlyjs=True)
        return figure

    def _check(self) -> None:
        if not self.epochs:
            raise ValueError("the history holds no epoch yet; train with fit first")

    def to_json(self) -> str:
        """Return the history as JSON."""
        return json.dumps(_plain(asdict(self)), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "History":
        """Read what `to_json` returned."""
        stored = json.loads(text)
        epochs = [Epoch(epoch["epoch"], *(math.nan if epoch[name] is None else epoch[name]
                                          for name in _FIGURES)) for epoch in stored.pop("epochs")]
        return cls(epochs, **stored)


_FIGURES = ("seconds", "loss", "metric", "learning_rate")


def _plain(stored: dict) -> dict:
    for epoch in stored["epochs"]:
        for name in _FIGURES:
            if math.isnan(epoch[name]):
                epoch[name] = None  # JSON knows no NaN
    return stored
