"""Putting other modules and weights in the place of a network's own, and the paths it runs on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils.parametrize import is_parametrized

from netwright import checks
from netwright.anatomy.layers import is_linear, is_transposed
from netwright.errors import UnknownName

__all__ = ["linear_weight", "plain_paths", "replace", "replace_all", "write_linear"]


@checks.annotated
def replace(network: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put `module` wherever the module called `name` is, in place; return the network.

    That is every place that the same module has, in lists, dictionaries and attributes alike.
    `module` gets its mode; its hooks go with it. "" is the network, in whose place `module` is
    returned.

    Raises:
        UnknownName: the network has no such module.

    >>> network = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> replace(network, "1", nn.Tanh())[1]
    Tanh()
    """
    try:
        before = network.get_submodule(name)
    except AttributeError:
        raise UnknownName("module of the network", name,
                          [known for known, _ in network.named_modules() if known]) from None
    module.train(before.training)
    _put(network, {before: module})
    return module if before is network else network


@checks.annotated
def replace_all(network: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put each value of `made` wherever its key is in `network`, in place; return the network.

    >>> network = nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU()))
    >>> replace_all(network, {network[1][0]: nn.Tanh()})[1]
    Sequential(
      (0): Tanh()
    )
    """
    _put(network, made)
    return made.get(network, network)


def _put(network: nn.Module, made: dict[nn.Module, nn.Module]) -> None:
    for parent in list(network.modules()):
        if parent in made:
            continue
        for child, part in parent._modules.items():
            if part in made:
                parent._modules[child] = made[part]


@contextmanager
def standing_in(network: nn.Module, stubs: dict[str, nn.Module]) -> Iterator[None]:
    """Hold `stubs` in the places of the modules that they are named by."""
    places = [(network.get_submodule(name.rpartition(".")[0])._modules, name.rpartition(".")[2])
              for name in stubs]
    before = [place[child] for place, child in places]
    try:
        for (place, child), stub in zip(places, stubs.values(), strict=True):
            place[child] = stub
        yield
    finally:
        for (place, child), module in zip(places, before, strict=True):
            place[child] = module


@checks.annotated
def linear_weight(layer: Any) -> Tensor:
    """Return the weight of a linear layer as (outputs, inputs), in its own memory.

    >>> linear_weight(nn.Linear(2, 3)).shape
    torch.Size([3, 2])
    """
    weight: Tensor = layer.weight
    return weight.T if is_transposed(layer) else weight


@checks.annotated
@torch.no_grad()
def write_linear(layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Give a linear layer copies of a weight (outputs, inputs) and a bias, in place.

    Both learn where the weight did before. A bias that is None is taken away; the layer of GPT-2,
    which must have one, gets zeros.

    Raises:
        ValueError: the layer is parametrized.
    """
    if is_parametrized(layer):
        raise ValueError(f"{layer} is parametrized, so that new weights have no place in it; take "
                         "that off by torch.nn.utils.parametrize.remove_parametrizations first")
    learns = layer.weight.requires_grad
    outputs, inputs = weight.shape
    if is_transposed(layer):
        layer.weight = Parameter(weight.detach().T.contiguous().clone(), learns)
        layer.nx, layer.nf = inputs, outputs
        bias = weight.new_zeros(outputs) if bias is None else bias
    else:
        layer.weight = Parameter(weight.detach().clone(), learns)
        layer.in_features, layer.out_features = inputs, outputs
    layer.bias = None if bias is None else Parameter(
        bias.detach().clone(), learns if layer.bias is None else layer.bias.requires_grad)


@checks.annotated
@contextmanager
def plain_paths(*, kernels: bool = False) -> Iterator[None]:
    """Hold PyTorch off the fused paths that skip a network's own modules.

    With `kernels` it is held off oneDNN's as well, which run a whole recurrent layer as one.

    >>> with plain_paths():
    ...     torch.backends.mha.get_fastpath_enabled()
    False
    """
    fused, mkldnn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(mkldnn and not kernels)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        torch._C._set_mkldnn_enabled(mkldnn)


def without_fused_paths(network: nn.Module, *, every: bool = False) -> None:
    """Keep changed encoder layers off the fused path, which reads the weights of their parts.

    With `every`, those that are as they were as well.

    >>> layer = nn.TransformerEncoderLayer(4, 1, 8)
    >>> layer.linear1 = nn.Sequential(layer.linear1)
    >>> without_fused_paths(layer)
    >>> layer.activation_relu_or_gelu
    0
    """
    for layer in network.modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and (every or not (
                is_linear(layer.linear1) and is_linear(layer.linear2)
                and isinstance(layer.self_attn, nn.MultiheadAttention)
                and isinstance(layer.norm1, nn.LayerNorm)
                and isinstance(layer.norm2, nn.LayerNorm))):
            layer.activation_relu_or_gelu = 0
