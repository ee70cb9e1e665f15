import torch
from torch import Tensor, nn

from netwright.blocks.quantized.grid import Grid
from netwright.blocks.quantized.stored import QuantizedWeight
from netwright.catalogue.facets import method

__all__ = ["QuantizedEmbedding"]


def _tokens() -> Tensor:
    return torch.randint(10, (2, 5))


@method(
    "block",
    place="embedding",
    takes=("num_embeddings", "embedding_dim"),
    saves=["file size", "inference memory"],
    needs=["tokens"],
    search={"grid": ["int8", "int4/32", "nf4/64"]},
    variants={"int8": {"num_embeddings": 10, "embedding_dim": 8},
              "int4": {"num_embeddings": 10, "embedding_dim": 8, "grid": "int4/4"}},
    batch=_tokens,
)
class QuantizedEmbedding(nn.Module):
    """A table of vectors held as packed codes, of which it unpacks the rows that are looked up.

    y = W'[x], W' what the codes stand for. A layer that shares its `stored` weight is tied to it.

    Args:
        num_embeddings: how many rows there are.
        embedding_dim: how long each is.
        grid: what weights are rounded to, a `Grid` or a short form as "int4/32".
        dtype: what the rows are given in, the default of PyTorch where it is None.

    Shapes: x (*), whole numbers below num_embeddings; y (*, embedding_dim).

    Raises:
        ValueError: the grid's groups do not divide the vectors, and it does not pad.

    >>> table = QuantizedEmbedding.of(nn.Embedding(10, 64), "int4/32")
    >>> table(torch.tensor([[1, 2]])).shape, table.stored.codes.shape
    (torch.Size([1, 2, 64]), torch.Size([10, 32]))
    """

    padding_idx: int | None

    def __init__(self, num_embeddings: int, embedding_dim: int, *,
                 grid: "Grid | str | int" = "int8", dtype: torch.dtype | None = None) -> None:
        super().__init__()
        made = nn.Embedding(num_embeddings, embedding_dim, dtype=dtype)
        self._take(made, QuantizedWeight.of(made.weight, grid))

    @classmethod
    def of(cls, layer: nn.Embedding, grid: "Grid | str | int" = "int8", *,
           dtype: torch.dtype | None = None) -> "QuantizedEmbedding":
        """Return a table with its rows rounded to the nearest levels."""
        return cls.holding(QuantizedWeight.of(layer.weight, grid, dtype=dtype), layer)

    @classmethod
    def holding(cls, stored: QuantizedWeight, layer: nn.Embedding) -> "QuantizedEmbedding":
        """Return the table `layer` with a weight that is quantized already."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._take(layer, stored)
        return made

    def _take(self, layer: nn.Embedding, stored: QuantizedWeight) -> None:
        self.num_embeddings, self.embedding_dim = stored.shape
        self.padding_idx, self.stored = layer.padding_idx, stored

    @property
    def weight(self) -> Tensor:
        """The table in full, which is made anew at each look."""
        return self.stored()

    def forward(self, x: Tensor) -> Tensor:
        """Return the rows x."""
        return self.stored.rows(x)

    def extra_repr(self) -> str:
        """Say what is looked up."""
        return f"{self.num_embeddings}, {self.embedding_dim}"
