"""What a module is: a linear layer, a norm, a layer with weights of its own."""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


def is_linear(module: nn.Module) -> bool:
    """Return whether `module` is a linear layer: PyTorch's, or the transposed one of GPT-2."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Return whether it is the linear layer of GPT-2, whose weight is (inputs, outputs)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def linear_sizes(module: Any) -> tuple[int, int]:
    """Return how many features a linear layer takes and gives."""
    if is_transposed(module):
        return module.nx, module.nf
    return module.in_features, module.out_features


def is_norm(module: nn.Module) -> bool:
    """Whether `module` normalises, by its class or its class's name."""
    return isinstance(module, _NORMS) or type(module).__name__.lower().endswith("norm")


def beyond_weights(module: nn.Module) -> str:
    """Return what a call of `module` does that its weights do not tell, "" where nothing is.

    That is a hook, a `forward` of the module's own, which offloading and wrapping put there, or a
    parameter that is no plain tensor in memory, as quantised and distributed ones are.

    >>> beyond_weights(nn.Linear(2, 2))
    ''
    >>> layer = nn.Linear(2, 2)
    >>> layer.forward = lambda x: x
    >>> beyond_weights(layer)
    'a forward of its own'
    """
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "hooks"
    if "forward" in vars(module):
        return "a forward of its own"
    odd = [p for p in module.parameters(recurse=False) if type(p) not in (nn.Parameter, Tensor)
           or type(p.data) is not Tensor or p.is_meta or not p.is_floating_point()]
    return f"parameters of a kind of their own ({type(odd[0].data).__name__})" if odd else ""


def owns_weights(module: nn.Module) -> bool:
    """Whether `module` itself, apart from its children, holds a matrix that it applies."""
    return not is_norm(module) and any(
        nn.parameter.is_lazy(p) or p.ndim > 1 for p in module.parameters(recurse=False))


def count_weighted(module: nn.Module) -> int:
    """Return how many layers with weights `module` holds, itself included."""
    return sum(owns_weights(m) for m in module.modules())


def weighted(module: nn.Module) -> bool:
    """Whether a new stage starts at `module`."""
    return any(owns_weights(m) for m in module.modules())


def reversible(module: nn.Module) -> bool:
    """Whether `module` has an inverse, so that it may run its parts in an order of its own."""
    return callable(getattr(module, "inverse", None))


def common(names: list[str]) -> str:
    """Return the smallest module that holds all of `names`."""
    paths = [name.split(".")[:-1] for name in names]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
