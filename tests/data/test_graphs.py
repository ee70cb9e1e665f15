import pickle

import networkx
import numpy
import pytest
import torch
from scipy.sparse import csr_matrix

from netwright.data import citeseer, cora, karate
from netwright.errors import MissingData


def test_karate_is_the_published_club():
    graph, club = karate(), networkx.karate_club_graph()
    assert graph.edge_index.shape[1] == 2 * club.number_of_edges() == 156
    assert {frozenset(edge) for edge in graph.edge_index.T.tolist()} == \
        {frozenset(edge) for edge in club.edges}
    assert graph.y.bincount().tolist() == [17, 17]
    parts = torch.stack([graph.train, graph.validation, graph.test])
    assert (parts.sum(0) == 1).all()
    assert parts.sum(1).tolist() == [2, 16, 16]


def test_batches_hide_the_labels_of_the_other_parts():
    graph = karate()
    ((x, edge_index), y), = graph.batches("test")
    assert x is graph.features
    assert edge_index is graph.edge_index
    assert torch.equal(y != -100, graph.test)
    assert torch.equal(y[graph.test], graph.y[graph.test])


@pytest.fixture
def planetoid(tmp_path, monkeypatch):
    """Eight files of a graph of 8 nodes; node 6 is in no part, as some of CiteSeer's are."""
    monkeypatch.setenv("NETWRIGHT_DATA", str(tmp_path))
    folder = tmp_path / "planetoid"
    folder.mkdir()
    eye = numpy.eye(3, dtype="float32")
    tables = {
        "x": csr_matrix(2 * eye[:2]), "allx": csr_matrix(2 * eye[[0, 1, 2, 0, 1]]),
        "tx": csr_matrix(4 * eye[[2, 1]]), "y": eye[:2, :2].astype("int32"),
        "ally": eye[[0, 1, 0, 1, 1], :2].astype("int32"), "ty": eye[[0, 1], :2].astype("int32"),
        "graph": {0: [1, 0], 1: [0, 2], 2: [1], 3: [4], 4: [3], 5: [7, 7], 6: [], 7: [5]},
    }
    for name in ("cora", "citeseer"):
        for part, table in tables.items():
            # Protocol 2 and old module names, as Python 2 wrote them.
            raw = pickle.dumps(table, protocol=2).replace(b"scipy.sparse._csr", b"scipy.sparse.csr")
            (folder / f"ind.{name}.{part}").write_bytes(raw)
        (folder / f"ind.{name}.test.index").write_text("7\n5\n")
    return folder


@pytest.mark.parametrize("load", [cora, citeseer])
def test_planetoid_files_are_put_together(planetoid, load):
    graph = load()
    assert graph.features.argmax(1).tolist() == [0, 1, 2, 0, 1, 1, 0, 2]
    assert graph.features.sum(1).tolist() == [1, 1, 1, 1, 1, 1, 0, 1]  # node 6 is not described
    assert graph.y.tolist() == [0, 1, 0, 1, 1, 1, 0, 0]
    assert graph.edge_index.T.tolist() == [[0, 1], [1, 0], [1, 2], [2, 1], [3, 4], [4, 3],
                                           [5, 7], [7, 5]]
    assert graph.train.nonzero().flatten().tolist() == [0, 1]
    assert graph.test.nonzero().flatten().tolist() == [5, 7]


def test_a_file_that_would_run_code_is_refused(planetoid, tmp_path):
    class Harm:
        def __reduce__(self):
            return (tmp_path / "harm").touch, ()
    (planetoid / "ind.cora.graph").write_bytes(pickle.dumps(Harm(), protocol=2))
    with pytest.raises(MissingData, match="which is not data"):
        cora()
    assert not (tmp_path / "harm").exists()


def test_damaged_and_missing_files(planetoid):
    file = planetoid / "ind.cora.allx"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(MissingData, match=r"ind\.cora\..*not those of Planetoid"):
        cora()
    file.unlink()
    with pytest.raises(MissingData, match=r"ind\.cora\.allx does not exist"):
        cora()
