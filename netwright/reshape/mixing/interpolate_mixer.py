from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from netwright.blocks.mixing import MLPMixer
from netwright.blocks.mixing.mlp_mixer import check_tokens
from netwright.catalogue.facets import method
from netwright.errors import NothingToReshape
from netwright.reshape.change import decided, reshape

__all__ = ["interpolate_mixer"]


@method(
    "reshape",
    papers=["003-084"],
    place="token mixing",
    needs=["a mixer"],
    keeps_function=False,
    variants={"wider": {"size": (8, 12)}},
    network=lambda: MLPMixer(3, (8, 8), 4, patch=4, width=8, depth=2),
    batch=lambda: torch.randn(2, 3, 8, 12),
)
@reshape
def interpolate_mixer(model: nn.Module, size: int | Sequence[int]) -> nn.Module:
    """Return a copy of a mixer for images of another size, by bicubic interpolation of its tokens.

    token_mixing(x) := to new grid(token_mixing(to old grid(x))), in every block.

    What mixes tokens knows one grid of patches: the tokens are interpolated to it before, and what
    is to be added to them is interpolated back. Everything else works on each token and stays as it
    is. No weight is changed or added, so that a `state_dict` differs in its keys only
    (`token_mixing.mixing.` for `token_mixing.`), and the size that the model was made for gives the
    model back. Fine-tune afterwards where you can.

    Args:
        model: an `MLPMixer` or `ResMLP`, with blocks of any kind whose token mixing is called
            `token_mixing`, or a network that holds such.
        size: height and width of the new images, or one number for both.

    Raises:
        NothingToReshape: the model holds no `MLPMixer`, or one that has no `token_mixing`.
        ValueError: the patch does not divide `size`.

    Paper: Tatsunami, Taki, 2022, RaftMLP: How Much Can Be Done Without Attention and with Less
    Spatial Locality?

    >>> import torch
    >>> model = MLPMixer(3, (16, 16), 10, patch=4, width=8, depth=2)
    >>> interpolate_mixer(model, (24, 32))(torch.zeros(2, 3, 24, 32)).shape
    torch.Size([2, 10])
    """
    size = (size, size) if isinstance(size, int) else tuple(size)
    mixers = [module for module in model.modules() if isinstance(module, MLPMixer)]
    if not mixers:
        raise NothingToReshape("model must be an MLPMixer or hold one, got "
                               f"{type(model).__name__}; build it by "
                               "netwright.blocks.mixing.MLPMixer(block=...)")
    for mixer in mixers:
        if not any(name.rpartition(".")[2] == "token_mixing" for name, _ in mixer.named_modules()):
            raise NothingToReshape("model must have blocks with a module called token_mixing, got "
                                   f"{type(mixer[1]).__name__}; name what mixes tokens so, if it "
                                   "takes and returns (*, tokens, dim)")
        patch = mixer.embedding.patch
        if len(size) != 2 or any(axis < 1 or axis % patch for axis in size):
            raise ValueError(f"size must be two multiples of patch={patch}, got {size}; crop or "
                             "resize the images")
    return decided({"size": list(size)})


@interpolate_mixer.applies
def _interpolated(model: nn.Module, decision: Mapping[str, Any]) -> nn.Module:
    for module in list(model.modules()):
        if isinstance(module, MLPMixer):
            old, patch = module.grid, module.embedding.patch
            height, width = decision["size"]
            module.embedding.grid = height // patch, width // patch
            _interpolate(module, old, module.grid)
    return model


def _interpolate(module: nn.Module, old: tuple[int, int], new: tuple[int, int]) -> None:
    for name, child in module.named_children():
        if name != "token_mixing":
            _interpolate(child, old, new)
            continue
        inner, known = ((child.mixing, child.known)
                        if isinstance(child, InterpolatedTokenMixing) else (child, old))
        module.token_mixing = (inner if known == new
                               else InterpolatedTokenMixing(inner, known, new))


class InterpolatedTokenMixing(nn.Module):
    """A token mixing of a `known` grid of tokens, applied to tokens of a `seen` grid."""

    def __init__(self, mixing: nn.Module, known: tuple[int, int], seen: tuple[int, int]) -> None:
        super().__init__()
        self.mixing, self.known, self.seen = mixing, known, seen

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, tokens, dim) of (*, tokens, dim)."""
        check_tokens(x, self.seen[0] * self.seen[1])
        flat = x.reshape(-1, *x.shape[-2:])
        mixed = self.mixing(_resized(flat, self.seen, self.known))
        return _resized(mixed, self.known, self.seen).view(x.shape)


def _resized(x: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    image = x.mT.unflatten(-1, old)
    if len(x):  # an empty batch has nothing to interpolate, which PyTorch refuses
        image = interpolate(image, new, mode="bicubic", align_corners=False)
    else:
        image = image.new_zeros(*image.shape[:2], *new)
    return image.flatten(-2).mT
