"""The small tables that come with scikit-learn, split and standardised."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray
from sklearn import datasets
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler


class Table(NamedTuple):
    """A table's training and test part, with features of mean 0 and deviation 1."""

    x: NDArray[Any]
    y: NDArray[Any]
    x_test: NDArray[Any]
    y_test: NDArray[Any]
    classes: int  # 0 where y is a number


TABLES: dict[str, tuple[Callable[..., Any], int]] = {
    "diabetes": (datasets.load_diabetes, 0),
    "friedman": (lambda **_: datasets.make_friedman1(800, noise=1.0, random_state=0), 0),
    "breast cancer": (datasets.load_breast_cancer, 2),
    "wine": (datasets.load_wine, 3),
    "digits": (datasets.load_digits, 10)}


def table(name: str, seed: int) -> Table:
    """Return the table called `name`, at most 800 samples of it, a third of them for testing."""
    load, classes = TABLES[name]
    x, y = load(return_X_y=True)
    rows = numpy.random.default_rng(seed).permutation(len(x))[:800]
    return split(x[rows], y[rows], classes, seed)


def split(x: NDArray[Any], y: NDArray[Any], classes: int, seed: int) -> Table:
    """Return a third of the samples as the test part."""
    x, x_test, y, y_test = train_test_split(x, y, test_size=1 / 3, random_state=seed,
                                            stratify=y if classes else None)
    scaler = StandardScaler().fit(x)
    return Table(scaler.transform(x), y, scaler.transform(x_test), y_test, classes)


def tuned(make: Callable[[dict[str, Any]], Any], grid: list[dict[str, Any]], data: Table,
          seed: int) -> dict[str, Any]:
    """Return what of `grid` scores best on a third of the training part."""
    inner = split(data.x, data.y, data.classes, seed)
    scores = [make(options).fit(inner.x, inner.y).score(inner.x_test, inner.y_test)
              for options in grid]
    return grid[int(numpy.argmax(scores))]
