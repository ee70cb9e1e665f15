from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Generator, nn
from torch.nn.functional import linear

from netwright import checks
from netwright.anatomy.replacing import replace
from netwright.blocks.experts import MixtureOfExperts, TopKRouter
from netwright.blocks.experts.routing import check_choice
from netwright.catalogue.facets import method
from netwright.errors import NothingToReshape
from netwright.reshape._layers import layer_of, plain_layer
from netwright.reshape.change import decided, reshape
from netwright.reshape.experts._dense import activation_of, as_block, dense_layers, put_blocks
from netwright.reshape.feedforward import FeedForwardLayer, feedforward_weights
from netwright.runtime.modes import evaluating
from netwright.runtime.padding import read_padding
from netwright.runtime.random_state import same_random_state
from netwright.signals import apply, first_argument

__all__ = ["upcycle"]


@method(
    "reshape",
    papers=["000-003"],
    place="feedforward",
    needs=["dense feed-forward layers", "training"],
    keeps_function=True,
    search={"n_experts": [2, 4, 8], "k": [1, 2]},
    variants={"plain": {"n_experts": 2}, "noisy": {"n_experts": 2, "noise": 0.1}},
)
@reshape
def upcycle(model: nn.Module | Sequence[nn.Module], example: Any = None, *, n_experts: int = 8,
            k: int = 2, noise: float = 0.0, attention: Sequence[str] = (),
            balance: float = 0.01, square: bool = True,
            generator: Generator | None = None) -> nn.Module:
    """Return a model whose feed-forward layers are mixtures of copies of dense ones.

    y = sum_(e in top k) w_e f_e(x),  w = softmax of the k largest of R x,  f_e of model e mod n;
    attention:  y = sum_i softmax(R x)_i a_i(x), over all n models;  any other weight is their mean.

    From one model the result computes what the model does, whatever the routers say, for the
    copies are alike and the weights add up to one; `noise` makes them differ. Given several models
    of one shape, such as copies of one that were trained on different data, their feed-forward
    layers become the experts, and their attention layers too where `attention` names them: each
    runs on every token, and a router weighs what they give (Branch-Attend-Mix). All weights can be
    trained; the balance loss is added in the backward pass, as in every `MixtureOfExperts`.

    Args:
        model: a dense model, or several of one architecture.
        example: what a model takes, to find its layers by; see `feedforwards`.
        n_experts: of each feed-forward layer, at least as many as there are models.
        k: experts that a token uses.
        noise: of each further copy of a model's layer: the deviation of what is added to a weight,
            in deviations of its matrix.
        attention: names of attention modules, or the last parts of their names, such as
            "self_attn". A module takes the signal (*, dim) first and returns one like it, alone or
            first in a tuple; it must not keep a cache. Needs `example`.
        balance: strength of the balance loss.
        square: False for feed-forward layers whose output has another size than their input, too.
        generator: draws the routers and the noise; the global state without one.

    Raises:
        NothingToReshape: the model has no dense feed-forward layer, or no module of a name of
            `attention`.
        ValueError: there is no model, models differ in shape, `n_experts` is below their number,
            `k` is not between 1 and `n_experts`, `noise` is below 0, or `example` is lacking.

    Papers: Komatsuzaki, Puigcerver, Lee-Thorp, Ruiz, Mustafa, Ainslie, Tay, Dehghani, Houlsby,
    2023, Sparse Upcycling; Zhang, Gritsch, Gnaneshwar, Guo, Cairuz, Venkitesh, Foerster, Blunsom,
    Ruder, Üstün, Locatelli, 2024, BAM! Just Like That: Simple and Efficient Parameter Upcycling
    for Mixture of Experts.

    >>> from netwright.models import gpt
    >>> model, x = gpt(96, context=16), torch.randint(96, (4, 16))
    >>> torch.allclose(upcycle(model, x, n_experts=4)(x), model(x), atol=1e-5)
    True
    """
    models = [model] if isinstance(model, nn.Module) else list(model)
    _check(models, n_experts, k, noise)
    names = _named(models[0], attention)
    if names and example is None:
        raise ValueError("example must be given where attention is, to see what attention takes; "
                         "pass a batch of what the model takes")
    layers = dense_layers(models[0], example, square)
    return decided({
        "layers": [plain_layer(layer, models[0]) for layer in layers], "models": len(models),
        "attention": _widths(models[0], names, example), "n_experts": n_experts, "k": k,
        "noise": noise, "balance": balance},
        keeps_function=len(models) == 1 and not noise, layers=layers, models=models,
        generator=generator)


