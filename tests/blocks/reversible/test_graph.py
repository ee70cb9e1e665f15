import builtins
import copy

import pytest
import torch
from torch import nn

from netwright.blocks.reversible import GroupedReversible, ReversibleGIN, ReversibleSequential
from netwright.errors import CannotReverse, MissingExtra
from netwright.measure import cost
from netwright.rules import Reversible
from netwright.stages import stages
from netwright.training import fit

pytest.importorskip("torch_geometric")

NODES, EDGES = 12, torch.randint(12, (2, 40), generator=torch.Generator().manual_seed(0))


class Weighted(nn.Module):
    """A convolution with edge weights, batch norm and dropout."""

    def __init__(self, width):
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x, edge_index, weight):
        source, target = edge_index
        messages = self.norm(self.linear(x))[source] * weight[:, None]
        return self.dropout(torch.zeros_like(x).index_add(0, target, messages).tanh())


def chain(groups=2, depth=4):
    torch.manual_seed(0)
    return ReversibleSequential(*[GroupedReversible(Weighted, 6, groups)
                                  for _ in range(depth)]).double()


def nodes(channels=6):
    return torch.randn(NODES, channels, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(1))


def weights():
    return torch.rand(EDGES.shape[1], dtype=torch.float64,
                      generator=torch.Generator().manual_seed(2)).requires_grad_()


def gin(depth=4, groups=2, **options):
    torch.manual_seed(0)
    return ReversibleGIN(6, depth, groups, **{"features": 3, "classes": 2, **options}).double()


def plain(network):
    """The same GIN under ordinary autograd."""
    other = copy.deepcopy(network)

    class InTurn(nn.ModuleList):
        def forward(self, x, edge_index):
            for block in self:
                x = block(x, edge_index)
            return x
    other.blocks = InTurn(other.blocks)
    return other


def test_block_is_pytorch_geometrics_grouped_reversible():
    from torch_geometric.nn import GroupAddRev
    block = GroupedReversible(Weighted, 6, 3).double().eval()
    other = GroupAddRev(nn.ModuleList(conv.conv for conv in block.convs), disable=True)
    x, weight = nodes(), weights()
    torch.testing.assert_close(block(x, EDGES, weight), other(x, EDGES, weight))


@pytest.mark.parametrize("groups", [2, 3, 6])
def test_inverts(groups):
    deep, x = chain(groups, depth=12).eval(), nodes()
    with torch.no_grad():
        torch.testing.assert_close(deep.inverse(deep(x, EDGES, weights()), EDGES, weights()), x,
                                   atol=1e-10, rtol=0)
        single, x, weight = copy.deepcopy(deep).float(), x.float(), weights().float()
        # measured: at most 1.5e-6
        torch.testing.assert_close(single.inverse(single(x, EDGES, weight), EDGES, weight), x,
                                   atol=1e-5, rtol=0)


@pytest.mark.parametrize("groups", [2, 3])
def test_gradients_are_those_of_plain_autograd(groups):
    deep, x, weight = chain(groups), nodes(), weights()
    blocks, same, before = copy.deepcopy(list(deep)), weights(), x.clone()
    torch.manual_seed(3)
    deep(x, EDGES, weight).square().sum().backward()  # the input needs no gradient
    torch.manual_seed(3)
    h = x
    for block in blocks:
        h = block(h, EDGES, same)
    h.square().sum().backward()
    other = nn.ModuleList(blocks)
    for mine, theirs in zip(deep.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(weight.grad, same.grad, atol=1e-10, rtol=1e-10)
    for mine, theirs in zip(deep.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(x, before)


def test_gin_is_its_formula():
    from torch_geometric.nn import GINConv
    network, x = gin(1, 3).eval(), nodes(3)
    groups = list(network.entry(x).chunk(3, 1))
    for i, conv in enumerate(network.blocks[0].convs):
        part = conv.conv
        h = groups[i - 1] if i else groups[1] + groups[2]
        g = part.norm(h).relu()
        groups[i] = groups[i] + part.conv.nn(
            g + torch.zeros_like(g).index_add(0, EDGES[1], g[EDGES[0]]))
        assert isinstance(part.conv, GINConv)
    torch.testing.assert_close(network(x, EDGES), network.output(torch.cat(groups, 1)))
    bare = gin(2, features=None, classes=None)
    assert bare(nodes(), EDGES).shape == (NODES, 6)


def test_saliency_is_that_of_the_plain_network():
    network, x = gin(8, dropout=0.2).eval(), nodes(3).requires_grad_()
    other = plain(network)
    for node, label in ((0, 1), (7, 0)):
        (mine,) = torch.autograd.grad(network(x, EDGES)[node, label], x)
        (theirs,) = torch.autograd.grad(other(x, EDGES)[node, label], x)
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)
        assert mine.abs().sum() > 0
    assert all(p.grad is None for p in network.parameters())


def test_pytorch_geometrics_explainer_runs_on_it():
    from torch_geometric.explain import Explainer, GNNExplainer
    found = []
    for network in (gin(3).float(), plain(gin(3).float())):
        torch.manual_seed(0)
        explainer = Explainer(
            network, GNNExplainer(epochs=10), explanation_type="model",
            node_mask_type="attributes", edge_mask_type="object",
            model_config={"mode": "multiclass_classification", "task_level": "node",
                          "return_type": "raw"})
        found.append(explainer(nodes(3).float(), EDGES, index=3))
        assert all(not name.endswith("_edge_mask") for name, _ in network.named_parameters())
    for mask in ("edge_mask", "node_mask"):
        torch.testing.assert_close(found[0][mask], found[1][mask], atol=1e-4, rtol=1e-3)
    assert found[0].edge_mask.shape == (EDGES.shape[1],)
    assert (found[0].edge_mask > 0).any()


def test_low_precision_frozen_parts_and_states():
    network, x = gin(4).float(), nodes(3).float()
    with torch.autocast("cpu", torch.bfloat16):
        network(x, EDGES).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    half = copy.deepcopy(network).bfloat16()
    half.zero_grad()
    half(x.bfloat16(), EDGES).float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())
    frozen = gin(2)
    frozen.blocks[0].requires_grad_(False)
    frozen(nodes(3), EDGES).sum().backward()
    assert all(p.grad is None for p in frozen.blocks[0].parameters())
    assert all(p.grad is not None for p in frozen.blocks[1].parameters())
    other = gin(4).float()
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(x, EDGES), network(x, EDGES))


