import gzip
import io
import struct
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from netwright import checks
from netwright.data._folder import locate
from netwright.errors import MissingData

__all__ = ["Split", "cifar10", "digits", "mnist"]


@checks.annotated
class Split(NamedTuple):
    """Inputs and targets for training, and those held out."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


@checks.annotated
def digits(*, test: float = 0.2, seed: int = 0) -> Split:
    """Return scikit-learn's 1,797 digits, held-out part drawn with equal classes.

    Shapes: x (samples, 1, 8, 8) in 0..1; y (samples,) in 0..9.

    >>> [tuple(part.shape) for part in digits()]
    [(1437, 1, 8, 8), (1437,), (360, 1, 8, 8), (360,)]
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x.astype("float32") / 16, y, test_size=test, stratify=y,
                             random_state=seed)
    x_train, x_test, y_train, y_test = map(torch.from_numpy, parts)
    return Split(x_train.view(-1, 1, 8, 8), y_train.long(), x_test.view(-1, 1, 8, 8),
                 y_test.long())


@checks.annotated
def mnist() -> Split:
    """Return MNIST's 60,000 and 10,000 digits from `NETWRIGHT_DATA/mnist`, IDX files gzipped.

    Shapes: x (samples, 1, 28, 28) in 0..1; y (samples,) in 0..9.

    Raises:
        MissingData: a file is missing or is not what it should be.
    """
    parts = []
    for name in ("train", "t10k"):
        x = _idx(locate("mnist", f"{name}-images-idx3-ubyte.gz", source=_MNIST))
        y = _idx(locate("mnist", f"{name}-labels-idx1-ubyte.gz", source=_MNIST))
        parts += [x.unsqueeze(1).float() / 255, y.long()]
    return Split(*parts)


@checks.annotated
def cifar10() -> Split:
    """Return CIFAR-10 from `NETWRIGHT_DATA/cifar10`, Parquet as on the Hugging Face hub.

    Shapes: x (samples, 3, 32, 32) in 0..1; y (samples,) in 0..9.

    Raises:
        MissingData: a file is missing or is not what it should be.
    """
    parts: list[Tensor] = []
    for name in ("train", "test"):
        path = locate("cifar10", f"{name}-00000-of-00001.parquet", source=_CIFAR)
        parts += _parquet_images(path)
    return Split(*parts)


_MNIST = "get the four IDX files of MNIST under their original names"
_CIFAR = "get the Parquet files of the set cifar10 on the Hugging Face hub"


def _idx(path: Path) -> Tensor:
    try:
        raw = gzip.decompress(path.read_bytes())
        rank = raw[3]
        shape = struct.unpack(f">{rank}I", raw[4:4 + 4 * rank])
        values = numpy.frombuffer(raw, numpy.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, IndexError, ValueError, struct.error) as error:
        raise MissingData(f"{path} is not a gzipped IDX file ({error}); {_MNIST}") from error
    return torch.from_numpy(values.copy())


def _parquet_images(path: Path) -> list[Tensor]:
    import pyarrow.parquet
    from PIL import Image
    try:
        table = pyarrow.parquet.read_table(path)
        images, labels = table["img"].to_pylist(), table["label"].to_pylist()
        pixels = numpy.stack([numpy.asarray(Image.open(io.BytesIO(image["bytes"])))
                              for image in images])
    except (OSError, KeyError, ValueError, pyarrow.ArrowException) as error:
        raise MissingData(f"{path} is not a Parquet file of images ({error}); {_CIFAR}") from error
    return [torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, torch.tensor(labels)]