@upcycle.applies
def _mixed(model: nn.Module, decision: Mapping[str, Any],
           layers: Sequence[FeedForwardLayer] | None = None,
           models: Sequence[nn.Module] | None = None,
           generator: Generator | None = None) -> nn.Module:
    layers = layers or [layer_of(said, model) for said in decision["layers"]]
    models = models or [model] * decision["models"]
    n_experts, noise = decision["n_experts"], decision["noise"]
    blocks: dict[Any, nn.Module] = {}
    for layer in layers:
        made = []
        for e in range(n_experts):
            weights = feedforward_weights(models[e % len(models)], layer)
            block = as_block(weights, activation_of(layer, weights.up))
            if noise and e >= len(models):
                _shake(block, noise, generator)
            made.append(block)
        like = next(made[0].parameters())
        router = TopKRouter(layer.dim, n_experts, decision["k"], softmax="chosen",
                            generator=generator).to(like)
        blocks[layer] = MixtureOfExperts(layer.dim, made, router, balance=decision["balance"])
    parts = {name: [deepcopy(m.get_submodule(name)) for m in models]
             for name in decision["attention"]}
    _average(model, models)
    mixed = put_blocks(model, blocks)
    for name, dim in decision["attention"].items():
        replace(mixed, name, SoftExperts(dim, parts[name], generator=generator))
    read_padding(mixed)
    return mixed


class SoftExperts(nn.Module):
    """Run every one of some modules, and weigh what they give by a softmax of each token.

    y = sum_i softmax(R x)_i f_i(x)

    What a module returns besides, in a tuple, is the first module's.

    Shapes: x (*, dim), the first argument; y (*, dim).
    """

    def __init__(self, dim: int, experts: Sequence[nn.Module], *,
                 generator: Generator | None = None) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        like = next(self.experts.parameters())
        drawn = (2 * torch.rand(len(experts), dim, generator=generator) - 1) * dim ** -0.5
        self.router = nn.Parameter(drawn.to(like))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the weighted sum of what the modules make of the arguments."""
        x = first_argument(self.experts[0], args, kwargs)
        weights = linear(x, self.router).softmax(-1)
        given = [expert(*args, **kwargs) for expert in self.experts]
        tensors = [g[0] if isinstance(g, tuple) else g for g in given]
        mixed = (torch.stack(tensors, -1) * weights[..., None, :].to(tensors[0].dtype)).sum(-1)
        return (mixed, *given[0][1:]) if isinstance(given[0], tuple) else mixed


def _check(models: list[nn.Module], n_experts: int, k: int, noise: float) -> None:
    if not models:
        raise ValueError("model must be a model or a list of at least one, got an empty list")
    checks.count(len(models), n_experts=n_experts,
                 advice=f"each of the {len(models)} models gives at least one")
    check_choice(n_experts, k)
    checks.at_least(0, noise=noise)
    shapes = [{name: tuple(p.shape) for name, p in m.named_parameters()} for m in models]
    for i, other in enumerate(shapes):
        if other != shapes[0]:
            names = [name for name in {**shapes[0], **other}
                     if shapes[0].get(name) != other.get(name)]
            raise ValueError(f"all models must have the parameters of the first; model {i} has "
                             f"{names[0]} of {other.get(names[0])}, the first of "
                             f"{shapes[0].get(names[0])}")


def _named(model: nn.Module, attention: Sequence[str]) -> list[str]:
    if isinstance(attention, str):
        attention = [attention]
    found = []
    for wanted in attention:
        names = [name for name, _ in model.named_modules()
                 if name and (name == wanted or name.endswith("." + wanted))]
        if not names:
            raise NothingToReshape(f"attention names {wanted!r}, and no module of "
                                   f"{type(model).__name__} is called so")
        found += names
    return list(dict.fromkeys(found))


def _widths(model: nn.Module, names: list[str], example: Any) -> dict[str, int]:
    """Return the size of the signal that each module takes."""
    widths: dict[str, int] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            widths[name] = first_argument(module, args, kwargs).shape[-1]
        return hook

    if names:
        watched = deepcopy(model)
        for name in names:
            watched.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True)
        with torch.no_grad(), same_random_state(), evaluating(watched):
            apply(watched, example)
    return widths


@torch.no_grad()
def _average(model: nn.Module, models: Sequence[nn.Module]) -> None:
    """Give `model` the mean of all models' parameters."""
    if len(models) == 1:
        return
    others = [dict(m.named_parameters()) for m in models]
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.stack([other[name] for other in others]).mean(0))


@torch.no_grad()
def _shake(block: nn.Module, noise: float, generator: Generator | None) -> None:
    for parameter in block.parameters():
        if parameter.ndim > 1:
            drawn = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise * parameter.std() * drawn)
