from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.anatomy.layers import is_linear, linear_sizes
from netwright.anatomy.replacing import replace
from netwright.blocks.experts import MixtureOfExperts, Routing, TopKRouter
from netwright.blocks.experts.routing import check_choice
from netwright.catalogue.facets import method
from netwright.errors import NothingToReshape
from netwright.reshape._calibration import layers_in
from netwright.reshape._layers import layer_of, plain_layer
from netwright.reshape.change import decided, reshape
from netwright.reshape.experts._dense import activation_of, as_block, dense, put_blocks
from netwright.reshape.feedforward import FeedForwardLayer, feedforward_weights
from netwright.runtime.padding import read_padding

__all__ = ["mix_lora"]


@method(
    "reshape",
    papers=["003-187"],
    place="feedforward",
    needs=["dense feed-forward layers", "training"],
    keeps_function=True,
    search={"n_experts": [4, 8], "rank": [4, 8, 16]},
    variants={"plain": {"n_experts": 2, "rank": 2}},
)
@reshape
def mix_lora(model: nn.Module, example: Any = None, *, n_experts: int = 8, rank: int = 8,
             k: int = 2, alpha: float | None = None, dropout: float = 0.0,
             balance: float = 0.01, attention: bool | Sequence[str] = True, square: bool = True,
             generator: Generator | None = None) -> nn.Module:
    """Return a frozen copy whose feed-forward layers have low-rank experts, its attention adapters.

    y = W2 sum_e w_e h_e + sum_e w_e B2_e A2_e h_e + b2;  h_e = a((W + B_e A_e) x) * (V + ...) x;
    e the k experts with the largest logits R x, w the softmax of these;  attention: (W + B A) x.

    All B are 0 at first, so that the result computes what the model does; only A, B and R learn.
    The frozen matrices are multiplied once for each token, whatever k is: W x is shared by the
    experts, and W2 is applied to their sum. The balance loss is added in the backward pass, as in
    every `MixtureOfExperts`.

    Args:
        model: any module with feed-forward layers. Those that are experts already stay frozen, and
            where all are, attention alone gets adapters.
        example: what the model takes, to find its layers by; see `feedforwards`.
        n_experts: low-rank experts of each feed-forward layer.
        rank: of every B A.
        k: experts that a token uses.
        alpha: B A is multiplied by alpha / rank; 2 `rank` where none is given, as in the paper.
        dropout: how much of x is dropped before A.
        balance: strength of the balance loss.
        attention: whether the linear layers beside a feed-forward layer get adapters of the same
            rank: those in the largest module that holds this feed-forward layer and no other; or
            the names of linear layers, anywhere. PyTorch's own `nn.MultiheadAttention` reads its
            weights past its layers and is left as it is.
        square: False for feed-forward layers whose output has another size than their input, too.
        generator: draws A and R; the global state without one.

    Raises:
        NothingToReshape: the model has no feed-forward layer, its feed-forward layers are experts
            and there is nothing else to adapt, or no linear layer has a name of `attention`.
        ValueError: a size is below 1, `k` is above `n_experts`, or `dropout` is not within 0 to 1.

    Paper: Li, Ma, Wang, Ye, Cheng, Tang, Zhang, Duan, Zuo, Yang, Tang, 2024, MixLoRA: Enhancing
    Large Language Models Fine-Tuning with LoRA-based Mixture of Experts.

    >>> from netwright.models import gpt
    >>> model, x = gpt(96, context=16), torch.randint(96, (4, 16))
    >>> tuned = mix_lora(model, x, n_experts=4)
    >>> torch.allclose(tuned(x), model(x), atol=1e-6)
    True
    >>> sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    47616
    """
    checks.count(1, n_experts=n_experts, rank=rank)
    check_choice(n_experts, k)
    checks.between(0, 1, ends=(True, False), dropout=dropout)
    found = layers_in(model, example, square=square)
    names = attention
    if isinstance(attention, bool):
        names = _beside(model, found) if attention else ()
    layers = dense(model, found, needed=not names)
    modules = dict(model.named_modules())
    for name in names:  # type: ignore[union-attr]
        if not is_linear(modules.get(name, nn.Identity())):
            raise NothingToReshape(f"attention names {name!r}, which is no linear layer of "
                                   f"{type(model).__name__}")
    return decided({
        "layers": [plain_layer(layer, model) for layer in layers],
        "attention": list(names),  # type: ignore[arg-type]
        "n_experts": n_experts, "rank": rank, "k": k, "dropout": dropout, "balance": balance,
        "scale": (2 * rank if alpha is None else alpha) / rank}, layers=layers, generator=generator)


@mix_lora.applies
def _with_adapters(model: nn.Module, decision: Mapping[str, Any],
                   layers: Sequence[FeedForwardLayer] | None = None,
                   generator: Generator | None = None) -> nn.Module:
    layers = layers or [layer_of(said, model) for said in decision["layers"]]
    rank, scale, dropout = (decision[name] for name in ("rank", "scale", "dropout"))
    blocks = {}
    for layer in layers:
        weights = feedforward_weights(model, layer)
        base = as_block(weights, activation_of(layer, weights.up))
        blocks[layer] = LowRankExperts(base, layer, decision["n_experts"], rank, decision["k"],
                                       scale, dropout, decision["balance"], generator)
    tuned = put_blocks(model.requires_grad_(False), blocks)
    for name in decision["attention"]:
        replace(tuned, name, LowRank(tuned.get_submodule(name), rank, scale, dropout, generator))
    read_padding(tuned)
    return tuned


