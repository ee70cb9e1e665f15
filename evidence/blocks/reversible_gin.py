from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from netwright.blocks.reversible import ReversibleGIN
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.measure import cost
from netwright.runtime.modes import evaluating
from netwright.training import fit
from netwright.training.history import Epoch

NODES, BOTS, EXTRA, DIM, DEEP = 600, 60, 2.0, 16, 6
DEEPEST, LONGER, LOOKS = f"{DEEP} reversible blocks", 5, 20


@evidence(paper="001-007", claim="A deep network of grouped reversible graph isomorphism "
          "convolutions finds the nodes of a botnet in a communication graph better than shallow "
          "ones do, in memory that depth does not grow.")
def reversible_gin(scale: Scale) -> Outcome:
    """Plant peer-to-peer overlays in random graphs; find their nodes by structure alone."""
    seeds, epochs = (3, 120) if scale == "desk" else (5, 600)
    figures: dict[str, Sequence[float]] = {}
    curves: dict[str, Curve] = {}
    found: dict[str, list[float]] = {}
    saliency: list[float] = []
    for name in (DEEPEST, "1 reversible block", "2 layers of plain GIN"):
        lines = []
        for seed in range(seeds):
            train, test = (_union(range(first, first + 2)) for first in
                           (1000 * seed, 1000 * seed + 500))
            torch.manual_seed(seed)
            network = _network(name)
            lines.append(_trained(network, train, test, seed,
                                  epochs if name == DEEPEST else LONGER * epochs))
            if name == DEEPEST:
                saliency.append(_on_bots(network, test))
        curves[name] = Curve([100 * (k + 1) / LOOKS for k in range(LOOKS)], lines)
        found[name] = [line[-1] for line in lines]
        figures[f"F1 of the bots of graphs not seen, {name}"] = found[name]
    figures["share of a bot's saliency that lies on bots (%)"] = saliency
    figures["share of bots among the nodes (%)"] = [100 * BOTS / NODES]
    stored = {}
    for depth in (2, 8, 32):
        for kind in ("reversible", "stored"):
            stored[depth, kind] = _stored(depth, reversible=kind == "reversible")
            figures[f"bytes stored for the backward pass, {depth} blocks, {kind}"] = [
                stored[depth, kind]]
    deep, *shallow = found.values()
    better = all(mine > other + 0.05 for others in shallow
                 for mine, other in zip(deep, others, strict=True))
    flat = stored[32, "reversible"] <= 1.05 * stored[2, "reversible"]
    return Outcome(
        verdict="shown" if better and flat else "partly shown" if better or flat else "not shown",
        setting={"graphs": f"2 to train on and 2 others to test on; each {NODES} nodes by "
                 f"preferential attachment (2 edges a node), of which {BOTS} are bots with a de "
                 "Bruijn overlay (4 edges a bot); the others get as many random edges among "
                 f"themselves as make {EXTRA:g} more a node; every feature is 1",
                 "networks": f"width {DIM}; a block has 2 groups, so messages go 2 edges in 1 "
                 f"block and {2 * DEEP} in {DEEP}", "training": f"{epochs} epochs, {LONGER} times "
                 "as many for the shallow networks; Adam 0.005 falling by a cosine, gradient norm "
                 "at most 1", "decision": "above the probability that gives the best F1 on the "
                 "training graphs",
                 "saliency": "gradient of the bot logit by the features, 20 bots of each test set",
                 "memory": "the training graphs"},
        figures=figures,
        note="Shown means: in every seed the deep network's F1 after the last epoch is over 0.05 "
             "above both shallow ones', and 32 blocks store at most 1.05 times the bytes of 2. The "
             "paper's graphs of real traffic have 140,000 nodes; these are small and random.",
        curves=curves, axes=("share of the training (%)", "F1 of the bots"))


class _Graphs(NamedTuple):
    x: Tensor
    edge_index: Tensor
    y: Tensor


