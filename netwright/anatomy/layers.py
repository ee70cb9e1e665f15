"""Which modules count as weighted layers."""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


def is_norm(module: nn.Module) -> bool:
    """Whether `module` normalises, by its class or its class's name."""
    return isinstance(module, _NORMS) or type(module).__name__.lower().endswith("norm")


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
