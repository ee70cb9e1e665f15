from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from netwright import checks
from netwright.anatomy.replacing import replace
from netwright.catalogue.facets import method
from netwright.errors import NothingToReshape, UnknownName
from netwright.reshape.change import decided, reshape

__all__ = ["pool_convolutions"]

Operation = Literal["max", "average"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS: Mapping[str, Sequence[type[nn.Module]]] = {
    "max": (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    "average": (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)}


def _bottlenecks() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 5, 2, "valid", groups=8, bias=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


@method(
    "reshape",
    papers=["001-082"],
    place="convolution",
    saves=["parameters", "file size"],
    needs=["images", "training"],
    keeps_function=False,
    search={"operation": ["max", "average"]},
    variants={"max": {}, "average": {"operation": "average"}, "named": {"layers": ["1"]}},
    network=_bottlenecks,
    batch=lambda: torch.randn(2, 3, 8, 8),
)
@reshape
def pool_convolutions(model: nn.Module, *, operation: Operation = "max",
                      layers: Sequence[str] | None = None) -> nn.Module:
    """Return a copy whose depthwise convolutions are pools, which have nothing to learn.

    y[c, p] = max over q in the window at p of x[c, q], where it was the sum of W[c, q - p] x[c, q].

    A pool has the window, stride, padding and dilation of the convolution that it stands for; its
    bias goes as well, since a norm or a convolution over the channels follows one. What mixes
    channels stays: a convolution of one cell before and after makes the features that a pool
    compares. Train afterwards: the other layers were trained for what was there. The authors gain
    time on a GPU; on a CPU, PyTorch's pools are no faster than its depthwise convolutions.

    By default all convolutions go that work on each channel alone and look at more than one cell.
    The authors also put pools in place of the ordinary convolution in a bottleneck; name such
    layers, of as many channels out as in.

    Args:
        model: a network with convolutions over one, two or three axes.
        operation: "max", which the authors found best, or "average" (of the cells inside).
        layers: the names of the convolutions that go; all that are depthwise where it is None.

    Raises:
        NothingToReshape: no convolution is depthwise, and no `layers` are named.
        UnknownName: a name of `layers` is no convolution's, or `operation` is neither of the two.
        ValueError: a pool cannot stand for a layer: it has more or fewer channels out than in,
            padding of more than half its window, or dilation where the pool is an average.

    Paper: Han, Yoo, Kim, Heo, 2022, Learning Features with Parameter-Free Layers.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8))
    >>> pool_convolutions(model)[1]
    MaxPool2d(kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), ceil_mode=False)
    """
    checks.one_of(_POOLS, operation=operation)
    found = {name: module for name, module in model.named_modules()
             if isinstance(module, _CONVOLUTIONS)}
    if layers is None:
        chosen = [name for name, layer in found.items() if _is_depthwise(layer)]
        if not chosen:
            raise NothingToReshape(
                f"model must have a depthwise convolution, got {len(found)} convolutions in "
                f"{type(model).__name__} and none with groups=in_channels=out_channels; name "
                "those that go by layers=")
    else:
        chosen = list(dict.fromkeys(layers))
        for name in chosen:
            if name not in found:
                raise UnknownName("convolution", name, found)
    return decided({"operation": operation,
                    "layers": {name: _window(name, found[name], operation) for name in chosen}})


@pool_convolutions.applies
def _pooled(model: nn.Module, decision: Mapping[str, Any]) -> nn.Module:
    for name, window in decision["layers"].items():
        options: dict[str, Any] = {key: tuple(size) for key, size in window.items()}
        if decision["operation"] == "average":
            options["count_include_pad"] = False
        pool = _POOLS[decision["operation"]][len(window["stride"]) - 1](**options)
        model = replace(model, name, pool)
    return model


def _is_depthwise(layer: Any) -> bool:
    return (layer.groups == layer.in_channels == layer.out_channels
            and max(layer.kernel_size) > 1)


def _window(name: str, layer: Any, operation: Operation) -> dict[str, list[int]]:
    """Return where the pool looks that stands for a convolution."""
    if layer.in_channels != layer.out_channels:
        raise ValueError(f"layers must have as many channels out as in, since a pool keeps them, "
                         f"got {name!r} from {layer.in_channels} to {layer.out_channels}; leave it "
                         "out")
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    padding = {"valid": [0] * len(reach), "same": [r // 2 for r in reach]}.get(
        layer.padding, layer.padding)
    even = layer.padding == "same" and any(r % 2 for r in reach)
    if even or any(2 * p > k for p, k in zip(padding, layer.kernel_size, strict=True)):
        raise ValueError(f"layers must have padding of at most half their window, the same on both "
                         f"sides, got {name!r} with kernel_size={layer.kernel_size}, "
                         f"padding={layer.padding!r}, dilation={layer.dilation}; leave it out by "
                         "naming the others in layers=")
    window = {"kernel_size": list(layer.kernel_size), "stride": list(layer.stride),
              "padding": list(padding)}
    if operation == "max":
        return window | {"dilation": list(layer.dilation)}
    if max(layer.dilation) > 1:
        raise ValueError(f"layers must have no dilation for operation='average', got {name!r} with "
                         f"{layer.dilation}; try operation='max'")
    return window
