import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from netwright import checks
from netwright.data._folder import locate
from netwright.errors import MissingData

__all__ = ["Graph", "citeseer", "cora", "karate"]


@checks.annotated
class Graph(NamedTuple):
    """A graph whose nodes are classified, with the nodes of each part as masks.

    Shapes: features (nodes, features); edge_index (2, edges), both directions of each edge;
    y (nodes,) of int64; train, validation and test (nodes,) of bool.
    """

    features: Tensor
    edge_index: Tensor
    y: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor

    def batches(self, part: str) -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
        """Return the one batch of "train", "validation" or "test": the other labels are -100.

        >>> (x, y), = karate().batches("train")
        >>> (y != -100).sum().item()
        2
        """
        inside = getattr(self, part)
        return [((self.features, self.edge_index), self.y.where(inside, -100))]


@checks.annotated
def karate() -> Graph:
    """Return Zachary's karate club of 1977: 34 members, and which of two clubs each went to.

    The two leaders are labelled; of the others every second one is for validation. A member's
    features are who they are, one-hot.

    >>> graph = karate()
    >>> tuple(graph.features.shape), tuple(graph.edge_index.shape)
    ((34, 34), (2, 156))
    """
    import networkx
    club = networkx.karate_club_graph()
    members = len(club)
    y = torch.tensor([int(club.nodes[i]["club"] != "Mr. Hi") for i in range(members)])
    train, validation, test = torch.zeros(3, members, dtype=torch.bool)
    train[[0, members - 1]] = True
    validation[1:members - 1:2] = True
    test[2:members - 1:2] = True
    edges = torch.tensor(list(club.edges)).T
    return Graph(torch.eye(members), torch.cat([edges, edges.flip(0)], dim=1), y, train,
                 validation, test)


@checks.annotated
def cora() -> Graph:
    """Return Cora from `NETWRIGHT_DATA/planetoid`: 2,708 papers in 7 fields, and who cites whom.

    The public split: 20 labelled papers a field, 500 for validation, 1,000 for the test.
    Features are normalised to sum to 1 for each paper.

    Raises:
        MissingData: a file is missing or is not what it should be.

    Paper: Yang, Cohen, Salakhutdinov, 2016, Revisiting Semi-Supervised Learning with Graph
    Embeddings.
    """
    return _planetoid("cora")


@checks.annotated
def citeseer() -> Graph:
    """Return CiteSeer from `NETWRIGHT_DATA/planetoid`: 3,327 papers in 6 fields, split as `cora`.

    Raises:
        MissingData: a file is missing or is not what it should be.
    """
    return _planetoid("citeseer")


_SOURCE = "get the eight ind.* files of the set from the repository kimiyoung/planetoid"


def _planetoid(name: str) -> Graph:
    files = {part: locate("planetoid", f"ind.{name}.{part}", source=_SOURCE)
             for part in ("x", "y", "tx", "ty", "allx", "ally", "graph", "test.index")}
    try:
        labelled = len(_unpickled(files["y"]))
        known_x, known_y, test_x, test_y = (
            _dense(_unpickled(files[part])) for part in ("allx", "ally", "tx", "ty"))
        links = _unpickled(files["graph"])
        places = torch.tensor([int(line) for line in files["test.index"].read_text().split()])
        nodes = len(links)
        features = torch.zeros(nodes, known_x.shape[1])
        scores = torch.zeros(nodes, known_y.shape[1])
        # Some papers of CiteSeer's test range are cited by none and described by none: they keep
        # their zeros.
        features[:len(known_x)], scores[:len(known_y)] = known_x, known_y
        features[places], scores[places] = test_x, test_y
        pairs = {pair for node, others in links.items() for other in others if other != node
                 for pair in ((node, other), (other, node))}
        edge_index = torch.tensor(sorted(pairs)).T
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, IndexError, KeyError,
            RuntimeError, TypeError, ValueError) as error:
        raise MissingData(f"the files {files['x'].with_suffix('.*')} are not those of Planetoid "
                          f"({error}); {_SOURCE}") from error
    masks = torch.zeros(3, nodes, dtype=torch.bool)
    masks[0, :labelled] = True
    masks[1, labelled:labelled + 500] = True
    masks[2, places] = True
    features = features / features.sum(1, keepdim=True).clamp(min=1)
    return Graph(features, edge_index, scores.argmax(1), *masks)


def _dense(table: Any) -> Tensor:
    return torch.from_numpy(table.toarray() if hasattr(table, "toarray") else table).float()


def _unpickled(path: Path) -> Any:
    with path.open("rb") as file:
        return _Arrays(file, encoding="latin1").load()


class _Arrays(pickle.Unpickler):
    """Reads arrays, sparse tables and lists from Python 2, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        from scipy.sparse import csr_matrix
        known = {
            "numpy.ndarray": numpy.ndarray, "numpy.dtype": numpy.dtype,
            "_reconstruct": _reconstruct, "scipy.sparse.csr.csr_matrix": csr_matrix,
            "collections.defaultdict": defaultdict, "__builtin__.list": list,
            "__builtin__.object": object, "copy_reg._reconstructor": _rebuild,
            "_codecs.encode": _latin,
        }
        key = name if name == "_reconstruct" else f"{module}.{name}"
        if key not in known:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not data")
        return known[key]


def _reconstruct(kind: type, shape: tuple[int, ...], dtype: Any) -> numpy.ndarray:
    return numpy.ndarray.__new__(kind, shape, dtype)


def _latin(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


def _rebuild(kind: Any, base: type, state: Any) -> Any:
    return kind.__new__(kind)
