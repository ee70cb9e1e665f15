from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, normalize, silu

from netwright.blocks.feedforward import ProjectionHead, maxsim
from netwright.errors import UnknownName


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("layers", "gated"), [(1, False), (2, False), (3, False), (2, True)])
@pytest.mark.parametrize("out", [3, 6])
def test_it_is_its_formula(layers, gated, residual, out):
    head = ProjectionHead(6, out, 10, layers=layers, gated=gated, residual=residual,
                          activation="silu").double()
    x = torch.randn(2, 4, 6, dtype=torch.double)
    if gated:
        y = linear(silu(x @ head.head.gate.weight.T) * (x @ head.head.up.weight.T),
                   head.head.down.weight)
    else:
        weights = [part.weight for part in head.head if isinstance(part, nn.Linear)]
        assert len(weights) == layers
        y = x
        for i, weight in enumerate(weights):
            y = y @ weight.T if i == 0 else silu(y) @ weight.T
    if residual:
        y = y + (x if out == 6 else x @ head.residual.weight.T)
    torch.testing.assert_close(head(x), normalize(y, dim=-1), rtol=0, atol=1e-13)
    head.normalize = False
    torch.testing.assert_close(head(x), y, rtol=0, atol=1e-13)


def test_linear_layers_and_a_residual_are_one_matrix():
    head = ProjectionHead(6, 3, 10, normalize=False).double()
    up, down = head.head[0].weight, head.head[2].weight
    x = torch.randn(5, 6, dtype=torch.double)
    torch.testing.assert_close(head(x), x @ (down @ up + head.residual.weight).T,
                               rtol=0, atol=1e-13)


def test_maxsim_is_its_sum_of_maxima_and_has_its_gradients():
    torch.manual_seed(0)
    queries = torch.randn(3, 4, 5, dtype=torch.double, requires_grad=True)
    documents = torch.randn(2, 6, 5, dtype=torch.double, requires_grad=True)
    of_queries = torch.rand(3, 4) < 0.7
    of_documents = torch.rand(2, 6) < 0.7
    for masks in ((None, None), (of_queries, None), (None, of_documents),
                  (of_queries, of_documents)):
        a, b = (torch.ones(t.shape[:2], dtype=torch.bool) if mask is None else mask
                for mask, t in zip(masks, (queries, documents), strict=True))
        expected = torch.stack([torch.stack([
            sum(max(q @ d for d in document[there]) for q in query[asked])
            for document, there in zip(documents, b, strict=True)])
            for query, asked in zip(queries, a, strict=True)])
        score = maxsim(queries, documents, *masks)
        torch.testing.assert_close(score, expected, rtol=0, atol=1e-13)
        signal = torch.randn_like(score)
        for mine, theirs in zip(torch.autograd.grad(score, (queries, documents), signal),
                                torch.autograd.grad(expected, (queries, documents), signal),
                                strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


def test_texts_without_tokens():
    queries, documents = torch.randn(2, 3, 4), torch.randn(3, 5, 4)
    asked, there = torch.ones(2, 3, dtype=torch.bool), torch.ones(3, 5, dtype=torch.bool)
    asked[1], there[2] = False, False
    score = maxsim(queries, documents, asked, there)
    assert torch.equal(score[1], torch.zeros(3))
    assert score[0, 2] == -torch.inf
    assert score[0, :2].isfinite().all()
    assert maxsim(queries[:0], documents).shape == (0, 3)
    assert maxsim(queries, documents[:0]).shape == (2, 0)


def test_dtypes_shapes_and_states():
    head = ProjectionHead(6, 3)
    for shape in ((6,), (3, 6), (2, 1, 3, 6), (0, 6)):
        assert head(torch.randn(shape)).shape == (*shape[:-1], 3)
    assert deepcopy(head).bfloat16()(torch.randn(3, 6).bfloat16()).dtype == torch.bfloat16
    x, other = torch.randn(2, 5, 6), ProjectionHead(6, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert maxsim(head(x), head(x)).shape == (2, 2)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(x), head(x))
    assert ProjectionHead(6).head[0].out_features == 12
    assert isinstance(ProjectionHead(6, 3, gated=True).head.activation, nn.SiLU)


def test_a_head_learns_which_features_tell_documents_apart():
    """Measured over 5 seeds: at most 6 of 40 found before training, at least 39 after."""
    torch.manual_seed(0)
    told, noise = torch.randn(40, 4, 4), torch.randn(2, 40, 4, 12)
    asked, there = (torch.cat([told, part], -1) for part in noise)
    head = ProjectionHead(16, 4)
    right, optimizer = torch.arange(40), torch.optim.Adam(head.parameters(), 1e-2)

    def found():
        return int((maxsim(head(asked), head(there)).argmax(1) == right).sum())

    before = found()
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(5 * maxsim(head(asked), head(there)), right).backward()
        optimizer.step()
    assert found() >= 36 > 12 > before


@pytest.mark.parametrize(("run", "says"), [
    (lambda: ProjectionHead(0), "dim must be at least 1, got 0"),
    (lambda: ProjectionHead(4, 0), "out must be at least 1, got 0"),
    (lambda: ProjectionHead(4, hidden=0), "hidden must be at least 1, got 0"),
    (lambda: ProjectionHead(4, layers=0), "layers must be at least 1, got 0"),
    (lambda: ProjectionHead(4, layers=3, gated=True), "layers must be 2 where the head is gated"),
    (lambda: maxsim(torch.randn(2, 3), torch.randn(1, 2, 3)), "queries and documents must be"),
    (lambda: maxsim(torch.randn(2, 2, 3), torch.randn(1, 2, 4)), "queries and documents must be"),
    (lambda: maxsim(torch.randn(2, 2, 3), torch.randn(1, 0, 3)), "a place for a token"),
    (lambda: maxsim(torch.randn(2, 2, 3), torch.randn(1, 2, 3), torch.ones(2, 2)),
     "query_mask must be bool"),
    (lambda: maxsim(torch.randn(2, 2, 3), torch.randn(1, 2, 3), None,
                    torch.ones(1, 3, dtype=torch.bool)), "document_mask must be bool of shape"),
])
def test_what_cannot_be_is_refused(run, says):
    with pytest.raises(ValueError, match=says):
        run()
    with pytest.raises(UnknownName, match="swish"):
        ProjectionHead(4, activation="swish")
