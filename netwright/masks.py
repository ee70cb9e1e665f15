"""Masks of weights: which numbers of which parameters are kept, and the others held at zero."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from netwright import checks
from netwright.errors import CorruptCheckpoint, UnknownName

__all__ = ["Masks", "n_of_m"]


class Masks(Mapping[str, Tensor]):
    """Which numbers of parameters are kept: a boolean tensor for each parameter's name.

    Names, ties and the parameters themselves stay as they are, so that a masked model's
    state_dict is that of the model.

    Raises:
        ValueError: a mask is no boolean tensor.

    >>> model = nn.Linear(4, 2)
    >>> masks = Masks({"weight": n_of_m(model.weight, 2, 4)})
    >>> masks.density(), int((masks.apply(model).weight != 0).sum())
    (0.5, 4)
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                seen = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(f"masks[{name!r}] must be a tensor of booleans, got {seen}; "
                                 "compare with something, as in weight.abs() > threshold")
        self._masks = {name: mask.detach().clone() for name, mask in masks.items()}

    @classmethod
    def of(cls, model: nn.Module) -> "Masks":
        """Return masks of what is not zero in each parameter that has zeros.

        >>> len(Masks.of(nn.Linear(4, 2)))
        0
        """
        return cls({name: p != 0 for name, p in model.named_parameters() if bool((p == 0).any())})

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return f"Masks of {len(self)} parameters, {self.density():.1%} kept"

    def density(self) -> float:
        """Return the share of numbers that are kept, 1 where there is no mask."""
        total = sum(mask.numel() for mask in self.values())
        return sum(int(mask.sum()) for mask in self.values()) / total if total else 1.0

    @torch.no_grad()
    def apply(self, model: nn.Module) -> nn.Module:
        """Set what is not kept to zero, in place; return the model.

        Raises:
            UnknownName: the model has no parameter of that name.
            ValueError: the parameter has another shape than its mask.
        """
        for p, mask in self._placed(model):
            p.masked_fill_(~mask.to(p.device), 0)
        return model

    def hold(self, model: nn.Module, optimizer: Optimizer) -> RemovableHandle:
        """Keep what is not kept at exactly zero after each step of the optimizer, from now on.

        That is after momentum and weight decay. The handle that is returned ends it by
        `remove()`.

        Raises:
            UnknownName: the model has no parameter of that name.
            ValueError: a parameter has another shape than its mask, or the optimizer has none of
                those that are masked.
        """
        placed = self._placed(model)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if placed and not any(id(p) in held for p, _ in placed):
            raise ValueError("optimizer must train parameters of model that are masked, got one "
                             "that trains none of them; make it of model.parameters()")
        self.apply(model)
        gone = [(p, ~mask.to(p.device)) for p, mask in placed]

        @torch.no_grad()
        def again(*_: Any) -> None:
            for p, mask in gone:
                p.masked_fill_(mask.to(p.device), 0)
        return optimizer.register_step_post_hook(again)

    def save(self, path: str | Path) -> None:
        """Write the masks to a file in the safetensors format, a bit for each number.

        It is written under another name first, and then renamed.
        """
        path = Path(path)
        shapes = {name: list(mask.shape) for name, mask in self.items()}
        bits = {name: np.packbits(mask.cpu().numpy().ravel()) for name, mask in self.items()}
        part = path.with_name(path.name + ".part")
        save_file(bits, part, metadata={"shapes": json.dumps(shapes)})
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "Masks":
        """Return the masks in a file that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            CorruptCheckpoint: the file is damaged, or holds something else.
        """
        if not Path(path).exists():
            raise FileNotFoundError(f"path must be a file that Masks.save wrote, got {path}, "
                                    "where there is none")
        try:
            with safe_open(path, "numpy") as held:
                shapes = json.loads(held.metadata()["shapes"])
                return cls({name: _unpacked(held.get_tensor(name), shape)
                            for name, shape in shapes.items()})
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise CorruptCheckpoint(f"path holds no masks, or damaged ones: {path} ({error}); "
                                    "write them again by Masks.save") from error

    def _placed(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the model's parameters with their masks, checked."""
        held = dict(model.named_parameters(remove_duplicate=False))
        for name, mask in self.items():
            if name not in held:
                raise UnknownName("parameter of the model", name, held)
            if held[name].shape != mask.shape:
                raise ValueError(f"masks[{name!r}] must have the parameter's shape "
                                 f"{tuple(held[name].shape)}, got {tuple(mask.shape)}; make masks "
                                 "of this model")
        return [(held[name], mask) for name, mask in self.items()]


def n_of_m(weight: Tensor, n: int, m: int) -> Tensor:
    """Return a mask of the n largest of each m weights that stand side by side in an output's row.

    weight (outputs, *inputs) -> mask of the same shape; of equals the first ones are kept.

    Raises:
        ValueError: m does not divide the number of inputs, or n is not from 1 to m.

    >>> n_of_m(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), 2, 4)
    tensor([[False,  True,  True, False]])
    """
    checks.count(1, m=m)
    checks.between(1, m, whole=True, n=n)
    if weight.ndim < 2 or weight[0].numel() % m:
        raise ValueError(f"m must divide the number of inputs of each output, got {m} for a "
                         f"weight of shape {tuple(weight.shape)}; choose another m, or leave the "
                         "weight dense")
    groups = weight.detach().abs().reshape(-1, m)
    order = groups.argsort(dim=1, descending=True, stable=True)
    kept = torch.zeros_like(groups, dtype=torch.bool)
    return kept.scatter_(1, order[:, :n], True).reshape(weight.shape)


def _unpacked(bits: np.ndarray, shape: list[int]) -> Tensor:
    count = int(np.prod(shape))
    if len(bits) != -(-count // 8):
        raise ValueError(f"{len(bits)} bytes for a mask of shape {tuple(shape)}")
    return torch.from_numpy(np.unpackbits(bits, count=count).astype(bool)).reshape(shape)
