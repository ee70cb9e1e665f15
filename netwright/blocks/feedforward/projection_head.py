import torch
from torch import Tensor, nn

from netwright.blocks.feedforward.feed_forward import GLU, Activation, FeedForward
from netwright.catalogue.facets import method

__all__ = ["ProjectionHead", "maxsim"]


@method(
    "block",
    papers=["004-002"],
    place="head",
    takes=("dim", "out"),
    needs=["tokens"],
    search={"layers": [1, 2], "gated": [False, True]},
    variants={"plain": {}, "gated": {"gated": True}},
)
class ProjectionHead(nn.Module):
    """What makes a token's vector for late interaction of an encoder's output.

    y = f(x) or, with `residual`, y = f(x) + R x;  y / |y| with `normalize`.  f is a chain of
    `layers` linear layers with an activation between them, or, with `gated`, one gated block; R is
    the identity where `dim` equals `out`, else a matrix.

    Under MaxSim a document's gradient reaches only the tokens that some query's token found
    nearest, and one matrix must turn the others along. A wider layer between, and a residual path,
    give the head directions that only some tokens use.

    Args:
        dim: size of the encoder's vectors.
        out: size of the vectors that are compared.
        hidden: units between the layers, twice `dim` where none is given.
        layers: of f; 1 is the usual linear head.
        gated: whether f is a gated block; it has 2 `layers`.
        residual: whether R x is added.
        activation: a name, or what makes a module; `identity` where none is given, `silu` for a
            gated block.
        bias: whether the layers have one.
        normalize: whether the vectors have length 1, so that MaxSim compares angles.

    Shapes: x (*, dim), y (*, out).

    Raises:
        ValueError: a size or `layers` is below 1, or `gated` has other than 2 layers; a module in
            place of what makes an activation.
        UnknownName: no activation is called that.

    Paper: Clavié, Lee, Takehi, Shakir, Kato, 2025, Simple Projection Variants Improve ColBERT
    Performance.

    >>> ProjectionHead(32, 8)(torch.zeros(2, 5, 32)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, dim: int, out: int = 128, hidden: int | None = None, *, layers: int = 2,
                 gated: bool = False, residual: bool = True,
                 activation: Activation | None = None, bias: bool = False,
                 normalize: bool = True) -> None:
        super().__init__()
        hidden = 2 * dim if hidden is None else hidden
        if gated and layers != 2:
            raise ValueError(f"layers must be 2 where the head is gated, got {layers}; give "
                             "gated=False for another number")
        self.normalize = normalize
        if gated:
            self.head: nn.Module = GLU(dim, hidden, out=out, bias=bias,
                                       activation="silu" if activation is None else activation)
        else:
            self.head = FeedForward(dim, hidden, layers=layers, out=out, bias=bias,
                                    activation="identity" if activation is None else activation)
        self.residual: nn.Module | None = None
        if residual:
            self.residual = nn.Identity() if dim == out else nn.Linear(dim, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the vectors (*, out) of (*, dim)."""
        y: Tensor = self.head(x)
        if self.residual is not None:
            y = y + self.residual(x)
        return nn.functional.normalize(y, dim=-1) if self.normalize else y


@method("companion", papers=["004-002"])
def maxsim(queries: Tensor, documents: Tensor, query_mask: Tensor | None = None,
           document_mask: Tensor | None = None) -> Tensor:
    """Return the score of each document for each query: what its tokens find best, added up.

    score(q, d) = sum_i max_j <q_i, d_j>,  over the tokens that the masks leave.

    Args:
        queries: the tokens' vectors of each query.
        documents: the tokens' vectors of each document.
        query_mask: where a query has a token; everywhere where none is given.
        document_mask: where a document has one.

    Shapes: queries (queries, tokens, dim), documents (documents, others, dim), masks of bool
    (queries, tokens) and (documents, others); score (queries, documents).

    Raises:
        ValueError: the shapes are others, or there are documents without any place for a token.

    A query without a token scores 0 everywhere, a document without one -inf, except for such a
    query.

    Paper: Clavié, Lee, Takehi, Shakir, Kato, 2025, Simple Projection Variants Improve ColBERT
    Performance.

    >>> maxsim(torch.eye(3)[None, :2], torch.eye(3)[None])
    tensor([[2.]])
    """
    if queries.ndim != 3 or documents.ndim != 3 or queries.shape[-1] != documents.shape[-1]:
        raise ValueError("queries and documents must be (queries, tokens, dim) and (documents, "
                         f"tokens, dim), got {tuple(queries.shape)} and {tuple(documents.shape)}")
    for name, mask, vectors in (("query_mask", query_mask, queries),
                                ("document_mask", document_mask, documents)):
        if mask is not None and (mask.shape != vectors.shape[:2] or mask.dtype != torch.bool):
            raise ValueError(f"{name} must be bool of shape {tuple(vectors.shape[:2])}, got "
                             f"{mask.dtype} of {tuple(mask.shape)}")
    if not documents.shape[1]:
        raise ValueError(f"documents must have a place for a token, got {tuple(documents.shape)}")
    (n, tokens, _), (m, others, _) = queries.shape, documents.shape
    similarity = (queries.flatten(0, 1) @ documents.flatten(0, 1).T).view(n, tokens, m, others)
    if document_mask is not None:
        similarity = similarity.masked_fill(~document_mask, float("-inf"))
    best = similarity.amax(-1)
    if query_mask is not None:
        best = best.masked_fill(~query_mask[:, :, None], 0)
    return best.sum(1)
