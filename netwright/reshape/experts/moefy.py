from collections.abc import Mapping, Sequence
from pathlib import Path
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
from netwright.reshape._calibration import Stream, show_inputs
from netwright.reshape._layers import layer_of, plain_layer
from netwright.reshape._resuming import Finished
from netwright.reshape.change import decided, reshape
from netwright.reshape.experts._dense import activation_of, as_block, dense_layers, put_blocks
from netwright.reshape.feedforward import (
    FeedForwardLayer,
    FeedForwardWeights,
    feedforward_weights,
)
from netwright.runtime.padding import read_padding, real_rows
from netwright.runtime.progress import Bar

__all__ = ["moefy"]

MOST = 2048  # inputs in which units are counted together
ROWS = 128  # inputs in a step of the fit

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
          steps: int = 200, generator: Generator | None = None, progress: bool = True,
          resume: str | Path | None = None) -> nn.Module:
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
    experts must run, or the model be trained on; the routers do not learn then, their weights are
    frozen. What the data's `attention_mask` calls padding takes no part in any of this.

    Args:
        model: any module with feed-forward layers; those that are experts already stay.
        calibration: what the model takes, or batches of it, such as a loader, of which one is in
            memory at a time.
        n_experts: into how many each layer is split; it must divide the hidden units.
        split: how.
        router: how experts are chosen.
        k: how many run, a quarter where none is given.
        square: False for layers whose output has another size than their input, too.
        rows: how many inputs of a layer are looked at, drawn from the calibration data.
        steps: of the fit of an "mlp" router, each on 128 rows, with Adam.
        generator: draws all that is drawn; the global state without one.
        progress: whether to show a bar in a terminal where it takes more than two seconds.
        resume: a folder where each layer's experts are kept. A call that was broken off goes on
            from there when it is made again with the same arguments, and ends the same.

    Raises:
        NothingToReshape: the model has no dense feed-forward layer.
        UnknownName: no split or router is called that.
        ValueError: `n_experts` does not divide a layer's hidden units, `k` is not between 1 and
            `n_experts`, the calibration data are empty, nothing but padding or not finite, or
            `resume` holds what another call left.

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
    stream = Stream(calibration)
    layers = dense_layers(model, stream.first, square)
    for layer in layers:
        if layer.hidden % n_experts:
            raise ValueError(f"n_experts must divide the {layer.hidden} hidden units of "
                             f"{layer}, got {n_experts}")
    finished = Finished(resume, {
        "reshape": "moefy", "n_experts": n_experts, "split": split, "rows": rows,
        "data": stream.first, "weights": model.state_dict()}, generator)
    bar = Bar(len(layers), None, "", unit="layer")
    if progress:
        bar.start(after=2.0)
    try:
        given = _drawn(model, [str(layer.up) for layer in layers], stream, rows, generator, bar)
        said, scores, shares = [], [], []
        for number, layer in enumerate(layers):
            weights = feedforward_weights(model, layer)
            activation = activation_of(layer, weights.up)
            sizes = torch.empty(0)
            if split == "coactivation" or router == "mlp":
                with torch.no_grad():
                    sizes = weights.hidden(given[str(layer.up)], activation).abs_()
            there = finished.get(str(layer.down))
            groups = there[1]["groups"] if there is not None else _groups(
                weights, sizes, n_experts, split, generator)
            if there is None:
                finished.put(str(layer.down), {}, {"groups": groups})
            if router == "mlp":
                scores.append(_score(layer.dim, n_experts, weights.up))
                shares.append(_activity(sizes, groups))
            said.append({"layer": plain_layer(layer, model), "groups": groups.tolist()})
            bar.epoch(number, float("nan"), float("nan"))
        fit(scores, list(given.values()), shares, steps, generator)
    finally:
        bar.stop()
    return decided({"layers": said, "k": k, "router": router}, layers=layers,
                   scores=scores)