class LowRank(nn.Module):
    """A frozen linear layer and a product of two thin matrices that learns: W x + s B A x."""

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float,
                 generator: Generator | None) -> None:
        super().__init__()
        dim, out = linear_sizes(base)
        like: Any = base.weight
        self.base, self.scale, self.dropout = base, scale, nn.Dropout(dropout)
        self.a, self.b = _pair(dim, out, rank, like, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, out) of (*, dim)."""
        added: Tensor = self.base(x) + _product(self.dropout(x), self.a, self.b, self.scale)
        return added


class LowRankExpert(nn.Module):
    """What one expert adds to what the frozen matrices gave: hidden units, and a part of y.

    Shapes: rows (rows, dim + hidden), or (rows, dim + 2 hidden) with a gate: x, W x and the
    gate's product; result (rows, hidden + out).
    """

    def __init__(self, sizes: tuple[int, int, int], gated: bool, activation: nn.Module, rank: int,
                 scale: float, dropout: float, like: Tensor, generator: Generator | None) -> None:
        super().__init__()
        dim, hidden, out = sizes
        self.sizes, self.scale, self.dropout = (dim, hidden), scale, nn.Dropout(dropout)
        self.activation = activation
        self.up_a, self.up_b = _pair(dim, hidden, rank, like, generator)
        self.down_a, self.down_b = _pair(hidden, out, rank, like, generator)
        if gated:
            self.gate_a, self.gate_b = _pair(dim, hidden, rank, like, generator)

    def forward(self, rows: Tensor) -> Tensor:
        """Return hidden units and what B2 A2 makes of them."""
        dim, hidden = self.sizes
        x, up, *gate = rows.split([dim] + [hidden] * ((rows.shape[1] - dim) // hidden), dim=1)
        seen = self.dropout(x)
        up = up + _product(seen, self.up_a, self.up_b, self.scale)
        if gate:
            h = self.activation(
                gate[0] + _product(seen, self.gate_a, self.gate_b, self.scale)) * up
        else:
            h = self.activation(up)
        added = _product(self.dropout(h), self.down_a, self.down_b, self.scale)
        return torch.cat([h, added.to(h.dtype)], 1)


class LowRankExperts(nn.Module):
    """A frozen feed-forward block, and a mixture of low-rank experts that change it."""

    def __init__(self, base: nn.Module, layer: FeedForwardLayer, n_experts: int, rank: int, k: int,
                 scale: float, dropout: float, balance: float,
                 generator: Generator | None) -> None:
        super().__init__()
        block: Any = base.requires_grad_(False)
        gated = layer.gate is not None
        self.up, self.down = (block.up, block.down) if gated else (block[0], block[2])
        self.gate = block.gate if gated else None
        activation = block.activation if gated else block[1]
        like = self.up.weight
        self.hidden, self.out = layer.hidden, layer.out
        sizes = (layer.dim, layer.hidden, layer.out)
        experts = [LowRankExpert(sizes, gated, activation, rank, scale, dropout, like, generator)
                   for _ in range(n_experts)]
        router = TopKRouter(layer.dim, n_experts, k, softmax="chosen",
                            generator=generator).to(like)
        self.mixture = MixtureOfExperts(layer.dim + layer.hidden * (1 + gated), experts,
                                        FirstEntries(router, layer.dim), balance=balance)

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, out) of (*, dim)."""
        up = self.up(x)
        parts = [x.to(up.dtype), up] + ([] if self.gate is None else [self.gate(x)])
        h, added = self.mixture(torch.cat(parts, -1)).split([self.hidden, self.out], -1)
        result: Tensor = self.down(h) + added
        return result


class FirstEntries(nn.Module):
    """A router that looks at the first entries of each row."""

    def __init__(self, router: TopKRouter, dim: int) -> None:
        super().__init__()
        self.router, self.dim, self.n_experts = router, dim, router.n_experts

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Routing:
        """Return the routing of the first entries of x (tokens, size)."""
        routing: Routing = self.router(x[:, :self.dim], token_ids)
        return routing


def _pair(dim: int, out: int, rank: int, like: Tensor,
          generator: Generator | None) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A (rank, dim), drawn as a linear layer's weight is, and B (out, rank) of zeros."""
    drawn = (2 * torch.rand(rank, dim, generator=generator) - 1) * dim ** -0.5
    return nn.Parameter(drawn.to(like)), nn.Parameter(like.new_zeros(out, rank))


def _product(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    # The thin side is the cheap one to scale.
    return nn.functional.linear(scale * nn.functional.linear(x, a), b)


def _beside(model: nn.Module, layers: list[FeedForwardLayer]) -> list[str]:
    """Return the linear layers in the modules that hold one feed-forward layer each."""
    parts = {name for layer in layers for name in (layer.up, layer.gate, layer.down) if name}
    experts = [layer.name for layer in layers if layer.experts is not None]
    names = [layer.up or layer.name for layer in layers]
    fused = [name for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    found = []
    for layer in layers:
        block = layer.name
        while "." in block:
            outer = block.rpartition(".")[0]
            if sum(name.startswith(outer + ".") for name in names) > 1:
                break
            block = outer
        found += [name for name, module in model.named_modules()
                  if block and name.startswith(block + ".") and is_linear(module)
                  and name not in parts and not any(
                      name.startswith(f + ".") for f in (*fused, *experts))]
    return list(dict.fromkeys(found))
