"""The samples that Forward-Forward shows a network: labelled, normalised, joined, weighted."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

from netwright.rules.forward._graphs import copied as copied_graph
from netwright.rules.forward._graphs import graph_parts, is_graph, put_together
from netwright.rules.rule import check_labels

IMAGE = "pixel_values"
TINY = 1e-6


def overlaid(x: Any, image: Tensor, labels: Tensor, *, amplitude: float, normalise: bool) -> Any:
    """Return copies of `x`, as many as there are `labels` for, that carry them in its `image`."""
    copies = max(1, len(labels) // len(image))
    if is_graph(x):
        graph = copied_graph(graph_parts(x), copies)
        graph.features[:, :labels.shape[1]] = amplitude * labels.to(image)
        if normalise:
            graph.features.div_(rms(graph.features))
        return put_together(graph, x)

    def copied(value: Tensor) -> Tensor:
        return value.repeat(copies, *[1] * (value.ndim - 1))

    drawn = copied(image)
    rows = drawn.view(len(drawn), -1)
    rows[:, :labels.shape[1]] = amplitude * labels.to(drawn)
    if normalise:
        rows /= rms(rows)
    if not isinstance(x, Mapping):
        return drawn
    return {key: drawn if key == IMAGE else copied(value)
            if isinstance(value, Tensor) and value.shape[:1] == image.shape[:1] else value
            for key, value in x.items()}


def image_of(x: Any, classes: int) -> Tensor:
    """Return the tensor of `x` that labels are written into."""
    image = (graph_parts(x).features if is_graph(x)
             else x.get(IMAGE) if isinstance(x, Mapping) else x)
    if not isinstance(image, Tensor) or not image.is_floating_point():
        what = (f"{image.dtype}" if isinstance(image, Tensor)
                else f"a mapping of {', '.join(map(str, x))}" if isinstance(x, Mapping)
                else f"a {type(x).__name__}")
        raise ValueError("x must be a floating-point tensor, a mapping with one as "
                         f"{IMAGE}, or a graph, for a label to be written into it, got "
                         f"{what}; give negatives=, a function that makes negative samples of it")
    if image[:1].numel() < classes:
        raise ValueError(f"x must have at least {classes} numbers a sample for the "
                         f"label, got {tuple(image.shape)}; give negatives=, a function that "
                         "makes negative samples, or add empty numbers in front")
    return image


def check_written(image: Tensor, y: Tensor, classes: int, *, some: bool = False) -> None:
    """Raise ValueError unless `y` names a class for every sample of `image`, or for `some`."""
    if y.shape != image.shape[:1]:
        raise ValueError(f"y must have one class a sample, ({len(image)},), got "
                         f"{tuple(y.shape)}; give negatives= for other labels")
    check_labels(y, classes)
    if some:
        if not bool((y >= 0).any()):
            raise ValueError("y must label at least one node, got -100 alone; leave such batches "
                             "out")
        return
    if y.device.type == "cpu" and bool((y < 0).any()):
        raise ValueError("y must name a class for every sample, since it is written into x, "
                         f"got {int(y.min())}; leave such samples out of the batch")


def normalised(x: Any) -> Any:
    """Return `x` with each sample of its real numbers divided by its rms."""
    if isinstance(x, Mapping):
        real = "x" if is_graph(x) else IMAGE
        return {key: unit(value) if key == real else value for key, value in x.items()}
    return unit(x) if isinstance(x, Tensor) else (unit(x[0]), *x[1:])


def unit(value: Any) -> Any:
    """Return each sample divided by its rms, and what is no sample of real numbers as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 2:
        return value
    rows = value.reshape(len(value), -1)
    return (rows / rms(rows)).view_as(value)


def rms(rows: Tensor) -> Tensor:
    """Return the root of each row's mean square, above 0."""
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return (norm / rows.shape[1] ** 0.5).clamp_min(TINY)


def joined(positive: Any, negative: Any) -> list[Any]:
    """Return positives and negatives as one batch where they can be one, else one by one."""
    if isinstance(positive, Tensor) and isinstance(negative, Tensor):
        return [torch.cat([positive, negative])] if _alike(positive, negative) else [
            positive, negative]
    if isinstance(positive, Mapping) and isinstance(negative, Mapping) and (
            set(positive) == set(negative)) and all(_alike(v, negative[k])
                                                    for k, v in positive.items()):
        return [{k: torch.cat([v, negative[k]]) for k, v in positive.items()}]
    return [positive, negative]


def _alike(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim > 0 and a.shape == b.shape


def weights(y: Tensor | None, rows: int, halves: int) -> Tensor:
    """Return what each of `rows` samples counts, 1 in all; labels below 0 leave samples out."""
    if y is None or y.ndim != 1 or len(y) * halves != rows:
        return torch.full((rows,), 1 / rows)
    counts = (y >= 0).repeat(halves).float()
    return counts / counts.sum().clamp_min(1)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Return each label as a row, and for labels below 0 the neutral one, every class 1/classes."""
    rows = functional.one_hot(labels.clamp(min=0), classes).float()
    return rows.where((labels >= 0).unsqueeze(1), 1 / classes)


def other_labels(y: Tensor, classes: int, scores: Tensor | None,
                 generator: Generator | None) -> Tensor:
    """Return a class other than `y` for each sample, in proportion to exp(scores).

    Nodes of a graph that have no label keep their -100.
    """
    device = y.device if generator is None else generator.device
    known = y.clamp(min=0)
    if scores is None:
        shift = torch.randint(1, classes, y.shape, generator=generator,
                              device=device)
        drawn = (known + shift.to(y.device)) % classes
    else:
        noise = torch.empty(scores.shape, device=device).exponential_(generator=generator)
        others = scores.float().scatter(1, known.unsqueeze(1), -math.inf)
        drawn = (others - noise.to(y.device).log()).argmax(1)
    return drawn.where(y >= 0, y)