@moefy.applies
def _of_experts(model: nn.Module, decision: Mapping[str, Any],
                layers: Sequence[FeedForwardLayer] | None = None,
                scores: Sequence[nn.Sequential] = ()) -> nn.Module:
    layers = layers or [layer_of(said["layer"], model) for said in decision["layers"]]
    blocks = {}
    for i, (layer, said) in enumerate(zip(layers, decision["layers"], strict=True)):
        weights = feedforward_weights(model, layer)
        made = _experts(weights, activation_of(layer, weights.up), torch.tensor(said["groups"]))
        chooser = ActiveExperts(made, decision["k"], decision["router"])
        if scores:
            chooser.score = scores[i]
        # The bias of the second matrix counts once, whatever the experts.
        bias = None if weights.down_bias is None else Bias(weights.down_bias)
        blocks[layer] = MixtureOfExperts(layer.dim, made, chooser, shared=bias, balance=0.0)
    changed = put_blocks(model, blocks)
    read_padding(changed)
    return changed


def _drawn(model: nn.Module, names: list[str], stream: Stream, most: int,
           generator: Generator | None, bar: Bar) -> dict[str, Tensor]:
    """Return at most so many vectors of what each module is given, each as likely as any other."""
    kept: dict[str, Tensor] = {}
    seen = dict.fromkeys(names, 0)

    def see(name: str, x: Tensor) -> None:
        x = real_rows(x)
        if not x.isfinite().all():
            raise ValueError(f"calibration must give finite values, got others before {name!r}; "
                             "check the inputs and the weights")
        before, seen[name] = seen[name], seen[name] + len(x)
        if seen[name] <= most:
            kept[name] = torch.cat([kept[name], x]) if name in kept else x.clone()
            return
        picked = torch.randperm(seen[name], generator=generator)[:most].to(x.device)
        new = x[picked[picked >= before] - before]
        if before:
            stay = torch.randperm(len(kept[name]), generator=generator)[:most - len(new)]
            new = torch.cat([kept[name][stay.to(x.device)], new])
        kept[name] = new

    show_inputs(model, names, stream, see, bar)
    empty = [name for name in names if not seen[name]]
    if empty:
        raise ValueError(f"calibration must give {empty[0]!r} vectors that are no padding, got "
                         "none; check its attention_mask")
    return {name: kept[name] for name in names}


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
            self.score = _score(up.shape[1], len(experts), up)
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


def _score(dim: int, experts: int, like: Tensor) -> nn.Sequential:
    """Return a network for the scores, its weights not drawn yet.

    It is frozen, since a choice has no gradient, and who waits for one would wait for ever.
    """
    width = max(experts, 32)
    with torch.device("meta"):
        score = nn.Sequential(nn.Linear(dim, width), nn.Tanh(), nn.Linear(width, experts))
    return score.to_empty(device=like.device).to(like.dtype).requires_grad_(False)


def _activity(sizes: Tensor, groups: Tensor) -> Tensor:
    """Return the sums of each expert's units' sizes (rows, units): (rows, experts)."""
    wide = torch.promote_types(sizes.dtype, torch.float32)
    chosen = torch.zeros(sizes.shape[1], len(groups), dtype=wide, device=sizes.device)
    chosen[groups.to(sizes.device), torch.arange(len(groups), device=sizes.device)[:, None]] = 1
    return sizes.to(wide) @ chosen


def fit(scores: Sequence[Any], given: Sequence[Tensor], activity: Sequence[Tensor],
        steps: int, generator: Generator | None) -> None:
    """Fit scores to the share that each expert's activity has of the largest one's.

    Those whose layers are alike learn together, as one batched product.

    Shapes: given (rows, dim) and activity (rows, experts) of each.
    """
    alike: dict[Any, list[int]] = {}
    for i, (score, x) in enumerate(zip(scores, given, strict=False)):
        alike.setdefault((x.shape, x.device, x.dtype, len(score[2].weight)), []).append(i)
    for places in alike.values():
        _fit_alike([scores[i] for i in places], [given[i] for i in places],
                   torch.stack([activity[i] for i in places]), steps, generator)