def test_stages_the_rule_and_fit():
    network, x = gin(4).float(), (nodes(3).float(), EDGES)
    y = torch.randint(2, (NODES,), generator=torch.Generator().manual_seed(4))
    found = stages(network, x, cuts=["entry", "blocks", "output"])
    assert torch.equal(found(x), network(*x))
    other = copy.deepcopy(network)
    Reversible(found)(x, y)
    nn.functional.cross_entropy(other(*x), y).backward()
    for p, q in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    history = fit(network, [(x, y)], epochs=60, progress=False, seed=0,
                  optimizer=lambda p: torch.optim.Adam(p, 1e-2))
    assert history.epochs[-1].loss < 0.5 * history.epochs[0].loss


def test_memory_does_not_grow_with_depth():
    x, y = (torch.randn(500, 3), torch.randint(500, (2, 600))), torch.randint(2, (500,))

    def bytes_of(depth, change=lambda network: network):
        found = cost(change(gin(depth).float()), (x, y), repeats=1, warmup=0)
        return found.saved_bytes, found.working_bytes
    few, many = bytes_of(1), bytes_of(3)
    assert all(more <= 1.05 * less for less, more in zip(few, many, strict=True))
    assert bytes_of(3, plain)[0] > 2 * many[0]


def ring(number=160, reach=4):
    """A ring of which it is sought which nodes have a mark up to `reach` nodes before."""
    around = torch.arange(number)
    edges = torch.stack([around, (around + 1) % number])
    x = torch.zeros(number, 1)
    x[torch.randperm(number, generator=torch.Generator().manual_seed(0))[:16]] = 1
    y = sum(x[:, 0].roll(k) for k in range(reach + 1)) > 0
    return [((x, edges), y.long())]


def test_depth_reaches_what_a_shallow_network_does_not():
    def trained(depth):
        torch.manual_seed(0)
        network = ReversibleGIN(16, depth, features=1, classes=2)
        history = fit(network, ring(), epochs=80, progress=False, seed=0,
                      optimizer=lambda p: torch.optim.Adam(p, 1e-2))
        return history.epochs[-1].loss
    deep, shallow = trained(3), trained(1)  # one block of two groups sees two edges far
    assert deep < 0.15
    assert shallow > 0.3


def test_errors(monkeypatch):
    for groups in (1, 4):
        with pytest.raises(ValueError, match="divide channels=6, got"):
            GroupedReversible(Weighted, 6, groups)
    with pytest.raises(ValueError, match="depth must be at least 1"):
        gin(0)
    with pytest.raises(ValueError, match="dropout must be"):
        gin(1, dropout=1.0)
    with pytest.raises(CannotReverse, match="has 8 entries"):
        chain()(nodes(8), EDGES, weights())
    with pytest.raises(CannotReverse, match="Linear must return"):
        GroupedReversible(lambda width: nn.Linear(width, 1), 6, 2)(nodes().float())

    real = builtins.__import__

    def missing(name, *rest, **options):
        if name.startswith("torch_geometric"):
            raise ImportError("No module named 'torch_geometric'")
        return real(name, *rest, **options)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtra, match=r"netwright\[graphs\]"):
        gin(1)
    assert GroupedReversible(Weighted, 6, 2).streams == 2