def _union(seeds: range) -> _Graphs:
    """Return graphs of `seeds` as one, whose parts are not connected."""
    edges, labels = zip(*[_graph(seed) for seed in seeds], strict=True)
    shifted = [e + k * NODES for k, e in enumerate(edges)]
    return _Graphs(torch.ones(NODES * len(seeds), 1), torch.cat(shifted, 1), torch.cat(labels))


def _graph(seed: int) -> tuple[Tensor, Tensor]:
    import networkx
    generator = Generator().manual_seed(seed)
    background = torch.tensor(list(networkx.barabasi_albert_graph(NODES, 2, seed=seed).edges)).T
    order = torch.randperm(NODES, generator=generator)
    bots, others = order[:BOTS], order[BOTS:]
    k = torch.arange(BOTS)
    overlay = [torch.stack([bots, bots[(2 * k + j) % BOTS]]) for j in (0, 1)]
    extra = torch.randint(len(others), (2, int(EXTRA * len(others) / 2)), generator=generator)
    edges = torch.cat([background, *overlay, others[extra]], 1)
    edges = edges[:, edges[0] != edges[1]]
    y = torch.zeros(NODES, dtype=torch.long)
    y[bots] = 1
    return torch.cat([edges, edges.flip(0)], 1), y


def _network(name: str) -> nn.Module:
    if name.endswith("plain GIN"):
        from torch_geometric.nn import GIN
        return GIN(1, DIM, num_layers=2, out_channels=2, norm="batch_norm")
    return ReversibleGIN(DIM, int(name.split()[0]), features=1, classes=2)


def _trained(network: nn.Module, train: _Graphs, test: _Graphs, seed: int,
             epochs: int) -> list[float]:
    """Return the F1 on the test graphs, at `LOOKS` times during the training."""
    line = []

    def look(epoch: Epoch) -> None:
        if epoch.epoch % (epochs // LOOKS) == 0:
            line.append(_f1(network, train, test))
    fit(network, [((train.x, train.edge_index), train.y)], epochs=epochs, seed=seed, clip=1.0,
        optimizer=lambda p: torch.optim.Adam(p, 5e-3), progress=False, on_epoch=look,
        scheduler=lambda optimizer: CosineAnnealingLR(optimizer, epochs))
    return line


@torch.no_grad()
def _f1(network: nn.Module, train: _Graphs, test: _Graphs) -> float:
    with evaluating(network):
        scores = [network(part.x, part.edge_index).softmax(1)[:, 1] for part in (train, test)]
    bounds = torch.linspace(0.02, 0.98, 49)
    best = max(bounds.tolist(), key=lambda bound: _score(scores[0] > bound, train.y))
    return _score(scores[1] > best, test.y)


def _score(guess: Tensor, y: Tensor) -> float:
    return 2 * int((guess & (y == 1)).sum()) / max(1, int(guess.sum() + y.sum()))


def _on_bots(network: nn.Module, graphs: _Graphs) -> float:
    x, shares = graphs.x.clone().requires_grad_(), []
    with evaluating(network):
        for bot in graphs.y.nonzero()[:20, 0]:
            (gradient,) = torch.autograd.grad(network(x, graphs.edge_index)[bot, 1], x)
            saliency = gradient.abs().sum(1)
            shares.append(float(saliency[graphs.y == 1].sum() / saliency.sum()))
    return 100 * sum(shares) / len(shares)


def _stored(depth: int, *, reversible: bool) -> float:
    torch.manual_seed(0)
    graphs = _union(range(2))
    network = ReversibleGIN(DIM, depth, features=1, classes=2)
    if not reversible:
        network.blocks = _InTurn(network.blocks)  # type: ignore[assignment]
    batch = ((graphs.x, graphs.edge_index), graphs.y)
    return float(cost(network, batch, repeats=1, warmup=0).saved_bytes)


class _InTurn(nn.ModuleList):
    """The blocks under ordinary autograd."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for block in self:
            x = block(x, edge_index)
        return x
