import gzip
import io
import struct

import pytest
import torch

from netwright.data import cifar10, digits, mnist
from netwright.errors import MissingData


def test_digits_are_split_evenly_and_alike_for_a_seed():
    found, same, other = digits(), digits(), digits(seed=1)
    assert found.x_train.shape == (1437, 1, 8, 8)
    assert found.x_test.shape == (360, 1, 8, 8)
    assert found.x_train.min() == 0
    assert found.x_train.max() == 1
    shares = found.y_test.bincount() / found.y_train.bincount()
    assert (shares - 0.25).abs().max() < 0.02
    assert torch.equal(found.x_test, same.x_test)
    assert not torch.equal(found.x_test, other.x_test)


def _write_mnist(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "t10k"):
        pixels = struct.pack(">BBBB3I", 0, 0, 8, 3, len(images), 28, 28)
        pixels += b"".join(bytes([value]) * 784 for value in images)
        labels = struct.pack(">BBBBI", 0, 0, 8, 1, len(images)) + bytes(range(len(images)))
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(pixels))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))


def test_mnist_reads_idx_files(tmp_path, monkeypatch):
    monkeypatch.setenv("NETWRIGHT_DATA", str(tmp_path))
    _write_mnist(tmp_path / "mnist", [0, 51, 255])
    found = mnist()
    assert found.x_train.shape == (3, 1, 28, 28)
    assert torch.allclose(found.x_train[:, 0, 5, 5], torch.tensor([0, 0.2, 1]))
    assert found.y_test.tolist() == [0, 1, 2]


def test_mnist_damaged_and_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("NETWRIGHT_DATA", str(tmp_path))
    with pytest.raises(MissingData, match="does not exist"):
        mnist()
    _write_mnist(tmp_path / "mnist", [0, 51])
    file = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:30])
    with pytest.raises(MissingData, match="not a gzipped IDX file"):
        mnist()


def test_cifar10_reads_parquet(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra cifar")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra cifar")
    image = pytest.importorskip("PIL.Image", reason="needs the extra cifar")
    monkeypatch.setenv("NETWRIGHT_DATA", str(tmp_path))
    (tmp_path / "cifar10").mkdir()
    raw = io.BytesIO()
    image.new("RGB", (32, 32), (255, 0, 51)).save(raw, format="PNG")
    table = pyarrow.table({"img": [{"bytes": raw.getvalue()}], "label": [7]})
    for name in ("train", "test"):
        parquet.write_table(table, tmp_path / "cifar10" / f"{name}-00000-of-00001.parquet")
    found = cifar10()
    assert found.x_train.shape == (1, 3, 32, 32)
    assert found.y_train.tolist() == [7]
    assert torch.allclose(found.x_train[0, :, 3, 4], torch.tensor([1, 0, 0.2]))
    (tmp_path / "cifar10" / "test-00000-of-00001.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(MissingData, match="not a Parquet file of images"):
        cifar10()
