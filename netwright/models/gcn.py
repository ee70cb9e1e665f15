from torch import nn

from netwright.catalogue.facets import method
from netwright.errors import MissingExtra

__all__ = ["gcn"]


@method(
    "model",
    place="whole network",
    takes=("features", "classes"),
    needs=["a graph"],
    search={"width": [16, 64], "depth": [2, 3]},
)
def gcn(features: int, classes: int, *, width: int = 16, depth: int = 2,
        dropout: float = 0.5) -> nn.Module:
    """Return PyTorch Geometric's graph convolutional network.

    Args:
        features: of a node.
        classes: scores of a node that are returned.
        width: of the hidden layers.
        depth: how many convolutions there are.
        dropout: the share of a hidden layer that is dropped in training.

    Shapes: x ((nodes, features), (2, edges)); out (nodes, classes).

    Raises:
        MissingExtra: PyTorch Geometric is not installed.

    Paper: Kipf, Welling, 2017, Semi-Supervised Classification with Graph Convolutional Networks.

    >>> network = gcn(34, 2)
    >>> type(network).__name__
    'GCN'
    """
    try:
        from torch_geometric.nn import GCN
    except ImportError as error:
        raise MissingExtra("a GCN needs PyTorch Geometric, which is not installed "
                           f"({error}); pip install 'netwright[graphs]'") from error
    return GCN(features, width, num_layers=depth, out_channels=classes, dropout=dropout)
