import numpy
import torch
from numpy.random import Generator, default_rng

from netwright import checks
from netwright.data.images import Split

__all__ = ["mnist1d"]

# Facts of the data set: the ten strokes as Greydanus and Kobak published them.
STROKES = numpy.array([
    [5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5],
    [5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5],
    [5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5],
    [5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5],
    [5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5],
    [5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5],
    [5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5],
    [5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5],
    [5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5],
    [5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5],
])


@checks.annotated
def mnist1d(*, samples: int = 5000, test: float = 0.2, length: int = 40,
            padding: tuple[int, int] = (36, 60), scale: float = 0.4, translation: int = 48,
            correlated_noise: float = 0.25, noise: float = 0.02, shear: float = 0.75,
            seed: int = 42) -> Split:
    """Return MNIST-1D: ten one-dimensional strokes, stretched, moved, tilted and noisy.

    A stroke is padded with zeros to a random length, stretched to a common one, scaled, shifted
    round, filled up with smooth noise where it is zero, made noisy and tilted, then read at
    `length` points; the whole set gets mean 0 and standard deviation 1. The steps and defaults
    are the paper's; the draws are not those of its own generator, so the samples differ.

    Shapes: x (samples, 1, length); y (samples,) in 0..9, the classes equally frequent.

    Raises:
        ValueError: there are fewer samples than classes, or `test` leaves a part empty.

    Paper: Greydanus, Kobak, 2020, Scaling Down Deep Learning with MNIST-1D.

    >>> [tuple(part.shape) for part in mnist1d()]
    [(4000, 1, 40), (4000,), (1000, 1, 40), (1000,)]
    """
    classes = len(STROKES)
    checks.count(classes, samples=samples, advice=f"there are {classes} classes")
    held_out = round(samples // classes * classes * test)
    if not 0 < held_out < samples // classes * classes:
        raise ValueError(f"test must leave samples for training and for the test, got {test}; "
                         "try 0.2")
    random = default_rng(seed)
    y = numpy.repeat(numpy.arange(classes), samples // classes)
    x = _stretched(_standard(STROKES)[y], padding, random)
    x *= 1 + scale * (random.random((len(y), 1)) - 0.5)
    x = _shifted(x, random.integers(max(translation, 1), size=len(y)))
    x = numpy.where(x != 0, x, _smooth(correlated_noise * random.standard_normal(x.shape)))
    x += noise * random.standard_normal(x.shape)
    x -= shear * (random.random((len(y), 1)) - 0.5) * numpy.linspace(-0.5, 0.5, x.shape[1])
    x = _resampled(x, length)
    x = (x - x.mean()) / x.std()
    order = random.permutation(len(y))
    images = torch.from_numpy(x[order].astype("float32")).unsqueeze(1)
    labels = torch.from_numpy(y[order])
    return Split(images[held_out:], labels[held_out:], images[:held_out], labels[:held_out])


def _standard(strokes: numpy.ndarray) -> numpy.ndarray:
    strokes = strokes - strokes.mean(1, keepdims=True)
    strokes = strokes / strokes.std(1, keepdims=True)
    # The tiny term keeps a stroke's own zeros apart from the padding's.
    return (strokes - strokes[:, :1]) / 6 + 1e-8


def _stretched(x: numpy.ndarray, padding: tuple[int, int], random: Generator) -> numpy.ndarray:
    low, high = padding
    width = x.shape[1]
    stretched = numpy.empty((len(x), width + high))
    pads = random.integers(low, high + 1, size=len(x))
    for pad in numpy.unique(pads):
        rows = pads == pad
        padded = numpy.pad(x[rows], ((0, 0), (0, pad)))
        stretched[rows] = _resampled(padded, width + high)
    return stretched


def _resampled(x: numpy.ndarray, length: int) -> numpy.ndarray:
    place = numpy.linspace(0, x.shape[1] - 1, length)
    left = numpy.minimum(place.astype(int), x.shape[1] - 2)
    part = place - left
    return x[:, left] * (1 - part) + x[:, left + 1] * part


def _shifted(x: numpy.ndarray, steps: numpy.ndarray) -> numpy.ndarray:
    columns = (numpy.arange(x.shape[1]) - steps[:, None]) % x.shape[1]
    return numpy.take_along_axis(x, columns, axis=1)


def _smooth(noise: numpy.ndarray) -> numpy.ndarray:
    from scipy.ndimage import gaussian_filter1d
    return gaussian_filter1d(noise, sigma=2, axis=1)