@torch.enable_grad()
def _fit_alike(scores: Sequence[Any], given: Sequence[Tensor], activity: Tensor,
               steps: int, generator: Generator | None) -> None:
    # Narrow numbers have too few digits to learn with.
    order = torch.randperm(len(given[0]), generator=generator).to(activity.device)
    x = torch.stack([rows[order] for rows in given]).to(activity.dtype)
    target = activity[:, order]
    target = target / target.amax(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
    drawn: list[list[Tensor]] = [[], [], [], []]
    for score in scores:
        for i, (layer, name) in enumerate((layer, name) for layer in (score[0], score[2])
                                          for name in ("weight", "bias")):
            uniform = 2 * torch.rand(getattr(layer, name).shape, generator=generator) - 1
            drawn[i].append(uniform.to(x) * layer.in_features ** -0.5)
    up, up_bias, down, down_bias = learnt = [torch.stack(some).requires_grad_() for some in drawn]
    optimizer = torch.optim.Adam(learnt, 1e-2, fused=True)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    size, start = min(ROWS, x.shape[1]), 0
    for _ in range(steps):
        start = 0 if start + size > x.shape[1] else start  # views of what was shuffled once
        some = slice(start, start + size)
        start += size
        hidden = torch.baddbmm(up_bias[:, None], x[:, some], up.mT).tanh()
        guess = torch.baddbmm(down_bias[:, None], hidden, down.mT)
        loss = binary_cross_entropy_with_logits(guess, target[:, some]) * len(scores)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
    with torch.no_grad():
        for i, score in enumerate(scores):
            for parameter, whole in zip(score.parameters(), learnt, strict=True):
                parameter.copy_(whole[i])


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
def _groups(weights: FeedForwardWeights, sizes: Tensor, experts: int, split: Split,
            generator: Generator | None) -> Tensor:
    """Return which hidden units each expert has, (experts, units), by their sizes (rows, units)."""
    n = len(weights.up)
    if split == "random":
        return torch.randperm(n, generator=generator).view(experts, -1)
    if split == "cluster":
        read = weights.up if weights.gate is None else weights.gate
        points = normalize(read.float(), dim=-1)
    else:
        # With ReLU a unit is active where it is not 0; elsewhere where it is larger than most.
        limit = 0.0 if bool((sizes == 0).any()) else float(sizes.float().mean())
        points = normalize(_leading((sizes[:MOST] > limit).float(), experts), dim=-1)
    return balanced_kmeans(points, experts, generator=generator)


def _leading(active: Tensor, many: int, *, rounds: int = 5) -> Tensor:
    """Return the leading eigenvectors (units, many) of how often two units are active together.

    M = D^-1/2 (A^T A without its diagonal) D^-1/2, D the sums of its rows. M is never made where
    the vectors asked for are few: the space that they span is found by `rounds` of products with
    it, each made orthonormal, from a fixed start.
    """
    alone = active.sum(0)
    degrees = (active.T @ active.sum(1) - alone).clamp(min=1).rsqrt()[:, None]

    def product(v: Tensor) -> Tensor:
        v = degrees * v
        return degrees * (active.T @ (active @ v) - alone[:, None] * v)

    n, spare = len(alone), many + 16
    if n < 4 * spare:
        return torch.linalg.eigh(product(torch.eye(n, device=active.device)))[1][:, -many:]
    v = torch.randn(n, spare, generator=Generator().manual_seed(0)).to(active.device)
    for _ in range(rounds):
        v = product(torch.linalg.qr(v)[0])
    v = torch.linalg.qr(v)[0]
    return v @ torch.linalg.eigh(v.T @ product(v))[1][:, -many:]


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
        best, gained, least = owner, least - total, total
        if gained < 1e-3 * total:
            break
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
