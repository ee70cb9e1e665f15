"""The layers of a network whose weights can be held as codes, and what stands in their places."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from netwright import checks
from netwright.anatomy.layers import beyond_weights, is_linear, is_transposed
from netwright.anatomy.replacing import linear_weight, replace, without_fused_paths
from netwright.blocks.quantized.convolution import QuantizedConv2d
from netwright.blocks.quantized.embedding import QuantizedEmbedding
from netwright.blocks.quantized.linear import QuantizedLinear
from netwright.blocks.quantized.stored import QuantizedWeight
from netwright.errors import NothingToReshape


class Targets(NamedTuple):
    """The layers by name, those that share a weight together, and why others stay as they are."""

    tied: list[list[str]]
    left: dict[str, str]

    @property
    def names(self) -> list[str]:
        """All layers, whether they share their weight or not."""
        return [name for names in self.tied for name in names]


def targets(model: nn.Module, layers: Sequence[str] | None, *, embeddings: bool) -> Targets:
    """Return what of `model` can be quantized, among `layers` where they are given.

    Raises:
        UnknownName: one of `layers` is no such layer.
    """
    found: dict[int, list[str]] = {}
    left: dict[str, str] = {}
    seen: set[nn.Module] = set()
    shared = _names_of(model)
    read = {part for module in model.modules() if getattr(module, "reads_weight", False)
            for part in module.children()}
    for name, module in model.named_modules():
        if module in seen or isinstance(module, QuantizedWeight):
            continue
        seen.add(module)
        matrices = [key for key, p in module.named_parameters(recurse=False) if p.ndim > 1]
        if not matrices:
            continue
        why = ("the module around it reads its weight" if module in read else
               _why_left(module, matrices, embeddings=embeddings))
        if not why and layers is not None and name not in layers:
            why = "not among layers"
        if why:
            left[name] = why
        else:
            found.setdefault(id(module.weight), []).append(name)
    for key, names in list(found.items()):
        others = [name for name in shared[key] if name.rpartition(".")[0] not in names]
        others = [name for name in others if not _is_again(model, name, names)]
        if others:  # a weight that something else reads, too
            left |= dict.fromkeys(names, f"its weight is {others[0]} as well, which is left")
            del found[key]
    if layers is not None:
        known = {name for names in found.values() for name in names}
        for name in layers:
            if name not in known:
                raise_unknown(name, known, left)
    return Targets(list(found.values()), left)


def nothing(model: nn.Module, looked_for: str, left: Mapping[str, str]) -> NothingToReshape:
    """Return the error that says what was looked for, and why all that there is stays."""
    seen = "; ".join(f"{name or 'the model'}: {why}" for name, why in left.items())
    return NothingToReshape(f"{type(model).__name__} holds no {looked_for} whose weight can be "
                            f"held as codes: {seen[:500] or 'it has no matrix at all'}")


def raise_unknown(name: str, known: set[str], left: Mapping[str, str]) -> None:
    """Raise because `name` is no layer that can be quantized."""
    if left.get(name, "not among layers") != "not among layers":
        raise ValueError(f"layers must name what can be quantized, got {name!r}: {left[name]}")
    checks.one_of(known, layer=name)


def weight_of(module: Any) -> Tensor:
    """Return the weight of a layer as (outputs, *inputs)."""
    return linear_weight(module) if is_linear(module) else module.weight


def put(model: nn.Module, names: list[str], stored: QuantizedWeight) -> nn.Module:
    """Put quantized layers in the places of `names`, which share one weight."""
    for name in names:
        layer: Any = model.get_submodule(name)
        if isinstance(layer, nn.Embedding):
            made: nn.Module = QuantizedEmbedding.holding(stored, layer)
        elif isinstance(layer, nn.Conv2d):
            made = QuantizedConv2d.holding(stored, layer)
        else:
            made = QuantizedLinear.holding(stored, layer.bias)
        model = replace(model, name, made)
    return model


def finished(model: nn.Module) -> nn.Module:
    """Keep PyTorch's own layers off the paths that read the weights of their parts."""
    without_fused_paths(model)
    return model


_FORWARDS = (nn.Linear.forward, nn.Conv2d.forward, nn.Embedding.forward)


def _why_left(module: Any, matrices: list[str], *, embeddings: bool) -> str:
    """Return why a module with matrices stays as it is, "" where it does not."""
    kind = type(module).__name__
    if not is_transposed(module) and type(module).forward not in _FORWARDS:
        return f"a {kind}, which reads {', '.join(matrices)} in its own way"
    odd = beyond_weights(module)
    if odd:
        return f"it has {odd}"
    if hasattr(module, "parametrizations"):
        return "it is parametrized"
    if isinstance(module, nn.Embedding):
        if not embeddings:
            return "an embedding, and embeddings=False"
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            return "an embedding that changes its rows as it looks them up"
    if not module.weight.numel():
        return "it holds no numbers"
    return ""


def _names_of(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return names


def _is_again(model: nn.Module, parameter: str, names: list[str]) -> bool:
    """Return whether a parameter's name is that of one of the modules by another path."""
    there = model.get_submodule(parameter.rpartition(".")[0])
    return any(there is model.get_submodule(name) for name in names)
