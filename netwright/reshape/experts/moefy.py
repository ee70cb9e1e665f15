from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, normalize

from netwright import checks
from netwright.blocks.experts import MixtureOfExperts, Routing
from netwright.blocks.experts.routing import check_choice
from netwright.blocks.feedforward import GLU
from netwright.catalogue.facets import method
from netwright.errors import UnknownName
from netwright.reshape._calibration import batches_of
from netwright.reshape._layers import layer_of, plain_layer
from netwright.reshape.change import decided, reshape
from netwright.reshape.experts._dense import (
    activation_of,
    as_block,
    dense_layers,
    put_blocks,
    rows_of,
)
from netwright.reshape.feedforward import (
    FeedForwardLayer,
    FeedForwardWeights,
    feedforward_weights,
)

__all__ = ["moefy"]

Split = Literal["cluster", "coactivation", "random"]
Router = Literal["mlp", "similarity", "groundtruth"]


@method(
    "reshape",
    papers=["003-070"],
    place="feedforward",
    saves=["inference time"],
    needs=["dense feed-forward layers", "calibration data"],
    keeps_function=False,
    search={"n_experts": [8, 16], "split": ["cluster", "coactivation"]},
    variants={"clusters": {"n_experts": 4, "steps": 2},
              "co-activation": {"n_experts": 4, "split": "coactivation", "router": "similarity"},
              "random": {"n_experts": 4, "split": "random", "router": "groundtruth"}},
)
@reshape
def moefy(model: nn.Module, calibration: Any, *, n_experts: int = 16, split: Split = "cluster",
          router: Router = "mlp", k: int | None = None, square: bool = True, rows: int = 8192,
          steps: int = 500, generator: Generator | None = None) -> nn.Module:
    """Return a copy whose feed-forward layers run only the units that an input makes active.

    y = sum_(e in top k of s(x)) W2_e a(W1_e x + b1_e) + b2;  s_e(x) ~ sum_(units j of e) |h_j(x)|,
    h being the hidden units, W1_e and W2_e the rows and columns of those that are e's.

    The units of each layer are split into experts of one size: by a balanced k-means of their
    weights of length 1 ("cluster"), by cutting the graph of how often two units are active
    together ("coactivation", a balanced k-means of its leading eigenvectors), or at random. A
    router then guesses which experts are most active: a network with one hidden layer, fitted to
    the calibration data ("mlp"), the cosine with the mean of an expert's weights ("similarity"),
    or by computing all hidden units and looking ("groundtruth", which saves only the second
    matrix, and says how good a router could be).

    No weight is lost: with `k=n_experts` outputs are the dense model's up to rounding. A change to
    `router.k` of a `MixtureOfExperts` in the result changes how many run. With ReLU, units that
    are not active are 0 and leaving them out changes nothing. GELU, SiLU and gated layers are
    split in the same way by the size of their units, |a(gate) up|, which is small but not 0: more
    experts must run, or the model be trained on; the routers get no gradient.

    Args:
        model: any module with feed-forward layers; those that are experts already stay.
        calibration: what the model takes, or a list of such batches.
        n_experts: into how many each layer is split; it must divide the hidden units.
        split: how.
        router: how experts are chosen.
        k: how many run, a quarter where none is given.
        square: False for layers whose output has another size than their input, too.
        rows: how many inputs of a layer are looked at, drawn from the calibration data.
        steps: of the fit of an "mlp" router, each on 256 rows, with Adam.
        generator: draws all that is drawn; the global state without one.

    Raises:
        NothingToReshape: the model has no dense feed-forward layer.
        UnknownName: no split or router is called that.
        ValueError: `n_experts` does not divide a layer's hidden units, `k` is not between 1 and
            `n_experts`, or the calibration data are empty or not finite.

    Paper: Zhang, Lin, Liu, Li, Sun, Zhou, 2022, MoEfication: Transformer Feed-forward Layers are
    Mixtures of Experts.

    >>> from netwright.models import gpt
    >>> model, x = gpt(96, context=16), torch.randint(96, (4, 16))
    >>> whole = moefy(model, x, n_experts=8, k=8, steps=10)
    >>> torch.allclose(whole(x), model(x), atol=1e-5)
    True
    """
    k = max(1, n_experts // 4) if k is None else k
    for name, value, known in (("split", split, Split), ("router", router, Router)):
        if value not in known.__args__:  # type: ignore[attr-defined]
            raise UnknownName(name, value, known.__args__)  # type: ignore[attr-defined]
    check_choice(n_experts, k)
    checks.count(1, rows=rows, steps=steps)
    batches = batches_of(calibration)
    layers = dense_layers(model, batches[0], square)
    for layer in layers:
        if layer.hidden % n_experts:
            raise ValueError(f"n_experts must divide the {layer.hidden} hidden units of "
                             f"{layer}, got {n_experts}")
    given = rows_of(model, [str(layer.up) for layer in layers], batches)
    said, routers = [], []
    for layer in layers:
        x = given[str(layer.up)]
        if not x.isfinite().all():
            raise ValueError(f"calibration must give finite values, got others before "
                             f"{layer.up!r}; check the inputs and the weights")
        if len(x) > rows:
            x = x[torch.randperm(len(x), generator=generator)[:rows].to(x.device)]
        weights = feedforward_weights(model, layer)
        activation = activation_of(layer, weights.up)
        groups = _groups(weights, activation, x, n_experts, split, generator)
        chooser = ActiveExperts(_experts(weights, activation, groups), k, router)
        chooser.fit(x, steps, generator)
        routers.append(chooser.state_dict())
        said.append({"layer": plain_layer(layer, model), "groups": groups.tolist()})
    return decided({"layers": said, "k": k, "router": router}, layers=layers, routers=routers)


@moefy.applies
def _of_experts(model: nn.Module, decision: Mapping[str, Any],
                layers: Sequence[FeedForwardLayer] | None = None,
                routers: Sequence[Mapping[str, Tensor]] = ()) -> nn.Module:
    layers = layers or [layer_of(said["layer"], model) for said in decision["layers"]]
    blocks = {}
    for i, (layer, said) in enumerate(zip(layers, decision["layers"], strict=True)):
        weights = feedforward_weights(model, layer)
        made = _experts(weights, activation_of(layer, weights.up), torch.tensor(said["groups"]))
        chooser = ActiveExperts(made, decision["k"], decision["router"])
        if routers:
            chooser.load_state_dict(routers[i])
        # The bias of the second matrix counts once, whatever the experts.
        bias = None if weights.down_bias is None else Bias(weights.down_bias)
        blocks[layer] = MixtureOfExperts(layer.dim, made, chooser, shared=bias, balance=0.0)
    return put_blocks(model, blocks)


def _experts(weights: FeedForwardWeights, activation: nn.Module,
             groups: Tensor) -> list[nn.Module]:
    """Return a block of each group of hidden units."""
    return [as_block(weights.units(group)._replace(down_bias=None), activation)
            for group in groups]


class Bias(nn.Module):
    """A vector for every row, whatever the row."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, out) of (*, dim)."""
        return self.bias.expand(*x.shape[:-1], -1)


class ActiveExperts(nn.Module):
    """Choose the k experts whose hidden units are most active, each with a weight of 1.

    Shapes: x (tokens, dim); the routing's experts and weights (tokens, k).
    """

    score: nn.Sequential
    centers: Tensor

    def __init__(self, experts: list[Any], k: int, kind: Router) -> None:
        super().__init__()
        self.n_experts, self.k, self.kind = len(experts), k, kind
        self.looks_at = tuple(experts)  # not its own, so no parameters of it
        up = _reading(experts[0])
        if kind == "mlp":
            width = max(len(experts), 32)
            with torch.device("meta"):
                self.score = nn.Sequential(nn.Linear(up.shape[1], width), nn.Tanh(),
                                           nn.Linear(width, len(experts)))
            self.score.to_empty(device=up.device).to(up.dtype)
        elif kind == "similarity":
            with torch.no_grad():
                self.register_buffer("centers", normalize(torch.stack(
                    [_reading(expert).mean(0) for expert in experts]), dim=-1))

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Routing:
        """Return the routing of x (tokens, dim)."""
        with torch.no_grad():
            chosen = self.scores(x).topk(self.k).indices
        return Routing(chosen, torch.ones_like(chosen, dtype=x.dtype))

    def scores(self, x: Tensor) -> Tensor:
        """Return how active the router takes each expert to be, (tokens, experts)."""
        if self.kind == "mlp":
            scores: Tensor = self.score(x)
            return scores
        if self.kind == "similarity":
            return x @ self.centers.T.to(x.dtype)
        return self.activity(x)

    def activity(self, x: Tensor) -> Tensor:
        """Return the sum of the sizes of each expert's hidden units, (tokens, experts)."""
        return torch.stack([_hidden(expert, x).abs().sum(-1) for expert in self.looks_at], -1)

    def fit(self, x: Tensor, steps: int, generator: Generator | None) -> None:
        """Fit the scores to the share that each expert's activity has of the largest one's."""
        if self.kind != "mlp":
            return
        dtype = next(self.score.parameters()).dtype
        narrow = dtype in (torch.float16, torch.bfloat16)
        if narrow:  # too few digits to learn with
            self.score.float()
        with torch.enable_grad():
            for linear in self.score.children():
                if isinstance(linear, nn.Linear):
                    for parameter in (linear.weight, linear.bias):
                        drawn = 2 * torch.rand(parameter.shape, generator=generator) - 1
                        parameter.data.copy_(drawn * linear.in_features ** -0.5)
            optimizer = torch.optim.Adam(self.score.parameters(), 1e-2)
            falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
            with torch.no_grad():
                found = self.activity(x).float() if narrow else self.activity(x)
                target = found / found.amax(-1, keepdim=True).clamp(
                    min=torch.finfo(found.dtype).tiny)
            for _ in range(steps):
                some = torch.randint(len(x), (min(256, len(x)),), generator=generator)
                some = some.to(x.device)
                optimizer.zero_grad()
                guess = self.score(x[some].to(target.dtype))
                binary_cross_entropy_with_logits(guess, target[some]).backward()
                optimizer.step()
                falling.step()
            optimizer.zero_grad()
        self.score.to(dtype)


def _reading(expert: Any) -> Tensor:
    weight: Tensor = (expert.gate if isinstance(expert, GLU) else expert[0]).weight
    return weight


def _hidden(expert: Any, x: Tensor) -> Tensor:
    if isinstance(expert, GLU):
        gated: Tensor = expert.activation(expert.gate(x)) * expert.up(x)
        return gated
    hidden: Tensor = expert[1](expert[0](x))
    return hidden


@torch.no_grad()
def _groups(weights: FeedForwardWeights, activation: nn.Module, x: Tensor, experts: int,
            split: Split, generator: Generator | None) -> Tensor:
    """Return which hidden units each expert has, (experts, units)."""
    n = len(weights.up)
    if split == "random":
        return torch.randperm(n, generator=generator).view(experts, -1)
    if split == "cluster":
        read = weights.up if weights.gate is None else weights.gate
        points = normalize(read.float(), dim=-1)
    else:
        identity = torch.eye(n, dtype=x.dtype, device=x.device)
        h = weights._replace(down=identity, down_bias=None)(x, activation).abs().float()
        # With ReLU a unit is active where it is not 0; elsewhere where it is larger than most.
        limit = 0.0 if bool((h == 0).any()) else float(h.mean())
        active = (h > limit).float()
        together = active.T @ active
        together.fill_diagonal_(0)
        degrees = together.sum(1).clamp(min=1).rsqrt()
        vectors = torch.linalg.eigh(together * degrees[:, None] * degrees)[1]
        points = normalize(vectors[:, -experts:], dim=-1)
    return balanced_kmeans(points, experts, generator=generator)


@torch.no_grad()
def balanced_kmeans(points: Tensor, clusters: int, *, rounds: int = 20,
                    generator: Generator | None = None) -> Tensor:
    """Return the points of each cluster, all clusters having as many: (clusters, points each).

    The best of the rounds by the mean squared distance; in each, every cluster takes the points
    that are nearest to it among those that want it, and the others turn to their next best.

    >>> groups = balanced_kmeans(torch.randn(12, 3), 4)
    >>> groups.shape, groups.flatten().sort().values.tolist() == list(range(12))
    (torch.Size([4, 3]), True)
    """
    size = len(points) // clusters
    first = torch.randperm(len(points), generator=generator)[:clusters].to(points.device)
    centers, best, least = points[first], None, float("inf")
    for _ in range(rounds):
        distances = torch.cdist(points, centers).square()
        owner = _fill(distances, size)
        total = float(distances.gather(1, owner[:, None]).mean())
        if not total < least:
            break
        best, least = owner, total
        groups = owner.argsort(stable=True).view(clusters, size)
        centers = points[groups].mean(1)
    assert best is not None
    return best.argsort(stable=True).view(clusters, size)


def _fill(distances: Tensor, size: int) -> Tensor:
    """Return a cluster for each point, `size` points for each cluster, with no envious pair."""
    n, clusters = distances.shape
    wanted = distances.argsort(dim=1, stable=True)
    turn = torch.zeros(n, dtype=torch.long, device=distances.device)
    points = torch.arange(n, device=distances.device)
    while True:
        owner = wanted[points, turn]
        # Sorted by cluster, and within each by distance: those past its size are sent on.
        order = distances[points, owner].argsort(stable=True)
        order = order[owner[order].argsort(stable=True)]
        counts = torch.bincount(owner, minlength=clusters)
        places = points - (counts.cumsum(0) - counts)[owner[order]]
        sent = order[places >= size]
        if not len(sent):
            return owner
        turn[sent] += 1
