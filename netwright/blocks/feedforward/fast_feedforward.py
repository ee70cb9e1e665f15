from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from netwright import checks
from netwright.blocks.feedforward.feed_forward import Activation, FeedForward, activation_module
from netwright.catalogue.facets import method
from netwright.objectives.added_loss import with_auxiliary
from netwright.runtime.padding import real_of

__all__ = ["FastFeedforward"]

TOGETHER = 6  # levels whose nodes all decide in one product, which is quicker than picking theirs
FEW = 8  # rows for which copying their leaves' weights is quicker than going leaf by leaf


class TreeUsage(NamedTuple):
    """What a `FastFeedforward` did in its last forward pass in training.

    Attributes:
        load: (leaves,) how many inputs would go to each leaf in evaluation.
        hardening_loss: (), the mean entropy of the nodes' decisions (nats).
        balance_loss: (), L sum_l F_l P_l, which is 1 where all leaves are used evenly.
    """

    load: Tensor
    hardening_loss: Tensor
    balance_loss: Tensor


@method(
    "block",
    papers=["003-023", "003-034"],
    place="feedforward",
    takes=("dim", "hidden"),
    saves=["inference time"],
    search={"depth": [2, 3, 4], "hardening": (0.3, 30.0), "balance": [0.0, 0.1]},
)
class FastFeedforward(nn.Module):
    """A wide feed-forward block that is a tree: in use each input runs one small leaf of it.

    node j:  q_j = sigmoid(n_j x + c_j), the chance to go right;  p_l = the product of what the
    nodes on the way to leaf l say.
    In training:  y = sum_l p_l f_l(x),  f_l(x) = s(x U_l' + u_l) D_l + d_l.
    In evaluation:  y = f_l(x) for the one leaf that going right where q >= 1/2 leads to. The
    nodes decide in float32 or wider, so that autocast changes no input's way.

    A training pass adds `hardening` mean_j H(q_j) + `balance` L sum_l F_l P_l to whatever loss is
    trained: H is a node's entropy, F_l the share of the inputs that go to leaf l, P_l the mean of
    p_l over them, padding apart (see `feed_attention_mask`). Its gradient is added in the backward
    pass, and y is as it was; `usage` holds both terms of the last training pass. Their gradient is
    that of a loss of which backward() is called once and unscaled. Both weights may be changed at
    any time.

    With a `master_leaf` of some units, which every input runs, y is k times the above plus 1 - k
    times the master leaf's, where sigmoid(k') = k is learnt from k' = 1/2 on.

    Args:
        dim: size of the last axis of x.
        hidden: the units of all leaves together; 4 `dim` where neither it nor `leaf` is given.
        depth: levels of nodes; there are 2^depth leaves.
        leaf: the units of one leaf, `hidden` / 2^depth where none is given.
        activation: a name, or what makes a module.
        out: size of the last axis of y, `dim` where none is given.
        hardening: how much the nodes' entropy counts, so that choosing costs little in the end.
        balance: how much uneven use of the leaves counts.
        master_leaf: units of the leaf that every input runs; 0 for none.

    Shapes: x (*, dim), y (*, out).

    Raises:
        ValueError: a size is below 1, `hidden` is not `leaf` 2^depth, a weight is negative, or
            the last axis of x is not `dim`.
        UnknownName: no activation is called that.

    Papers: Belcak, Wattenhofer, 2023, Fast Feedforward Networks. Charalampopoulos, Chatzis,
    Ntoulas-Panagiotopoulos, Papaioannou, Potamianos, 2024, Enhancing Fast Feed Forward Networks
    with Load Balancing and a Master Leaf Node.

    >>> block = FastFeedforward(16, 64, depth=3)
    >>> block(torch.zeros(2, 5, 16)).shape, block.leaf
    (torch.Size([2, 5, 16]), 8)
    >>> block.eval().choose(torch.zeros(2, 5, 16)).shape
    torch.Size([2, 5])
    """

    usage: TreeUsage

    def __init__(self, dim: int, hidden: int | None = None, *, depth: int = 3,
                 leaf: int | None = None, activation: Activation = "relu", out: int | None = None,
                 hardening: float = 3.0, balance: float = 0.0, master_leaf: int = 0) -> None:
        super().__init__()
        out = dim if out is None else out
        checks.count(1, dim=dim, hidden=hidden, depth=depth, leaf=leaf, out=out, optional=True)
        checks.at_least(0, hardening=hardening, balance=balance, master_leaf=master_leaf)
        leaves = 2 ** depth
        if hidden is None:
            hidden = 4 * dim if leaf is None else leaf * leaves
        leaf = hidden // leaves if leaf is None else leaf
        if leaf * leaves != hidden:
            raise ValueError(f"hidden must be leaf x {leaves}, since depth={depth}, got "
                             f"hidden={hidden} with leaf={leaf}; give one of the two, or another "
                             "depth")
        self.dim, self.depth, self.leaf, self.leaves, self.out = dim, depth, leaf, leaves, out
        self.hardening, self.balance = hardening, balance
        self.nodes = nn.Linear(dim, leaves - 1)  # the root, then level after level
        self.up = nn.Linear(dim, leaves * leaf)
        self.activation = activation_module(activation)
        self.down = nn.Parameter(torch.empty(leaves, leaf, out))
        self.bias = nn.Parameter(torch.empty(leaves, out))
        for parameter in (self.down, self.bias):
            nn.init.uniform_(parameter, -leaf ** -0.5, leaf ** -0.5)
        if master_leaf:
            self.master = FeedForward(dim, master_leaf, activation=activation, out=out)
            self.share = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, out) of (*, dim)."""
        rows = self._rows(x)
        y = self._mixed(rows, real_of(x)) if self.training else self._chosen(rows)
        if hasattr(self, "master"):
            k = self.share.sigmoid()
            y = k * y + (1 - k) * self.master(rows)
        return y.view(*x.shape[:-1], self.out)

    @torch.no_grad()
    def choose(self, x: Tensor) -> Tensor:
        """Return the leaf (*) that each input of x (*, dim) goes to, in training mode too."""
        rows, top = self._rows(x), min(self.depth, TOGETHER)
        wide = torch.promote_types(rows.dtype, torch.float32)
        rows = rows.to(wide)
        weight, bias = self.nodes.weight.to(wide), self.nodes.bias.to(wide)
        inner = 2 ** top - 1
        with torch.autocast(x.device.type, enabled=False):
            node = _descended(linear(rows, weight[:inner], bias[:inner]) >= 0, top)
            for _ in range(self.depth - top):
                scores = (weight.index_select(0, node) * rows).sum(1) + bias.index_select(0, node)
                node = torch.add(scores >= 0, node, alpha=2) + 1
        return (node - (self.leaves - 1)).view(x.shape[:-1])

    def extra_repr(self) -> str:
        """Say how large the tree is and what is added to the loss."""
        return (f"depth={self.depth}, leaf={self.leaf}, hardening={self.hardening}, "
                f"balance={self.balance}")

    def _rows(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.dim:
            raise ValueError(f"x must have {self.dim} numbers in its last axis, since "
                             f"dim={self.dim}, got {tuple(x.shape)}")
        return x.reshape(-1, self.dim)

    def _mixed(self, x: Tensor, real: Tensor | None) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            scores = linear(x.to(wide), self.nodes.weight.to(wide), self.nodes.bias.to(wide))
        paths = self._with_losses(_paths(scores, self.depth), scores, real)
        h = self.activation(self.up(x).unflatten(1, (self.leaves, self.leaf)))
        paths = paths.to(h.dtype)
        h = (h * paths.unsqueeze(2)).flatten(1)  # scaled before the product that sums the leaves
        return h @ self.down.flatten(0, 1) + paths @ self.bias

    def _with_losses(self, paths: Tensor, scores: Tensor, real: Tensor | None) -> Tensor:
        counted, judged = paths, scores
        if real is not None:
            counted, judged = (t[real.reshape(-1)] for t in (paths, scores))
        rows = max(len(judged), 1)
        leaf = _descended(judged >= 0, self.depth) - (self.leaves - 1)
        load = paths.new_zeros(self.leaves).index_add_(0, leaf, paths.new_ones(len(leaf)))
        entropy = (softplus(judged) - judged * judged.sigmoid()).sum() / (rows * scores.shape[1])
        balance = self.leaves * (load / rows * counted.sum(0) / rows).sum()
        self.usage = TreeUsage(load, entropy.detach(), balance.detach())
        loss = self.hardening * entropy + self.balance * balance
        return with_auxiliary(paths, loss) if loss.requires_grad else paths

    def _chosen(self, x: Tensor) -> Tensor:
        leaf = self.choose(x)
        up = self.up.weight.view(self.leaves, self.leaf, self.dim).mT
        start = self.up.bias.view(self.leaves, self.leaf)
        if len(x) <= FEW:
            first, then = up.mT.index_select(0, leaf).mT, self.down.index_select(0, leaf)
            h = torch.baddbmm(start.index_select(0, leaf).unsqueeze(1), x.unsqueeze(1), first)
            y = torch.baddbmm(self.bias.index_select(0, leaf).unsqueeze(1), self.activation(h),
                              then)
            return y.squeeze(1)
        leaf, order = leaf.sort()
        used, counts = (found.tolist() for found in leaf.unique_consecutive(return_counts=True))
        # Under autocast the products are narrower than the biases, as they are in training.
        h = _by_leaf(x[order], up, used, counts)
        h = self.activation(h + start[leaf].to(h.dtype))
        y = _by_leaf(h, self.down, used, counts)
        return (y + self.bias[leaf].to(y.dtype))[order.argsort()]


def _by_leaf(rows: Tensor, weights: Tensor, used: list[int], counts: list[int]) -> Tensor:
    """Return rows (all, n), ordered by leaf, each times its leaf's matrix in (leaves, n, m)."""
    # Without unbinding, the gradient of each leaf's matrix would be as large as that of all.
    matrices: Any = weights.unbind() if torch.is_grad_enabled() else weights
    return torch.cat([some @ matrices[k] for k, some in zip(used, rows.split(counts),
                                                            strict=True)])


def _paths(scores: Tensor, depth: int) -> Tensor:
    """Return the probability (rows, leaves) of each leaf from the nodes' scores."""
    chances, paths = scores.sigmoid(), torch.ones_like(scores[:, :1])
    for level in range(depth):
        nodes = 2 ** level
        right = paths * chances[:, nodes - 1:2 * nodes - 1]
        paths = torch.stack((paths - right, right), 2).flatten(1)
    return paths


def _descended(right: Tensor, levels: int) -> Tensor:
    """Return the node (rows,) reached after `levels`, where `right` says where each node sends."""
    node = torch.zeros(len(right), 1, dtype=torch.long, device=right.device)
    for _ in range(levels):
        node = torch.add(right.gather(1, node), node, alpha=2) + 1
    return node.squeeze(1)
